"""filter(): a ranking of a part of the matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import OptionError
from . import serialize
from .ranking import Ranking
from .selecting import matching
from .selection import compiled


def filtered(
    ranking: Ranking,
    layers: int | Iterable[int] | None,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    groups: str | Sequence[str] | None,
) -> Ranking:
    """See ``Ranking.filter``."""
    entries = matching(ranking.entries, include, exclude)
    wanted = None if layers is None else _numbers(layers)
    named = None if groups is None else [groups] if isinstance(groups, str) else list(groups)
    if wanted is not None:
        entries = tuple(entry for entry in entries if entry.layer in wanted)
    if named is not None:
        # A group has "*" where names have numbers, so as a regular expression it would seldom match itself.
        patterns = compiled([name for name in named if not any(entry.group == name for entry in ranking)])
        entries = tuple(e for e in entries if e.group in named or any(p.search(e.group) for p in patterns))
    given = {
        "layers": sorted(wanted) if wanted is not None else None,
        "include": include if include is None or isinstance(include, str) else list(include),
        "exclude": exclude if exclude is None or isinstance(exclude, str) else list(exclude),
        "groups": named,
    }
    before = serialize.thaw(ranking.metadata.get("filters", ()))
    filters = [*before, {name: value for name, value in given.items() if value is not None}]
    return Ranking(entries, ranking.skipped, {**serialize.thaw(ranking.metadata), "filters": filters})


def _numbers(layers: int | Iterable[int]) -> set[int]:
    try:
        found = {layers} if isinstance(layers, int) else set(layers)
    except TypeError:
        found = {None}  # type: ignore[arg-type]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in found):
        raise OptionError(f"layers={layers!r}: give a number or several, such as range(8)")
    return found
