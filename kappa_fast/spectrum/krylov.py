"""Randomized block Krylov: the largest eigenvalue of a symmetric positive operator, with a bound on what lies above.

Block Lanczos with full two-pass reorthogonalization on a whole wave. The operator is R^T R for sigma_max and its
inverse for sigma_min. Every matrix stops on its own, as soon as its bound is tight enough: a converged inverse would
otherwise go on into noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from ..backends.base import Backend, Factor, Tensor
from .bounds import excess, start_overlap

WIDTH = 16
MAX_BLOCKS = 32  # trained and random weights need 4 to 17 at rtol 1e-2, 21 to 23 at 1e-6
CHECK_FROM = 2  # products before the first look at the bound
CANCELLED = 1e-2  # below this share of the operator's norm a direction is orthogonalized once more
DROP = 16.0  # directions below DROP u of the operator's norm are rounding, not information


@dataclass
class Extreme:
    """What is known of the largest eigenvalue of one operator, and the block of vectors that go with it."""

    theta: float
    excess: float
    vectors: Tensor  # (n, w) Ritz vectors, the wanted one last
    converged: bool


@dataclass
class Space:
    """A growing Krylov basis of one matrix."""

    basis: Tensor  # (n, capacity); the first ``size`` columns are in use
    projected: Tensor  # (capacity, capacity) float64 on the CPU, upper block triangle of T
    block: Tensor  # (n, w), the newest, not yet in the basis
    start: int
    size: int = 0
    coupling: Tensor = field(default_factory=lambda: torch.empty(0))  # (w, width of the block before), B
    scale: float = 0.0
    dropped: bool = False
    next_check: int = CHECK_FROM
    last_look: tuple[int, float] = (0, 0.0)  # step and log10(excess) of the last look at the bound

    @classmethod
    def begin(cls, backend: Backend, n: int, dtype: torch.dtype, width: int, blocks: int, salt: int) -> Space:
        """A space that starts from a Gaussian block and has room for ``blocks`` products."""
        width = min(width, n)
        start = gaussian_block(n, width, salt).to(device=backend.device, dtype=dtype)
        block = torch.linalg.qr(start).Q
        capacity = min(n, blocks * width)
        projected = torch.zeros((capacity, capacity), dtype=torch.float64, device="cpu")
        return cls(block.new_empty((n, capacity)), projected, block, width)

    def append(self) -> None:
        self.basis[:, self.size : self.size + self.block.shape[1]] = self.block
        self.size += self.block.shape[1]

    @property
    def filled(self) -> Tensor:
        return self.basis[:, : self.size]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (k,), ascending, and eigenvectors (k, k) of the projected operator, float64 on the CPU."""
        upper = torch.triu(self.projected[: self.size, : self.size])
        return torch.linalg.eigh(upper + torch.triu(upper, 1).T)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Ritz vectors (n, j) from coefficients (k, j)."""
        return self.filled @ coefficients.to(self.basis)

    def schedule(self, step: int, excess: float, tolerance: float) -> None:
        """Look again when the decay seen so far would reach the tolerance; soon while a look costs next to nothing."""
        level = math.log10(min(max(excess, 1e-300), 1e30))
        before, previous = self.last_look
        pace = (previous - level) / (step - before) if before else 0.5
        wait = math.ceil(0.9 * (level - math.log10(tolerance)) / pace) if pace > 0 else 2
        self.next_check = step + min(max(wait, 1), 1 if step < 6 else 4)
        self.last_look = (step, level)


@lru_cache(maxsize=16)  # a model has few shapes; a block is 16 n numbers
def gaussian_block(n: int, width: int, salt: int) -> Tensor:
    """A standard Gaussian (n, width) block in float64 on the CPU that depends on its arguments alone.

    Its own generator: the global random state is neither read nor moved. Never write to it: it is shared.
    """
    generator = torch.Generator("cpu").manual_seed((n * 1_000_003 + width) * 8 + salt)
    return torch.randn(n, width, generator=generator, dtype=torch.float64, device="cpu")


def expand(backend: Backend, spaces: Sequence[Space], operator: Callable[[list[Tensor]], list[Tensor]]) -> list[bool]:
    """One product with the newest blocks and its orthogonalization; True for a space that is full or invariant."""
    for space in spaces:
        space.append()
    images = operator([space.block for space in spaces])
    bases = [space.filled for space in spaces]
    coefficients, rest = backend.project(bases, images)
    for space, columns in zip(spaces, coefficients, strict=True):
        width = columns.shape[1]
        space.projected[: space.size, space.size - width : space.size] = columns.to("cpu", torch.float64)
        largest_here = float(columns.abs().max())
        space.scale = max(space.scale, largest_here) if math.isfinite(largest_here) else math.inf
    floors = [DROP * float(torch.finfo(s.basis.dtype).eps) / 2 * s.scale for s in spaces]
    pairs = backend.orthonormalize(rest, floors)
    ended = []
    for space, (q, b) in zip(spaces, pairs, strict=True):
        if q.shape[1] and float(torch.linalg.vector_norm(b, dim=1).min()) < CANCELLED * space.scale:
            # What was nearly cancelled carries rounding of the size of the basis: once more, now at unit length.
            q, r = torch.linalg.qr(backend.project([space.filled], [q])[1][0])
            b = r @ b
        space.coupling = b.to("cpu", torch.float64)
        space.dropped |= b.shape[0] < b.shape[1]
        space.block = q
        ended.append(
            q.shape[1] == 0 or not math.isfinite(space.scale) or space.size + q.shape[1] > space.basis.shape[1]
        )
    return ended


Operator = Callable[[Sequence[Factor], Sequence[Tensor]], list[Tensor]]


def largest(
    backend: Backend,
    operator: Operator,
    factors: Sequence[Factor],
    noise: Callable[[int, float], float],
    tolerance: float,
    *,
    salt: int,
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[Extreme]:
    """The largest eigenvalue of operator(factor) for every factor, to a relative excess of ``tolerance`` if it can.

    noise(i, theta): the relative rounding error of one application to matrix i whose largest eigenvalue is theta.
    salt: tells the start blocks of different ends apart.  dtypes: of the blocks, those of the rungs if not given.
    """
    chosen_dtypes = [f.rung.dtype for f in factors] if dtypes is None else dtypes
    spaces = [
        Space.begin(backend, f.n, dtype, WIDTH, MAX_BLOCKS, salt)
        for f, dtype in zip(factors, chosen_dtypes, strict=True)
    ]
    results: dict[int, Extreme] = {}
    active = list(range(len(factors)))
    step = 0
    while active:
        step += 1
        chosen = [factors[i] for i in active]
        ended = expand(backend, [spaces[i] for i in active], lambda blocks, chosen=chosen: operator(chosen, blocks))  # type: ignore[misc]
        going = []
        for i, over in zip(active, ended, strict=True):
            if over or step >= spaces[i].next_check:
                found = _extract(spaces[i], lambda theta, i=i: noise(i, theta), tolerance)  # type: ignore[misc]
                if over or found.converged:
                    results[i] = found
                    continue
                spaces[i].schedule(step, found.excess, tolerance)
            going.append(i)
        active = going
    return [results[i] for i in range(len(factors))]


def _extract(space: Space, noise: Callable[[float], float], tolerance: float) -> Extreme:
    if not math.isfinite(space.scale):
        return Extreme(math.nan, math.inf, space.filled[:, : space.start], False)
    theta, vectors = space.ritz()
    top = float(theta[-1])
    overlap = start_overlap(space.basis.shape[0], space.start)
    left_out = DROP * float(torch.finfo(space.basis.dtype).eps) / 2 if space.dropped else 0.0
    above = excess(theta, vectors, space.coupling, space.start, overlap, noise(top) + left_out, tolerance)
    return Extreme(top, above, space.combine(vectors[:, -WIDTH:]), above <= tolerance)
