"""How fast the files of a checkpoint can be read: by reading a part of them, and finding out what memory held of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4 << 20
RUN = 32 << 20  # bytes read in one go: as sequential as ranking reads them
MOST = 256 << 20  # bytes read in all
SECONDS = 1.0  # after which no further run is started
PROBES = 64
PAGE = 4096


@dataclass(frozen=True)
class Reading:
    """What reading would take.

    nbytes: how many bytes are to be read.  rate: bytes per second that were measured.  sampled: over how many bytes.
    cached: the share of the files that lay in memory before (the system's page cache); None where that is not known.
    """

    nbytes: int
    rate: float
    sampled: int
    cached: float | None

    @property
    def seconds(self) -> float:
        return self.nbytes / self.rate


def measure_reading(files: Sequence[Path], nbytes: int) -> Reading | None:
    """Read up to 256 MB, spread over the files, as bytes; None where there is nothing to read.

    What is read stays in the page cache, for a ranking that follows to find it there.

    Raises:
        OSError: a file cannot be read.
    """
    sizes = [(file, file.stat().st_size) for file in files]
    total = sum(size for _, size in sizes)
    if not total or not nbytes:
        return None
    cached = _share_in_memory(sizes, total)
    sampled, spent = 0, 0.0
    for file, offset, length in _runs(sizes, total):
        started = time.perf_counter()
        sampled += _read(file, offset, length)
        spent += time.perf_counter() - started
        if spent > SECONDS:
            break
    return Reading(nbytes, sampled / spent, sampled, cached) if sampled and spent else None


def _runs(sizes: Sequence[tuple[Path, int]], total: int) -> Iterator[tuple[Path, int, int]]:
    """Parts of the files, (file, offset, length): all of them if they are small, else evenly spread."""
    length = total if total <= MOST else RUN
    count = 1 if total <= MOST else MOST // RUN
    for i in range(count):
        start = i * (total - length) // max(1, count - 1)
        yield from _within(sizes, start, length)


def _within(sizes: Sequence[tuple[Path, int]], start: int, length: int) -> Iterator[tuple[Path, int, int]]:
    """``length`` bytes from ``start`` on, of all files one after the other."""
    for file, size in sizes:
        if start < size and length > 0:
            part = min(length, size - start)
            yield file, start, part
            length -= part
            start = 0
        else:
            start = max(0, start - size)


def _read(file: Path, offset: int, length: int) -> int:
    buffer = bytearray(min(BLOCK, length))
    done = 0
    with open(file, "rb", buffering=0) as handle:
        handle.seek(offset)
        while done < length and (read := handle.readinto(memoryview(buffer)[: length - done])):
            done += read
    return done


def _share_in_memory(sizes: Sequence[tuple[Path, int]], total: int) -> float | None:
    """The share of pages that can be had without waiting for the disk, from a few of them."""
    preadv, no_wait = getattr(os, "preadv", None), getattr(os, "RWF_NOWAIT", None)
    if preadv is None or no_wait is None:  # not Linux
        return None
    found = tried = 0
    page = bytearray(PAGE)
    for i in range(PROBES):
        for file, offset, length in _within(sizes, (2 * i + 1) * total // (2 * PROBES), 1):
            handle = os.open(file, os.O_RDONLY)
            try:
                found += preadv(handle, [memoryview(page)[:length]], offset, no_wait) > 0
            except BlockingIOError:
                pass
            except OSError:  # a file system that does not tell
                return None
            finally:
                os.close(handle)
            tried += 1
    return found / tried if tried else None
