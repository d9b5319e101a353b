"""The ladder: it resolves a wave of weights to kappa with an interval, each matrix on the cheapest rung that can.

A matrix climbs to the next rung when its factorization breaks down, when the residual of the factorization (departure)
is too large, or when its interval is wider than asked for; never because an estimate stopped changing, which proves
nothing. The last rung is exact.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..backends.base import CLIMBING, Backend, Factors, Operand, Panel, Rung, Tensor, symmetric_norm
from ..machine.torch_state import emulates_float64, flushes
from ..results.statistics import OF_SPECTRUM, UNKNOWN, Statistics
from . import certify as proofs
from . import exact, measures, small, statistics
from .bounds import norm_factor
from .krylov import WIDTH
from .polish import Triplets, polish, sensitivities
from .resolution import Goal, Resolution
from .rounding import U
from .search import interval, search

log = logging.getLogger("kappa_fast")


EXACT_BELOW = 160  # below so many columns an SVD is faster than the other rungs: 3.1 ms and 7.0 at 160 x 160
EXACT_SLENDER = 16  # unless there are more rows per column: 32000 x 158 takes 270 ms by SVD and 46 by the other rungs
EXACT_ALWAYS = 32
# How many rtol the excess of each end (relative, of sigma^2) and the departure may take; all three may take 4 together.
END_SHARE = 1.2
DEPARTURE_SHARE = 0.8
SUSPICIOUS = 1e12  # a matrix with a larger kappa may be singular


@dataclass
class _Climber:
    """One matrix on its way up."""

    position: int
    dtype: torch.dtype
    operand: Operand
    rungs: tuple[Rung, ...]
    seed: bytes = b""  # the digest from which its start blocks are drawn
    level: int = 0  # the index of its current rung
    best: Resolution | None = None
    triplets: Triplets | None = None
    statistics: Statistics = UNKNOWN
    done: bool = field(default=False)

    @property
    def rung(self) -> Rung:
        return self.rungs[self.level]

    def keep(self, found: Resolution, triplets: Triplets) -> None:
        """Record the result of a rung: it replaces the estimate, and it can only tighten the bounds."""
        if self.best is not None:
            lower = max(found.lower, self.best.lower)
            upper = found.upper if found.certified else min(found.upper, self.best.upper)
            if lower > upper:  # lower bounds are proven, so the upper bound of the rung before was wrong
                upper = max(found.upper, lower)
            found = replace(found, lower=lower, upper=upper, kappa=min(max(found.kappa, lower), upper))
        self.best, self.triplets = found, triplets


def resolve(
    backend: Backend, weights: Sequence[Tensor], goal: Goal, gate: exact.MemoryGate | None = None
) -> list[Resolution]:
    """Resolve one wave: 2-D weights of any shape, float dtype and strides, which are left unchanged.

    ``gate`` is shared by waves that are resolved side by side.
    """
    gate = gate or exact.MemoryGate()
    operands = backend.prepare(weights)
    # A subnormal number that was flushed to zero, or a product that is no sum of rounded products, makes proofs wrong.
    if flushes() or emulates_float64(backend.device):
        operands = [replace(a, exact=False) for a in operands]
    results: list[Resolution | None] = [_resolve_trivial(a) for a in operands]
    _resolve_small(backend, operands, [weight.dtype for weight in weights], goal, results)
    open_ = [i for i, found in enumerate(results) if found is None]
    kinds = [(operands[i].shape, weights[i].dtype) for i in open_]
    rungs = {k: () if left_to_the_svd(k[0]) else backend.rungs(*k, proofs=goal.certify) for k in set(kinds)}
    climbers = [_Climber(i, kind[1], operands[i], rungs[kind]) for i, kind in zip(open_, kinds, strict=True)]
    climbing = [c for c in climbers if c.rungs]
    for climber, digest in zip(climbing, backend.digests([c.operand for c in climbing]), strict=True):
        climber.seed = digest
    _climb(backend, climbing, goal)
    for climber in climbers:
        if not climber.done:
            with gate.taken(climber.operand):
                _finish_exactly(climber, goal)
    for climber in climbers:
        _complete(backend, climber, goal, gate)
    _measure_sensitivity(backend, [c for c in climbers if c.best is not None and c.best.status == "ok"])
    if goal.certify:
        _prove(backend, climbers, goal.rtol)
    for climber in climbers:
        assert climber.best is not None  # the exact rung always gives a result
        found = replace(climber.best, statistics=climber.statistics)
        results[climber.position] = _unscale(found, climber.operand.exponent)
    return [r for r in results if r is not None]


def _resolve_small(
    backend: Backend,
    operands: Sequence[Operand],
    dtypes: Sequence[torch.dtype],
    goal: Goal,
    results: list[Resolution | None],
) -> None:
    """Add to ``results`` those of small matrices that batches of float64 Gram matrices resolve on the CPU."""
    shapes = [a.shape if found is None else None for a, found in zip(operands, results, strict=True)]
    here = backend.side_by_side  # an accelerator leaves to the CPU what the last rung would do there
    which = [i for i, s in enumerate(shapes) if s and (here or left_to_the_svd(s)) and goes_in_batches(s, goal)]
    founds = small.resolve_small([operands[i] for i in which], [dtypes[i] for i in which], goal)
    for i, found in zip(which, founds, strict=True):
        if found is not None:
            results[i] = _unscale(found, operands[i].exponent)


def _prove(backend: Backend, climbers: Sequence[_Climber], rtol: float) -> None:
    """Prove the intervals that the last rung has not proven to ``rtol`` already."""
    measured = [(c, c.best) for c in climbers if c.triplets is not None and c.best is not None]
    ok = [(c, found) for c, found in measured if found.status == "ok"]
    chosen = [(c, found) for c, found in ok if not found.certified or found.half_width > rtol]
    wanted = {c.position for c, _ in chosen}
    for climber in climbers:
        if climber.position not in wanted:
            climber.operand.cache.clear()  # no proof needs these products any more, and they take memory
    founds = [replace(found, certified=False) for _, found in chosen]
    proven = proofs.certify_wave(backend, [c.operand for c, _ in chosen], founds, rtol)
    for (climber, before), found in zip(chosen, proven, strict=True):
        if not before.certified or (found.certified and found.upper < before.upper):
            climber.best = found


def goes_in_batches(shape: tuple[int, int], goal: Goal) -> bool:
    """Whether a matrix of this shape (m, n), m >= n, is tried among small ones first, which find both ends alone."""
    return small.eligible(shape, goal) and not any(name in OF_SPECTRUM for name in goal.statistics)


def left_to_the_svd(shape: tuple[int, int]) -> bool:
    """Whether the exact rung is the fastest for a matrix of this shape (m, n), m >= n."""
    m, n = shape
    return n < EXACT_ALWAYS or (n < EXACT_BELOW and m <= EXACT_SLENDER * n)


def _resolve_trivial(a: Operand) -> Resolution | None:
    if not a.finite:
        return Resolution("non_finite", math.nan, math.nan, math.nan, math.nan, math.nan, "none")
    if a.peak == 0:
        lower = math.inf if a.exact else 1.0
        known = statistics.of_singular(a.shape, None, 0.0, (0.0, 0.0), 0.0)
        return Resolution(
            "rank_deficient", math.inf, lower, math.inf, 0.0, 0.0, "zero", certified=a.exact, statistics=known
        )
    if a.shape[1] == 1:
        sigma = float(torch.linalg.vector_norm(a.tensor.to(torch.float64)))  # float8 has no norm of its own
        found = Resolution("ok", 1.0, 1.0, 1.0, sigma, sigma, "vector", certified=True, sensitivity=0.0)
        return _unscale(replace(found, statistics=statistics.of_vector(sigma)), a.exponent)
    return None


@dataclass
class _Factored:
    """Matrices whose factors are accurate enough, with these factors and bounds on their departures."""

    climbers: list[_Climber]
    factors: Factors
    departures: list[float]

    def beside(self, other: _Factored) -> _Factored:
        """The matrices of both."""
        return _Factored(
            self.climbers + other.climbers, self.factors.beside(other.factors), self.departures + other.departures
        )


def _climb(backend: Backend, climbers: Sequence[_Climber], goal: Goal) -> None:
    """Let every matrix climb until it is resolved or has no further rung.

    A matrix whose factor is not accurate enough climbs at once, so that all matrices of a wave search both ends in the
    same steps on whatever rungs. A matrix whose interval is too wide, or whose next rung needs memory that is not free,
    climbs after these steps.
    """
    most = CLIMBING * sum(backend.need(c.operand.shape, c.rung) for c in climbers)
    active = list(climbers)
    while active:
        lanes: dict[tuple[torch.dtype, torch.dtype], _Factored] = {}
        waiting: list[_Climber] = []
        free = most
        while active:
            now, later, free = _split_by_memory(backend, active, free, alone=not lanes)
            waiting += later
            for key, chosen in _by_block_dtypes(now, goal).items():
                found = _factor_accurately(backend, chosen, DEPARTURE_SHARE * goal.rtol)
                if found is not None:
                    lanes[key] = lanes[key].beside(found) if key in lanes else found
            kept = {id(climber) for found in lanes.values() for climber in found.climbers}
            active = _climb_one_rung([c for c in now if id(c) not in kept])
        active = waiting
        for key in list(lanes):
            found = lanes.pop(key)
            _resolve_with_factors(backend, found, goal)
            active += _climb_one_rung([c for c in found.climbers if not c.done])
            del found  # before the next rung needs the memory


def _split_by_memory(
    backend: Backend, climbers: Sequence[_Climber], free: float, *, alone: bool
) -> tuple[list[_Climber], list[_Climber], float]:
    """The climbers that have enough memory now, those that have to wait, and the bytes that remain.

    The first rungs of a wave always fit. alone: whether no factor is held; then one climber may exceed ``free``.
    """
    now: list[_Climber] = []
    later: list[_Climber] = []
    for climber in climbers:
        need = backend.need(climber.operand.shape, climber.rung) if climber.level else 0
        if need <= free or (alone and not now):
            now.append(climber)
            free -= need
        else:
            later.append(climber)
    return now, later, free


def _climb_one_rung(climbers: Sequence[_Climber]) -> list[_Climber]:
    """Move every climber to its next rung; returns those that have one."""
    for climber in climbers:
        climber.level += 1
    return [c for c in climbers if c.level < len(c.rungs)]


def _by_block_dtypes(climbers: Sequence[_Climber], goal: Goal) -> dict[tuple[torch.dtype, torch.dtype], list[_Climber]]:
    """The climbers by the dtypes of their blocks for both ends: one step serves all matrices of equal dtypes."""
    found: dict[tuple[torch.dtype, torch.dtype], list[_Climber]] = {}
    for c in climbers:
        found.setdefault((c.rung.blocks, c.rung.product_dtype(END_SHARE * goal.rtol)), []).append(c)
    return found


def _factor_accurately(backend: Backend, climbers: Sequence[_Climber], limit: float) -> _Factored | None:
    """The matrices that their current rungs factor with a departure up to ``limit``; None if there are none."""
    factors = backend.factor([c.operand for c in climbers], [c.rung for c in climbers])
    sound = [i for i, data in enumerate(factors.data) if data is not None]
    if not sound:
        return None
    climbers, factors = [climbers[i] for i in sound], factors.take(sound)
    departures = _measure_departures(backend, climbers, factors, limit)
    kept = [i for i, departure in enumerate(departures) if departure <= limit]
    if not kept:
        return None
    return _Factored([climbers[i] for i in kept], factors.take(kept), [departures[i] for i in kept])


def _resolve_with_factors(backend: Backend, wave: _Factored, goal: Goal) -> None:
    """Search both ends of every matrix, polish them, and record the interval; or only what needs no ends."""
    climbers, factors = wave.climbers, wave.factors
    if not goal.ends:
        return _measure_factors(backend, wave)
    (tops, highest), (bottoms, lowest) = search(backend, factors, [c.seed for c in climbers], END_SHARE * goal.rtol)
    volumes = backend.read(backend.volumes([c.operand for c in climbers], factors))
    polished = backend.solve(factors, lowest)
    # The vectors of an operator that overflowed cannot be polished, and LAPACK must not get their NaNs.
    finite = backend.read(torch.isfinite(backend.norms(polished)).all(dim=1))
    good = [j for j in range(len(climbers)) if finite[j] and 0 < tops[j].theta * bottoms[j].theta < math.inf]
    if not good:
        return
    chosen = [climbers[j] for j in good]
    found = polish(backend, [c.operand for c in chosen], highest.take(good), polished.take(good))
    for j, climber, triplets in zip(good, chosen, found, strict=True):
        if triplets.sigma_min > 0:
            rounding = 4 * (sum(climber.operand.shape) + 8) * U
            resolution = interval(factors.rungs[j], wave.departures[j], tops[j], bottoms[j], triplets, rounding)
            climber.keep(resolution, triplets)
            ends, power = (triplets.sigma_max, triplets.sigma_min), factors.rungs[j].power
            climber.statistics = statistics.of_factor(
                climber.operand.shape, power, wave.departures[j], volumes[j], triplets.norm, ends
            )
            climber.done = resolution.half_width <= goal.rtol or resolution.lower > goal.cutoff


def _measure_factors(backend: Backend, wave: _Factored) -> None:
    """Record the statistics of the factors, without both ends of the spectrum."""
    climbers, factors = wave.climbers, wave.factors
    operands, nan = [c.operand for c in climbers], math.nan
    ones = Panel.pack([torch.ones((n, 1), dtype=torch.float64, device=backend.device) for n in factors.ns])
    norms = backend.apply(operands, ones)[1]
    rows = backend.read(torch.cat([backend.volumes(operands, factors), norms[:, None]], dim=1))
    for climber, rung, departure, (*volume, norm) in zip(climbers, factors.rungs, wave.departures, rows, strict=True):
        climber.best = Resolution("bounded", nan, 1.0, math.inf, nan, nan, rung.name)
        climber.statistics = statistics.of_factor(
            climber.operand.shape, rung.power, departure, volume, norm, (nan, nan)
        )
        climber.done = True


def _measure_departures(backend: Backend, climbers: Sequence[_Climber], factors: Factors, limit: float) -> list[float]:
    """Bounds on ||M||_2 from a Gaussian block X: from ||M X||, and if that is too large from ||M^T M X||."""
    blocks = backend.gaussian(factors.ns, [c.seed for c in climbers], WIDTH, 2, factors.blocks)
    bounds = [math.inf] * len(climbers)
    factor = norm_factor(WIDTH) / math.sqrt(WIDTH)
    active = list(range(len(climbers)))
    for power in (1, 2):
        operands = [climbers[i].operand for i in active]
        blocks = backend.departure(operands, factors.take(active), blocks, transposed=power == 2)
        norms = backend.read(torch.linalg.vector_norm(backend.norms(blocks), dim=1))
        for i, norm in zip(active, norms, strict=True):
            if math.isfinite(norm):
                bounds[i] = min(bounds[i], (factor * norm) ** (1 / power))
        again = [j for j, i in enumerate(active) if limit < bounds[i] < 0.5]
        if not again:
            break
        blocks, active = blocks.take(again), [active[j] for j in again]
    return bounds


def _finish_exactly(climber: _Climber, goal: Goal) -> None:
    a = climber.operand
    suspected = bool(climber.rungs) and (climber.best is None or climber.best.lower > SUSPICIOUS)
    climber.done = True
    # Searching for equal columns takes as long as a small decomposition, so it is done only for a suspected matrix.
    if (suspected or a.peak == 0) and _found_plainly_singular(climber):
        return
    ends = exact.decompose(a, goal.rtol, suspected=suspected)
    (high_low, high_up), (low_low, low_up) = ends.largest, ends.smallest
    high, low = (high_low + high_up) / 2, (low_low + low_up) / 2
    lower = max(1.0, high_low / low_up * (1 - 4 * U)) if low_up > 0 else math.inf
    if ends.left is None or ends.right is None or lower > exact.SINGULAR:
        if not suspected and _found_plainly_singular(climber):
            return
        climber.best = Resolution("rank_deficient", math.inf, lower, math.inf, high, low, exact.METHOD)
        norm = float(torch.linalg.vector_norm(a.tensor.to("cpu", torch.float64)))
        climber.statistics = statistics.of_singular(a.shape, ends.values, norm, ends.largest, low_up)
        climber.triplets = None
    else:
        upper = high_up / low_low * (1 + 4 * U)
        left, right = (x.to(a.tensor.device) for x in (ends.left, ends.right))
        kappa = min(max(high / low, lower), upper)
        found = Resolution("ok", kappa, lower, upper, high, low, exact.METHOD, certified=goal.certify and a.exact)
        climber.keep(found, Triplets(high, low, lower, left, right))
        if ends.values is not None:
            climber.statistics = statistics.of_values(a.shape, ends.values, ends.smallest)


def _complete(backend: Backend, climber: _Climber, goal: Goal, gate: exact.MemoryGate) -> None:
    """Compute the statistics that the goal asks for and no rung has given."""
    known = climber.statistics
    if all(getattr(known, name) is not None for name in goal.statistics):
        return
    a = climber.operand
    if any(getattr(known, name) is None for name in goal.statistics if name in OF_SPECTRUM):
        with gate.taken(a):
            values = measures.singular_values(backend, a)
        known = climber.statistics = replace(known, **measures.of_spectrum(a.shape, values))
    if all(getattr(known, name) is not None for name in goal.statistics if name not in OF_SPECTRUM):
        return
    if climber.best is not None and climber.best.status == "rank_deficient":
        with gate.taken(a):
            every = exact.decompose_svd(a).values
        assert every is not None  # an SVD has them all
        found = statistics.of_singular(a.shape, every, known.frobenius or 0.0, every.largest, 0.0)
        climber.statistics = replace(
            known, stable_rank=found.stable_rank, participation_ratio=found.participation_ratio
        )
    elif known.participation_ratio is None and known.frobenius is not None:
        (gram,) = backend.gram([a], torch.float32 if climber.dtype != torch.float64 else torch.float64)
        ratio = statistics.participation(a.shape[1], known.frobenius, float(symmetric_norm(gram)))
        climber.statistics = replace(known, participation_ratio=ratio)


def _found_plainly_singular(climber: _Climber) -> bool:
    """Whether comparing entries shows that the matrix is singular; if so, this becomes the climber's result."""
    a = climber.operand
    reason = exact.singular_reason(a) if a.exact else None  # scaling may have made entries zero or equal
    if reason is None:
        return False
    high = float(torch.linalg.vector_norm(a.tensor.to("cpu", torch.float64)))
    climber.best = Resolution(
        "rank_deficient", math.inf, math.inf, math.inf, high, 0.0, f"{exact.METHOD}: {reason}", certified=True
    )
    climber.statistics = statistics.of_singular(a.shape, None, high, (0.0, high), 0.0)
    climber.triplets = None
    return True


def _measure_sensitivity(backend: Backend, climbers: Sequence[_Climber]) -> None:
    pairs = [(c, c.triplets) for c in climbers if c.triplets is not None]
    values = sensitivities(backend, [c.operand for c, _ in pairs], [c.dtype for c, _ in pairs], [t for _, t in pairs])
    for (climber, _), value in zip(pairs, values, strict=True):
        assert climber.best is not None
        climber.best = replace(climber.best, sensitivity=value)


def _unscale(found: Resolution, exponent: int) -> Resolution:
    if exponent == 0:
        return found
    half = exponent // 2
    norm = found.statistics.frobenius
    given = (found.sigma_max, found.sigma_min, math.nan if norm is None else norm)
    back = [x * 2.0**half * 2.0 ** (exponent - half) for x in given]
    known = found.statistics if norm is None else replace(found.statistics, frobenius=back[2])
    return replace(found, sigma_max=back[0], sigma_min=back[1], statistics=known)
