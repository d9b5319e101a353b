"""Exact integer Gram matrices of a wave, kept for proofs: what TritonBackend.exact_products hands out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .base import Operand, Tensor

COUNTS = (3, 4)  # by level: 21 and 28 bits of every column


class SliceProducts:
    """base.ExactProducts from int8 slices; the lower triangles are factored in place, see kernels/shifted.py."""

    def __init__(
        self, operands: Sequence[Operand], which: Sequence[int], slices: int, read: Callable[[Tensor], list[Any]]
    ) -> None:
        """``which`` must hold dtypes that the kernels read. One call of ``read``, which is Backend.read."""
        from kappa_fast.kernels.gram import gram_of_slices, slice_roundings
        from kappa_fast.kernels.problems import Problems
        from kappa_fast.kernels.quantize import column_peaks, quantize
        from kappa_fast.kernels.shifted import Mirrored

        problems = Problems.of([operands[i].tensor for i in which])
        digits = quantize(problems, column_peaks(problems), slices)
        self.which: tuple[int, ...] = tuple(which)
        self._read = read
        self.roundings: Sequence[int] = slice_roundings(problems, slices).tolist()
        packed = gram_of_slices(problems, digits)
        squared = digits.residual
        del digits  # before anything else needs the memory
        self._mirrored = Mirrored.of(problems, packed)
        distances, traces = read(torch.stack([squared.sqrt(), self._mirrored.traces()]))
        self.distances: Sequence[float] = distances
        self.traces: Sequence[float] = traces

    def residuals(self, chosen: Sequence[int], shifts: Sequence[float], sign: int) -> list[tuple[float, float]]:
        found = self._read(torch.stack(self._mirrored.factored(chosen, shifts, sign).residuals(), dim=1))
        return [(math.sqrt(square) if square >= 0 else math.inf, size) for square, size in found]

    def residual_roundings(self, place: int) -> int:
        from kappa_fast.kernels.shifted import residual_roundings

        return residual_roundings(int(self._mirrored.problems.n[place]))
