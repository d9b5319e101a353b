"""Reads byte ranges of files of weights into memory, and has the operating system read ahead.

Files are not memory-mapped. Mapped pages count as resident memory until the file is unmapped, and truncating a mapped
file kills the process (SIGBUS), whereas read() only returns fewer bytes. read() costs one more copy, at 4 to 5 GB/s
from the page cache on the machine of the benchmarks: a tenth of the time of the cheapest factorization.
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
LARGEST_READ = 64 << 20  # bytes; Ctrl-C takes effect between two reads
ROWS = 4 << 20  # bytes of rows that are read at a time if only some of their columns are needed
# Linux limits the advice of one call to the device's read-ahead, which may be as small as this.
ADVICE = 128 << 10


class DataFile:
    """A file of which byte ranges are read.

    The file is opened for each range, since a model may have more files than a process may have open. A file that has
    changed since its state was recorded is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: FileState | None = None

    @property
    def state(self) -> FileState:
        """The state of the file, recorded at the first access.

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
            OSError: the file cannot be read, ends too early, or has changed.
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
            self._check(file)  # another process may have written during the read

    def prefetch(self, offset: int, size: int) -> None:
        """Ask the operating system to read these bytes into its cache; do not wait, and ignore failures."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        with contextlib.suppress(OSError), self.opened() as file:
            for start in range(offset, offset + size, ADVICE):
                length = min(ADVICE, offset + size - start)
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    @contextlib.contextmanager
    def opened(self) -> Iterator[io.FileIO]:
        """Open the file for reading, and close it afterwards.

        Raises:
            OSError: the file cannot be opened, or has changed.
        """
        with io.FileIO(self.path, opener=_without_waiting) as file:
            self._check(file)
            yield file

    def _check(self, file: io.FileIO) -> None:
        if not self.state.has_same_content(os.fstat(file.fileno())):
            raise OSError("it has changed since it was opened")


class Region:
    """A dense row-major array in a file.

    name: of the tensor, for messages.  offset: of the first byte in the file.
    """

    def __init__(self, file: DataFile, name: str, offset: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.file, self.name, self.offset = file, name, offset
        self.shape, self.dtype = tuple(shape), dtype

    @property
    def location(self) -> tuple[str, int]:
        """The file and the offset of the first byte, for reading in the order of the disk."""
        return str(self.file.path), self.offset

    @property
    def stamp(self) -> Stamp:
        """The stamp of the whole array."""
        return Stamp((self.file.state,), self.name)

    def described(self, item: Stored) -> Stored:
        """Return ``item`` with the prefetch, location and stamp of this array."""
        return replace(item, prefetch=self.prefetch, location=self.location, stamp=self.stamp)

    def take(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        """Read the array, or the part that ``index`` selects, into new memory of the CPU; ``device`` is ignored.

        Raises:
            SourceError: the file has changed, or cannot be read.
        """
        try:
            return self._read(index)
        except OSError as error:
            raise unreadable(self.name, self.file.path, error) from error

    def prefetch(self, index: Index) -> None:
        """Ask the operating system to read ahead what ``take(index)`` will read; ignore failures."""
        self.file.prefetch(*self.span(index))

    def span(self, index: Index) -> tuple[int, int]:
        """Return offset and length in bytes of the rows that ``take(index)`` reads."""
        offset, shape, rest = self._inner(index)
        if not rest:
            return offset, self._bytes(shape)
        start, stop, _ = _rows(rest[0], shape[0])
        row = self._bytes(shape[1:])
        return offset + start * row, max(0, stop - start) * row

    def _inner(self, index: Index) -> tuple[int, tuple[int, ...], Index]:
        """Apply the leading integers of the index: return the offset and shape of the rest, and the index into it."""
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
        """Return the bytes that an array of this shape takes in the file."""
        return math.prod(shape) * self.dtype.itemsize

    def _whole(self, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        out = torch.empty(shape, dtype=self.dtype)
        if out.numel():
            self.file.read(offset, out)
        return out


def unreadable(name: str, path: Path, error: Exception) -> SourceError:
    """Return the error for a tensor that can no longer be read."""
    return SourceError(f"{name!r} cannot be read from {path} ({error}): check the file, and rank again")


def _rows(part: object, count: int) -> tuple[int, int, int]:
    assert isinstance(part, slice)
    return part.indices(count)


def _without_waiting(path: str, flags: int) -> int:
    """Open a file with O_NONBLOCK: opening a pipe would wait for a writer; regular files ignore the flag."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
