"""Files of weights: byte ranges read into memory of their own, and read ahead by the operating system.

Files are not mapped. A page of a map counts as resident memory until the map goes, and a file that is cut short while
it is mapped ends the process (SIGBUS) where a read merely comes back short. A read copies once more, at 4 to 5 GB/s
from the page cache on the machine of the benchmarks: a tenth of what the cheapest factorization takes.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import SourceError
from ..results.entries import Index
from .base import FileState, Stamp, Stored

ALL = slice(None)
LARGEST_READ = 64 << 20  # Ctrl-C has to wait for the read that is going on
ROWS = 4 << 20  # bytes of rows that are read at a time where only some of their columns are wanted
# Linux takes on no more than the device's read-ahead for one call, which may be as little as this.
ADVICE = 128 << 10


class DataFile:
    """One file of which byte ranges are read. It is opened for each of them: a model may have more files than a
    process may have open, and nothing is left to close.

    A file that is no longer the one that was looked at first, or that changes while it is read, is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: FileState | None = None

    @property
    def state(self) -> FileState:
        """What the file was when it was first looked at.

        Raises:
            OSError: there is no such file, or it is a directory, a pipe, ...
        """
        if self._state is None:
            found = os.stat(self.path)
            if not stat.S_ISREG(found.st_mode):
                raise OSError("it is not a regular file")
            self._state = FileState.of(self.path, found)
        return self._state

    @property
    def size(self) -> int:
        return self.state.size

    def read(self, offset: int, out: torch.Tensor) -> None:
        """Fill ``out``, a contiguous tensor on the CPU, with the bytes from ``offset`` on.

        Raises:
            OSError: it cannot be read, ends too early, or has changed.
        """
        view = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with self.opened() as file:
            file.seek(offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done : done + LARGEST_READ])
                if not count:
                    raise OSError(f"it ends {len(view) - done} bytes too early")
                done += count
            self._check(file)  # what was written in the meantime may be among what was read

    def prefetch(self, offset: int, size: int) -> None:
        """Have the operating system read these bytes into its cache, without waiting; where it cannot, do nothing."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        with contextlib.suppress(OSError), self.opened() as file:
            for start in range(offset, offset + size, ADVICE):
                length = min(ADVICE, offset + size - start)
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    @contextlib.contextmanager
    def opened(self) -> Iterator[io.FileIO]:
        """The file, for reading; closed afterwards.

        Raises:
            OSError: it cannot be opened, or has changed.
        """
        with io.FileIO(self.path, opener=_without_waiting) as file:
            self._check(file)
            yield file

    def _check(self, file: io.FileIO) -> None:
        if not self.state.has_same_content(os.fstat(file.fileno())):
            raise OSError("it has changed since it was opened")


class Region:
    """A dense row-major array in a file: what a tensor of a checkpoint is.

    name: for messages.  offset: of its first byte in the file.
    """

    def __init__(self, file: DataFile, name: str, offset: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.file, self.name, self.offset = file, name, offset
        self.shape, self.dtype = tuple(shape), dtype

    @property
    def location(self) -> tuple[str, int]:
        """Where it begins, for reading in the order of the file."""
        return str(self.file.path), self.offset

    @property
    def stamp(self) -> Stamp:
        """What identifies the values of the whole."""
        return Stamp((self.file.state,), self.name)

    def described(self, item: Stored) -> Stored:
        """``item`` with what is known of the file: how to read ahead, where it begins, whether it is what it was."""
        return replace(item, prefetch=self.prefetch, location=self.location, stamp=self.stamp)

    def take(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        """The array, or what ``index`` leaves of it, in memory that nobody else has, whatever ``device`` is.

        Raises:
            SourceError: the file has changed, or cannot be read.
        """
        try:
            return self._read(index)
        except OSError as error:
            raise unreadable(self.name, self.file.path, error) from error

    def prefetch(self, index: Index) -> None:
        """Have the operating system read what ``take(index)`` will read; it says nothing if that fails."""
        self.file.prefetch(*self.span(index))

    def span(self, index: Index) -> tuple[int, int]:
        """Offset and length in bytes of the rows that ``take(index)`` reads."""
        offset, shape, rest = self._inner(index)
        if not rest:
            return offset, self._bytes(shape)
        start, stop, _ = _rows(rest[0], shape[0])
        row = self._bytes(shape[1:])
        return offset + start * row, max(0, stop - start) * row

    def _inner(self, index: Index) -> tuple[int, tuple[int, ...], Index]:
        """Leading integers of the index turned into an offset: what remains to be indexed, and by what."""
        offset, shape, rest = self.offset, self.shape, tuple(index)
        while rest and isinstance(rest[0], int):
            shape = shape[1:]
            offset += rest[0] * self._bytes(shape)
            rest = rest[1:]
        return offset, shape, rest if any(part != ALL for part in rest) else ()

    def _read(self, index: Index) -> torch.Tensor:
        offset, shape, rest = self._inner(index)
        if not rest:
            return self._whole(offset, shape)
        start, stop, step = _rows(rest[0], shape[0])
        inner = tuple(rest[1:])
        row = self._bytes(shape[1:])
        if step == 1 and all(part == ALL for part in inner):
            return self._whole(offset + start * row, (max(0, stop - start), *shape[1:]))
        chosen = torch.empty(shape, dtype=self.dtype, device="meta")[rest]
        out = torch.empty(chosen.shape, dtype=self.dtype)
        chunk = max(1, ROWS // max(1, row * step)) * step  # rows, a multiple of the step
        done = 0
        for first in range(start, stop, chunk):
            rows = self._whole(offset + first * row, (min(chunk, stop - first), *shape[1:]))
            wanted = rows[::step][(ALL, *inner)]
            out[done : done + wanted.shape[0]] = wanted
            done += wanted.shape[0]
        return out

    def _bytes(self, shape: Sequence[int]) -> int:
        """How much of the file an array of this shape takes."""
        return math.prod(shape) * self.dtype.itemsize

    def _whole(self, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        out = torch.empty(shape, dtype=self.dtype)
        if out.numel():
            self.file.read(offset, out)
        return out


def unreadable(name: str, path: Path, error: Exception) -> SourceError:
    """The error for a tensor that was there when the file was opened."""
    return SourceError(f"{name!r} cannot be read from {path} ({error}): check the file, rank again")


def _rows(part: object, count: int) -> tuple[int, int, int]:
    assert isinstance(part, slice)
    return part.indices(count)


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe would wait for somebody who writes into it; for a file the flag means nothing."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
