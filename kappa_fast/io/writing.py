"""Atomic and durable writing of files; a file that is replaced keeps its permissions."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from ..errors import RankingFileError

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

ATTEMPTS = 5


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new content, never a part of it.

    The new file has the permissions of the file that it replaces, and is on the disk when the call returns.

    Raises:
        RankingFileError: the file cannot be written there.
    """
    try:
        # A link stays a link: its target is replaced.
        target = Path(os.path.realpath(path))
        before = _stat(target)
        if before is not None and not stat.S_ISREG(before.st_mode) and not stat.S_ISDIR(before.st_mode):
            # Otherwise root would replace /dev/null with a file.
            raise RankingFileError(f"cannot write {path}: it is a device or a pipe; give the name of a file")
        temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
        try:
            rights = 0o666 if before is None else stat.S_IMODE(before.st_mode) & 0o777
            with open(create(temporary, rights), "wb") as file:
                if before is not None and hasattr(os, "fchmod"):
                    os.fchmod(file.fileno(), rights)  # the umask may have removed some from the new file
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        reason = getattr(error, "strerror", None) or error
        raise RankingFileError(f"cannot write {path}: {reason}; choose a file that can be written") from error


def create(path: Path, mode: int) -> int:
    """Create a file and return its descriptor; an existing file or link is neither opened nor followed.

    Raises:
        OSError: the file cannot be created, or exists already.
    """
    return os.open(path, _NEW, mode)


def make_folders(folder: Path, mode: int = 0o777) -> None:
    """Create a folder and its missing parents, and sync their names to the disk.

    mode: permissions of the new folders, less the umask.

    Raises:
        OSError: a folder cannot be created.
    """
    for attempt in range(ATTEMPTS):
        try:
            return _make_folders(folder, mode)
        except FileNotFoundError:  # another process has removed a parent meanwhile
            if attempt == ATTEMPTS - 1:
                raise


def _make_folders(folder: Path, mode: int) -> None:
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        if folder.parent == folder:
            break
        folder = folder.parent
    for new in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(new, mode)
        sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk, where the system supports it."""
    with contextlib.suppress(OSError):  # Windows and some file systems do not support it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
