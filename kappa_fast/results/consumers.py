"""The functions and classes of report/, training/ and integrations/ that methods of results call, such as to_html().

Each is imported on first use. No other file of results/ or planning/ imports these packages, not even inside a function
or for types.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..integrations.exports import export
    from ..report.changes import write_comparison
    from ..report.comparison import ComparisonTable
    from ..report.frames import frame_of, frame_of_comparison, rows_of_series
    from ..report.lines import plot_comparison, plot_series
    from ..report.notebook import (
        html_of_comparison,
        html_of_plan,
        html_of_ranking,
        html_of_selection,
        html_of_series,
        html_of_summary,
    )
    from ..report.page import title_of, write_page
    from ..report.plan import PlanTable
    from ..report.plot import plot
    from ..report.series import SeriesTable
    from ..report.summary import SummaryTable
    from ..report.table import RankingTable
    from ..training.handle import Handle, apply
    from .combining import difference, intersection, union
    from .compare import compare
    from .comparison import Comparison
    from .filtering import filtered
    from .series import Series, series

_HOMES = {
    "Comparison": ".comparison",
    "ComparisonTable": "..report.comparison",
    "Handle": "..training.handle",
    "PlanTable": "..report.plan",
    "RankingTable": "..report.table",
    "Series": ".series",
    "SeriesTable": "..report.series",
    "SummaryTable": "..report.summary",
    "apply": "..training.handle",
    "compare": ".compare",
    "difference": ".combining",
    "export": "..integrations.exports",
    "filtered": ".filtering",
    "frame_of": "..report.frames",
    "frame_of_comparison": "..report.frames",
    "html_of_comparison": "..report.notebook",
    "html_of_plan": "..report.notebook",
    "html_of_ranking": "..report.notebook",
    "html_of_selection": "..report.notebook",
    "html_of_series": "..report.notebook",
    "html_of_summary": "..report.notebook",
    "intersection": ".combining",
    "plot": "..report.plot",
    "plot_comparison": "..report.lines",
    "plot_series": "..report.lines",
    "rows_of_series": "..report.frames",
    "series": ".series",
    "title_of": "..report.page",
    "union": ".combining",
    "write_comparison": "..report.changes",
    "write_page": "..report.page",
}

__all__ = [
    "Comparison",
    "ComparisonTable",
    "Handle",
    "PlanTable",
    "RankingTable",
    "Series",
    "SeriesTable",
    "SummaryTable",
    "apply",
    "compare",
    "difference",
    "export",
    "filtered",
    "frame_of",
    "frame_of_comparison",
    "html_of_comparison",
    "html_of_plan",
    "html_of_ranking",
    "html_of_selection",
    "html_of_series",
    "html_of_summary",
    "intersection",
    "plot",
    "plot_comparison",
    "plot_series",
    "rows_of_series",
    "series",
    "title_of",
    "union",
    "write_comparison",
    "write_page",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __package__), name)
