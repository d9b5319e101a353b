"""Exact integer Gram matrices of a wave, which TritonBackend.exact_products gives to the proofs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .base import ExactProducts, Operand, Tensor
from .triton_waves import KEPT, ExactGrams, exact_grams

log = logging.getLogger("kappa_fast")
LEVELS = ((2, 8), (3, 7), (4, 7))  # number of digits, bits of each: 16, 21 and 28 bits of every column
Read = Callable[[Tensor], list[Any]]  # Backend.read


def exact_products(
    operands: Sequence[Operand], level: int, limits: Sequence[float], read: Read
) -> list[ExactProducts] | None:
    """See Backend.exact_products. Gram matrices that the first rung kept with the operands are used and removed."""
    from kappa_fast.kernels.problems import supported

    if level >= len(LEVELS):
        return None
    kept: dict[int, tuple[ExactGrams, dict[int, int]]] = {}
    rest = []
    for i, a in enumerate(operands):
        if level == 0 and KEPT in a.cache:
            found, place = a.cache.pop(KEPT)
            kept.setdefault(id(found), (found, {}))[1][i] = place
        elif supported(a.tensor.dtype):
            rest.append(i)
    products: list[ExactProducts] = [SliceProducts(found, places, read) for found, places in kept.values()]
    fresh = _near_grams(operands, rest, limits, LEVELS[level], read)
    return [*products, *([SliceProducts(*fresh, read)] if fresh else [])]


def _near_grams(
    operands: Sequence[Operand], which: Sequence[int], limits: Sequence[float], kind: tuple[int, int], read: Read
) -> tuple[ExactGrams, dict[int, int]] | None:
    """Gram matrices of the operands whose ``kind`` of digits is within ``limits`` of the weights, and their places.

    None if there are no such operands. The distances take one read for each round of the loop.
    """
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.quantize import column_peaks, quantize

    count, bits = kind
    chosen = list(which)
    while chosen:  # again for the near ones if some are too far away
        problems = Problems.of([operands[i].tensor for i in chosen])
        slices = quantize(problems, column_peaks(problems), count, bits=bits)
        distances = read(slices.residual.sqrt())
        near = [i for i, distance in zip(chosen, distances, strict=True) if distance < limits[i]]
        if near == chosen:
            return exact_grams(problems, slices), {i: place for place, i in enumerate(chosen)}
        chosen = near
        del slices  # the next round needs the memory
    return None


class SliceProducts:
    """base.ExactProducts from int8 slices; the lower triangles are factored in place, see kernels/shifted.py."""

    def __init__(self, made: ExactGrams, places: Mapping[int, int], read: Read) -> None:
        """Take over Gram matrices in which the operand i has the place ``places[i]``. Calls ``read`` once."""
        from kappa_fast.kernels.coarse import ROUNDINGS
        from kappa_fast.kernels.shifted import Mirrored

        self.coarse_roundings = ROUNDINGS
        self.which: tuple[int, ...] = tuple(places)
        self._places = tuple(places.values())
        self._read = read
        self._mirrored = Mirrored.of(made.problems, made.packed)
        distances, traces = read(torch.stack([made.squared.sqrt(), self._mirrored.traces()]))
        self.distances: Sequence[float] = [distances[place] for place in self._places]
        self.traces: Sequence[float] = [traces[place] for place in self._places]
        self.roundings: Sequence[int] = made.roundings[list(self._places)].tolist()

    def residuals(self, chosen: Sequence[int], shifts: Sequence[float], sign: int) -> list[tuple[float, float]]:
        factors = self._mirrored.factored([self._places[j] for j in chosen], shifts, sign)
        squares, sizes = factors.residuals()
        found = self._read(torch.stack([squares, sizes, factors.deviations(squares, sizes)], dim=1))
        wrong = [deviation for square, _, deviation in found if math.isfinite(square) and not deviation <= 1]
        if wrong:
            where = self._mirrored.problems.device
            log.warning(
                "%d Cholesky factors on %s deviate from their matrices by up to %.1e times what rounding allows: the "
                "kernels compute wrong results, so these factors are not used for proofs",
                len(wrong),
                where,
                max(wrong),
            )
        return [
            (math.sqrt(square), size) if square >= 0 and deviation <= 1 else (math.inf, math.inf)
            for square, size, deviation in found
        ]

    def coarse_residuals(self, chosen: Sequence[int], bounds: Sequence[float]) -> list[tuple[float, float]]:
        from kappa_fast.kernels.coarse import coarse_factors
        from kappa_fast.kernels.splits import BYTE_ROWS

        places = [self._places[j] for j in chosen]
        # Sums of more products do not fit 32 bits.
        short = [k for k, place in enumerate(places) if int(self._mirrored.problems.n[place]) <= BYTE_ROWS]
        found = [(math.inf, math.inf)] * len(places)
        if short:
            made = coarse_factors(self._mirrored, [places[k] for k in short], [bounds[k] for k in short])
            for k, (square, size) in zip(short, self._read(torch.stack(made.residuals(), dim=1)), strict=True):
                if square >= 0:  # not nan
                    found[k] = math.sqrt(square), size
        return found

    def residual_roundings(self, place: int) -> int:
        from kappa_fast.kernels.cholesky import residual_roundings
        from kappa_fast.kernels.problems import target_of

        problems = self._mirrored.problems
        return residual_roundings(int(problems.n[self._places[place]]), target_of(problems.device))
