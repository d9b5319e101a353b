"""The table of a comparison: matrices that moved, matrices of one ranking only, and the selections of a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from ..texts import printable
from .names import shorten_names
from .table import TextTable, check_limit, format_interval, format_number, table_of_numbers

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from ..results.comparison import Change, Comparison, Overlap, Unpaired

T = TypeVar("T")

_DIRECTIONS: tuple[Literal["up", "down"], ...] = ("up", "down")
_VISIBLE = 1.005  # a smaller ratio is printed as 1.00x
_OTHERS = 62  # the width of the numbers of a row
_LEAST = 24


@dataclass(frozen=True)
class ComparisonTable(TextTable):
    """A comparison with ``limit`` moves in each direction (None: all), printed by a ``rich.console.Console``.

    Raises:
        OptionError: ``limit`` is not a count.
    """

    comparison: Comparison
    limit: int | None = None
    overlap: Overlap | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        rows = list(self.rows())
        if rows:
            name_width = max(_LEAST, options.max_width - _OTHERS)
            names = shorten_names([change.key for change in rows], name_width)
            cells = [(name, *cells_of_change(change)) for name, change in zip(names, rows, strict=True)]
            headers = ("before", "after", "ratio", "at least")
            yield table_of_numbers("tensor", headers, cells, no_wrap=True, max_width=name_width)
        yield from map(Text, self.lines(len(rows)))

    def rows(self) -> Iterator[Change]:
        """The changes that the table shows."""
        for direction in _DIRECTIONS:
            yield from self._visible(direction)[: self.limit]

    def _visible(self, direction: Literal["up", "down"]) -> Sequence[Change]:
        """The certain moves, and the uncertain ones that the digits of the table show."""
        moved = self.comparison.moved(direction)
        return [change for change in moved if change.at_least > 1 or change.size >= _VISIBLE]

    def lines(self, shown: int) -> Iterator[str]:
        """The lines below a table of ``shown`` rows."""
        c = self.comparison
        counts = c.counts
        moved = sum(len(self._visible(direction)) for direction in _DIRECTIONS)
        if moved > shown:
            yield f"... {moved - shown:,} more that moved"
        lone = f"{len(c.only_before):,} only in the first, {len(c.only_after):,} only in the second"
        yield f"{len(c):,} matrices in both, {lone}"
        yield (
            f"kappa: {counts['up']:,} certainly up, {counts['down']:,} certainly down, {counts['within']:,} changed "
            f"within their intervals, {counts['identical']:,} identical"
        )
        if not math.isnan(c.correlation):
            of = "" if c.score == "kappa" else f" of {c.score}"
            yield f"rank correlation (Spearman){of} {c.correlation:.4f} over {c.correlated:,}"
        for change in _few(c.status_changes, self.limit):
            yield f"status: {printable(change.key)}: {change.before.status} -> {change.after.status}"
        if self.limit is not None and len(c.status_changes) > self.limit:
            yield f"... {len(c.status_changes) - self.limit:,} more with another status"
        yield from self._lone(c.only_before, "first", "second")
        yield from self._lone(c.only_after, "second", "first")
        if self.overlap is not None:
            yield from self._selected(self.overlap)

    def _lone(self, lone: Sequence[Unpaired], here: str, there: str) -> Iterator[str]:
        for item in _few(lone, self.limit):
            why = f" (skipped in the {there}: {printable(item.reason)})" if item.reason else ""
            yield f"only in the {here}: {printable(item.key)}{why}"
        if self.limit is not None and len(lone) > self.limit:
            yield f"... {len(lone) - self.limit:,} more only in the {here}"

    def _selected(self, overlap: Overlap) -> Iterator[str]:
        weights = "" if math.isnan(overlap.params) else f", {100 * overlap.params:.1f}% of their weights"
        yield (
            f"selected by {overlap.budget}: {overlap.before:,} and {overlap.after:,}, {len(overlap.both):,} of them in "
            f"both: {100 * overlap.jaccard:.1f}% of the matrices{weights}"
        )
        for keys, sign in ((overlap.only_before, "-"), (overlap.only_after, "+")):
            yield from (f"  {sign} {printable(key)}" for key in _few(keys, self.limit))
            if self.limit is not None and len(keys) > self.limit:
                yield f"  {sign} ... {len(keys) - self.limit:,} more"


def _few(items: Sequence[T], limit: int | None) -> Sequence[T]:
    return items if limit is None else items[:limit]


def cells_of_change(change: Change) -> Sequence[str]:
    """The cells of a row after the name."""
    a, b = change.before, change.after
    shown = [format_interval(e) if e.status == "ok" and math.isfinite(e.upper) else _point(e.kappa) for e in (a, b)]
    return (*shown, format_factor(change.ratio), "-" if change.at_least == 1 else format_factor(change.at_least))


def format_factor(value: float) -> str:
    """A ratio: "1.52x", "-" where it is not known."""
    return "-" if math.isnan(value) else "inf" if math.isinf(value) else f"{format_number(value, 3)}x"


def _point(kappa: float) -> str:
    return "?" if math.isnan(kappa) else format_number(kappa)
