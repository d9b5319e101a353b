"""Pairs of entries of two rankings, or of matrices of two sources, that are the same matrix, whose names may have
different wrappers and prefixes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from .names import plain_name


class Named(Protocol):
    """What entries of rankings and matrices of sources have in common."""

    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...
    @property
    def part(self) -> str: ...
    @property
    def key(self) -> str: ...


Names = Callable[[Named], Iterable[str]]


def pair(before: Sequence[Named], after: Sequence[Named]) -> list[tuple[int, int]]:
    """Positions (in ``before``, in ``after``) of entries that are the same matrix, in the order of ``before``.

    Entries are paired by key; the remaining ones by key without the words of compile, DDP, FSDP and PEFT; then by such
    keys of tied names; then with the prefix of a base model that only one ranking has ("model.", "bert."), if this
    pairs most of the remaining ones. A name that fits several entries pairs none of them.
    """
    pairs: dict[int, int] = {}
    steps: tuple[Names, ...] = (
        lambda entry: (entry.key,),
        lambda entry: (plain_name(entry.name) + entry.part,),
        lambda entry: {plain_name(name) + entry.part for name in (entry.name, *entry.aliases)},
        # A checkpoint's tensor of one expert is an alias of a part of the model's parameter.
        lambda entry: {plain_name(entry.name) + entry.part, *map(plain_name, entry.aliases)},
    )
    for names in steps:
        rest, other = _left(before, pairs), _left(after, pairs.values())
        pairs.update(_by_name(_index(before, rest, names), _index(after, other, names)))
    rest, other = _left(before, pairs), _left(after, pairs.values())
    pairs.update(_by_prefix(_index(before, rest, steps[1]), _index(after, other, steps[1])))
    return sorted(pairs.items())


def _left(entries: Sequence[Named], taken: Iterable[int]) -> list[int]:
    gone = set(taken)
    return [i for i in range(len(entries)) if i not in gone]


def _index(entries: Sequence[Named], positions: Iterable[int], names: Names) -> dict[str, int]:
    """Positions by name, without the names that several of them have."""
    found: dict[str, int] = {}
    several: set[str] = set()
    for i in positions:
        for name in names(entries[i]):
            if found.setdefault(name, i) != i:
                several.add(name)
    return {name: i for name, i in found.items() if name not in several}


def _by_name(ours: Mapping[str, int], theirs: Mapping[str, int]) -> dict[int, int]:
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for name, i in ours.items():
        j = theirs.get(name)
        if j is not None and i not in pairs and j not in taken:
            pairs[i] = j
            taken.add(j)
    return pairs


def _by_prefix(ours: Mapping[str, int], theirs: Mapping[str, int]) -> dict[int, int]:
    """Pairs whose names differ by one prefix, the same for all, if that pairs most of the remaining names."""
    there, here = _behind_a_prefix(ours, theirs), _behind_a_prefix(theirs, ours)
    if len(there) >= len(here):
        return {ours[short]: theirs[long] for short, long in there.items()}
    return {ours[long]: theirs[short] for short, long in here.items()}


def _behind_a_prefix(short: Mapping[str, int], long: Mapping[str, int]) -> dict[str, str]:
    """For names of ``short`` the name of ``long`` that is a prefix, the same for all, and this name.

    Names that ``long`` has behind several prefixes are left out: layers of a text and of a vision model look alike.
    """
    prefixes: dict[str, list[str]] = {}
    for name in long:
        end = name.find(".")
        while end >= 0:
            if name[end + 1 :] in short:
                prefixes.setdefault(name[end + 1 :], []).append(name[: end + 1])
            end = name.find(".", end + 1)
    unique = {name: found[0] for name, found in prefixes.items() if len(found) == 1}
    if not unique:
        return {}
    prefix, count = Counter(unique.values()).most_common(1)[0]
    if 2 * count <= len(short):
        return {}
    return {name: prefix + name for name, found in unique.items() if found == prefix}
