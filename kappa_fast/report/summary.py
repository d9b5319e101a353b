"""The table of a summary: one line for each group or layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .names import shorten_names
from .table import TextTable, format_number, table_of_numbers, width_for_names

_LEAST = 24  # columns for names
_DISPENSABLE = ("weights", "number", "highest", "lowest")

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from ..results.summary import Row, Summary


@dataclass(frozen=True)
class SummaryTable(TextTable):
    """A summary, printed by a ``rich.console.Console`` or ``to_text``."""

    summary: Summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        headers = ["number", "median", "lowest", "highest", "weights"]
        headers += ["taken", "share"] if self.summary.has_selection else []
        columns = dict(zip(headers, zip(*map(cells_of, self.summary), strict=True), strict=False))
        for header in _DISPENSABLE:
            if width_for_names(columns.items(), options.max_width) < _LEAST:
                columns.pop(header, None)
        first = [row.name or ("outside of layers" if self.summary.by == "layer" else "-") for row in self.summary]
        names = shorten_names(first, width_for_names(columns.items(), options.max_width))
        rows = zip(names, *columns.values(), strict=True)
        yield table_of_numbers(self.summary.by, columns, rows, no_wrap=True)


def cells_of(row: Row) -> list[str]:
    """The cells of a row after the name."""
    share = "?" if math.isnan(row.share) else f"{100 * row.share:.1f}%"
    numbers = [format_number(value) for value in (row.median, row.lowest, row.highest)]
    return [f"{row.count:,}", *numbers, f"{row.numel:,}", f"{row.taken:,}", share]
