"""Rankings, comparisons and series as pandas DataFrames, whose cells have types that every table format can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..results.entries import FIELDS, Index, TensorKappa
from ..results.statistics import STATISTICS

if TYPE_CHECKING:
    import pandas

    from ..results.comparison import Comparison
    from ..results.difference import Difference
    from ..results.series import Series

_OWN_COLUMNS = {"shape": ("rows", "columns")}


def frame_of(entries: Iterable[TensorKappa], library: Any) -> pandas.DataFrame:
    """See ``Ranking.to_dataframe``; ``library`` is pandas."""
    columns = ["key", *(column for name in FIELDS for column in _OWN_COLUMNS.get(name, (name,)))]
    frame = library.DataFrame(list(rows_of(entries)), columns=columns)
    return frame.astype({"layer": "Int64", "quantization": "string", **dict.fromkeys(STATISTICS, "float64")})


def rows_of(entries: Iterable[TensorKappa]) -> Iterator[dict[str, Any]]:
    """The rows of ``Ranking.to_dataframe`` without pandas, for CSV."""
    columns = ["key", *(column for name in FIELDS for column in _OWN_COLUMNS.get(name, (name,)))]
    for entry in entries:
        values = [entry.key, *(value for name in FIELDS for value in _cells(entry, name))]
        yield dict(zip(columns, values, strict=True))


def _cells(entry: TensorKappa, name: str) -> tuple[Any, ...]:
    value = getattr(entry, name)
    if name == "shape":
        return tuple(value)
    if name == "index":
        return (index_text(value),)
    return (" ".join(value),) if name == "aliases" else (value,)


def index_text(index: Index) -> str:
    """The index as Python writes it between brackets: "3, 0:64"; "" for the whole."""
    return ", ".join(map(_part_text, index))


def _part_text(part: int | slice) -> str:
    if not isinstance(part, slice):
        return str(part)
    ends = ("" if bound is None else str(bound) for bound in (part.start, part.stop))
    return ":".join((*ends, *([str(part.step)] if part.step is not None else [])))


def frame_of_comparison(comparison: Comparison, library: Any) -> pandas.DataFrame:
    """See ``Comparison.to_dataframe``; ``library`` is pandas."""
    numbers = [f"{name}_{side}" for side in ("before", "after") for name in STATISTICS]
    frame = library.DataFrame(list(rows_of_comparison(comparison)))
    return frame.astype({"layer": "Int64", **dict.fromkeys(numbers, "float64")})


def rows_of_comparison(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """The rows of ``Comparison.to_dataframe`` without pandas, for CSV."""
    for change in comparison:
        a = change.before
        row: dict[str, Any] = {"key": change.key, "layer": a.layer, "group": a.group}
        row |= {"rows": a.shape[0], "columns": a.shape[1]}
        row |= {"verdict": change.verdict, "ratio": change.ratio, "at_least": change.at_least}
        for side, entry in (("before", a), ("after", change.after)):
            names = ("kappa", "lower", "upper", "status", "certified", "dtype")
            row |= {f"{name}_{side}": getattr(entry, name) for name in (*names, *STATISTICS)}
        yield row


def frame_of_difference(difference: Difference, library: Any) -> pandas.DataFrame:
    """See ``Difference.to_dataframe``; ``library`` is pandas."""
    numbers = ("stable_rank", "share_left", "share_right", "share")
    types = {"layer": "Int64", "intruders": "Int64", **dict.fromkeys(numbers, "float64")}
    return library.DataFrame(list(rows_of_difference(difference))).astype(types)


def rows_of_difference(difference: Difference) -> Iterator[dict[str, Any]]:
    """The rows of ``Difference.to_dataframe`` without pandas, for CSV."""
    names = ("norm", "norm_before", "relative", "spectral_norm", "stable_rank", "k", "share_left", "share_right")
    for update in difference:
        row: dict[str, Any] = {name: getattr(update, name) for name in ("key", "key_after", "layer", "group")}
        row |= {"rows": update.shape[0], "columns": update.shape[1]}
        row |= {name: getattr(update, name) for name in ("dtype_before", "dtype_after", "status", *names, "share")}
        yield {**row, "intruders": update.intruders, "threshold": update.threshold}


def rows_of_series(series: Series) -> Iterator[dict[str, Any]]:
    """A row for each matrix and ranking that has it."""
    for track in series:
        for position, (label, entry) in enumerate(zip(series.labels, track.entries, strict=True)):
            if entry is not None:
                row: dict[str, Any] = {
                    "label": label,
                    "position": position,
                    "key": track.key,
                    "layer": track.first.layer,
                }
                row |= {"group": track.first.group, "kappa": entry.kappa, "lower": entry.lower, "upper": entry.upper}
                yield {**row, "status": entry.status}
