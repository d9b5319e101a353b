"""Results on their way into the cache: one line each in a file of this run, brought to the disk about once a second.

A line is written as soon as a matrix is done, so a run that is killed loses what is in hand. ``fsync`` happens in a
thread: it makes nobody wait, and a loss of power costs what was done since the last one. What is on the disk is
settled, that is, copied to where it belongs; at the end the journal goes. Journals that nobody holds any more are what
a killed run has left: the next run settles them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..io.writing import make_folders, sync_folder
from .files import DamagedError, seal, unseal

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

INTERVAL = 0.5  # seconds between two fsyncs
ENDING, DRAFT = ".jsonl", ".new"
LIMIT = 1 << 28  # bytes; a larger one is passed over: no run has 500,000 results that are not settled
STALE = 7 * 86400  # seconds; where nobody can tell whether a journal is in use


class Journal:
    """The journal of this run. Thread-safe."""

    def __init__(self, folder: Path, header: Any, settle: Callable[[Sequence[Any]], None]) -> None:
        """Make the file, and hold it.

        Args:
            folder: of all journals.
            header: its first line.
            settle: called in another thread with the lines that are on the disk; an OSError or MemoryError of it
                is kept as ``failure``.

        Raises:
            OSError: it cannot be made.
        """
        self.tag = secrets.token_hex(8)
        self.failure: Exception | None = None
        self._path = folder / (self.tag + ENDING)
        self._settle, self._lines = settle, list[Any]()
        self._lock, self._stop = threading.Lock(), threading.Event()
        make_folders(folder, 0o700)
        if folder.is_symlink():
            raise OSError(errno.ELOOP, f"{folder} is a link, which is not followed")
        draft = folder / (self.tag + DRAFT)  # held before it has the name by which others find it
        self._handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o666)
        try:
            _hold(self._handle)
            _write(self._handle, seal(header))
            os.rename(draft, self._path)
        except BaseException:
            self._drop(draft)
            raise
        self._thread = threading.Thread(target=self._run, name="kappa_fast_journal", daemon=True)
        self._thread.start()

    def append(self, line: Any) -> None:
        """Keep a line; after a failure nothing."""
        data = seal(line)
        with self._lock:
            if self.failure is None:
                try:
                    _write(self._handle, data)
                    self._lines.append(line)
                except OSError as error:
                    self.failure = error

    def close(self, last: Callable[[], None]) -> None:
        """Settle what is left, then ``last()``, then remove the file, unless one of them failed (see ``failure``)."""
        self._stop.set()
        self._thread.join()
        self._sync(to_disk=False)  # what is settled now, and what last() brings to the disk, need it no more
        if self.failure is None:
            try:
                last()
            except OSError as error:
                self.failure = error
        if self.failure is None:
            self._drop(self._path)
        else:
            os.close(self._handle)

    def _run(self) -> None:
        sync_folder(self._path.parent)
        while not self._stop.wait(INTERVAL):
            self._sync(to_disk=True)

    def _sync(self, *, to_disk: bool) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
        if lines and self.failure is None:
            try:
                if to_disk:
                    os.fsync(self._handle)
                self._settle(lines)
            except (OSError, MemoryError) as error:
                self.failure = error

    def _drop(self, path: Path) -> None:
        # While it is still held: another run must not find it in between. Windows wants it the other way round.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(self._handle)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def leftovers(folder: Path) -> Iterator[tuple[str, list[Any], Callable[[], None]]]:
    """The journals of runs that have ended without settling: tag, the lines that are whole, and what removes it.

    Whatever is wrong with one of them, it is passed over.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        path = folder / name
        if not name.endswith((ENDING, DRAFT)):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            with open(handle, "rb") as file:
                found = os.fstat(handle)
                if _is_held(handle) or not stat.S_ISREG(found.st_mode) or found.st_size > LIMIT:
                    continue
                if name.endswith(DRAFT):
                    if time.time() - os.fstat(handle).st_mtime > 60:  # killed before the first line
                        path.unlink(missing_ok=True)
                    continue
                yield path.stem, list(_whole_lines(file)), lambda path=path: path.unlink(missing_ok=True)  # type: ignore[misc]


def _whole_lines(file: Any) -> Iterator[Any]:
    for line in file:
        try:
            yield unseal(line)
        except DamagedError:  # the last line of a run that was killed
            continue


def _hold(handle: int) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # not on every network file system
            fcntl.flock(handle, fcntl.LOCK_EX)  # waits for who is just finding out whether it is held


def _is_held(handle: int) -> bool:
    """Whether a living process writes it; the lock taken to find out goes when the handle is closed."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError:
            pass
    return time.time() - os.fstat(handle).st_mtime < STALE


def _write(handle: int, data: bytes) -> None:
    if os.write(handle, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
