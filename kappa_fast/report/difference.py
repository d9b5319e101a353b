"""The table of a difference: the matrices that changed most, and what was left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..texts import printable
from .names import shorten_names
from .table import TextTable, check_limit, format_number, table_of_numbers, width_for_names

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from ..results.difference import Difference, Update

T = TypeVar("T")

_LEAST = 24
_HEADERS = ("change", "stable rank", "left", "right", "both", "intruders")


@dataclass(frozen=True)
class DifferenceTable(TextTable):
    """The ``limit`` largest relative changes of a difference (None: all), printed by a ``rich.console.Console``.

    Columns: the key; ||D||_F / ||W||_F; the stable rank of D; the shares of D in the leading left, right and both
    subspaces of W; intruders among the leading singular vectors of W + D.

    Raises:
        OptionError: ``limit`` is not a count.
    """

    difference: Difference
    limit: int | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        rows = self.difference.changed[: self.limit]
        if rows:
            numbers = [cells_of_update(update) for update in rows]
            width = max(
                _LEAST, width_for_names(zip(_HEADERS, zip(*numbers, strict=True), strict=True), options.max_width)
            )
            names = shorten_names([update.key for update in rows], width)
            cells = [(name, *row) for name, row in zip(names, numbers, strict=True)]
            yield table_of_numbers("tensor", _HEADERS, cells, no_wrap=True, max_width=width)
        yield from map(Text, self.lines(len(rows)))

    def lines(self, shown: int) -> Iterator[str]:
        """The lines below a table of ``shown`` rows."""
        d = self.difference
        if len(d.changed) > shown:
            yield f"... {len(d.changed) - shown:,} more that changed"
        lone = f"{len(d.only_before):,} only before, {len(d.only_after):,} only after"
        yield f"{len(d):,} matrices in both, {len(d.changed):,} of them changed; {lone}, {len(d.skipped):,} skipped"
        yield f"all together changed by {_percent(d.relative)} of their norm"
        looked = [update for update in d.changed if update.intruders is not None]
        if looked:
            count, most = sum(u.intruders or 0 for u in looked), max(u.k for u in looked)
            yield (
                f"{count:,} intruders in {sum(bool(u.intruders) for u in looked):,} matrices: among the {most} leading "
                f"singular vectors, with no old one at a cosine of {d.settings['threshold']:g}"
            )
        for update in _few(d.non_finite, self.limit):
            yield f"NaN or inf: {printable(update.key)}"
        for what, lones in (
            ("not subtracted", d.refused),
            ("only before", d.only_before),
            ("only after", d.only_after),
        ):
            for item in _few(lones, self.limit):
                yield f"{what}: {printable(item.key)}{f' ({printable(item.reason)})' if item.reason else ''}"
            if self.limit is not None and len(lones) > self.limit:
                yield f"... {len(lones) - self.limit:,} more {what}"


def _few(items: Sequence[T], limit: int | None) -> Sequence[T]:
    return items if limit is None else items[:limit]


def cells_of_update(update: Update) -> Sequence[str]:
    """The cells of a row after the name."""
    rank = update.stable_rank
    shares = (update.share_left, update.share_right, update.share)
    intruders = "-" if update.intruders is None else f"{update.intruders}/{update.k}"
    return (_percent(update.relative), "-" if rank is None else format_number(rank, 3), *map(_share, shares), intruders)


def _share(value: float | None) -> str:
    return "-" if value is None else _percent(value)


def _percent(value: float) -> str:
    return "inf" if math.isinf(value) else f"{format_number(100 * value, 3)}%"
