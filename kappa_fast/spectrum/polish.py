"""The polish of the ladder: a Rayleigh-Ritz step with the weights themselves in float64, for vectors of any origin.

The error of an approximate factor enters the polished values squared. ||A x|| / ||A v|| is a lower bound of kappa for
any unit x and v, so the lower end of every interval is proven; the rounding of the measurement is accounted for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends.base import EXPONENT, Backend, Operand, Panel, Tensor
from ..backends.moving import on_device
from .rounding import U

TOP_WIDTH = 4  # the wanted vector and the nearest others, which the approximation may mix with it
BOTTOM_WIDTH = 8


@dataclass(frozen=True)
class Triplets:
    """The polished extreme singular triplets of one matrix (scaled units), float64."""

    sigma_max: float
    sigma_min: float
    lower: float
    left: Tensor  # (m, 2): u of sigma_max, u of sigma_min
    right: Tensor  # (n, 2): v of sigma_max, v of sigma_min
    norm: float = math.nan  # ||A||_F, to a relative 1e-6


def polish(backend: Backend, operands: Sequence[Operand], tops: Panel, bottoms: Panel) -> list[Triplets]:
    """Rayleigh-Ritz with A on the span of the last columns of ``tops`` for sigma_max and of ``bottoms`` for sigma_min.

    The blocks (n, .) have full rank; one read serves the whole wave.
    """
    top = backend.orthonormalize(tops.columns(-TOP_WIDTH).to(torch.float64))
    bottom = backend.orthonormalize(bottoms.columns(-BOTTOM_WIDTH).to(torch.float64))
    images, norms = backend.apply(operands, top.beside(bottom))
    u1, s1, v1, reached1 = _polish_end(backend, top, images.columns(0, top.width), 0)
    un, sn, vn, reachedn = _polish_end(backend, bottom, images.columns(top.width), bottom.width - 1)
    left, right = u1.beside(un), v1.beside(vn)
    measured = backend.read(torch.cat([s1, sn, reached1, reachedn, backend.norms(right), norms[:, None]], dim=1))
    width = max(top.width, bottom.width)
    return [
        Triplets(high, low, ratio_bound(a.shape, norm, reached, lengths, width), u, v, norm)
        for a, (high, low, *ends, norm), u, v in zip(operands, measured, left.blocks(), right.blocks(), strict=True)
        for reached, lengths in [((ends[0], ends[1]), (ends[2], ends[3]))]
    ]


def _polish_end(backend: Backend, basis: Panel, image: Panel, j: int) -> tuple[Panel, Tensor, Panel, Tensor]:
    """Singular triplet number j of A restricted to the basis, values (w, 1), and the measured ||A v||."""
    u, s, w = backend.svd(image)
    chosen = w[:, :, j : j + 1]
    reached = backend.norms(backend.combine(image, chosen))
    return u.columns(j, j + 1), s[:, j : j + 1], backend.combine(basis, chosen), reached


def ratio_bound(
    shape: tuple[int, int], norm: float, reached: tuple[float, float], lengths: tuple[float, float], width: int
) -> float:
    """A proven lower bound of kappa from ||A x||, ||A v|| (reached) and ||x||, ||v|| (lengths), computed in float64.

    x = X w is combined after the product, fl(fl(A X) w), with n + k roundings, k the width of X, and so is the vector
    whose length is measured, fl(X w), with k: together at most g ||x||, g = (n + 2 k + 3) u ||A||_F times the growth
    ||X||_F |w| / ||x|| <= sqrt(k) (1 + tiny).
    norm: ||A||_F, to a relative 1e-6.  The norms themselves carry (m + n + 8) u.
    """
    if not (min(lengths) > 0 and min(reached) >= 0):  # a vector is zero or holds a nan
        return 1.0
    m, n = shape
    g = (n + 2 * width + 3) * U * norm * (1 + 1e-5) * math.sqrt(width) * 1.01
    r = (m + n + 8) * U
    high = reached[0] * (1 - r) / (lengths[0] * (1 + r)) - g
    low = reached[1] * (1 + r) / (lengths[1] * (1 - r)) + g
    return max(1.0, high / low * (1 - 8 * U)) if low > 0 else 1.0


def sensitivities(
    backend: Backend, operands: Sequence[Operand], dtypes: Sequence[torch.dtype], triplets: Sequence[Triplets]
) -> list[float]:
    """First-order standard deviation of the relative change of kappa under one rounding of all weights to ``dtype``.

    d log kappa = u_1^T dA v_1 / sigma_1 - u_n^T dA v_n / sigma_n with independent dA_ij, each uniform within half
    a spacing of its dtype, eps 2^floor(log2 |A_ij|) and no less than that of subnormal numbers, which is added.
    """
    if not triplets:
        return []
    left, right = Panel.pack([t.left for t in triplets]), Panel.pack([t.right for t in triplets])
    sigmas = [[t.sigma_max, t.sigma_min] for t in triplets]
    u = left.data / left.spread(on_device(sigmas, left.data.device))
    lefts, rights = _weights_of_entries(u, right.data)
    squares = backend.weighted_binades(operands, Panel(lefts, left.rows), Panel(rights, right.rows))
    totals = backend.read(squares.sum(dim=1))
    return [
        sensitivity(total, dtype, operand.exponent, found.sigma_max, found.sigma_min)
        for operand, dtype, found, total in zip(operands, dtypes, triplets, totals, strict=True)
    ]


def _weights_of_entries(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (.., m, 3) and (.., n, 3) of the squared derivatives of log kappa, from u_i / sigma_i and v_i (.., 2)."""
    lefts = torch.cat([u * u, -2 * u[..., :1] * u[..., 1:]], dim=-1)
    return lefts, torch.cat([v * v, v[..., :1] * v[..., 1:]], dim=-1)


def binade_totals(a: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """What ``sensitivity`` needs for every matrix of a batch a (b, m, n), u_i / sigma_i (b, m, 2), v_i (b, n, 2): (b,).

    The same sums as Backend.weighted_binades, to a relative 1e-5, and for each matrix the same bits in any batch.
    """
    lefts, rights = _weights_of_entries(u, v)
    binades = a.to(torch.float32).view(torch.int32).bitwise_and_(EXPONENT).view(torch.float32)
    images = torch.bmm(binades.square_(), rights.to(torch.float32)).to(torch.float64)
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(lefts, images, strict=True)])


def sensitivity(total: float, dtype: torch.dtype, exponent: int, sigma_max: float, sigma_min: float) -> float:
    """From the weighted sum ``total`` of squared binades; entries are those of the weight times 2**-exponent."""
    info = torch.finfo(dtype)
    spacing = math.ldexp(float(info.eps) * float(info.smallest_normal), -exponent)
    # The standard deviation of log kappa under one rounding to multiples of the dtype's smallest subnormal number.
    subnormal = spacing / math.sqrt(12) * math.hypot(1 / sigma_max, 1 / sigma_min)
    return math.hypot(float(info.eps) * math.sqrt(max(0.0, total) / 12), subnormal)
