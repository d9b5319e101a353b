"""Union, difference and intersection of selections."""

from __future__ import annotations

import math

from ..errors import OptionError
from . import serialize
from .entries import Status, TensorKappa
from .selection import Selection

_ORDER: dict[Status, int] = {"ok": 0, "scored": 0, "rank_deficient": 1, "bounded": 2, "non_finite": 3}


def union(one: Selection, other: Selection) -> Selection:
    """The matrices that are in at least one of two selections."""
    _check_one_model(one, other)
    if one.exclude != other.exclude and (one.include or other.include):
        raise _apart("one of them has including() and their excluding() differ")
    mine = set(one.keys)
    entries = [*one.entries, *(entry for entry in other.entries if entry.key not in mine)]
    include = tuple(dict.fromkeys((*one.include, *other.include)))
    exclude = one.exclude if one.exclude == other.exclude else ()  # the entries have lost the excluded matrices already
    return _made("union", one, other, entries, include, exclude)


def intersection(one: Selection, other: Selection) -> Selection:
    """The matrices that are in both selections."""
    _check_one_model(one, other)
    if one.include != other.include and (one.include or other.include):
        raise _apart("their including() differ")
    theirs = set(other.keys)
    exclude = tuple(dict.fromkeys((*one.exclude, *other.exclude)))
    return _made("intersection", one, other, [e for e in one.entries if e.key in theirs], one.include, exclude)


def difference(one: Selection, other: Selection) -> Selection:
    """The matrices that are in the first selection and not in the second."""
    _check_one_model(one, other)
    if other.include and other.include != one.include:
        raise _apart("the second has including()")
    theirs = set(other.keys)
    include = () if other.include else one.include
    return _made("difference", one, other, [e for e in one.entries if e.key not in theirs], include, one.exclude)


def _apart(why: str) -> OptionError:
    return OptionError(
        f"the selections cannot be combined, because {why}: combine selections first, and call these on the result"
    )


def _check_one_model(one: Selection, other: Selection) -> None:
    mine = {entry.key: entry for entry in one.entries}
    for entry in other.entries:
        twin = mine.get(entry.key)
        if twin is not None and (twin.index, twin.shape, repr(twin.kappa)) != (
            entry.index,
            entry.shape,
            repr(entry.kappa),
        ):
            raise OptionError(
                f"the selections are of different rankings: kappa of {entry.key!r} is {twin.kappa!r} in one and "
                f"{entry.kappa!r} in the other; select both from the same ranking"
            )
    prints = [serialize.mapping_of(selection.settings.get("source")).get("fingerprint") for selection in (one, other)]
    if None not in prints and prints[0] != prints[1]:
        raise OptionError("the selections are of different models: select both from the same ranking")


def _made(
    how: str,
    one: Selection,
    other: Selection,
    entries: list[TensorKappa],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> Selection:
    shared = {
        name: one.settings[name]
        for name in ("source", "num_parameters", "unit")
        if name in one.settings and one.settings.get(name) == other.settings.get(name)
    }
    parts = []
    for selection in (one, other):
        parts.append({key: v for key, v in serialize.thaw(selection.settings).items() if key not in shared})
    alike = one.settings.get("score") == other.settings.get("score")  # or the values mean different things
    values = {e.key: e.score if alike else e.kappa for e in entries}
    entries.sort(key=lambda e: (_ORDER[e.status], math.inf if math.isnan(values[e.key]) else values[e.key], e.key))
    settings = {**serialize.thaw(shared), how: parts}
    certain = one.boundary_certain and other.boundary_certain
    return Selection(tuple(entries), certain, settings, include, exclude)
