"""The table of a summary: one line for each group or layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .names import shorten_names
from .table import format_number, to_plain_text

_LEAST = 24  # columns for names
_DISPENSABLE = ("weights", "number", "highest", "lowest")

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from ..results.summary import Row, Summary


@dataclass(frozen=True)
class SummaryTable:
    """A summary, printed by a ``rich.console.Console`` or ``to_text``."""

    summary: Summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.table import Table
        from rich.text import Text

        headers = ["number", "median", "lowest", "highest", "weights"]
        headers += ["taken", "share"] if self.summary.has_selection else []
        columns = dict(zip(headers, zip(*map(cells_of, self.summary), strict=True), strict=False))
        for header in _DISPENSABLE:
            if self._name_width(columns, options.max_width) < _LEAST:
                columns.pop(header, None)
        name_width, rows = self._name_width(columns, options.max_width), list(zip(*columns.values(), strict=True))
        first = [row.name or ("outside of layers" if self.summary.by == "layer" else "-") for row in self.summary]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(Text(self.summary.by, "bold"), no_wrap=True)
        for header in columns:
            table.add_column(Text(header, "bold"), justify="right", no_wrap=True)
        for name, cells in zip(shorten_names(first, name_width), rows, strict=True):
            table.add_row(*map(Text, (name, *cells)))
        yield table

    def _name_width(self, columns: Mapping[str, Sequence[str]], width: int) -> int:
        return width - sum(max(map(len, (header, *cells))) + 2 for header, cells in columns.items())

    def to_text(self, width: int = 100) -> str:
        """The same as text without colors.

        Raises:
            OptionError: less than 60 columns.
        """
        return to_plain_text(self, width)


def cells_of(row: Row) -> list[str]:
    """The cells of a row after the name."""
    share = "?" if math.isnan(row.share) else f"{100 * row.share:.1f}%"
    numbers = [format_number(value) for value in (row.median, row.lowest, row.highest)]
    return [f"{row.count:,}", *numbers, f"{row.numel:,}", f"{row.taken:,}", share]
