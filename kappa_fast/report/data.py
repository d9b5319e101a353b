"""The data of the page of a ranking: plain JSON in columns, small enough for tens of thousands of matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..results.names import in_model_order
from ..results.scores import score_of
from ..results.serialize import thaw
from .colors import viridis
from .grid import color_range, make_grid
from .shown import Shown
from .skipped import by_reason
from .thresholds import thresholds

if TYPE_CHECKING:
    from ..results.entries import TensorKappa
    from ..results.ranking import Ranking
    from ..results.selection import Selection

_NUMBERS = ("kappa", "lower", "upper", "score", "sensitivity")


def page_data(ranking: Ranking, selection: Selection | None, show: str | None = None) -> dict[str, Any]:
    """The input of the script of the page.

    ``entries`` holds a list for every field, in the order of the ranking. Fields that repeat (group, shape with numel,
    dtype, method, status, quantization) are positions in ``tables``. nan and inf are the texts "nan", "inf", "-inf".
    ``order`` is the place of each entry in the order of the model. ``score`` is null if every score is the kappa.
    ``statistics`` has six digits of what the page can show in place of kappa; ``shown`` says which these are, whether
    their scales are logarithmic, and which comes first. The cells of ``grid`` have the means of kappa.

    Raises:
        OptionError: ``selection`` holds a matrix that is not in the ranking, or no matrix has what is to be shown.
    """
    entries = ranking.entries
    first = Shown.chosen(ranking, show)
    choices = Shown.choices(entries)
    grid = make_grid(entries)
    tables: dict[str, list[Any]] = {}
    return {
        "entries": {**_columns(entries, tables), "statistics": _statistics(entries, choices)},
        "shown": {"first": first.name, "choices": [[each.name, each.logarithmic] for each in choices]},
        "tables": tables,
        "aliases": {str(i): list(entry.aliases) for i, entry in enumerate(entries) if entry.aliases},
        "grid": {
            "layers": [str(layer) for layer in grid.layers],
            "columns": [{"group": column.group, "label": column.label} for column in grid.columns],
            "cells": [
                [
                    cell.row,
                    cell.column,
                    list(cell.members),
                    *map(_number, (cell.kappa, cell.low, cell.high)),
                    cell.status,
                ]
                for cell in grid.cells
            ],
            "beside": list(grid.beside),
        },
        "skipped": [
            {
                "reason": reason,
                "items": [
                    [item.name, list(item.shape), *([item.reason] if item.reason != reason else [])] for item in items
                ],
            }
            for reason, items in by_reason(ranking.skipped)
        ],
        "selection": None if selection is None else _selection(ranking, selection),
        "parameters": _count_of_parameters(ranking.metadata),
        "thresholds": thresholds(
            entries, interrupted=bool(ranking.metadata.get("partial")), score=score_of(ranking.metadata)
        ),
        "colors": viridis(),
        "range": list(color_range(grid.cells)),
    }


def _columns(entries: Iterable[TensorKappa], tables: dict[str, list[Any]]) -> dict[str, list[Any] | None]:
    entries = tuple(entries)
    places = {key: place for place, key in enumerate(in_model_order(entry.key for entry in entries))}
    columns: dict[str, list[Any] | None] = {
        "key": [entry.key for entry in entries],
        "order": [places[entry.key] for entry in entries],
        "layer": [entry.layer for entry in entries],
        "certified": [int(entry.certified) for entry in entries],
    }
    columns |= {name: [_number(getattr(entry, name)) for entry in entries] for name in _NUMBERS}
    if columns["score"] == columns["kappa"]:
        columns["score"] = None  # saves a tenth of the file
    repeated: dict[str, Callable[[TensorKappa], Hashable]] = {
        "group": lambda entry: entry.group,
        "shape": lambda entry: (*entry.shape, entry.numel),
        "dtype": lambda entry: entry.dtype,
        "method": lambda entry: entry.method,
        "status": lambda entry: entry.status,
        "quantization": lambda entry: getattr(entry, "quantization", None),
    }
    for name, read in repeated.items():
        positions: dict[Hashable, int] = {}
        columns[name] = [positions.setdefault(read(entry), len(positions)) for entry in entries]
        tables[name] = list(positions)
    return columns


def _statistics(entries: Iterable[TensorKappa], choices: Iterable[Shown]) -> dict[str, list[Any]]:
    names = [each.name for each in choices if each.name not in _NUMBERS]  # these have columns of their own
    return {name: [_rounded(getattr(entry, name)) for entry in entries] for name in names}


def _rounded(value: float | None) -> float | str | None:
    return None if value is None else _number(float(f"{value:.6g}"))


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(float(value))


def _selection(ranking: Ranking, selection: Selection) -> dict[str, Any]:
    positions = {entry.key: i for i, entry in enumerate(ranking.entries)}
    foreign = [key for key in selection.keys if key not in positions]
    if foreign:
        raise OptionError(
            f"the selection holds {foreign[0]!r}, which is not in the ranking: select from the ranking that is reported"
        )
    return {
        "chosen": sorted(positions[key] for key in selection.keys),
        "certain": selection.boundary_certain,
        "code": _code(selection),
        "unfit": selection.unfit(),
    }


def _code(selection: Selection) -> str:
    """The Python call that makes the selection; "" if its settings do not have the budgets."""
    settings = selection.settings
    if not selection.budgets:
        return ""
    arguments = [f"{name}={value!r}" for name, value in selection.budgets.items()]
    arguments += ["per_group=True"] if settings.get("per_group") else []
    arguments += ["fill=True"] if settings.get("fill") else []
    given = {
        name: thaw(settings[name]) for name in ("include", "exclude", "order", "seed", "match") if name in settings
    }
    arguments += [f"{name}={patterns!r}" for name, patterns in given.items()]
    arguments += [f"unit={settings['unit']!r}"] if settings.get("unit", "matrix") != "matrix" else []
    calls = [f"ranking.select({', '.join(arguments)})"]
    for name, patterns in (("including", selection.include), ("excluding", selection.exclude)):
        calls += [f"{name}({', '.join(map(repr, patterns))})"] if patterns else []
    return ".".join(calls)


def _count_of_parameters(metadata: Mapping[str, Any]) -> int | None:
    count = metadata.get("num_parameters")
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 1 else None


def to_script_text(data: Mapping[str, Any]) -> str:
    """``data`` as ASCII for a script element; "<" is escaped, so that no text in the data can end the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
