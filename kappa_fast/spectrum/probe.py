"""Cheap lower bounds of kappa, for matrices that need not be resolved because they cannot be among the lowest.

A few steps of block Krylov on A^T A itself, no Gram matrix, no factorization: kappa >= ||A x|| / ||A v|| for any
unit vectors x and v.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..backends.base import Backend, Operand, Tensor
from .krylov import Space, expand
from .polish import ratio_bound

WIDTH = 4
STEPS = 8
HOPELESS = 0.7  # a ratio still below this share of the cutoff after half the steps does not reach it at the last


def lower_bounds(backend: Backend, weights: Sequence[Tensor], cutoff: float) -> list[float]:
    """A proven lower bound of kappa for every weight: above ``cutoff`` where a few products could show it, else 1."""
    operands = backend.prepare(weights)
    bounds = [1.0] * len(operands)
    active = [i for i, a in enumerate(operands) if a.finite and a.peak > 0 and a.shape[1] > 2 * WIDTH * STEPS]
    spaces = {i: Space.begin(backend, operands[i].shape[1], torch.float32, WIDTH, STEPS, salt=3) for i in active}
    for step in range(1, STEPS + 1):
        if not active:
            break
        chosen = [operands[i] for i in active]
        ended = expand(backend, [spaces[i] for i in active], lambda x, chosen=chosen: backend.normal(chosen, x))  # type: ignore[misc]
        going: list[int] = []
        promising: list[tuple[int, Tensor]] = []
        for i, over in zip(active, ended, strict=True):
            theta, vectors = spaces[i].ritz()
            ratio = math.sqrt(max(0.0, float(theta[-1])) / max(float(theta[0]), 1e-30))
            if ratio > 1.01 * cutoff:
                promising.append((i, spaces[i].combine(vectors[:, [-1, 0]])))
            elif not over and (step < STEPS // 2 or ratio > HOPELESS * cutoff):
                going.append(i)
        _prove(backend, operands, promising, bounds)
        active = going
    return bounds


def _prove(
    backend: Backend, operands: Sequence[Operand], found: Sequence[tuple[int, Tensor]], bounds: list[float]
) -> None:
    images = backend.apply([operands[i] for i, _ in found], [pair for _, pair in found])
    for (i, pair), (image, norm) in zip(found, images, strict=True):
        wide, one = pair.double(), image.new_ones(1)
        high, low = (float(torch.linalg.vector_norm(image[:, j])) for j in (0, 1))
        bounds[i] = ratio_bound(operands[i].shape, norm, high, low, wide[:, 0], wide[:, 1], one, one)
