"""The table of a series: a line for each matrix, a column for each ranking."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..texts import printable
from .comparison import format_factor
from .names import cut_middle, shorten_names
from .table import TextTable, check_limit, format_number, table_of_numbers, width_for_names

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from ..results.series import Series, Track

_LEAST = 24  # columns for names
_LABEL = 16


@dataclass(frozen=True)
class SeriesTable(TextTable):
    """The ``limit`` matrices that moved most (None: all), printed by a ``rich.console.Console`` or ``to_text``.

    If the page is too narrow for all rankings, the table omits those in the middle.

    Raises:
        OptionError: ``limit`` is not a count.
    """

    series: Series
    limit: int | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        rows = self.series.moved()[: self.limit]
        shown = list(range(len(self.series.labels)))
        columns = self._columns(rows, shown)
        while len(shown) > 2 and width_for_names(columns, options.max_width) < _LEAST:
            del shown[len(shown) // 2]
            columns = self._columns(rows, shown)
        if rows:
            name_width = max(_LEAST, width_for_names(columns, options.max_width))
            names = shorten_names([track.key for track in rows], name_width)
            cells = zip(names, *(cells for _, cells in columns), strict=True)
            yield table_of_numbers("tensor", [header for header, _ in columns], cells, no_wrap=True)
        yield from map(Text, self.lines(len(rows), len(shown)))

    def lines(self, shown: int, columns: int | None = None) -> Iterator[str]:
        """The lines below a table of ``shown`` rows and ``columns`` rankings."""
        if len(self.series) > shown:
            yield f"... {len(self.series) - shown:,} more"
        number = len(self.series.labels)
        hidden = number - (number if columns is None else columns)
        rest = f", {hidden} of them not shown: the page is too narrow" if hidden else ""
        yield f"{len(self.series):,} matrices over {number} rankings{rest}"

    def _columns(self, rows: Sequence[Track], shown: Sequence[int]) -> list[tuple[str, list[str]]]:
        labels = [cut_middle(printable(self.series.labels[i]), _LABEL) for i in shown]
        values = [[cell_of(track.kappas[i]) for track in rows] for i in shown]
        return [*zip(labels, values, strict=True), ("ratio", [format_factor(track.ratio) for track in rows])]


def cell_of(kappa: float) -> str:
    """A number, or a dash where it is not known."""
    return "-" if math.isnan(kappa) else format_number(kappa)
