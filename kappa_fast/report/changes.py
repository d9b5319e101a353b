"""The HTML page of a comparison: text, a picture and a table, without a script."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import OptionError
from ..texts import printable
from .comparison import ComparisonTable, cells_of_change
from .lines import plot_comparison
from .page import write_static
from .plot import plain_style, saved

if TYPE_CHECKING:
    from ..results.comparison import Comparison

MOST_ROWS = 1000  # in each direction


def write_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """See ``Comparison.to_html``."""
    table = ComparisonTable(comparison, MOST_ROWS)
    changes = list(table.rows())
    try:
        with plain_style("Comparison.to_html()"):
            picture: bytes | None = saved(plot_comparison(comparison, None, None), "svg")
    except OptionError:  # no kappa is known in both
        picture = None
    write_static(
        path,
        picture,
        title="How kappa moved",
        alt="kappa after over kappa before, by layer and type",
        heading="What moved, up and then down, the most certain first",
        lines=[printable(line) for line in table.lines(len(changes))],
        caveats=[printable(caveat) for caveat in comparison.caveats],
        headers=["tensor", "before", "after", "ratio", "at least"],
        rows=[[printable(change.key), *cells_of_change(change)] for change in changes],
    )
