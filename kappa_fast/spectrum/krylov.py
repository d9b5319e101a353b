"""Randomized block Krylov: the largest eigenvalue of a symmetric positive operator, with a bound on what lies above.

Block Lanczos with full two-pass reorthogonalization, in lockstep on a whole wave. The operator is R^T R for sigma_max
and its inverse for sigma_min. Every matrix stops on its own, as soon as its bound is tight enough: a converged inverse
would otherwise go on into noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..backends.base import DROP, Backend, Factors, Panel, Ritz, Tensor, dense_projection
from .bounds import WIDEST, excess, start_overlap

WIDTH = 16
MAX_BLOCKS = 32  # trained and random weights need 4 to 17 at rtol 1e-2, 21 to 23 at 1e-6
CHECK_FROM = 2  # products before the first look at the bound
FIRST_BLOCKS = 8  # that a basis has room for at first

Operator = Callable[[Factors, Panel], Panel]
Noise = Callable[[Sequence[int], Tensor], Tensor]


@dataclass
class Extreme:
    """What is known of the largest eigenvalue of one operator."""

    theta: float
    excess: float
    converged: bool


@dataclass
class Schedule:
    """When to look at the bound of one matrix: as soon as the decay seen so far would reach the tolerance."""

    next_check: int = CHECK_FROM
    last_step: int = 0
    last_level: float = 0.0  # log10 of the excess at last_step

    def plan(self, step: int, excess: float, tolerance: float) -> None:
        level = math.log10(min(max(excess, 1e-300), 10 * WIDEST))
        pace = (self.last_level - level) / (step - self.last_step) if self.last_step else 0.5
        wait = math.ceil(0.9 * (level - math.log10(tolerance)) / pace) if pace > 0 else 2
        # Soon again while a look costs next to nothing.
        self.next_check = step + min(max(wait, 1), 1 if step < 6 else 4)
        self.last_step, self.last_level = step, level


@dataclass
class KrylovBasis:
    """The growing Krylov bases of a wave."""

    basis: Panel  # the first ``size`` columns are in use
    block: Panel  # the newest, not yet in the basis
    columns: list[Tensor]  # block columns of T, each (w, (j + 1) b, b)
    coupling: Tensor  # B, (w, b, b)
    scale: Tensor  # (w,)
    dropped: Tensor  # (w,) whether a direction has been left out
    alive: Tensor  # (w, b) the directions of ``block`` that have not
    missing: Tensor  # (w,) how many columns of the basis are zero, for directions left out
    size: int = 0

    @classmethod
    def begin(
        cls, backend: Backend, ns: Sequence[int], seeds: Sequence[bytes], dtype: torch.dtype, width: int, salt: int
    ) -> KrylovBasis:
        """Spaces that start from Gaussian blocks."""
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
        """The spaces of some matrices, ascending."""
        if len(which) == len(self.basis.rows):
            return self
        columns = [_pick(c, which) for c in self.columns]
        state = (self.coupling, self.scale, self.dropped, self.alive, self.missing)
        coupling, scale, dropped, alive, missing = (_pick(t, which) for t in state)
        basis, block = self.basis.take(which), self.block.take(which)
        return KrylovBasis(basis, block, columns, coupling, scale, dropped, alive, missing, self.size)

    def expand(self, backend: Backend, operator: Callable[[Panel], Panel]) -> Tensor:
        """One product with the newest blocks and its orthogonalization; True (w,) for a space that has ended.

        It has when it is invariant or when the operator produced something that is not finite. A direction that was
        left out gets a negative value in T, far below all others: its vector must not be taken for one of them.
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
    """All eigenpairs of T, ascending: (w, k) and (w, k, k), for k up to 32, where every library works on batches."""
    projected = dense_projection(columns)
    finite = torch.isfinite(projected).all(dim=2).all(dim=1)  # LAPACK must not see what is not
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
    """The largest eigenvalue of operator(factor) for every factor, to a relative excess of ``tolerance`` if it can.

    Beside it blocks (n, WIDTH) with orthonormal columns, which span the Ritz vectors of the largest values, the largest
    last.

    seeds: of the start blocks, one for each factor.
    noise(which, theta): the relative rounding error of one application to those matrices, whose largest eigenvalues
    are theta.  salt: tells the start blocks of different ends apart.  dtype: of the blocks, if not that of the factors.
    """
    search = _Search(backend, factors, noise, tolerance)
    space = KrylovBasis.begin(backend, factors.ns, seeds, dtype or factors.blocks, WIDTH, salt)
    active, chosen = list(range(len(factors.ns))), factors
    for step in range(1, MAX_BLOCKS + 1):
        ended = space.expand(backend, lambda block, chosen=chosen: operator(chosen, block))  # type: ignore[misc]
        going = set(search.look(space, active, ended, step))
        if not going:
            break
        kept = [j for j, i in enumerate(active) if i in going]
        space, chosen = space.take(kept), chosen.take(kept)
        active = [active[j] for j in kept]
    return search.extremes()


class _Search:
    """Who has been found, and when to look at whom."""

    def __init__(self, backend: Backend, factors: Factors, noise: Noise, tolerance: float) -> None:
        self._backend, self._noise, self._tolerance = backend, noise, tolerance
        overlaps = {n: start_overlap(n, min(n, WIDTH)) for n in set(factors.ns)}
        self._overlaps = torch.tensor([overlaps[n] for n in factors.ns], dtype=torch.float64, device=backend.device)
        self._schedules = [Schedule() for _ in factors.ns]
        self._floors = torch.full_like(self._overlaps, math.nan)  # theta of the last look: T grows, and theta with it
        self.results: dict[int, Extreme] = {}
        self._vectors: list[Panel] = []  # of the results, in the order in which they were found

    def extremes(self) -> tuple[list[Extreme], Panel]:
        """All results and their vectors, by position."""
        rows = tuple(n for panel in self._vectors for n in panel.rows)
        data = [panel.data for panel in self._vectors]
        order = list(self.results)
        places = sorted(range(len(order)), key=order.__getitem__)
        vectors = Panel(data[0] if len(data) == 1 else torch.cat(data), rows).take(places)
        return [self.results[order[place]] for place in places], vectors

    def look(self, space: KrylovBasis, active: list[int], ended: Tensor, step: int) -> list[int]:
        """Those of ``active`` that go on: not converged, and able to. One read for the whole wave, as a rule."""
        due = [j for j, i in enumerate(active) if step in (self._schedules[i].next_check, MAX_BLOCKS)]
        ritz, bound = self._bound(space, active, due)
        read = self._backend.read(torch.cat([ended.to(torch.float64), bound]))
        over = [step == MAX_BLOCKS or bool(flag) for flag in read[: len(active)]]
        self._sort(space, active, due, over, ritz, read[len(active) :], step)
        late = [j for j, i in enumerate(active) if over[j] and i not in self.results]
        if late:
            ritz, bound = self._bound(space, active, late)
            self._sort(space, active, late, over, ritz, self._backend.read(bound), step)
        return [i for i in active if i not in self.results]

    def _bound(self, space: KrylovBasis, active: list[int], which: list[int]) -> tuple[Ritz | None, Tensor]:
        """Ritz values and, behind them, the excess of each."""
        if not which:
            return None, self._overlaps[:0]
        positions = [active[j] for j in which]
        columns, coupling = [_pick(c, which) for c in space.columns], _pick(space.coupling, which)
        ritz = self._backend.ritz(columns, coupling, _pick(self._floors, positions))
        self._floors[positions] = ritz.theta
        unit = float(torch.finfo(space.basis.data.dtype).eps) / 2
        noise = self._noise(positions, ritz.theta) + DROP * unit * _pick(space.dropped, which)
        return ritz, torch.cat([ritz.theta, excess(ritz, _pick(self._overlaps, positions), noise)])

    def _sort(
        self,
        space: KrylovBasis,
        active: list[int],
        which: list[int],
        over: list[bool],
        ritz: Ritz | None,
        values: list[float],
        step: int,
    ) -> None:
        """Keep the results of those that are done, and plan when to look at the others again."""
        done = []
        for k, j in enumerate(which):
            theta, above = values[k], values[len(which) + k]
            if over[j] or above <= self._tolerance:
                done.append((k, j, theta, above))
            else:
                self._schedules[active[j]].plan(step, above, self._tolerance)
        if done and ritz is not None:
            coefficients = _pick(ritz.vectors(WIDTH), [k for k, *_ in done])
            self._vectors.append(self._backend.combine(space.filled.take([j for _, j, *_ in done]), coefficients))
            for _, j, theta, above in done:
                self.results[active[j]] = Extreme(theta, above, above <= self._tolerance)


def _pick(values: Tensor, which: list[int]) -> Tensor:
    """Rows of a small tensor, ascending, without a copy where they are all of them."""
    return values if len(which) == values.shape[0] else values[which]
