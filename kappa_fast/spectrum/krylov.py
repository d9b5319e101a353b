"""Randomized block Krylov: the largest eigenvalue of a symmetric positive operator, with a bound on what lies above.

Block Lanczos with full two-pass reorthogonalization on a whole wave. The operator is R^T R for sigma_max and its
inverse for sigma_min. Every matrix stops on its own, as soon as its bound is tight enough: a converged inverse would
otherwise go on into noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..backends.base import Backend, Factor, Tensor
from .bounds import excess, start_overlap

WIDTH = 16
MAX_BLOCKS = 32  # trained and random weights need 4 to 17 at rtol 1e-2, 21 to 23 at 1e-6
CHECK_FROM = 2  # products before the first look at the bound
CANCELLED = 1e-2
DROP = 16.0  # directions below DROP * n * u of the operator's norm are rounding, not information


@dataclass
class Extreme:
    """What is known of the largest eigenvalue of one operator, and the block of vectors that go with it."""

    theta: float
    excess: float
    vectors: Tensor  # (n, w) Ritz vectors, the wanted one last
    converged: bool


@dataclass
class _Space:
    """A growing Krylov basis of one matrix."""

    basis: Tensor  # (n, capacity); the first ``size`` columns are in use
    projected: Tensor  # (capacity, capacity) float64 on the CPU, upper block triangle of T
    start: int
    overlap: float
    size: int = 0
    block: Tensor = field(default_factory=lambda: torch.empty(0))  # (n, w), the newest, not yet in the basis
    coupling: Tensor = field(default_factory=lambda: torch.empty(0))  # (w, width of the block before), B
    scale: float = 0.0
    next_check: int = CHECK_FROM
    last_look: tuple[int, float] = (0, 0.0)  # step and log10(excess) of the last look at the bound

    def schedule(self, step: int, excess: float, tolerance: float) -> None:
        """Look again when the decay seen so far would reach the tolerance; soon while a look costs next to nothing."""
        level = math.log10(min(max(excess, 1e-300), 1e30))
        before, previous = self.last_look
        pace = (previous - level) / (step - before) if before else 0.5
        wait = math.ceil(0.9 * (level - math.log10(tolerance)) / pace) if pace > 0 else 2
        self.next_check = step + min(max(wait, 1), 1 if step < 6 else 4)
        self.last_look = (step, level)

    def append(self) -> None:
        self.basis[:, self.size : self.size + self.block.shape[1]] = self.block
        self.size += self.block.shape[1]

    def ritz(self) -> tuple[Tensor, Tensor]:
        upper = torch.triu(self.projected[: self.size, : self.size])
        return torch.linalg.eigh(upper + torch.triu(upper, 1).T)


Operator = Callable[[Sequence[Factor], Sequence[Tensor]], list[Tensor]]


def gaussian_block(n: int, width: int, salt: int) -> Tensor:
    """A standard Gaussian (n, width) block in float64 on the CPU that depends on its arguments alone.

    Its own generator: the global random state is neither read nor moved.
    """
    generator = torch.Generator().manual_seed((n * 1_000_003 + width) * 8 + salt)
    return torch.randn(n, width, generator=generator, dtype=torch.float64)


def largest(
    backend: Backend,
    operator: Operator,
    factors: Sequence[Factor],
    noise: Callable[[int, float], float],
    tolerance: float,
    *,
    salt: int,
) -> list[Extreme]:
    """The largest eigenvalue of operator(factor) for every factor, to a relative excess of ``tolerance`` if it can.

    noise(i, theta): the relative rounding error of one application to matrix i whose largest eigenvalue is theta.
    salt: tells the start blocks of different ends apart.
    """
    spaces = [_begin(backend, factor, salt) for factor in factors]
    results: list[Extreme | None] = [None] * len(factors)
    active = list(range(len(factors)))
    step = 0
    while active:
        step += 1
        ended = _expand(backend, operator, [factors[i] for i in active], [spaces[i] for i in active])
        going = []
        for i, over in zip(active, ended, strict=True):
            if step < spaces[i].next_check and not over:
                going.append(i)
                continue
            result = _extract(spaces[i], lambda theta, i=i: noise(i, theta), tolerance)  # type: ignore[misc]
            if over or result.converged:
                results[i] = result
            else:
                spaces[i].schedule(step, result.excess, tolerance)
                going.append(i)
        active = going
    return [r for r in results if r is not None]


def _begin(backend: Backend, factor: Factor, salt: int) -> _Space:
    n, width = factor.n, min(WIDTH, factor.n)
    start = gaussian_block(n, width, salt).to(device=backend.device, dtype=factor.rung.dtype)
    block = torch.linalg.qr(start).Q
    capacity = min(n, MAX_BLOCKS * width)
    space = _Space(
        basis=block.new_empty((n, capacity)),
        projected=torch.zeros((capacity, capacity), dtype=torch.float64),
        start=width,
        overlap=start_overlap(n, width),
    )
    space.block = block
    return space


def _expand(
    backend: Backend, operator: Operator, factors: Sequence[Factor], spaces: Sequence[_Space]
) -> list[bool]:
    """One product and one reorthogonalization for all; True for a space that is full or invariant."""
    for space in spaces:
        space.append()
    images = operator(factors, [space.block for space in spaces])
    bases = [space.basis[:, : space.size] for space in spaces]
    coefficients, rest = backend.project(bases, images)
    for space, columns in zip(spaces, coefficients, strict=True):
        width = columns.shape[1]
        space.projected[: space.size, space.size - width : space.size] = columns.to("cpu", torch.float64)
        space.scale = max(space.scale, float(columns.abs().max()))
    drops = [DROP * f.rung.unit_roundoff for f in factors]
    pairs = backend.orthonormalize(rest, [s.scale for s in spaces], max(drops))
    ended = []
    for space, basis, (q, b) in zip(spaces, bases, pairs, strict=True):
        if q.shape[1] and float(torch.linalg.vector_norm(b[-1])) < CANCELLED * space.scale:
            # What was nearly cancelled carries rounding of the size of the basis: once more, now at unit length.
            q, r = torch.linalg.qr(backend.project([basis], [q])[1][0])
            b = r @ b
        space.coupling = b.to("cpu", torch.float64)
        space.block = q
        ended.append(q.shape[1] == 0 or space.size + q.shape[1] > space.basis.shape[1])
    return ended


def _extract(space: _Space, noise: Callable[[float], float], tolerance: float) -> Extreme:
    theta, vectors = space.ritz()
    top = float(theta[-1])
    above = excess(theta, vectors, space.coupling, space.start, space.overlap, noise(top))
    converged = above <= tolerance
    wanted = vectors[:, -min(WIDTH, space.size) :].to(space.basis)
    return Extreme(top, above, space.basis[:, : space.size] @ wanted, converged)

