"""Statistics beside kappa, from what resolving a matrix leaves: the determinant and the norms of its factor, or all
singular values where a decomposition gave them. docs/numerics.md, section 9, derives every formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..backends.base import Tensor
from ..results.statistics import Statistics
from .rounding import U

NORM_ERROR = 1e-6  # of ||A||_F, see Backend.apply; of the sums of Backend.volumes too, for each column
GRAM_NORM_ERROR = 1e-10  # of ||A||_F from the trace of a float64 Gram matrix, and of its logarithm
NARROW = 0.1  # a relative width of the interval of sigma_1 above which it gives no stable rank

Array = np.ndarray
Interval = tuple[float, float]


@lru_cache(maxsize=1024)
def gaussian_flatness(rows: int, columns: int) -> Interval:
    """Mean and standard deviation of the flatness over Gaussian matrices of this shape, whatever their variance.

    log det A^T A is a sum of independent logarithms of chi-square variables (Bartlett 1933; Goodman, Ann. Math. Stat.
    34, 1963), and the flatness is independent of the trace (Basu 1955), so that variances subtract.
    """
    m, n = max(rows, columns), min(rows, columns)
    halves = (m - torch.arange(n, dtype=torch.float64, device="cpu")) / 2
    whole = torch.tensor(m * n / 2, dtype=torch.float64, device="cpu")
    mean = float(torch.digamma(halves).mean() - torch.digamma(whole)) + math.log(n)
    variance = float(torch.polygamma(1, halves).sum()) / n**2 - float(torch.polygamma(1, whole))
    return mean / 2, math.sqrt(max(0.0, variance)) / 2


def by_shape(flatness: float, shape: tuple[int, int]) -> float | None:
    """The flatness less its mean over Gaussian matrices of this shape, in standard deviations; None for one column."""
    if min(shape) < 2:
        return None
    mean, deviation = gaussian_flatness(*shape)
    return (flatness - mean) / deviation


def of_factor(
    shape: tuple[int, int], power: int, departure: float, volume: Sequence[float], norm: float, ends: Interval
) -> Statistics:
    """The statistics of a factored matrix.

    power, departure: as in Rung.power and Backend.departure, the departure bounded as in the ladder.
    volume: a row of Backend.volumes.  norm: ||A||_F.  ends: sigma_max and sigma_min, nan where they are not known.
    """
    n = shape[1]
    total, size, gram = volume
    high, low = ends
    flatness = total / n - math.log(norm) + math.log(n) / 2
    # |log det(I + M)| <= sqrt(n) ||M||_F / (1 - d) and ||M||_F <= n^(1/4) d; half of that where M is of squares.
    unknown = departure / (1 - departure) / n**0.25 / power
    error = unknown + NORM_ERROR + 4 * (n + 8) * U * (1 + size / n)
    return Statistics(
        frobenius=norm,
        stable_rank=(norm / high) ** 2 if high > 0 else None,
        participation_ratio=participation(n, norm, gram) if gram > 0 else None,
        demmel=norm / low if low > 0 else None,
        **_flatness(shape, flatness, flatness - error, flatness + error),
    )


def of_gram(shape: tuple[int, int], volume: tuple[float, float, float], norm: float, ends: Interval) -> Statistics:
    """The statistics of a small matrix from its float64 Gram matrix G; ends: sigma_max and sigma_min, nan if unknown.

    volume: the mean logarithm of the singular values, a bound on its error, and ||G||_F.
    """
    n = shape[1]
    mean, error, gram = volume
    flatness = mean - math.log(norm) + math.log(n) / 2
    error += GRAM_NORM_ERROR
    return Statistics(
        frobenius=norm,
        stable_rank=max(1.0, (norm / ends[0]) ** 2) if ends[0] > 0 else None,
        participation_ratio=participation(n, norm, gram),
        demmel=norm / ends[1] if ends[1] > 0 else None,
        **_flatness(shape, flatness, flatness - error, flatness + error),
    )


def participation(n: int, norm: float, gram: float) -> float:
    """(||A||_F^2 / ||A^T A||_F)^2, which rounding may carry out of its range from 1 to n."""
    return min(max((norm * norm / gram) ** 2, 1.0), float(n))


def _flatness(shape: tuple[int, int], flatness: float, lower: float, upper: float) -> dict[str, Any]:
    found = min(0.0, flatness)
    return {
        "flatness": found,
        "flatness_lower": min(lower, found),
        "flatness_upper": min(0.0, max(upper, found)),
        "flatness_by_shape": by_shape(found, shape),
    }


def of_vector(norm: float) -> Statistics:
    """The statistics of a single column that is not zero."""
    return Statistics(
        frobenius=norm,
        stable_rank=1.0,
        participation_ratio=1.0,
        demmel=1.0,
        flatness=0.0,
        flatness_lower=0.0,
        flatness_upper=0.0,
    )


@dataclass(frozen=True)
class Values:
    """All singular values of a matrix: estimates and proven bounds, ascending or descending, float64."""

    estimates: Array
    low: Array
    high: Array

    @classmethod
    def of_values(cls, values: Tensor, relative: float, absolute: float) -> Values:
        """Each true value is within ``value * relative + absolute``."""
        found = values.numpy()
        margin = (found * relative + absolute) * (1 + 8 * U)
        return cls(found, np.maximum(found - margin, 0.0), found + margin)

    @classmethod
    def of_squares(cls, squares: Tensor, relative: float, absolute: float, distance: float = 0.0) -> Values:
        """Each true squared value of a matrix at ``distance`` is within ``|square| * relative + absolute``."""
        found = squares.numpy()
        margin = (np.abs(found) * relative + absolute) * (1 + 8 * U)
        low, high = (np.sqrt(np.maximum(x, 0.0)) for x in (found - margin, found + margin))
        low, high = low * (1 - 4 * U) - distance, high * (1 + 4 * U) + distance
        return cls(np.sqrt(np.maximum(found, 0.0)), np.maximum(low, 0.0), high)

    @property
    def largest(self) -> Interval:
        """The bounds of the largest of them."""
        return float(self.low.max()), float(self.high.max())

    @property
    def width(self) -> float:
        """The width of the interval of the logarithm of their product."""
        with np.errstate(divide="ignore"):
            return float((np.log(self.high) - np.log(self.low)).sum())


def of_values(shape: tuple[int, int], values: Values, smallest: Interval) -> Statistics:
    """The statistics of a matrix of full rank from all singular values; ``smallest`` are bounds of sigma_n above 0."""
    n = shape[1]
    low, high = np.maximum(values.low, smallest[0]), np.maximum(values.high, smallest[0])
    least = int(values.estimates.argmin())  # whose own bounds are often wider, where a Gram matrix gave all values
    high[least] = min(float(high[least]), smallest[1])
    found = np.minimum(np.maximum(values.estimates, low), high)
    squares = found * found
    total = float(squares.sum())
    logs = [float(np.log(x).mean()) for x in (found, low, high)]
    sizes = [math.log(x / n) / 2 for x in (total, float(low @ low), float(high @ high))]
    error = 4 * (n + 8) * U * (1 + max(abs(math.log(float(found.max()))), abs(math.log(float(found.min())))))
    norm, top = math.sqrt(total), float(found.max())
    flatness = _flatness(shape, logs[0] - sizes[0], logs[1] - sizes[2] - error, logs[2] - sizes[1] + error)
    return Statistics(
        frobenius=norm,
        stable_rank=total / top**2,
        participation_ratio=total**2 / float((squares * squares).sum()),
        demmel=norm / float(found.min()),
        **flatness,
    )


def of_singular(
    shape: tuple[int, int], values: Values | None, norm: float, largest: Interval, smallest: float
) -> Statistics:
    """The statistics of a matrix whose sigma_n cannot be told from zero; smallest: a bound of sigma_n, 0 if it is 0."""
    n = shape[1]
    upper = -math.inf
    if smallest > 0 and norm > 0:  # of the other values the logarithms have the largest mean where all are equal
        share = math.log(n / (n - 1)) * (n - 1) / n / 2
        upper = min(0.0, math.log(smallest / norm * math.sqrt(n)) / n + share + 1e-9)
    ratio = None
    if values is not None and values.estimates.any():
        squares = values.estimates * values.estimates
        ratio = float(squares.sum()) ** 2 / float((squares * squares).sum())
    top = (largest[0] + largest[1]) / 2
    narrow = largest[0] > 0 and largest[1] - largest[0] <= NARROW * largest[0]
    return Statistics(
        frobenius=norm,
        stable_rank=max(1.0, (norm / top) ** 2) if narrow else None,
        participation_ratio=ratio,
        demmel=math.inf,
        flatness=-math.inf,
        flatness_lower=-math.inf,
        flatness_upper=upper,
        flatness_by_shape=-math.inf if n > 1 else None,
    )
