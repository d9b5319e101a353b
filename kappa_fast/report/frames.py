"""Rankings, comparisons and series as pandas DataFrames whose cells every file of tables can hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..entries import Index, TensorKappa

if TYPE_CHECKING:
    import pandas

    from ..comparison import Comparison

_OWN_COLUMNS = {"shape": ("rows", "columns")}


def frame_of(entries: Iterable[TensorKappa], library: Any) -> pandas.DataFrame:
    """What ``Ranking.to_dataframe`` promises; ``library`` is pandas."""
    names = [item.name for item in fields(TensorKappa)]
    columns = [column for name in names for column in _OWN_COLUMNS.get(name, (name,))]
    rows = [[entry.key, *(value for name in names for value in _cells(entry, name))] for entry in entries]
    frame = library.DataFrame(rows, columns=["key", *columns])
    return frame.astype({"layer": "Int64", "quantization": "string"})


def _cells(entry: TensorKappa, name: str) -> tuple[Any, ...]:
    value = getattr(entry, name)
    if name == "shape":
        return tuple(value)
    if name == "index":
        return (index_text(value),)
    return (" ".join(value),) if name == "aliases" else (value,)


def index_text(index: Index) -> str:
    """What stands between the brackets in Python: "3, 0:64"; "" for the whole."""
    return ", ".join(map(_part_text, index))


def _part_text(part: int | slice) -> str:
    if not isinstance(part, slice):
        return str(part)
    ends = ("" if bound is None else str(bound) for bound in (part.start, part.stop))
    return ":".join((*ends, *([str(part.step)] if part.step is not None else [])))


def frame_of_comparison(comparison: Comparison, library: Any) -> pandas.DataFrame:
    """What ``Comparison.to_dataframe`` promises; ``library`` is pandas."""
    sides = ("kappa", "lower", "upper", "status", "certified", "dtype")
    columns = ["key", "layer", "group", "rows", "columns", "verdict", "ratio", "at_least"]
    columns += [f"{name}_{side}" for side in ("before", "after") for name in sides]
    rows = [
        [
            *(change.key, change.before.layer, change.before.group, *change.before.shape),
            *(change.verdict, change.ratio, change.at_least),
            *(getattr(entry, name) for entry in (change.before, change.after) for name in sides),
        ]
        for change in comparison
    ]
    return library.DataFrame(rows, columns=columns).astype({"layer": "Int64"})
