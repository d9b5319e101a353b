"""Randomized block Krylov for the ladder: the largest eigenvalue of a symmetric positive operator, with an upper bound.

All matrices of a wave take the steps of block Lanczos (with full two-pass reorthogonalization) in lockstep. The
operator is R^T R for sigma_max and its inverse for sigma_min. Every matrix stops as soon as its own bound is tight
enough, since further steps of a converged inverse compute only rounding errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..backends.base import DROP, Backend, Factors, Panel, Ritz, Tensor, dense_projection
from ..backends.moving import on_device, pick, places
from .bounds import LARGEST_GAP, excess, start_overlap

WIDTH = 16
MAX_BLOCKS = 32  # trained and random weights need 4 to 17 at rtol 1e-2, 21 to 23 at 1e-6
CHECK_FROM = 2  # products before the bound is computed for the first time
FIRST_BLOCKS = 8  # blocks for which a basis has memory at first

Operator = Callable[[Factors, Panel], Panel]
Noise = Callable[[Sequence[int], Tensor], Tensor]


@dataclass
class Extreme:
    """The largest eigenvalue of one operator lies in [theta, theta (1 + excess)]."""

    theta: float
    excess: float
    converged: bool


@dataclass
class Schedule:
    """The step at which the bound of one matrix is computed next: when its decay so far would reach the tolerance."""

    next_check: int = CHECK_FROM
    last_step: int = 0
    last_level: float = 0.0  # log10 of the excess at last_step

    def plan(self, step: int, excess: float, tolerance: float) -> None:
        level = math.log10(min(max(excess, 1e-300), 10 * LARGEST_GAP))
        pace = (self.last_level - level) / (step - self.last_step) if self.last_step else 0.5
        wait = math.ceil(0.9 * (level - math.log10(tolerance)) / pace) if pace > 0 else 2
        # Early bounds cost next to nothing.
        self.next_check = step + min(max(wait, 1), 1 if step < 6 else 4)
        self.last_step, self.last_level = step, level


@dataclass
class KrylovBasis:
    """The growing Krylov bases of a wave."""

    basis: Panel  # the first ``size`` columns are in use
    block: Panel  # the newest block, which is not in the basis yet
    columns: list[Tensor]  # block columns of T, each (w, (j + 1) b, b)
    coupling: Tensor  # B, (w, b, b)
    scale: Tensor  # (w,)
    dropped: Tensor  # (w,) whether a direction has been left out
    alive: Tensor  # (w, b) the directions of ``block`` that are not left out
    missing: Tensor  # (w,) how many columns of the basis are zero because their directions were left out
    size: int = 0

    @classmethod
    def begin(
        cls, backend: Backend, ns: Sequence[int], seeds: Sequence[bytes], dtype: torch.dtype, width: int, salt: int
    ) -> KrylovBasis:
        """Bases that start from Gaussian blocks."""
        block = backend.orthonormalize(backend.gaussian(ns, seeds, width, salt, dtype))
        basis = Panel(block.data.new_empty((block.data.shape[0], FIRST_BLOCKS * width)), block.rows)
        nothing = torch.zeros((len(ns), width, width), dtype=torch.float64, device=backend.device)
        never = nothing[:, 0] != 0
        return cls(basis, block, [], nothing, nothing[:, 0, 0], never[:, 0], ~never, never.sum(dim=1))

    def append(self) -> None:
        stop = self.size + self.block.width
        if stop > self.basis.width:
            wider = self.basis.data.new_empty((self.basis.data.shape[0], 2 * self.basis.width))
            wider[:, : self.size] = self.basis.data[:, : self.size]
            self.basis = Panel(wider, self.basis.rows)
        self.basis.data[:, self.size : stop] = self.block.data
        self.size = stop

    @property
    def filled(self) -> Panel:
        return self.basis.columns(0, self.size)

    def take(self, which: list[int]) -> KrylovBasis:
        """The bases of the matrices at the positions ``which``, ascending."""
        if len(which) == len(self.basis.rows):
            return self
        columns = [pick(c, which) for c in self.columns]
        state = (self.coupling, self.scale, self.dropped, self.alive, self.missing)
        coupling, scale, dropped, alive, missing = (pick(t, which) for t in state)
        basis, block = self.basis.take(which), self.block.take(which)
        return KrylovBasis(basis, block, columns, coupling, scale, dropped, alive, missing, self.size)

    def expand(self, backend: Backend, operator: Callable[[Panel], Panel]) -> Tensor:
        """Multiply the newest blocks and orthogonalize the product; True (w,) for a space that has ended.

        A space has ended when it is invariant or when the operator produced a nan or inf. A direction that was left out
        gets a negative value in T, far below all others, so that its vector is not taken for a Ritz vector.
        """
        self.append()
        split = backend.extend(self.filled, operator(self.block), self.scale)
        diagonal = split.coefficients[:, -self.block.width :].diagonal(dim1=1, dim2=2)
        diagonal.copy_(torch.where(self.alive, diagonal, -split.scale[:, None]))
        self.missing = self.missing + (~self.alive).sum(dim=1)
        self.columns.append(split.coefficients)
        self.block, self.coupling, self.scale = split.new, split.coupling, split.scale
        self.alive = (split.coupling != 0).any(dim=2)
        self.dropped = self.dropped | ~self.alive.all(dim=1)
        return ~self.alive.any(dim=1) | ~torch.isfinite(split.scale)


def small_eigenpairs(columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All eigenpairs of T, ascending: (w, k) and (w, k, k), k up to 32, where every library has a batched solver."""
    projected = dense_projection(columns)
    finite = torch.isfinite(projected).all(dim=2).all(dim=1)  # LAPACK must not get a nan or inf
    theta, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], projected, 0.0))
    return torch.where(finite[:, None], theta, math.nan), vectors


def largest(
    backend: Backend,
    operator: Operator,
    factors: Factors,
    seeds: Sequence[bytes],
    noise: Noise,
    tolerance: float,
    *,
    salt: int,
    dtype: torch.dtype | None = None,
) -> tuple[list[Extreme], Panel]:
    """The largest eigenvalue of operator(factor) for every factor, to a relative excess of ``tolerance`` if possible.

    Also returns blocks (n, WIDTH) with orthonormal columns that span the Ritz vectors of the largest values, the
    largest last.

    seeds: one for the start block of each factor.
    noise(which, theta): the relative rounding error of one application to the matrices ``which``, whose largest
    eigenvalues are theta.  salt: makes the start blocks of both ends differ.  dtype: the dtype of the blocks, by
    default that of the factors.
    """
    search = _Search(backend, factors, noise, tolerance)
    space = KrylovBasis.begin(backend, factors.ns, seeds, dtype or factors.blocks, WIDTH, salt)
    active, chosen = list(range(len(factors.ns))), factors
    for step in range(1, MAX_BLOCKS + 1):
        ended = space.expand(backend, lambda block, chosen=chosen: operator(chosen, block))  # type: ignore[misc]
        going = set(search.check(space, active, ended, step))
        if not going:
            break
        kept = [j for j, i in enumerate(active) if i in going]
        space, chosen = space.take(kept), chosen.take(kept)
        active = [active[j] for j in kept]
    return search.extremes()


class _Search:
    """The results of one search, and the schedule of every matrix that has none yet."""

    def __init__(self, backend: Backend, factors: Factors, noise: Noise, tolerance: float) -> None:
        self._backend, self._noise, self._tolerance = backend, noise, tolerance
        overlaps = {n: start_overlap(n, min(n, WIDTH)) for n in set(factors.ns)}
        self._overlaps = on_device([overlaps[n] for n in factors.ns], backend.device)
        self._schedules = [Schedule() for _ in factors.ns]
        self._floors = torch.full_like(self._overlaps, math.nan)  # the last theta, a lower bound of the next one
        self.results: dict[int, Extreme] = {}
        self._vectors: list[Panel] = []  # one panel of vectors each time that results were found, in that order

    def extremes(self) -> tuple[list[Extreme], Panel]:
        """All results and their vectors, by position."""
        rows = tuple(n for panel in self._vectors for n in panel.rows)
        data = [panel.data for panel in self._vectors]
        order = list(self.results)
        places = sorted(range(len(order)), key=order.__getitem__)
        vectors = Panel(data[0] if len(data) == 1 else torch.cat(data), rows).take(places)
        return [self.results[order[place]] for place in places], vectors

    def check(self, space: KrylovBasis, active: list[int], ended: Tensor, step: int) -> list[int]:
        """The matrices of ``active`` that have not converged and can go on. One read for the whole wave, as a rule."""
        due = [j for j, i in enumerate(active) if step in (self._schedules[i].next_check, MAX_BLOCKS)]
        ritz, bound = self._bound(space, active, due)
        read = self._backend.read(torch.cat([ended.to(torch.float64), bound]))
        over = [step == MAX_BLOCKS or bool(flag) for flag in read[: len(active)]]
        self._record(space, active, due, over, ritz, read[len(active) :], step)
        late = [j for j, i in enumerate(active) if over[j] and i not in self.results]
        if late:
            ritz, bound = self._bound(space, active, late)
            self._record(space, active, late, over, ritz, self._backend.read(bound), step)
        return [i for i in active if i not in self.results]

    def _bound(self, space: KrylovBasis, active: list[int], which: list[int]) -> tuple[Ritz | None, Tensor]:
        """The Ritz pairs of the matrices at ``which``, and a tensor of their largest values and then their excesses."""
        if not which:
            return None, self._overlaps[:0]
        positions = [active[j] for j in which]
        columns, coupling = [pick(c, which) for c in space.columns], pick(space.coupling, which)
        ritz = self._backend.ritz(columns, coupling, pick(self._floors, positions))
        self._floors.index_copy_(0, places(tuple(positions), self._floors.device), ritz.theta)
        unit = float(torch.finfo(space.basis.data.dtype).eps) / 2
        noise = self._noise(positions, ritz.theta) + DROP * unit * pick(space.dropped, which)
        return ritz, torch.cat([ritz.theta, excess(ritz, pick(self._overlaps, positions), noise)])

    def _record(
        self,
        space: KrylovBasis,
        active: list[int],
        which: list[int],
        over: list[bool],
        ritz: Ritz | None,
        values: list[float],
        step: int,
    ) -> None:
        """Record the results of the matrices that are done, and plan the next bound of the others."""
        done = []
        for k, j in enumerate(which):
            theta, above = values[k], values[len(which) + k]
            if over[j] or above <= self._tolerance:
                done.append((k, j, theta, above))
            else:
                self._schedules[active[j]].plan(step, above, self._tolerance)
        if done and ritz is not None:
            coefficients = pick(ritz.vectors(WIDTH), [k for k, *_ in done])
            self._vectors.append(self._backend.combine(space.filled.take([j for _, j, *_ in done]), coefficients))
            for _, j, theta, above in done:
                self.results[active[j]] = Extreme(theta, above, above <= self._tolerance)
