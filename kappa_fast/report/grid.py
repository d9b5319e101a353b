"""The grid of layers and types of matrices that the heat maps of the page and of the plot show."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..results.entries import Status, TensorKappa
from ..results.names import in_model_order
from .shown import KAPPA, Shown

# A larger map would not be readable; further matrices are listed beside the map.
MAX_LAYERS = 256
MAX_COLUMNS = 48

_WORST_FIRST: tuple[Status, ...] = ("non_finite", "rank_deficient", "bounded", "scored", "ok")

# Names of projections, in the order in which data passes through them.
_ROLES = {
    "qkv": r"qkv|wqkv|c_attn|query_key_value",
    "query": r"w?q|query|to_q",
    "key": r"w?kv?|key|to_k",
    "value": r"w?v|value|to_v",
    "gate": r"gate|w1|wi_0",
    "up": r"up|w3|wi|wi_1|fc1|c_fc|intermediate|dense_h_to_4h|fc_in",
    "down": r"down|w2|fc2|dense_4h_to_h|fc_out",
    "out": r"w?o|out|output|to_out|c_proj",
}
_ROLE = re.compile("(?<![^._])(?:" + "|".join(f"(?P<{role}>{words})" for role, words in _ROLES.items()) + ")(?![^._])")
_ATTENTION = re.compile(r"att", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """One type of matrix: its group, a short name for it, and the most matrices that one layer has of it."""

    group: str
    label: str
    depth: int


@dataclass(frozen=True)
class Cell:
    """The matrices of one type in one layer.

    Attributes:
        row, column: positions in ``Grid.layers`` and ``Grid.columns``.
        members: positions in the ranking, in the order of the numbers in their names.
        kappa: geometric mean over the members with a finite kappa; nan if there is none. Of another statistic, where
            that is shown, the mean that ``Shown.mean`` takes.
        low, high: the smallest and the largest of these.
        status: "ok", or the worst among the members.
    """

    row: int
    column: int
    members: tuple[int, ...]
    kappa: float
    low: float
    high: float
    status: Status


@dataclass(frozen=True)
class Grid:
    """The cells of a ranking, row by row; ``beside`` holds the positions of the matrices that are in no cell."""

    layers: tuple[int, ...]
    columns: tuple[Column, ...]
    cells: tuple[Cell, ...]
    beside: tuple[int, ...]


def make_grid(entries: Sequence[TensorKappa], shown: Shown = KAPPA) -> Grid:
    """Sort the entries of a ranking into layers and types; ``shown``: what the cells show.

    Matrices without a layer are beside the grid, and so are matrices beyond ``MAX_LAYERS`` (the highest numbers) or
    ``MAX_COLUMNS`` (the types with the fewest matrices).
    """
    placed = {i: entry for i, entry in enumerate(entries) if entry.layer is not None}
    layers = sorted({entry.layer for entry in placed.values() if entry.layer is not None})[:MAX_LAYERS]
    rows = {layer: row for row, layer in enumerate(layers)}
    placed = {i: entry for i, entry in placed.items() if entry.layer in rows}
    sizes = Counter(entry.group for entry in placed.values())
    groups = sorted(sizes, key=lambda group: (-sizes[group], group))[:MAX_COLUMNS]
    labels = shorten_groups(groups)
    groups.sort(key=lambda group: _place(labels[group]))
    columns = {group: column for column, group in enumerate(groups)}
    members: dict[tuple[int, int], list[int]] = {}
    for i, entry in placed.items():
        if entry.layer is not None and entry.group in columns:
            members.setdefault((rows[entry.layer], columns[entry.group]), []).append(i)
    cells = tuple(_make_cell(entries, shown, where, _by_number(entries, members[where])) for where in sorted(members))
    depths = dict[int, int]()
    for cell in cells:
        depths[cell.column] = max(depths.get(cell.column, 0), len(cell.members))
    inside = {i for cell in cells for i in cell.members}
    return Grid(
        layers=tuple(layers),
        columns=tuple(Column(group, labels[group], depths[column]) for group, column in columns.items()),
        cells=cells,
        beside=tuple(i for i in range(len(entries)) if i not in inside),
    )


def _by_number(entries: Sequence[TensorKappa], members: Sequence[int]) -> list[int]:
    positions = {entries[i].key: i for i in members}
    return [positions[key] for key in in_model_order(positions)]


def _make_cell(entries: Sequence[TensorKappa], shown: Shown, where: tuple[int, int], members: Sequence[int]) -> Cell:
    found = [entries[i] for i in members]
    statuses = {entry.status for entry in found}
    values = [value for value in map(shown.value, found) if not math.isnan(value)]
    return Cell(
        row=where[0],
        column=where[1],
        members=tuple(members),
        kappa=shown.mean(values) if values else math.nan,
        low=min(values, default=math.nan),
        high=max(values, default=math.nan),
        status=next(status for status in _WORST_FIRST if status in statuses),
    )


def color_range(cells: Iterable[Cell]) -> tuple[float, float]:
    """The smallest and the largest number that a map of these cells shows, (1, 10) if there is none."""
    kappas = [cell.kappa for cell in cells if not math.isnan(cell.kappa)]
    return (min(kappas), max(kappas)) if kappas else (1.0, 10.0)


def shorten_groups(groups: Iterable[str]) -> dict[str, str]:
    """A label for each group: its name after the layer, without ".weight"; the whole name if two would be equal."""
    groups = list(groups)

    def short(group: str) -> str:
        parts = group.split(".")
        after = parts[parts.index("*") + 1 :] if "*" in parts[:-1] else parts
        return ".".join(after).removesuffix(".weight")

    labels: dict[str, str] = {}
    for shorten in (short, lambda group: group.removesuffix(".weight"), lambda group: group):
        left = [group for group in groups if group not in labels]
        found: dict[str, Any] = {group: shorten(group) for group in left}
        counts = Counter([*found.values(), *labels.values()])
        labels |= {group: label for group, label in found.items() if counts[label] == 1 and label}
    return labels | {group: group for group in groups if group not in labels}


def _place(label: str) -> tuple[bool, str, int, str]:
    """The sort key of a label: attention first, then families ("mlp.experts."), each in the order of the roles."""
    found = list(_ROLE.finditer(label))
    roles = list(_ROLES)
    role = roles.index(found[-1].lastgroup or "") if found else len(roles)
    in_attention = bool(_ATTENTION.search(label)) or role < roles.index("gate")
    family = "" if in_attention else label[: found[0].start()] if found else label
    return not in_attention, family, role, label
