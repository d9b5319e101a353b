"""select(): the matrices that one or more budgets take from a ranking."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from ..errors import OptionError
from ..texts import warn
from .budgets import BUDGETS, is_count
from .cuts import Cut, Pool, cut_by_all, cut_by_count, cut_by_kappa, cut_by_params, fraction_count, possibly_next
from .entries import TensorKappa
from .orders import MatchName, Order, OrderName
from .scores import KAPPA, score_of
from .selection import Selection, compiled, matches
from .serialize import mapping_of
from .units import Unit, UnitName, check_unit, make_units

Patterns = str | Sequence[str] | None


def select(
    entries: Sequence[TensorKappa],
    metadata: Mapping[str, Any],
    *,
    budgets: Mapping[str, Any],
    per_group: bool,
    unit: UnitName,
    fill: bool,
    include: Patterns,
    exclude: Patterns,
    order: OrderName = "lowest",
    seed: int | None = None,
    match: MatchName | Sequence[MatchName] = (),
) -> Selection:
    """See ``Ranking.select``; this takes the entries and the metadata of a ranking."""
    given = _the_budgets(budgets)
    _check_fill(fill, budgets)
    way = Order.of(order, seed, match, budgets)
    candidates = matching(entries, include, exclude)
    score = score_of(metadata)
    units = make_units(candidates, unit, score)
    if not any(item.status != "non_finite" for item in units):
        raise OptionError(f"there is nothing to select: {_why_empty(entries, units)}")
    _check_kappas_known(given, units)
    params = next((_params(b.value, metadata, units) for b in given if b.name == "max_params"), 0)
    pools = _pools(way.arranged(units), per_group)
    cuts = _cuts(pools, given, params, fill)
    words = ", ".join(map(str, given))
    if any(cut.needed for cut in cuts):
        by_entry = unit == "matrix" and all(pool.horizon > -math.inf for pool in pools) and candidates == tuple(entries)
        top = _needed_top(given, cuts, pools, per_group) if by_entry else None
        advice = "without top" if top is None else f"with top={top}" + (", top_per_group=True" if per_group else "")
        settings = metadata.get("settings")
        had = settings.get("top") if isinstance(settings, Mapping) else None
        what = "what was resolved" + (f" with top={had}" if had is not None else "")
        raise OptionError(f"select({words}) reaches beyond {what}: rank again {advice}, or select less")
    taken = [item for cut in cuts for item in cut.chosen]
    if not taken:
        raise OptionError(f"select({words}) selects nothing: {_nothing_fits(given, params, pools, fill)}")
    if way.match:
        lowest, taken = taken, way.drawn(units, taken)
        if {unit.key for unit in lowest} == {unit.key for unit in taken}:
            warn(f"seed={way.seed} draws the lowest themselves, which is no control: give another seed")
    chosen = {entry.key for item in taken for entry in item.members}
    partial = bool(metadata.get("partial"))
    if partial:
        warn(
            "the ranking was interrupted, so matrices that belong to the selection may be missing: rank again",
        )
    return Selection(
        entries=tuple(entry for entry in entries if entry.key in chosen),
        boundary_certain=not partial and all(cut.certain for cut in cuts),
        settings=_settings(given, cuts, metadata, per_group=bool(per_group), unit=unit)
        | ({} if score == KAPPA else {"score": _score_text(metadata)})
        | ({"fill": True} if fill else {})
        | ({"took": {"units": len(taken), "of": len(units), "groups": len(pools)}} if per_group else {})
        | way.settings
        | {name: _listed(p) for name, p in (("include", include), ("exclude", exclude)) if p is not None},
    )


def _score_text(metadata: Mapping[str, Any]) -> str:
    return str(mapping_of(metadata.get("settings")).get("score", "kappa"))


def _check_kappas_known(given: Sequence[_Budget], units: Sequence[Unit]) -> None:
    without = next((unit for unit in units if any(entry.status == "scored" for entry in unit.members)), None)
    if without is not None and any(budget.name == "max_kappa" for budget in given):
        raise OptionError(
            f"max_kappa needs kappa, which the score of this ranking did not need, and that of {without.key} is not "
            "known: rank with score='kappa', and sort with ranking.by()"
        )


def _settings(
    given: Sequence[_Budget], cuts: Sequence[Cut], metadata: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """The options and the source of the selection as plain JSON."""
    if len(given) == 1:
        settings: dict[str, Any] = {"budget": given[0].name, "value": given[0].value}
    else:
        settings = {"budgets": {budget.name: budget.value for budget in given}}
    settings |= options
    settings |= {name: metadata[name] for name in ("source", "num_parameters") if name in metadata}
    unfit = [item for cut in cuts for item in cut.unfit]
    if unfit:
        settings["unfit"] = {"count": len(unfit), "first": unfit[0].key, "numel": unfit[0].numel}
    return settings


def matching(entries: Sequence[TensorKappa], include: Patterns, exclude: Patterns) -> tuple[TensorKappa, ...]:
    """The entries whose key, name or aliases match one of ``include`` and none of ``exclude`` (re.search).

    Raises:
        OptionError: a pattern is not a regular expression.
    """
    wanted, unwanted = (None if given is None else compiled(_listed(given)) for given in (include, exclude))
    return tuple(
        entry
        for entry in entries
        if (wanted is None or any(matches(pattern, entry) for pattern in wanted))
        and not any(matches(pattern, entry) for pattern in unwanted or ())
    )


def _listed(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def _why_empty(entries: Sequence[TensorKappa], units: Sequence[Unit]) -> str:
    if units:
        return "the ranking has only entries with a nan or inf"
    return "no entry has a matching name" if entries else "the ranking has no entries (ranking.skipped says why)"


@dataclass(frozen=True)
class _Budget:
    name: str
    value: int | float

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}"


def check_budget(options: Mapping[str, Any]) -> None:
    """Raises OptionError if these cannot be options of ``Ranking.select`` for any ranking."""
    _check_names(options)
    budgets = {name: options.get(name) for name in BUDGETS}
    _the_budgets(budgets)
    _check_fill(options.get("fill", False), budgets)
    check_unit(options.get("unit", "matrix"))
    Order.of(options.get("order", "lowest"), options.get("seed"), options.get("match"), budgets)
    matching((), options.get("include"), options.get("exclude"))


def _check_fill(fill: object, budgets: Mapping[str, Any]) -> None:
    if not isinstance(fill, bool):
        raise OptionError(f"fill={fill!r}: give True or False")
    if fill and budgets.get("max_params") is None:
        raise OptionError("fill=True goes on to matrices that fit a number of weights: give max_params")


def _check_names(options: Mapping[str, Any]) -> None:
    known = (*BUDGETS, *_OPTIONS)
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        close = difflib.get_close_matches(unknown, known, 1, 0.5)
        advice = f"{close[0]!r} is" if close else f"there are {', '.join(known)}"
        raise OptionError(f"{unknown!r} is no option of select(): {advice}")


_OPTIONS = ("per_group", "unit", "fill", "include", "exclude", "order", "seed", "match")


def _the_budgets(budgets: Mapping[str, Any]) -> list[_Budget]:
    given = {name: value for name, value in budgets.items() if value is not None}
    if not given:
        raise OptionError(f"select() takes one or more of {', '.join(budgets)}, and got none")
    for name, value in given.items():
        expected, is_valid = BUDGETS[name]
        if not is_valid(value):
            raise OptionError(f"{name}={value!r}: give {expected}")
    # 1 is all for top_p but one for rank(top=...), so a fraction stays a float.
    return [
        _Budget(name, int(value) if isinstance(value, Integral) and name != "top_p" else float(value))
        for name, value in given.items()
    ]


def _params(value: float, metadata: Mapping[str, Any], units: Sequence[Unit]) -> int:
    """``max_params`` as a number of weights."""
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


def _cuts(pools: Sequence[Pool], given: Sequence[_Budget], params: int, fill: bool) -> list[Cut]:
    """What the budgets take from each pool, ``max_params`` shared out by their weights.

    A share is no whole number of matrices. So what all shares leave over together goes to the pools whose next matrix
    was nearest to fitting, one for each: the whole then takes what was asked for, as far as whole matrices can.
    """
    every = max(1, sum(pool.numel for pool in pools))
    shares = [params * pool.numel // every for pool in pools]
    cuts = [_cut(pool, given, share, fill) for pool, share in zip(pools, shares, strict=True)]
    if len(pools) < 2 or all(budget.name != "max_params" for budget in given) or any(cut.needed for cut in cuts):
        return cuts
    left = params - sum(_numel(cut) for cut in cuts)
    over = [i for i, cut in enumerate(cuts) if cut.unfit]
    following = {i: possibly_next(pools[i], shares[i], fill) for i in over}
    # Where intervals leave open which matrix is the next, its size must not depend on that.
    certain = all(
        len({u.numel for u in units}) == 1 or min(u.numel for u in units) > left for units in following.values()
    )
    # What may be of full rank may come next where all else fits.
    unsure = [unit for i, pool in enumerate(pools) if i not in over for unit in pool.ranked if unit.is_unsure]
    certain = certain and all(unit.numel > left for unit in unsure)

    def nearness(i: int) -> float:
        return -(shares[i] - _numel(cuts[i])) / cuts[i].unfit[0].numel

    ordered = sorted(over, key=lambda i: (nearness(i), cuts[i].unfit[0].key))
    for _, equal in itertools.groupby(ordered, nearness):
        alike = list(equal)
        sizes = [cuts[i].unfit[0].numel for i in alike]
        # Keys break ties, and they must not decide where intervals leave open whose key it is.
        if len(alike) > 1 and min(sizes) <= left < sum(sizes) and any(len(following[i]) > 1 for i in alike):
            certain = False
        for i in alike:
            if cuts[i].unfit[0].numel > left:
                continue
            more = _cut(pools[i], given, _numel(cuts[i]) + cuts[i].unfit[0].numel, fill)
            left -= _numel(more) - _numel(cuts[i])
            cuts[i] = more
    return cuts if certain else [replace(cut, certain=False) for cut in cuts]


def _numel(cut: Cut) -> int:
    return sum(item.numel for item in cut.chosen)


def _cut(pool: Pool, given: Sequence[_Budget], params: int, fill: bool) -> Cut:
    def one(budget: _Budget) -> Callable[[Pool], Cut]:
        if budget.name == "num_tensors":
            return lambda pool: cut_by_count(pool, int(budget.value))
        if budget.name == "top_p":
            return lambda pool: cut_by_count(pool, fraction_count(pool.size, budget.value))
        if budget.name == "max_kappa":
            return lambda pool: cut_by_kappa(pool, budget.value)
        return lambda pool: cut_by_params(pool, params, fill)

    highest = next((float(budget.value) for budget in given if budget.name == "max_kappa"), None)
    return cut_by_all(pool, [one(budget) for budget in given], highest)


def _needed_top(given: Sequence[_Budget], cuts: Sequence[Cut], pools: Sequence[Pool], per_group: bool) -> Any:
    """The ``top`` of rank() that resolves enough entries; None if all entries have to be resolved."""
    needed = max(cut.needed for cut in cuts)
    if needed >= max(len(pool.ranked) + len(pool.bounded) for pool in pools):
        return None
    # One count for groups of different sizes would resolve too much; rank() rounds a fraction as select() does.
    only = given[0] if len(given) == 1 else None
    return only.value if only is not None and per_group and only.name == "top_p" else needed


def _nothing_fits(given: Sequence[_Budget], params: int, pools: Sequence[Pool], fill: bool) -> str:
    first = [(pool, pool.regular[0]) for pool in pools if pool.regular]
    if not first:
        return "no matrix of full rank is resolved; num_tensors and top_p select rank-deficient ones too"
    highest = next((budget.value for budget in given if budget.name == "max_kappa"), None)
    lowest = min((item for pool in pools for item in pool.regular), key=lambda item: (item.kappa, item.key))
    if highest is not None and lowest.kappa > highest:
        return f"the smallest kappa is {lowest.kappa!r}, of {lowest.key}"
    if all(budget.name != "max_params" for budget in given):
        return "no matrix is within all of these budgets"
    some = [(pool, item) for pool in pools for item in pool.regular] if fill else first
    item = min((item for _, item in some), key=lambda item: (item.numel, item.key))
    which = "which is the smallest" if fill else "which comes first"
    return (
        f"{params:,} weights have no room for {item.key} with {item.numel:,}, {which}; "
        f"the smallest max_params that selects something is {item.numel}"
    )
