"""Cheap lower bounds of kappa, by which rank(top=...) passes over matrices that cannot be among the lowest.

A few steps of block Krylov on A^T A need neither a Gram matrix nor a factorization: kappa >= ||A x|| / ||A v|| for any
unit vectors x and v.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..backends.base import Backend, Operand, Panel, Tensor
from .krylov import KrylovBasis, small_eigenpairs
from .polish import ratio_bound

WIDTH = 4
STEPS = 8
# From the second step on the ratio grows no faster than in proportion to the steps, for Gaussian and trained weights;
# one that would stay below the cutoff even with so much growth to spare is given up.
SPARE = 1.2


def lower_bounds(backend: Backend, weights: Sequence[Tensor], cutoff: float) -> list[float]:
    """A proven lower bound of kappa for every weight: above ``cutoff`` if a few products prove that, else 1."""
    operands = backend.prepare(weights)
    bounds = [1.0] * len(operands)
    active = [i for i, a in enumerate(operands) if a.finite and a.peak > 0 and a.shape[1] > 2 * WIDTH * STEPS]
    if not active:
        return bounds
    seeds = backend.digests([operands[i] for i in active])
    space = KrylovBasis.begin(backend, [operands[i].shape[1] for i in active], seeds, torch.float32, WIDTH, salt=3)
    for step in range(1, STEPS + 1):
        chosen = [operands[i] for i in active]
        ended = space.expand(backend, lambda x, chosen=chosen: backend.normal(chosen, x))  # type: ignore[misc]
        theta, vectors = small_eigenpairs(space.columns)
        least = space.missing[:, None]  # the values before this position belong to directions that were left out
        ends = torch.cat([theta.gather(1, least), theta[:, -1:], ended.double()[:, None]], dim=1)
        going: list[int] = []
        promising: list[int] = []
        for j, (low, high, over) in enumerate(backend.read(ends)):
            ratio = math.sqrt(max(0.0, high) / max(low, 1e-30))
            if ratio > 1.01 * cutoff:
                promising.append(j)
            elif not over and (step == 1 or ratio * SPARE * STEPS / step > cutoff):
                going.append(j)
        if promising:
            low_vectors = vectors.gather(2, least[:, :, None].expand(-1, vectors.shape[1], 1))
            chosen_vectors = torch.cat([vectors[:, :, -1:], low_vectors], dim=2)[promising]
            pairs = backend.combine(space.filled.take(promising), chosen_vectors)
            found = _prove(backend, [chosen[j] for j in promising], pairs.to(torch.float64))
            for j, bound in zip(promising, found, strict=True):
                bounds[active[j]] = bound
        active = [active[j] for j in going]
        if not active:
            break
        space = space.take(going)
    return bounds


def _prove(backend: Backend, operands: Sequence[Operand], pairs: Panel) -> list[float]:
    images, norms = backend.apply(operands, pairs)
    read = backend.read(torch.cat([backend.norms(images), backend.norms(pairs), norms[:, None]], dim=1))
    return [
        ratio_bound(a.shape, norm, (high, low), (length_high, length_low), 1)
        for a, (high, low, length_high, length_low, norm) in zip(operands, read, strict=True)
    ]
