"""Exact integer Gram matrices of a wave, kept for proofs: what TritonBackend.exact_products hands out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .base import Operand, Tensor

log = logging.getLogger("kappa_fast")
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
        factors = self._mirrored.factored(chosen, shifts, sign)
        squares, sizes = factors.residuals()
        found = self._read(torch.stack([squares, sizes, factors.deviations(squares, sizes)], dim=1))
        wrong = [deviation for square, _, deviation in found if math.isfinite(square) and not deviation <= 1]
        if wrong:
            where = self._mirrored.problems.device
            log.warning(
                "%d factors on %s are not factors of their matrices by up to %.1e times what rounding allows: kernels "
                "compute something else than they should, so nothing is proven from these",
                len(wrong),
                where,
                max(wrong),
            )
        return [
            (math.sqrt(square), size) if square >= 0 and deviation <= 1 else (math.inf, math.inf)
            for square, size, deviation in found
        ]

    def residual_roundings(self, place: int) -> int:
        from kappa_fast.kernels.cholesky import residual_roundings
        from kappa_fast.kernels.problems import target_of

        problems = self._mirrored.problems
        return residual_roundings(int(problems.n[place]), target_of(problems.device))
