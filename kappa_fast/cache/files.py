"""Documents that say themselves whether they are whole: ``{"checksum": "...", "body": ...}``, replaced all at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from ..io.writing import ATTEMPTS, create, make_folders, sync_folder
from .fingerprints import checksum

_BEFORE, _BETWEEN, _AFTER = b'{"checksum": "', b'", "body": ', b"}\n"
_BODY = len(_BEFORE) + 32 + len(_BETWEEN)
_ENCODER = json.JSONEncoder(allow_nan=False)


class DamagedError(Exception):
    """A file in the cache is not what was written there; the text says how that shows. Never leaves the cache."""


def seal(body: Any) -> bytes:
    """One line of JSON with a checksum over the text of ``body``."""
    text = _ENCODER.encode(body).encode()
    return _BEFORE + checksum(text).encode() + _BETWEEN + text + _AFTER


def unseal(data: bytes) -> Any:
    """The body of what ``seal`` made.

    Raises:
        DamagedError: a bit is not as it was, or it is something else.
    """
    text = data[_BODY : -len(_AFTER)]
    if data != _BEFORE + data[len(_BEFORE) : len(_BEFORE) + 32] + _BETWEEN + text + _AFTER:
        raise DamagedError("truncated, or no document of the cache")
    if data[len(_BEFORE) : len(_BEFORE) + 32] != checksum(text).encode():
        raise DamagedError("its checksum is wrong")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError("no JSON") from error


def read(path: Path, limit: int) -> Any:
    """The body of a document, or None if there is none.

    Raises:
        DamagedError: what is there is no document, larger than ``limit`` (bytes), a link, or cannot be read.
    """
    try:
        # Neither a link nor a pipe is ever followed or waited for.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            raise DamagedError("no regular file, or a far too large one")
        with open(handle, "rb", buffering=0, closefd=False) as file:
            data = file.readall()
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from error
    finally:
        os.close(handle)
    return unseal(data)


def write(path: Path, body: Any, tag: str, *, durable: bool = False) -> None:
    """Replace the document all at once: whoever reads it sees the old one or the new one.

    Args:
        path: its folders are made if need be; a link there is replaced, and a folder moved aside.
        tag: of the writer, so that what it leaves behind when it is killed can be found (``temporary``).
        durable: wait until it is on the disk.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    draft = temporary(path, tag)
    try:
        with open(_begun(draft), "wb") as file:
            file.write(seal(body))
            file.flush()
            if durable:
                os.fsync(file.fileno())
        try:
            os.replace(draft, path)
        except (IsADirectoryError, PermissionError):  # the latter on Windows
            if not path.is_dir():
                raise
            os.rename(path, path.with_name(f"{path.name}.{secrets.token_hex(4)}.moved"))
            os.replace(draft, path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def _begun(draft: Path) -> int:
    """A handle of the draft. What a killed run has left there, or somebody has planted, is removed, not written to."""
    folder = draft.parent
    if folder.is_symlink() or folder.parent.is_symlink():
        raise OSError(errno.ELOOP, f"{folder} is reached by a link, which is not followed")
    for _ in range(ATTEMPTS):
        try:
            return create(draft, 0o666)
        except FileNotFoundError:  # at first, or since somebody removes the cache meanwhile
            make_folders(folder, 0o700)
        except FileExistsError:
            draft.unlink(missing_ok=True)
    return create(draft, 0o666)


def refused(folder: Path) -> str | None:
    """Why what lies in a folder of the cache is not taken for the user's own, None if it is, or there is no folder.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is no folder"
    if not hasattr(os, "geteuid"):  # Windows
        return None
    if found.st_uid not in (os.geteuid(), 0):
        return f"{folder} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to {folder}: run chmod go-w on it, or remove it"
    return None


def temporary(path: Path, tag: str) -> Path:
    """What ``path`` is written as at first."""
    return path.with_name(f".{path.name}.{tag}.tmp")
