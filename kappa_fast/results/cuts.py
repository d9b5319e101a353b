"""The cuts of select(): the units that a budget takes, whether exact kappas would take the same units, and whether the
ranking is resolved far enough to decide that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .units import Unit

Place = tuple[bool, float, str]  # in the order of a ranking: whether singular, the score, the key


@dataclass(frozen=True)
class Pool:
    """Units that share one budget.

    ``ranked`` holds the units with a score, "ok" before "rank_deficient", each in score order; ``bounded`` the units of
    which only a lower bound is known. ``size`` counts all units, with the non-finite ones, and ``numel`` their weights.
    """

    ranked: tuple[Unit, ...]
    bounded: tuple[Unit, ...]
    size: int
    numel: int

    @classmethod
    def of(cls, units: Iterable[Unit]) -> Pool:
        units = tuple(units)
        ranked = [unit for unit in units if unit.status in ("ok", "scored", "rank_deficient")]
        bounded = [unit for unit in units if unit.status == "bounded"]
        return cls(
            ranked=tuple(sorted(ranked, key=lambda unit: (unit.status == "rank_deficient", unit.score, unit.key))),
            bounded=tuple(sorted(bounded, key=lambda unit: (unit.lower, unit.key))),
            size=len(units),
            numel=sum(unit.numel for unit in units),
        )

    @property
    def regular(self) -> tuple[Unit, ...]:
        """The units of full rank, in score order."""
        return tuple(unit for unit in self.ranked if unit.status != "rank_deficient")

    @property
    def horizon(self) -> float:
        """The least score that a bounded unit can have; -inf where a bound of kappa does not bound the score."""
        return min((unit.score_lower for unit in self.bounded), default=math.inf)

    def without(self, chosen: Sequence[Unit]) -> list[Unit]:
        """The ranked and bounded units that are not in ``chosen``."""
        keys = {unit.key for unit in chosen}
        return [unit for unit in (*self.ranked, *self.bounded) if unit.key not in keys]


@dataclass(frozen=True)
class Cut:
    """The units that a budget takes from a pool.

    ``needed`` is 0 if the ranking is resolved far enough to decide, else the number of units that have to be resolved.
    ``unfit`` holds the units that came next, or in between, and did not fit into a number of weights.
    """

    chosen: tuple[Unit, ...]
    certain: bool
    needed: int = 0
    unfit: tuple[Unit, ...] = ()


def fraction_count(size: int, fraction: float) -> int:
    """How many of ``size`` a fraction in (0, 1] means: rounded down, at least one (as PEFT's KappaTuneSelector)."""
    return max(1, int(size * fraction))


def cut_by_count(pool: Pool, count: int) -> Cut:
    """The ``count`` lowest units, or all if there are fewer."""
    count = min(count, len(pool.ranked) + len(pool.bounded))
    chosen = pool.ranked[:count]
    if pool.bounded and count and (len(chosen) < count or chosen[-1].score > pool.horizon):
        return Cut((), False, needed=count)
    return Cut(chosen, separated(chosen, pool.without(chosen)))


def cut_by_kappa(pool: Pool, value: float) -> Cut:
    """Every unit of full rank with kappa at most ``value``."""
    chosen = tuple(unit for unit in pool.regular if unit.kappa <= value)
    open_ended = [unit for unit in pool.bounded if unit.lower <= value]
    if open_ended:
        # One more than can be chosen: only a resolved unit above the value shows that the others lie above it too.
        return Cut((), False, needed=len(chosen) + len(open_ended) + 1)
    above = all(unit.lower > value for unit in pool.without(chosen))
    return Cut(chosen, above and all(unit.upper <= value for unit in chosen))


def cut_by_params(pool: Pool, budget: int, fill: bool = False) -> Cut:
    """The longest prefix, in score order, of units of full rank that have at most ``budget`` weights together.

    fill: a unit that does not fit is passed over, and smaller ones after it are still taken.
    """
    known = [unit for unit in pool.regular if unit.score <= pool.horizon]
    chosen: list[Unit] = []
    unfit: list[Unit] = []
    left = budget
    for unit in known:
        if unit.numel > left:
            unfit.append(unit)
            if not fill:
                break
            continue
        chosen.append(unit)
        left -= unit.numel
    if fill or len(chosen) == len(known):
        further = _how_many_fit([*pool.regular[len(known) :], *pool.bounded], left)
        if further and pool.bounded:
            every = len(pool.ranked) + len(pool.bounded)
            return Cut((), False, needed=every if fill else len(known) + further)
    rest = pool.without(chosen)
    if fill:  # whatever may be of full rank takes part
        certain = _filling_is_certain([*known, *(unit for unit in rest if unit.is_unsure)], budget)
    else:
        certain = separated(chosen, rest) and _stop_is_certain(rest, left)
    return Cut(tuple(chosen), certain, unfit=tuple(unfit))


def cut_by_all(pool: Pool, cuts: Sequence[Callable[[Pool], Cut]], max_kappa: float | None) -> Cut:
    """The units that each of several budgets takes on its own.

    max_kappa: the value of the budget of that name, if it is among them.
    """
    found = [cut(pool) for cut in cuts]
    if len(found) == 1 or all(cut.needed for cut in found):
        return min(found, key=lambda cut: cut.needed)
    # What a resolved budget takes is ahead of all that is only bounded, so that the others need not know of these.
    resolved = replace(pool, bounded=())
    found = [
        replace(cut(resolved), certain=False) if done.needed else done for cut, done in zip(cuts, found, strict=True)
    ]
    keys = set.intersection(*({unit.key for unit in cut.chosen} for cut in found))
    chosen = tuple(unit for unit in pool.ranked if unit.key in keys)
    below = max_kappa is None or all(unit.upper <= max_kappa for unit in chosen)
    rest = pool.without(chosen)
    # One that is certain, and less than all others: what is ahead of everything else fits them as well.
    least = any(cut.certain and {unit.key for unit in cut.chosen} == keys for cut in found)
    decided = below and least and separated(chosen, rest)
    unfit = tuple(unit for cut in found for unit in cut.unfit)
    return Cut(chosen, decided or all(cut.certain for cut in found), unfit=unfit)


def _filling_is_certain(known: Sequence[Unit], budget: int) -> bool:
    """Whether exact kappas would take the same units: in each run of units with overlapping intervals all fit, or not
    even the smallest one does, so that their order does not matter. One that may be singular must not fit."""
    left = budget
    reach: Place = (False, -math.inf, "")
    run: list[Unit] = []
    for unit in [*sorted(known, key=first_place), None]:
        if unit is None or not run or first_place(unit) > reach:
            sizes = [other.numel for other in run]
            open_ = (sum(sizes) > left and len(run) > 1) or any(other.is_unsure for other in run)
            if run and left >= min(sizes) and open_:
                return False
            left -= sum(sizes) if sum(sizes) <= left else 0
            run = []
        if unit is not None:
            run.append(unit)
            reach = max(reach, last_place(unit))
    return True


def _how_many_fit(units: Sequence[Unit], budget: int) -> int:
    count = 0
    for numel in sorted(unit.numel for unit in units):
        budget -= numel
        if budget < 0:
            break
        count += 1
    return count


def separated(chosen: Sequence[Unit], rest: Sequence[Unit]) -> bool:
    """Whether every chosen unit comes before every other one for all scores within their intervals; keys break ties."""
    if not chosen or not rest:
        return True
    return max(map(last_place, chosen)) < min(map(first_place, rest))


def possibly_next(pool: Pool, budget: int, fill: bool) -> list[Unit]:
    """The units of which each may be the first of full rank that ``budget`` weights do not take, as far as intervals
    tell; a unit that is only bounded may be one."""
    cut = cut_by_params(pool, budget, fill)
    rest = [unit for unit in pool.without(cut.chosen if cut.certain else ()) if not unit.is_singular]
    if not cut.certain:
        return rest
    earliest = min(map(last_place, rest), default=(True, math.inf, ""))
    return [unit for unit in rest if first_place(unit) <= earliest]


def first_place(unit: Unit) -> Place:
    """The earliest place that the score of a unit allows, and its rank: singular units come after all others."""
    return unit.is_singular, unit.score_lower, unit.key


def last_place(unit: Unit) -> Place:
    """The latest place that the score of a unit allows, and its rank."""
    return (True, math.inf, unit.key) if unit.is_unsure else (unit.is_singular, unit.score_upper, unit.key)


def _stop_is_certain(rest: Sequence[Unit], left: int) -> bool:
    """Whether some unit that does not fit certainly comes before all units that do."""
    fitting = [unit for unit in rest if unit.numel <= left and not unit.is_singular]
    if not fitting:
        return True
    first = min(map(first_place, fitting))
    full = [unit for unit in rest if unit.status != "rank_deficient"]
    return any(unit.numel > left and last_place(unit) < first for unit in full)
