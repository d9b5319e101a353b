"""Summary: figures of a ranking by group or by layer, and of the part of each that a selection takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import OptionError, missing_extra
from . import consumers
from .entries import TensorKappa

if TYPE_CHECKING:
    import pandas

    from .consumers import SummaryTable
    from .selection import Selection

By = Literal["group", "layer"]


@dataclass(frozen=True)
class Row:
    """Matrices of one group, or of one layer.

    Attributes:
        name: the group; or the number of the layer as text, "" for matrices outside of layers.
        count, numel: how many matrices, and their weights.
        median, lowest, highest: of kappa, over the resolved ones (rank-deficient ones have inf); nan if there is none.
        taken: how many matrices the selection has.
        share: their weights over ``numel``; nan where sizes are unknown.
    """

    name: str
    count: int
    numel: int
    median: float
    lowest: float
    highest: float
    taken: int
    share: float


@dataclass(frozen=True)
class Summary(Sequence[Row]):
    """The rows of a ranking, by the lowest median first for groups, in order for layers.

    ``print(summary)`` shows a table, ``to_dataframe()`` has one row for each.
    """

    by: By
    rows: tuple[Row, ...]
    has_selection: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        return self.to_text()

    def table(self) -> SummaryTable:
        """A table for ``rich``, fitted to the width of the page."""
        return consumers.SummaryTable(self)

    def to_text(self, width: int = 100) -> str:
        """The table as plain text.

        Raises:
            OptionError: less than 60 columns.
        """
        return self.table().to_text(width)

    def _repr_html_(self) -> str:
        return consumers.html_of_summary(self)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per group or layer, the fields of Row as columns.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise missing_extra("pandas", "dataframe", "Summary.to_dataframe()") from error
        names = [item.name for item in fields(Row)]
        frame = pandas.DataFrame([[getattr(row, name) for name in names] for row in self.rows], columns=names)
        return frame.rename(columns={"name": self.by})


def summarize(entries: Iterable[TensorKappa], by: By, selection: Selection | None) -> Summary:
    """See ``Ranking.summary``.

    Raises:
        OptionError: ``by`` is neither "group" nor "layer".
    """
    if by not in get_args(By):
        raise OptionError(f"by={by!r}: give 'group' or 'layer'")
    taken = set(selection.keys) if selection is not None else set()
    members: dict[str, list[TensorKappa]] = {}
    for entry in entries:
        name = entry.group if by == "group" else "" if entry.layer is None else str(entry.layer)
        members.setdefault(name, []).append(entry)
    rows = [_row(name, some, taken) for name, some in members.items()]
    if by == "group":
        rows.sort(key=lambda row: (math.isnan(row.median), row.median, row.name))
    else:
        rows.sort(key=lambda row: (not row.name, int(row.name or 0)))
    return Summary(by, tuple(rows), selection is not None)


def _row(name: str, entries: Sequence[TensorKappa], taken: set[str]) -> Row:
    kappas = [entry.kappa for entry in entries if entry.status in ("ok", "rank_deficient")]
    chosen = [entry for entry in entries if entry.key in taken]
    numel = sum(entry.numel for entry in entries)
    return Row(
        name=name,
        count=len(entries),
        numel=numel,
        median=statistics.median(kappas) if kappas else math.nan,
        lowest=min(kappas, default=math.nan),
        highest=max(kappas, default=math.nan),
        taken=len(chosen),
        share=sum(entry.numel for entry in chosen) / numel if all(e.numel for e in entries) else math.nan,
    )
