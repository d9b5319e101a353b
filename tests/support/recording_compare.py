"""Two recordings side by side: which cases differ, and in which fields."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recording_plain import WORDS

MOST = 40  # differences that are told
NAMED = 3  # cases of each


def read(path: Path) -> dict[str, Any]:
    """The cases of a recording, by their names."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return dict(document["cases"])


def differing(
    before: Mapping[str, Any], after: Mapping[str, Any], *, numbers_only: bool = False
) -> dict[str, list[str]]:
    """By name of a case, the fields that differ, each in a line; words do not count where ``numbers_only``."""
    found: dict[str, list[str]] = {}
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after or name not in before:
            found[name] = ["is in the first recording only" if name in before else "is in the second recording only"]
        elif lines := list(_differences(before[name], after[name], "", numbers_only)):
            found[name] = lines
    return found


def report(found: Mapping[str, list[str]], cases: int) -> Iterator[str]:
    """The first differences, each with the first cases that have it, and how many there are."""
    having: dict[str, list[str]] = {}
    for name, lines in found.items():
        for line in lines:
            having.setdefault(line, []).append(name)
    for line, names in list(having.items())[:MOST]:
        yield line
        yield from (f"    {name}" for name in names[:NAMED])
        if len(names) > NAMED:
            yield f"    and {len(names) - NAMED} more cases"
    if len(having) > MOST:
        yield f"and {len(having) - MOST} more differences"
    yield f"{len(found)} of {cases} cases differ" if found else f"{cases} cases are the same"


def _differences(one: Any, other: Any, where: str, numbers_only: bool) -> Iterator[str]:
    if _is_text(one) and _is_text(other):
        if not numbers_only and one != other:
            yield _line(where, one[WORDS], other[WORDS])
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            place = f"{where}.{key}" if where else key
            if key not in other or key not in one:
                yield _line(place, one.get(key, "<nothing>"), other.get(key, "<nothing>"))
            else:
                yield from _differences(one[key], other[key], place, numbers_only)
        if list(one) != list(other) and set(one) == set(other):
            yield _line(f"{where} (order of its fields)", list(one), list(other))
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            yield _line(f"{where} (length)", len(one), len(other))
        for i, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from _differences(a, b, f"{where}[{_label(a, i)}]", numbers_only)
    elif type(one) is not type(other) or repr(one) != repr(other):  # repr: nan is nan, and 0.0 is not -0.0
        yield _line(where, one, other)


def _is_text(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {WORDS}


def _label(item: Any, i: int) -> str:
    """What an item of a list is called: entries have names."""
    if isinstance(item, dict) and isinstance(item.get("name"), str):
        return f"{i}: {item['name']}{item.get('part', '')}"
    return str(i)


def _line(where: str, one: Any, other: Any) -> str:
    drift = ""
    if isinstance(one, float) and isinstance(other, float) and one and math.isfinite(one) and math.isfinite(other):
        drift = f" (by {abs(other / one - 1):.1e})"
    return f"{where or 'the result'}: {_short(one)} -> {_short(other)}{drift}"


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, (dict, list)) else json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}..."
