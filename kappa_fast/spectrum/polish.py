"""Measure with the weights themselves: Rayleigh-Ritz with A in float64, whatever the vectors came from.

The error of an approximate factor enters the polished values squared, and ||A x|| / ||A v|| is a lower bound of kappa
for any unit x and v, so the lower end of every interval is proven, including the rounding of this very measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends.base import Backend, Operand, Tensor

U64 = 2.0**-53
TOP_WIDTH = 4  # vectors worth measuring: the wanted one and a few neighbours it may be mixed with
BOTTOM_WIDTH = 8
# Mean of (spacing / value)^2 over a logarithmically uniform mantissa, 3 / (8 ln 2), over 12 for a uniform error.
ROUNDING_VARIANCE = 3 / (8 * math.log(2)) / 12


@dataclass(frozen=True)
class Triplets:
    """The polished extreme singular triplets of one matrix (scaled units), float64."""

    sigma_max: float
    sigma_min: float
    lower: float
    u_max: Tensor
    v_max: Tensor
    u_min: Tensor
    v_min: Tensor


def polish(
    backend: Backend, operands: Sequence[Operand], tops: Sequence[Tensor], bottoms: Sequence[Tensor]
) -> list[Triplets]:
    """Rayleigh-Ritz with A on the span of ``tops`` (n, .) for sigma_max and of ``bottoms`` (n, .) for sigma_min."""
    pairs = [
        (torch.linalg.qr(top[:, -TOP_WIDTH:].double()).Q, torch.linalg.qr(bottom[:, -BOTTOM_WIDTH:].double()).Q)
        for top, bottom in zip(tops, bottoms, strict=True)
    ]
    images = backend.apply(operands, [torch.cat(pair, dim=1) for pair in pairs])
    return [
        _triplets(a, top, bottom, image, norm)
        for a, (top, bottom), (image, norm) in zip(operands, pairs, images, strict=True)
    ]


def _triplets(a: Operand, top: Tensor, bottom: Tensor, image: Tensor, norm: float) -> Triplets:
    k = top.shape[1]
    u1, s1, w1 = _small_svd(image[:, :k])
    un, sn, wn = _small_svd(image[:, k:])
    v_max, v_min = top @ w1[:, 0], bottom @ wn[:, -1]
    sigma_max, sigma_min = float(s1[0]), float(sn[-1])
    reached_max = float(torch.linalg.vector_norm(image[:, :k] @ w1[:, 0]))
    reached_min = float(torch.linalg.vector_norm(image[:, k:] @ wn[:, -1]))
    lower = ratio_bound(a.shape, norm, reached_max, reached_min, v_max, v_min, w1[:, 0], wn[:, -1])
    return Triplets(sigma_max, sigma_min, lower, u1[:, 0], v_max, un[:, -1], v_min)


def _small_svd(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, r = torch.linalg.qr(image)
    u, s, vh = torch.linalg.svd(r)
    return q @ u, s, vh.T


def ratio_bound(
    shape: tuple[int, int],
    norm: float,
    reached_max: float,
    reached_min: float,
    v_max: Tensor,
    v_min: Tensor,
    w_max: Tensor,
    w_min: Tensor,
) -> float:
    """A proven lower bound of kappa from ||A x|| and ||A v|| as computed in float64.

    x = X w is combined after the product, fl(fl(A X) w), so its error is that of n + k + 1 roundings, k the width of X:
    at most g ||x|| with g = (n + k + 3) u ||A||_F times the growth ||X||_F |w| / ||x|| <= sqrt(k) (1 + tiny).
    norm: ||A||_F, to a relative 1e-6.  The norms themselves carry (m + n + 8) u.
    """
    m, n = shape
    width = max(len(w_max), len(w_min))
    g = (n + width + 3) * U64 * norm * (1 + 1e-5) * math.sqrt(width) * 1.01
    r = (m + n + 8) * U64
    length_max, length_min = float(torch.linalg.vector_norm(v_max)), float(torch.linalg.vector_norm(v_min))
    high = reached_max * (1 - r) / (length_max * (1 + r)) - g
    low = reached_min * (1 + r) / (length_min * (1 - r)) + g
    return max(1.0, high / low * (1 - 8 * U64)) if low > 0 else 1.0


def sensitivities(
    backend: Backend, operands: Sequence[Operand], dtypes: Sequence[torch.dtype], triplets: Sequence[Triplets]
) -> list[float]:
    """First-order standard deviation of the relative change of kappa under one rounding of all weights to ``dtype``.

    d log kappa = u_1^T dA v_1 / sigma_1 - u_n^T dA v_n / sigma_n with independent dA_ij, each uniform within half
    a spacing of its dtype, whose mean square is ROUNDING_VARIANCE eps^2 A_ij^2.
    """
    lefts, rights = [], []
    for t in triplets:
        u, w = t.u_max / t.sigma_max, t.u_min / t.sigma_min
        lefts.append(torch.stack([u * u, w * w, -2 * u * w], dim=1))
        rights.append(torch.stack([t.v_max**2, t.v_min**2, t.v_max * t.v_min], dim=1))
    sums = backend.weighted_squares(operands, lefts, rights)
    return [
        float(torch.finfo(dtype).eps) * math.sqrt(ROUNDING_VARIANCE * max(0.0, float(total.sum())))
        for dtype, total in zip(dtypes, sums, strict=True)
    ]
