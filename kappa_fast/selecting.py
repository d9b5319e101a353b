"""select(): which matrices a budget takes from a ranking."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .budgets import BUDGETS, is_count
from .cuts import Cut, Pool, cut_by_count, cut_by_kappa, cut_by_params, fraction_count
from .entries import TensorKappa
from .errors import OptionError
from .selection import Selection
from .units import Unit, UnitName, check_unit, make_units


def select(
    entries: Sequence[TensorKappa],
    metadata: Mapping[str, Any],
    *,
    num_tensors: int | None,
    top_p: float | None,
    max_kappa: float | None,
    max_params: float | None,
    per_group: bool,
    unit: UnitName,
) -> Selection:
    """What ``Ranking.select`` promises, for the entries and the metadata of a ranking."""
    budgets = dict(num_tensors=num_tensors, top_p=top_p, max_kappa=max_kappa, max_params=max_params)
    budget = _the_budget(budgets)
    units = make_units(entries, unit)
    if not any(item.status != "non_finite" for item in units):
        reason = "has no entries (ranking.skipped says why)" if not units else "has only entries with a nan or inf"
        raise OptionError(f"there is nothing to select: the ranking {reason}")
    params = _params(budget.value, metadata, units) if budget.name == "max_params" else 0
    pools = _pools(units, per_group)
    cuts = [_cut(pool, budget, params * pool.numel // max(1, sum(item.numel for item in units))) for pool in pools]
    if any(cut.needed for cut in cuts):
        by_entry = unit == "matrix" and all(pool.horizon > -math.inf for pool in pools)
        top = _needed_top(budget, cuts, pools, per_group) if by_entry else None
        advice = "without top" if top is None else f"with top={top}" + (", top_per_group=True" if per_group else "")
        settings = metadata.get("settings")
        had = settings.get("top") if isinstance(settings, Mapping) else None
        what = "what was resolved" + (f" with top={had}" if had is not None else "")
        raise OptionError(f"select({budget}) reaches beyond {what}: rank again {advice}, or select less")
    chosen = {entry.key for cut in cuts for item in cut.chosen for entry in item.members}
    if not chosen:
        raise OptionError(f"select({budget}) selects nothing: {_nothing_fits(budget, params, pools)}")
    partial = bool(metadata.get("partial"))
    if partial:
        # stacklevel: past this function and Ranking.select, to whoever called it.
        warnings.warn(
            "the ranking was interrupted, so matrices that belong to the selection may be missing: rank again",
            stacklevel=3,
        )
    settings = {"budget": budget.name, "value": budget.value, "per_group": bool(per_group), "unit": unit}
    settings |= {"source": metadata["source"]} if "source" in metadata else {}
    return Selection(
        entries=tuple(entry for entry in entries if entry.key in chosen),
        boundary_certain=not partial and all(cut.certain for cut in cuts),
        settings=settings,
    )


@dataclass(frozen=True)
class _Budget:
    name: str
    value: int | float

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}"


def check_budget(options: Mapping[str, Any]) -> None:
    """Raises OptionError where these cannot be the options of ``Ranking.select``, whatever the ranking is."""
    _check_names(options)
    _the_budget({name: options.get(name) for name in BUDGETS})
    check_unit(options.get("unit", "matrix"))


def _check_names(options: Mapping[str, Any]) -> None:
    known = (*BUDGETS, *_OPTIONS)
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        close = difflib.get_close_matches(unknown, known, 1, 0.5)
        advice = f"{close[0]!r} is" if close else f"there are {', '.join(known)}"
        raise OptionError(f"{unknown!r} is no option of select(): {advice}")


_OPTIONS = ("per_group", "unit")


def _the_budget(budgets: Mapping[str, Any]) -> _Budget:
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        raise OptionError(f"select() takes exactly one of {', '.join(budgets)}, and got {found}")
    name, value = given[0], budgets[given[0]]
    expected, is_valid = BUDGETS[name]
    if not is_valid(value):
        raise OptionError(f"{name}={value!r}: give {expected}")
    # 1 is all for top_p but one for rank(top=...), so a fraction stays a float.
    return _Budget(name, int(value) if isinstance(value, Integral) and name != "top_p" else float(value))


def _params(value: float, metadata: Mapping[str, Any], units: Sequence[Unit]) -> int:
    """``max_params`` as a count."""
    unknown = [entry for item in units for entry in item.members if not entry.numel]
    if unknown:
        raise OptionError(
            f"max_params needs sizes, and the size of {unknown[0].key} is unknown (method {unknown[0].method!r}): "
            "rank the model itself, or use num_tensors, top_p or max_kappa"
        )
    if isinstance(value, int):
        return value
    total: Any = metadata.get("num_parameters")
    if not is_count(total):
        raise OptionError(
            f"max_params={value!r} is a fraction, but metadata['num_parameters'] does not say of how many: give an int"
        )
    return math.floor(value * int(total))


def _pools(units: Sequence[Unit], per_group: bool) -> list[Pool]:
    groups: dict[str, list[Unit]] = {}
    for item in units:
        groups.setdefault(item.group if per_group else "", []).append(item)
    return [Pool.of(group) for group in groups.values()]


def _cut(pool: Pool, budget: _Budget, params: int) -> Cut:
    if budget.name == "num_tensors":
        return cut_by_count(pool, int(budget.value))
    if budget.name == "top_p":
        return cut_by_count(pool, fraction_count(pool.size, budget.value))
    if budget.name == "max_kappa":
        return cut_by_kappa(pool, budget.value)
    return cut_by_params(pool, params)


def _needed_top(budget: _Budget, cuts: Sequence[Cut], pools: Sequence[Pool], per_group: bool) -> int | float | None:
    """The ``top`` of rank() that resolves enough entries; None if that is all of them."""
    needed = max(cut.needed for cut in cuts)
    if needed >= max(len(pool.ranked) + len(pool.bounded) for pool in pools):
        return None
    # One count for groups of different sizes would resolve too much; rank() rounds a fraction as select() does.
    return budget.value if per_group and budget.name == "top_p" else needed


def _nothing_fits(budget: _Budget, params: int, pools: Sequence[Pool]) -> str:
    first = [(pool, pool.regular[0]) for pool in pools if pool.regular]
    if not first:
        return "no matrix of full rank is resolved; num_tensors and top_p select rank-deficient ones too"
    if budget.name == "max_kappa":
        lowest = min((item for pool in pools for item in pool.regular), key=lambda item: (item.kappa, item.key))
        return f"the smallest kappa is {lowest.kappa!r}, of {lowest.key}"
    total = sum(pool.numel for pool in pools)
    needs = [(-(-item.numel * total // pool.numel), item) for pool, item in first]
    need, item = min(needs, key=lambda pair: (pair[0], pair[1].key))
    return (
        f"{params:,} weights have no room for {item.key} with {item.numel:,}, which comes first; "
        f"the smallest max_params that selects something is {need}"
    )
