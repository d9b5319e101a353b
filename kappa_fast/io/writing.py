"""Files written all at once, with the rights of what they replace, and on the disk when the call returns."""

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
    """Write a file all at once: whoever reads it sees the old one or the new one, never half.

    What it replaces keeps its rights: a file that only its owner may read stays so.

    Raises:
        RankingFileError: the file cannot be written there.
    """
    try:
        # A link stays a link: what it points at is replaced.
        target = Path(os.path.realpath(path))
        before = _stat(target)
        if before is not None and not stat.S_ISREG(before.st_mode) and not stat.S_ISDIR(before.st_mode):
            # Root could replace /dev/null by a file.
            raise RankingFileError(f"cannot write {path}: it is a device or a pipe; give the name of a file")
        temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
        try:
            rights = 0o666 if before is None else stat.S_IMODE(before.st_mode) & 0o777
            with open(create(temporary, rights), "wb") as file:
                if before is not None and hasattr(os, "fchmod"):
                    os.fchmod(file.fileno(), rights)  # whatever the umask takes from a new file
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise RankingFileError(f"cannot write {path}: {reason}; choose a file that can be written") from error


def create(path: Path, mode: int) -> int:
    """A handle of a new file: what lies there already, a link included, is neither opened nor followed.

    Raises:
        OSError: it cannot be made, or is there.
    """
    return os.open(path, _NEW, mode)


def make_folders(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and what is missing above it, and bring their names to the disk.

    mode: of the new ones, less the umask.

    Raises:
        OSError: one cannot be made.
    """
    for attempt in range(ATTEMPTS):
        try:
            return _make_folders(folder, mode)
        except FileNotFoundError:  # somebody removes them meanwhile
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
    """Bring the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # not on Windows, and not on every file system
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
