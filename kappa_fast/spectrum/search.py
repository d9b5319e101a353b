"""Both ends of the spectrum of factored matrices, and the interval that they leave for kappa."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..backends.base import Backend, Factors, Panel, Rung, Tensor
from ..backends.moving import on_device, pick
from .krylov import Extreme, largest
from .polish import Triplets
from .resolution import Resolution


def search(
    backend: Backend, factors: Factors, seeds: Sequence[bytes], tolerance: float
) -> tuple[tuple[list[Extreme], Panel], tuple[list[Extreme], Panel]]:
    """The largest eigenvalues of R^T R and of its inverse for every factor R, with their vectors."""

    of_products = on_device([rung.product_error(tolerance) for rung in factors.rungs], backend.device)
    of_solves = on_device([2 * rung.unit_roundoff for rung in factors.rungs], backend.device)

    def constant(which: Sequence[int], theta: Tensor) -> Tensor:
        return pick(of_products, which)

    quick = factors.rungs[0].product_dtype(tolerance)
    tops = largest(backend, backend.product, factors, seeds, constant, tolerance, salt=0, dtype=quick)
    heights = on_device([top.theta for top in tops[0]], backend.device)

    def noise(which: Sequence[int], theta: Tensor) -> Tensor:
        return pick(of_solves, which) * torch.sqrt((theta * pick(heights, which)).clamp(min=1.0))

    return tops, largest(backend, backend.solve, factors, seeds, noise, tolerance, salt=1)


def interval(
    rung: Rung, departure: float, top: Extreme, bottom: Extreme, triplets: Triplets, rounding: float
) -> Resolution:
    """The interval from the polish's proven lower bound and the upper bounds of both searches and of the departure."""
    # With power 1 the search for sigma_max used the weights themselves, and the departure concerns sigma_min alone.
    widening = math.sqrt((1 + departure) / (1 - departure)) if rung.power == 2 else 1 / (1 - departure)
    upper = math.sqrt(top.theta * (1 + top.excess) * bottom.theta * (1 + bottom.excess)) * widening
    kappa = max(triplets.sigma_max / triplets.sigma_min, triplets.lower)  # rounding may leave it below 1
    upper *= 1 + rounding  # the rounding of the Ritz values
    # If the weights attain a larger kappa than the bound, the start blocks missed a vector, and the next rung decides.
    upper = math.inf if upper * (1 + 1e-12) < triplets.lower else max(upper, kappa * (1 + rounding))
    return Resolution("ok", kappa, triplets.lower, upper, triplets.sigma_max, triplets.sigma_min, rung.name)
