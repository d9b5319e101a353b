"""What the host does for a wave, seen without a device: nothing is computed, and reads say what a test decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from launches import counted

from kappa_fast.backends.triton_backend import TritonBackend
from kappa_fast.spectrum import krylov
from kappa_fast.spectrum.ladder import resolve
from kappa_fast.spectrum.resolution import Goal, Resolution

SHAPES = ((768, 512), (512, 768), (640, 400))


class Scripted(TritonBackend):
    """Tensors without values. All matrices are sound and have kappa 1; a third each needs few, more or many steps."""

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))
        self.looked: tuple[Sequence[int], int] = ((), 0)  # at which matrices, after how many steps

    def digests(self, operands):
        return [bytes([i % 256, i // 256]) for i in range(len(operands))]

    def read(self, values: torch.Tensor) -> list[Any]:
        self._reads += 1
        if values.dtype == torch.float64 and values.ndim == 1:  # departures, or who has ended, theta and excess
            (looked, steps), self.looked = self.looked, ((), 0)
            excess = [10.0 ** (1 - (i % 3 + 1) * steps / 3) for i in looked]
            return [0.0] * (len(values) - 2 * len(looked)) + [1.0] * len(looked) + excess
        return torch.full(values.shape, float(values.dtype != torch.int32)).tolist()  # info is 0 where all is well


@contextmanager
def looks(backend: Scripted) -> Iterator[None]:
    """The backend is told who is looked at."""
    bound = krylov._Search._bound

    def watched(self, space, active, which):
        backend.looked = [int(active[j]) for j in which], len(space.columns)
        return bound(self, space, active, which)

    with patch.object(krylov._Search, "_bound", watched):
        yield


def resolved(count: int) -> tuple[list[Resolution], list[str], int]:
    """Of a wave of so many small matrices: what was found, the kernels launched and the number of reads."""
    matrix = torch.empty(SHAPES[0][0] * SHAPES[0][1], dtype=torch.bfloat16, device="meta")
    weights = [matrix[: m * n].view(m, n) for m, n in SHAPES]
    backend = Scripted()
    with counted(run=False) as launches, looks(backend):
        found = resolve(backend, [weights[i % len(weights)] for i in range(count)], Goal(1e-2))
    return found, launches, backend.counts["reads"]
