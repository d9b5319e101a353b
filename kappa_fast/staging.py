"""Reading ahead: the weights of the next wave are loaded, and copied to the device, while this one is worked on."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .sources.base import Matrix
from .undisturbed import undisturbed_thread
from .waves import is_out_of_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Staged:
    """The weights of a wave, on their way to the device; none where there was no room for them yet.

    arrived: the event of the last copy; None if none was made.
    """

    weights: list[torch.Tensor]
    arrived: Any = None

    def ready(self) -> list[torch.Tensor]:
        """The weights, for use on the current stream of the device: it waits for their arrival, the host does not."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.weights[0].device)
            stream.wait_event(self.arrived)
            for weight in self.weights:
                weight.record_stream(stream)
        return self.weights


def stage(matrices: Sequence[Matrix], device: torch.device) -> Staged:
    """Load, and copy to an accelerator on a stream of its own what is not there; nothing is waited for.

    The codes of quantized weights are what is copied: they are dequantized on that stream.
    """
    try:
        with undisturbed_thread():
            if device.type != "cuda":
                return Staged([matrix.load(device) for matrix in matrices])
            if all(matrix.device == device for matrix in matrices):  # dequantized where they are used, on that stream
                return Staged([])
            stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if any(matrix.device == device for matrix in matrices):  # codes may still be on their way
                stream.wait_stream(torch.cuda.current_stream(device))
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


def one_ahead(items: Iterable[T], matrices: Any, device: torch.device) -> Generator[tuple[T, Staged], None, None]:
    """Pairs (item, its staged weights); those of the next item are staged in a thread while this one is used.

    matrices: what gives the matrices of an item. An exception in staging comes when it is that item's turn.
    """
    pool = ThreadPoolExecutor(1, "kappa_fast_staging")
    try:
        waiting: list[Any] = []
        for item in items:
            waiting.append((item, pool.submit(stage, matrices(item), device)))
            if len(waiting) == 2:
                first, staged = waiting.pop(0)
                yield first, staged.result()
                del staged  # or the weights of this wave would stay while the next but one is staged
        for item, staged in waiting:
            yield item, staged.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
