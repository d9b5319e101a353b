"""Where a budget cuts a ranking: which units are in, whether that is certain, and whether it can be told at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .units import Unit


@dataclass(frozen=True)
class Pool:
    """Units that share one budget.

    ``ranked`` holds those with a score, "ok" before "rank_deficient", each in score order; ``bounded`` those of which
    only a lower bound is known; ``size`` counts the non-finite ones too, ``numel`` their weights.
    """

    ranked: tuple[Unit, ...]
    bounded: tuple[Unit, ...]
    size: int
    numel: int

    @classmethod
    def of(cls, units: Iterable[Unit]) -> Pool:
        units = tuple(units)
        ranked = [unit for unit in units if unit.status in ("ok", "rank_deficient")]
        bounded = [unit for unit in units if unit.status == "bounded"]
        return cls(
            ranked=tuple(sorted(ranked, key=lambda unit: (unit.status != "ok", unit.score, unit.key))),
            bounded=tuple(sorted(bounded, key=lambda unit: (unit.lower, unit.key))),
            size=len(units),
            numel=sum(unit.numel for unit in units),
        )

    @property
    def regular(self) -> tuple[Unit, ...]:
        """The units of full rank, in score order."""
        return tuple(unit for unit in self.ranked if unit.status == "ok")

    @property
    def horizon(self) -> float:
        """Up to this score no bounded unit can come in between; -inf where bounds of kappa say nothing of the score."""
        return min((unit.score_lower for unit in self.bounded), default=math.inf)

    def without(self, chosen: Sequence[Unit]) -> list[Unit]:
        """The units that may be selected in principle and were not."""
        keys = {unit.key for unit in chosen}
        return [unit for unit in (*self.ranked, *self.bounded) if unit.key not in keys]


@dataclass(frozen=True)
class Cut:
    """What a budget takes from a pool.

    ``needed`` is 0 if the ranking is resolved far enough to tell, else the number of units that must be.
    """

    chosen: tuple[Unit, ...]
    certain: bool
    needed: int = 0


def fraction_count(size: int, fraction: float) -> int:
    """How many of ``size`` a fraction in (0, 1] means: rounded down, at least one (as PEFT's KappaTuneSelector)."""
    return max(1, int(size * fraction))


def cut_by_count(pool: Pool, count: int) -> Cut:
    """The ``count`` lowest units, or all if there are fewer."""
    count = min(count, len(pool.ranked) + len(pool.bounded))
    chosen = pool.ranked[:count]
    if pool.bounded and count and (len(chosen) < count or chosen[-1].score > pool.horizon):
        return Cut((), False, needed=count)
    return Cut(chosen, _separated(chosen, pool.without(chosen)))


def cut_by_kappa(pool: Pool, value: float) -> Cut:
    """Every unit of full rank with kappa at most ``value``."""
    chosen = tuple(unit for unit in pool.regular if unit.kappa <= value)
    open_ended = [unit for unit in pool.bounded if unit.lower <= value]
    if open_ended:
        # One more than can be chosen: only a resolved unit above the value shows that the others lie above it too.
        return Cut((), False, needed=len(chosen) + len(open_ended) + 1)
    above = all(unit.lower > value for unit in pool.without(chosen))
    return Cut(chosen, above and all(unit.upper <= value for unit in chosen))


def cut_by_params(pool: Pool, budget: int) -> Cut:
    """The longest prefix, in score order, of units of full rank that have at most ``budget`` weights together."""
    known = [unit for unit in pool.regular if unit.score <= pool.horizon]
    chosen: list[Unit] = []
    left = budget
    for unit in known:
        if unit.numel > left:
            break
        chosen.append(unit)
        left -= unit.numel
    if len(chosen) == len(known):
        further = _how_many_fit([*pool.regular[len(known) :], *pool.bounded], left)
        if further and pool.bounded:
            return Cut((), False, needed=len(known) + further)
    rest = pool.without(chosen)
    return Cut(tuple(chosen), _separated(chosen, rest) and _stop_is_certain(rest, left))


def _how_many_fit(units: Sequence[Unit], budget: int) -> int:
    count = 0
    for numel in sorted(unit.numel for unit in units):
        budget -= numel
        if budget < 0:
            break
        count += 1
    return count


def _separated(chosen: Sequence[Unit], rest: Sequence[Unit]) -> bool:
    """Every chosen unit is ahead of every other one, wherever in their intervals the scores are; keys break ties."""
    if not chosen or not rest:
        return True
    return max(map(_last_place, chosen)) < min(map(_first_place, rest))


def _first_place(unit: Unit) -> tuple[float, str]:
    return unit.score_lower, unit.key


def _last_place(unit: Unit) -> tuple[float, str]:
    return unit.score_upper, unit.key


def _stop_is_certain(rest: Sequence[Unit], left: int) -> bool:
    """The unit that did not fit is certainly ahead of all that would have."""
    fitting = [unit for unit in rest if unit.numel <= left and unit.status != "rank_deficient"]
    if not fitting:
        return True
    first = min(map(_first_place, fitting))
    return any(unit.numel > left and _last_place(unit) < first for unit in rest)
