"""Statistics by request, from all singular values: outliers beyond the edges of noise, Spectrum's ratio of signal to
noise, the exponent of a power law, and the spectral entropy. docs/scores.md has the sources.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..backends.base import Backend, Operand
from .rounding import OUT, gamma
from .statistics import Values

SVD_BELOW = 160  # columns: below an SVD takes no longer, and holds the smallest values better
EDGE_ERROR = 1e-12  # of the edges of noise for a given median, relative
NORMAL_IQR = 1.349  # interquartile range of a standard normal variable, as Spectrum has it

Array = np.ndarray


def singular_values(backend: Backend, a: Operand) -> Values:
    """All singular values, ascending, float64; to about n u sigma_1^2 / sigma_i where they come from a Gram matrix.

    Their bounds count all rounding of the Gram matrix, and take for granted that LAPACK errs by no more than
    2 gamma(n + 2) ||A||_F^2 in an eigenvalue, and by 2 gamma(m + n) ||A||_F in a singular value.
    """
    m, n = a.shape
    if n < SVD_BELOW:
        values = torch.linalg.svdvals(a.tensor.to("cpu", torch.float64)).flip(0)
        return Values.of_values(values, 0.0, 2 * gamma(m + n) * float(torch.linalg.vector_norm(values)) * OUT)
    (gram,) = backend.gram([a], torch.float64)
    trace = float(gram.diagonal().sum()) * OUT
    squares = torch.linalg.eigvalsh(gram, UPLO="L").cpu()
    return Values.of_squares(squares, 0.0, (gamma(m) + 2 * gamma(n + 2)) * trace * OUT)


def of_spectrum(shape: tuple[int, int], spectrum: Values) -> dict[str, Any]:
    """The fields of Statistics that take all singular values, which are ascending and not all zero."""
    values = spectrum.estimates
    squares = values * values
    share = squares / squares.sum()
    share = share[share > 0]
    n = len(values)
    return {
        **outliers(shape, spectrum),
        "snr": signal_to_noise(shape, values),
        "alpha": power_law(squares),
        "spectral_entropy": min(1.0, max(0.0, -float((share * np.log(share)).sum()) / math.log(n))) if n > 1 else None,
    }


@lru_cache(maxsize=256)
def median_of_noise(ratio: float) -> float:
    """The median of the law of Marchenko and Pastur (Math. USSR Sb. 1, 1967) for this ratio of the sides, up to 1.

    By halving the interval, to the last digits of a float64 number.
    """
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if mass_of_noise(middle, ratio) < 0.5 else (low, middle)
    return middle


def mass_of_noise(x: float, ratio: float) -> float:
    """The share of the law of Marchenko and Pastur that is below x, between its edges a and b = (1 -+ sqrt(ratio))^2.

    The density is sqrt((b - x) (x - a)) / (2 pi ratio x). Its integral, with s = sqrt((x - a) (b - x)):
    (s + (1 + ratio) phi - 2 (1 - ratio) psi) / (2 pi ratio), cos phi = (a + b - 2 x) / (b - a), and
    tan psi = sqrt(b (x - a) / (a (b - x))).
    """
    a, b = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    left, right = max(x - a, 0.0), max(b - x, 0.0)
    root = math.sqrt(left * right)
    angle = math.atan2(2 * root, right - left)  # from 0 at a to pi at b
    turned = math.atan2(math.sqrt(b * left), math.sqrt(a * right))  # from 0 to pi / 2
    return (root + (1 + ratio) * angle - 2 * (1 - ratio) * turned) / (2 * math.pi * ratio)


def outliers(shape: tuple[int, int], spectrum: Values) -> dict[str, int | None]:
    """How many singular values lie beyond the edges s (sqrt(m) +- sqrt(n)) of noise of standard deviation s.

    s is the median singular value over that of noise of standard deviation 1 (Gavish, Donoho, IEEE Trans. Inf. Theory
    60, 2014, section III-D), which outliers hardly move. Values whose bounds do not lie on one side of an edge, whose
    bounds come from those of the median, are counted as undecided too. A square matrix has no lower edge.
    """
    m, n = max(shape), min(shape)
    unit = math.sqrt(m * median_of_noise(n / m))
    scales = [float(np.median(values)) / unit for values in (spectrum.estimates, spectrum.low, spectrum.high)]
    counts, undecided = [], np.zeros(n, dtype=bool)
    for sign in (1, -1):
        edge, low, high = (scale * (math.sqrt(m) + sign * math.sqrt(n)) for scale in scales)
        low, high = low * (1 - EDGE_ERROR), high * (1 + EDGE_ERROR)
        counts.append(int((sign * spectrum.estimates > sign * edge).sum()))
        if sign > 0 or m > n:
            undecided |= (spectrum.low <= high) & (spectrum.high >= low)
    above, below = counts
    return {"outliers_above": above, "outliers_below": below, "outliers_undecided": int(undecided.sum())}


def signal_to_noise(shape: tuple[int, int], values: Array) -> float:
    """Spectrum's (Hartford et al., arXiv 2406.06623): the sum of singular values above an edge over that of the others,
    over the largest. The edge is iqr / 1.349 (1 + sqrt(n / m)), as in Spectrum's program.
    """
    low, high = np.quantile(values, [0.25, 0.75])
    edge = float(high - low) / NORMAL_IQR * (1 + math.sqrt(min(shape) / max(shape)))
    signal, noise = float(values[values > edge].sum()), float(values[values <= edge].sum())
    return signal / noise / float(values.max()) if noise > 0 else math.inf


def power_law(squares: Array) -> float | None:
    """The exponent of the power law that fits the largest eigenvalues best, as WeightWatcher's alpha.

    For each eigenvalue as the least of the tail the exponent is 1 + k / sum log(x / x_min) over its k values; that with
    the least distance of Kolmogorov and Smirnov is taken (Clauset, Shalizi, Newman, SIAM Review 51, 2009, equations 3.1
    and 3.9; Martin, Peng, Mahoney, Nature Communications 12, 2021). None where no two eigenvalues differ.
    """
    data = squares[squares > 0]
    logs, n = np.log(data), len(data)
    best: tuple[float, float] | None = None
    for i in range(n - 1):
        tail = logs[i:] - logs[i]
        total = float(tail.sum())
        if not total > 0:
            continue
        exponent = 1 + (n - i) / total
        distance = float(np.abs(-np.expm1(tail * (1 - exponent)) - np.arange(n - i) / (n - i)).max())
        if best is None or distance < best[0]:
            best = distance, exponent
    return None if best is None else best[1]
