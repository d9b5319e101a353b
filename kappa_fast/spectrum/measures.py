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

SVD_BELOW = 160  # columns: below an SVD takes no longer, and holds the smallest values better
GRID = 20000  # points at which the density of Marchenko and Pastur is summed
NORMAL_IQR = 1.349  # interquartile range of a standard normal variable, as Spectrum has it

Array = np.ndarray


def singular_values(backend: Backend, a: Operand) -> Array:
    """All singular values, ascending, float64; to about n u sigma_1^2 / sigma_i where they come from a Gram matrix."""
    n = a.shape[1]
    if n < SVD_BELOW:
        return np.ascontiguousarray(torch.linalg.svdvals(a.tensor.to("cpu", torch.float64)).numpy()[::-1])
    (gram,) = backend.gram([a], torch.float64)
    squares: Array = torch.linalg.eigvalsh(gram, UPLO="L").cpu().numpy()
    return np.sqrt(np.maximum(squares, 0.0))


def of_spectrum(shape: tuple[int, int], values: Array) -> dict[str, Any]:
    """The fields of Statistics that take all singular values, which are ascending and not all zero."""
    squares = values * values
    share = squares / squares.sum()
    share = share[share > 0]
    n = len(values)
    return {
        **outliers(shape, values),
        "snr": signal_to_noise(shape, values),
        "alpha": power_law(squares),
        "spectral_entropy": min(1.0, max(0.0, -float((share * np.log(share)).sum()) / math.log(n))) if n > 1 else None,
    }


@lru_cache(maxsize=256)
def median_of_noise(ratio: float) -> float:
    """The median of the law of Marchenko and Pastur (Math. USSR Sb. 1, 1967) for this ratio of the sides, up to 1.

    Its density is sqrt((b - x) (x - a)) / (2 pi ratio x) between a, b = (1 -+ sqrt(ratio))^2; with
    x = a + (b - a) sin(t)^2 it is smooth, and midpoints leave out the point where it is 0 / 0.
    """
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    angles = (np.arange(GRID) + 0.5) / GRID * math.pi / 2
    sines, cosines = np.sin(angles) ** 2, np.cos(angles) ** 2
    points = low + (high - low) * sines
    mass = np.cumsum((high - low) ** 2 * sines * cosines / points)
    return float(np.interp(mass[-1] / 2, mass, points))


def outliers(shape: tuple[int, int], values: Array) -> dict[str, int | None]:
    """How many singular values lie beyond the edges s (sqrt(m) +- sqrt(n)) of noise of standard deviation s.

    s is the median singular value over that of noise of standard deviation 1 (Gavish, Donoho, IEEE Trans. Inf. Theory
    60, 2014, section III-D), which outliers hardly move.
    """
    m, n = max(shape), min(shape)
    scale = float(np.median(values)) / math.sqrt(m * median_of_noise(n / m))
    high, low = (scale * (math.sqrt(m) + sign * math.sqrt(n)) for sign in (1, -1))
    return {"outliers_above": int((values > high).sum()), "outliers_below": int((values < low).sum())}


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
