"""Reading ahead: while one wave is worked on, the next ones come from the disk, and to an accelerator its weights.

From the disk they come into the cache of the operating system, which takes no memory of this process.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..machine.memory import is_out_of_memory
from ..machine.torch_state import undisturbed_thread
from ..sources.base import Matrix

# Beside the next wave so many bytes are read ahead: a disk must not wait where a few small waves follow a costly one.
AHEAD = 256 << 20


@dataclass
class Staged:
    """The weights of a wave, on their way to the device; none where there was no room for them yet.

    ``ready()`` gives them away, so that whoever used them decides when they go.

    arrived: the event of the last copy; None if none was made.
    """

    weights: list[torch.Tensor]
    arrived: Any = None

    def ready(self) -> list[torch.Tensor]:
        """The weights, for use on the current stream of the device: it waits for their arrival, the host does not."""
        weights, self.weights = self.weights, []
        if self.arrived is not None:
            stream = torch.cuda.current_stream(weights[0].device)
            stream.wait_event(self.arrived)
            for weight in weights:
                weight.record_stream(stream)
        return weights


def streams_of(matrices: Sequence[Matrix], device: torch.device) -> list[Any]:
    """The current streams of this thread where the matrices are and will be: what writes to them may still run there.

    A stream is current for one thread, so this must be asked in the caller's, not in the one that stages.
    """
    places = {d for d in (device, *(matrix.device for matrix in matrices)) if d.type == "cuda"}
    return [torch.cuda.current_stream(place) for place in sorted(places, key=str)]


def stage(matrices: Sequence[Matrix], device: torch.device, after: Sequence[Any] = ()) -> Staged:
    """Load, and copy to an accelerator on a stream of its own what is not there; the host waits for nothing.

    The codes of quantized weights are what is copied: they are dequantized on that stream.
    after: streams that the copies wait for, see streams_of().
    """
    try:
        with undisturbed_thread():
            if device.type != "cuda":
                return Staged([matrix.load(device) for matrix in matrices])
            if all(matrix.device == device for matrix in matrices):  # dequantized where they are used, on that stream
                return Staged([])
            stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for earlier in after:
                stream.wait_stream(earlier)
            with torch.cuda.stream(stream):
                moved = [_copied(matrix.load(device), device) for matrix in matrices]
            return Staged(moved, stream.record_event())
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Staged([])


def _copied(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    # From pinned memory a copy takes half the time and runs beside everything else.
    return (weight.pin_memory() if weight.device.type == "cpu" else weight).to(device, non_blocking=True)


def one_ahead(
    waves: Iterable[Sequence[Matrix]], device: torch.device
) -> Generator[tuple[Sequence[Matrix], Staged], None, None]:
    """Pairs (wave, its staged weights); those of the next wave are staged in a thread while this one is used.

    Copies wait for what the current streams of the calling thread have been given. An exception in staging comes when
    it is that wave's turn.
    """
    pool = ThreadPoolExecutor(1, "kappa_fast_staging")
    try:
        waiting: list[Any] = []
        for wave in waves:
            after = streams_of(wave, device) if device.type == "cuda" else []
            waiting.append((wave, pool.submit(stage, wave, device, after)))
            if len(waiting) == 2:
                first, staged = waiting.pop(0)
                yield first, staged.result()
                del staged  # or the weights of this wave would stay while the next but one is staged
        for wave, staged in waiting:
            yield wave, staged.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_ahead(waves: Iterable[Sequence[Matrix]], ahead: int = AHEAD) -> Generator[Sequence[Matrix], None, None]:
    """The same waves; a thread prefetches this one, the next, and those after it up to ``ahead`` bytes in all."""
    pool = ThreadPoolExecutor(1, "kappa_fast_read_ahead")
    ended = threading.Event()

    def prefetch(wanted: Sequence[Callable[[], None]]) -> None:
        for read in wanted:
            if ended.is_set():
                return
            read()

    source = iter(waves)
    coming: deque[tuple[Sequence[Matrix], int]] = deque()
    total = 0  # bytes in it
    try:
        while True:
            while len(coming) < 2 or total < ahead:
                wave = next(source, None)
                if wave is None:
                    break
                coming.append((wave, sum(matrix.nbytes for matrix in wave)))
                total += coming[-1][1]
                with contextlib.suppress(RuntimeError):  # the system starts no thread: nothing is read ahead
                    pool.submit(prefetch, [matrix.prefetch for matrix in wave if matrix.prefetch is not None])
            if not coming:
                return
            wave, size = coming.popleft()
            total -= size
            yield wave
    finally:
        ended.set()
        pool.shutdown(wait=True, cancel_futures=True)
