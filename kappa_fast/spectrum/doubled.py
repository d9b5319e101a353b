"""Matrix products in about twice the precision of float64, with a bound on their error, for exact.py.

A factor is split into slices of few bits, in units of one power of two for each row (of a left factor) or column (of a
right one), so that float64 holds every product of two slices and every sum of such products exactly, in any order of
summation, with or without FMA (Ozaki, Ogita, Oishi and Rump, Numer. Algorithms 59, 2012). These exact products are
added up as unevaluated sums of two float64 numbers. docs/numerics.md, section 5, has the bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..backends.base import Tensor
from .rounding import OUT, TINY, U

ROWS = 4096  # rows of A whose products are added to a Gram matrix at a time
GRAM_SLICES = 3
SLICES = 5  # slices of a factor that has two parts; a factor of one part has no more than three
RESIDUAL_SLICES = 3  # a residual is about 2^-50 of the matrix, and 2^-66 is dropped at most
LEAST_EXPONENT = -400  # the least exponent of a unit, so that no product of two units is subnormal


@dataclass(frozen=True)
class Double:
    """The matrix ``high + low``, |low| <= u |high|; ``error`` bounds its distance in ||.||_F from the exact matrix."""

    high: Tensor
    low: Tensor
    error: float


def norm(x: Tensor) -> float:
    """||x||_F, rounded up."""
    return float(torch.linalg.vector_norm(x)) * OUT


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """fl(a + b) and its exact rounding error (Knuth)."""
    s = a + b
    part = s - a
    return s, (a - (s - part)) + (b - part)


class _Sum:
    """A running sum of exact products. Every addition errs by at most 2.5 u^2 of the sum of absolute terms."""

    def __init__(self, rows: int, columns: int) -> None:
        self.high = torch.zeros((rows, columns), dtype=torch.float64)
        self.low = torch.zeros_like(self.high)
        self.additions = 0

    def add(self, term: Tensor) -> None:
        s, lacking = two_sum(self.high, term)
        low = self.low + lacking
        self.high, self.low = two_sum(s, low)
        self.additions += 1

    @property
    def error(self) -> float:
        """A bound on the error, relative to the sum of the absolute values of all terms."""
        return 2.5 * U * U * self.additions


def bits_for(terms: int) -> int:
    """The bits of a slice for which float64 holds sums of ``terms`` products of slices exactly."""
    return (53 - max(1, math.ceil(math.log2(max(terms, 2))))) // 2


def _unit(x: Tensor, dim: int, bits: int) -> Tensor:
    """One number for each line along ``dim``: adding and subtracting it leaves the leading ``bits`` of an entry."""
    exponent = torch.frexp(x.abs().amax(dim=dim, keepdim=True))[1].to(torch.int64).clamp(min=LEAST_EXPONENT)
    return 1.5 * ((exponent + 52 - bits + 1023) << 52).view(torch.float64)


def _slices(x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    high = (x + unit) - unit
    return high, x - high


def sliced(x: Tensor, dim: int, bits: int, count: int) -> tuple[list[Tensor], Tensor]:
    """At most ``count`` slices of a float64 matrix, the largest first, and the remainder; their sum is exactly x."""
    unit, slices = _unit(x, dim, bits), []
    for _ in range(count):
        part, x = _slices(x, unit)
        slices.append(part)
        unit = unit * 2.0**-bits
        if not bool(x.any()):
            break
    return slices, x


def _sliced_double(x: Double, dim: int, bits: int) -> tuple[list[Tensor], float]:
    """The slices of both parts, and a bound on ||remainder||_F."""
    unit = _unit(x.high, dim, bits) * 2.0  # the low part may carry the sum over a power of two
    slices, rest, late = [], x.high, x.low
    for k in range(SLICES):
        if k == 2:
            rest, late = two_sum(rest, late)
        if k == 4:
            rest = rest + late
        part, rest = _slices(rest, unit)
        slices.append(part)
        unit = unit * 2.0**-bits
    # The sum before the last slice is rounded, by at most u times the remainder of four slices.
    return slices, norm(rest) + U * norm(slices[-1]) + U * norm(rest)


def gram(a: Tensor) -> tuple[Double, float]:
    """The Gram matrix of A - D for a tall A (m, n) of any float dtype, and ||D||_F, which is about 2^-60 ||A||_F."""
    m, n = a.shape
    total, dropped, sizes = _Sum(n, n), 0.0, 0.0
    bits = bits_for(min(m, ROWS))
    for start in range(0, m, ROWS):
        rows = a[start : start + ROWS].to("cpu", torch.float64)
        slices, rest = sliced(rows.contiguous(), 0, bits, GRAM_SLICES)
        dropped += norm(rest) ** 2
        sizes += sum(norm(part) for part in slices) ** 2
        for i, left in enumerate(slices):
            for right in slices[i:]:
                product = left.T @ right
                total.add(product)
                if right is not left:
                    total.add(product.T)
    error = total.error * sizes * OUT + TINY
    return Double(total.high, total.low, error), math.sqrt(dropped) * OUT


def product(left: Double, right: Tensor) -> Double:
    """(left) (right) for left (p, k) and a float64 right (k, q) of no more than three slices (see ``rounded``)."""
    bits = bits_for(left.high.shape[1])
    slices, rest = _sliced_double(left, 1, bits)
    others, nothing = sliced(right, 0, bits, GRAM_SLICES + 1)
    return _summed(slices, others, rest, norm(nothing), left.error)


def transposed_product(left: Tensor, right: Double) -> Double:
    """(left)^T (right) for a float64 left (k, p) of no more than three slices and right (k, q)."""
    bits = bits_for(left.shape[0])
    slices, nothing = sliced(left.T.contiguous(), 1, bits, GRAM_SLICES + 1)
    others, rest = _sliced_double(right, 0, bits)
    return _summed(slices, others, norm(nothing), rest, 0.0, right.error)


def rounded(x: Tensor) -> Tensor:
    """X (k, p) rounded to three slices per column, which ``product`` and ``transposed_product`` use without error."""
    return x - sliced(x, 0, bits_for(x.shape[0]), GRAM_SLICES)[1]


def residual(a: Tensor, left: Tensor, right: Tensor) -> float:
    """A bound on ||A - left right||_F for A (m, n), left (m, k), right (k, n), all float64, by blocks of rows."""
    bits = bits_for(right.shape[0])
    others, rest_right = sliced(right, 0, bits, RESIDUAL_SLICES)
    squares, error = 0.0, 0.0
    for start in range(0, a.shape[0], ROWS // 4):
        rows = a[start : start + ROWS // 4]
        slices, rest_left = sliced(left[start : start + ROWS // 4], 1, bits, RESIDUAL_SLICES)
        found = _summed(slices, others, norm(rest_left), norm(rest_right), depth=RESIDUAL_SLICES)
        difference = (rows - found.high) - found.low
        squares += norm(difference) ** 2
        error += found.error + 2 * U * (norm(difference) + U * norm(found.high))
    return (math.sqrt(squares) + error) * OUT + TINY


def _summed(
    lefts: list[Tensor],
    rights: list[Tensor],
    rest_left: float,
    rest_right: float,
    error_left: float = 0.0,
    error_right: float = 0.0,
    depth: int = SLICES,
) -> Double:
    """The sum of the products of slices i and j with i + j < depth.

    The other arguments are bounds, in norm, on the remainders and the errors of the factors.
    """
    total = _Sum(lefts[0].shape[0], rights[0].shape[1])
    sizes, others = [norm(x) for x in lefts], [norm(x) for x in rights]
    size, other = sum(sizes) + rest_left, sum(others) + rest_right
    dropped = 0.0
    for i, x in enumerate(lefts):
        for j, y in enumerate(rights):
            if i + j < depth:
                total.add(x @ y)
            else:
                dropped += sizes[i] * others[j]
    error = dropped + (rest_left + error_left) * (other + error_right) + (rest_right + error_right) * size
    return Double(total.high, total.low, (error + total.error * size * other) * OUT + TINY)
