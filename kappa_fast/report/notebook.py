"""HTML tables without scripts that notebooks show for rankings, selections, comparisons, plans and summaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..texts import printable
from .comparison import ComparisonTable, cells_of_change, format_factor
from .plan import PlanTable
from .series import SeriesTable, cell_of
from .summary import cells_of
from .table import RankingTable, format_interval, format_number

if TYPE_CHECKING:
    from ..planning import Plan
    from ..results.comparison import Comparison
    from ..results.ranking import Ranking
    from ..results.selection import Selection
    from ..results.series import Series
    from ..results.summary import Summary

ROWS = 20  # rows of a table; a notebook saves them in its file


def html_of_ranking(ranking: Ranking) -> str:
    """The lowest entries, and the counts that the text table has."""
    table = RankingTable(ranking, ROWS)
    shown = ranking.entries[:ROWS]
    columns = table.columns(shown)
    return _html(columns.keys(), zip(*columns.values(), strict=True), table.lines(len(shown)))


def html_of_selection(selection: Selection) -> str:
    """The selected matrices, and the budget that selected them."""
    shown = selection.entries[:ROWS]
    shapes = ["x".join(map(str, entry.shape)) if entry.numel else "?" for entry in shown]
    rows = [(e.key, s, format_number(e.kappa), format_interval(e)) for e, s in zip(shown, shapes, strict=True)]
    more = [f"... {len(selection) - len(shown):,} more"] if len(selection) > len(shown) else []
    said = repr(selection).removeprefix("Selection(").removesuffix(")").split("; ")
    return _html(("tensor", "shape", "kappa", "interval"), rows, [*more, *said, selection.describe()])


def html_of_comparison(comparison: Comparison) -> str:
    """The matrices that moved most, in both directions."""
    table = ComparisonTable(comparison, ROWS // 2)
    changes = list(table.rows())
    rows = [(change.key, *cells_of_change(change)) for change in changes]
    return _html(("tensor", "before", "after", "ratio", "at least"), rows, table.lines(len(changes)))


def html_of_series(series: Series) -> str:
    """The matrices that moved most."""
    rows = series.moved()[:ROWS]
    cells = [(t.key, *map(cell_of, t.kappas), format_factor(t.ratio)) for t in rows]
    return _html(("tensor", *series.labels, "ratio"), cells, SeriesTable(series, ROWS).lines(len(rows)))


def html_of_plan(plan: Plan) -> str:
    """The matrices that would be ranked, and the work and memory that this takes."""
    table = PlanTable(plan, ROWS)
    headers = ("to be ranked", "shape", "dtype", "number", "weights", "Gop", "share")
    facts = [f"{what}: {text}".removeprefix(": ") for what, text in table.lines()]
    return _html(headers, table.rows(), [*table.counts(), *facts])


def html_of_summary(summary: Summary) -> str:
    """All rows."""
    headers = [summary.by, "number", "median", "lowest", "highest", "weights"]
    headers += ["taken", "share"] if summary.has_selection else []
    names = [row.name or ("outside of layers" if summary.by == "layer" else "-") for row in summary]
    rows = [(name, *cells_of(row))[: len(headers)] for name, row in zip(names, summary, strict=True)]
    return _html(headers, rows, ())


def _html(headers: Iterable[str], rows: Iterable[Sequence[str]], lines: Iterable[str]) -> str:
    head = "".join(f"<th style='text-align: left'>{escape(header)}</th>" for header in headers)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align: left'>{escape(printable(cell))}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    below = "<br>\n".join(escape(printable(line)) for line in lines)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n" if body else ""
    return f"<div>\n{table}<p>{below}</p>\n</div>\n"
