"""The functions and classes of report/, training/ and integrations/ that methods of results call, such as to_html().

Each is imported on first use. No other file of results/ or planning/ imports these packages, not even inside a function
or for types.
"""

# ruff: noqa: F401
# mypy: implicit-reexport

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..integrations.exports import export
    from ..report.changes import write_comparison
    from ..report.comparison import ComparisonTable
    from ..report.difference import DifferenceTable
    from ..report.frames import (
        frame_of,
        frame_of_comparison,
        frame_of_difference,
        rows_of_series,
    )
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

# By module, the names that are loaded from it.
_NAMES = {
    "..integrations.exports": "export",
    "..report.changes": "write_comparison",
    "..report.comparison": "ComparisonTable",
    "..report.difference": "DifferenceTable",
    "..report.frames": "frame_of frame_of_comparison frame_of_difference rows_of_series",
    "..report.lines": "plot_comparison plot_series",
    "..report.notebook": (
        "html_of_comparison html_of_plan html_of_ranking html_of_selection html_of_series html_of_summary"
    ),
    "..report.page": "title_of write_page",
    "..report.plan": "PlanTable",
    "..report.plot": "plot",
    "..report.series": "SeriesTable",
    "..report.summary": "SummaryTable",
    "..report.table": "RankingTable",
    "..training.handle": "Handle apply",
    ".combining": "difference intersection union",
    ".compare": "compare",
    ".comparison": "Comparison",
    ".filtering": "filtered",
    ".series": "Series series",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __package__), name)
