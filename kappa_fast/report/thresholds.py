"""The outcome of every budget of the page as thresholds, so that the script of the page repeats no rule of select().

The functions of results/cuts.py decide. A cut depends on other units only through the extremes of their intervals, so
each call gets the extreme units instead of all units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any

from ..results.cuts import Cut, Pool, cut_by_count, cut_by_kappa, cut_by_params, first_place, last_place, separated
from ..results.entries import TensorKappa
from ..results.scores import KAPPA, NamedScore
from ..results.units import Unit, make_units

Step = tuple[float, Cut]  # a cut, and the value of the budget from which it is valid, up to the value of the next step


def thresholds(
    entries: Sequence[TensorKappa], *, interrupted: bool, score: NamedScore | None = KAPPA
) -> dict[str, Any]:
    """By name of a budget: how many matrices it can take, and for which values of the budget a cut is certain.

    ``order`` has the positions of these matrices in the order in which they are taken (None: the first ``number``).
    ``certain`` has ranges [from, below) of values, where None is infinity. From the value ``beyond`` on (None: never)
    the ranking is not resolved far enough. Values of max_params are counts of weights.

    score: by which the entries are sorted, None for a callable. No kappa is at most max_kappa where a score needs none.
    """
    pool = Pool.of(make_units(entries, "matrix", score))
    known = [unit for unit in pool.regular if unit.score <= pool.horizon]
    kappas_known = all(unit.status != "scored" for unit in pool.regular)
    by_kappa = sorted(pool.regular, key=lambda unit: unit.kappa) if kappas_known else []
    places = {entry.key: i for i, entry in enumerate(entries)}
    order = [places[unit.key] for unit in by_kappa]

    def table(number: int, steps: Iterable[Step], order: Sequence[int] | None = None) -> dict[str, Any]:
        ranges, beyond = _summarize(steps)
        return {"number": number, "order": order, "certain": [] if interrupted else ranges, "beyond": beyond}

    steps = _steps_of_kappa(pool, by_kappa) if kappas_known else ()
    return {
        "num_tensors": table(len(pool.ranked), _steps_of_count(pool)),
        "max_kappa": table(len(order), steps, None if order == sorted(order) else order),
        "max_params": table(len(known), _steps_of_params(pool, known)),
    }


def _summarize(steps: Iterable[Step]) -> tuple[list[tuple[float, float | None]], float | None]:
    ranges: list[tuple[float, float | None]] = []
    begin: float | None = None
    for value, cut in steps:
        if begin is None and cut.certain:
            begin = value
        elif begin is not None and not cut.certain:
            ranges.append((begin, value))
            begin = None
        if cut.needed:
            return ranges, value
    return ranges if begin is None else [*ranges, (begin, None)], None


def _steps_of_count(pool: Pool) -> Iterator[Step]:
    latest, earliest, nearest = _latest(pool.ranked), _earliest(pool.ranked), _least(pool.bounded, first_place)
    for k, last in enumerate(pool.ranked):
        yield k + 1, cut_by_count(Pool((latest[k], last, *earliest[k + 1 : k + 2]), nearest, 0, 0), 2)
    if pool.bounded:
        yield len(pool.ranked) + 1, cut_by_count(pool, len(pool.ranked) + 1)


def _steps_of_kappa(pool: Pool, by_kappa: Sequence[Unit]) -> Iterator[Step]:
    highest = list(accumulate(by_kappa, partial(max, key=lambda unit: unit.upper)))
    lowest = list(accumulate(reversed(by_kappa), partial(min, key=lambda unit: unit.lower)))[::-1]
    deficient = _least(pool.ranked[len(by_kappa) :], lambda unit: unit.lower)
    nearest = _least(pool.bounded, lambda unit: unit.lower)
    for k, begin in enumerate([1.0, *(unit.kappa for unit in by_kappa)]):
        end = by_kappa[k].kappa if k < len(by_kappa) else math.inf
        last, rest = highest[k - 1 : k] if k else [], [*lowest[k : k + 1], *deficient]
        if begin == end:
            continue
        limits = [*(unit.upper for unit in last), *(unit.lower for unit in (*rest, *nearest))]
        for value in sorted({begin, *(limit for limit in limits if begin < limit < end)}):
            yield value, cut_by_kappa(Pool((*last, *rest), nearest, 0, 0), value)


def _steps_of_params(pool: Pool, known: Sequence[Unit]) -> list[Step]:
    latest, earliest = _latest(known), _earliest([*pool.ranked, *_least(pool.bounded, first_place)])
    sums = [0, *accumulate(unit.numel for unit in known)]
    rest, bounded, steps = Extremes(), Extremes(), list[Step]()
    rest.add(pool.ranked[len(known) :])
    bounded.add(pool.bounded)
    for k in range(len(known), -1, -1):
        last, stop = latest[k - 1 : k] if k else [], known[k : k + 1]
        rest.add(stop)
        if stop and not separated(last, earliest[k : k + 1]):  # no certain cut, however many weights are left
            steps.append((sums[k], Cut((), False)))
            continue
        reduced = Pool((*last, *stop, *chain(*rest.values())), tuple(chain(*bounded.values())), 0, 0)
        sizes = {size for size, *_ in (*rest, *bounded) if not stop or size < stop[0].numel}
        for left in sorted({0, *sizes}, reverse=True):
            steps.append((sums[k] + left, cut_by_params(reduced, sum(unit.numel for unit in last) + left)))
    return steps[::-1]


class Extremes(dict[tuple[int, str, bool], tuple[Unit, ...]]):
    """By size, status and whether they are proven to be singular the units that may come first: by the lower and by
    the upper end of the interval."""

    def add(self, units: Iterable[Unit]) -> None:
        for unit in units:
            kind = unit.numel, unit.status, unit.is_singular
            alike = (*self.get(kind, ()), unit)
            self[kind] = min(alike, key=first_place), min(alike, key=last_place)


def _latest(units: Sequence[Unit]) -> list[Unit]:
    """Among the units up to each one, the unit whose score may be the largest."""
    return list(accumulate(units, partial(max, key=last_place)))


def _earliest(units: Sequence[Unit]) -> list[Unit]:
    """Among the units from each one on, the unit whose score may be the smallest."""
    return list(accumulate(reversed(units), partial(min, key=first_place)))[::-1]


def _least(units: Sequence[Unit], key: Callable[[Unit], Any]) -> tuple[Unit, ...]:
    return (min(units, key=key),) if units else ()
