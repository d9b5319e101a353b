"""Pictures of comparisons and series, drawn by matplotlib without pyplot."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..io.writing import write_bytes
from ..results.units import geometric_mean
from ..texts import printable
from .grid import Grid, make_grid, shorten_groups
from .names import cut_middle, shorten_names
from .plot import column_labels, kind_of, new_figure, plain_style, saved
from .table import format_number

if TYPE_CHECKING:
    from ..results.comparison import Comparison
    from ..results.series import Series, Track

_MOST_PANELS = 12
_MOST_BARS = 40


def plot_series(series: Series, path: str | os.PathLike[str] | None, ax: Any, group: str | None) -> Any:
    """See ``Series.plot``."""
    kind = None if path is None else kind_of(path)
    groups: dict[str, list[Track]] = {}
    for track in series.moved():
        if sum(0 < kappa < math.inf for kappa in track.kappas) > 0:
            groups.setdefault(track.first.group, []).append(track)
    if group is not None and group not in groups:
        raise OptionError(f"group={group!r}: give one of {', '.join(map(repr, sorted(groups)[:8]))}")
    if not groups:
        raise OptionError("there is nothing to plot: no matrix has a finite kappa")
    shown = [group] if group is not None else list(groups)[: 1 if ax is not None else _MOST_PANELS]
    with plain_style("Series.plot()"):
        if ax is not None:
            figure, panels = ax.figure, [ax]
        else:
            columns = min(3, len(shown))
            rows = -(-len(shown) // columns)
            figure = new_figure(figsize=(4.2 * columns + 0.9, 3.0 * rows + 0.3), layout="constrained")
            panels = [figure.add_subplot(rows, columns, i + 1) for i in range(len(shown))]
        labels = shorten_groups(shown)
        for panel, name in zip(panels, shown, strict=True):
            _draw_lines(figure, panel, groups[name], series.labels, _unformatted(labels[name]))
        if path is not None and kind is not None:
            write_bytes(path, saved(figure, kind))
    return figure


def _draw_lines(figure: Any, axes: Any, tracks: Sequence[Track], labels: Sequence[str], title: str) -> None:
    """Draw a line for each layer; for several matrices (experts) it shows the geometric mean of the known kappas."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    layers: dict[int | None, list[Track]] = {}
    for track in tracks:
        layers.setdefault(track.first.layer, []).append(track)
    numbers = [layer for layer in layers if layer is not None]
    norm = Normalize(min(numbers, default=0), max(max(numbers, default=1), min(numbers, default=0) + 1))
    colors = colormaps["viridis"]
    for layer, members in sorted(layers.items(), key=lambda pair: -1 if pair[0] is None else pair[0]):
        known = [[k for k in at if 0 < k < math.inf] for at in zip(*(t.kappas for t in members), strict=True)]
        points = [(i, geometric_mean(kappas)) for i, kappas in enumerate(known) if kappas]
        color = colors(norm(layer)) if layer is not None else "0.4"
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=2.5, linewidth=1)
    axes.set_yscale("log")
    # matplotlib writes exponents in its mathematical notation, which is switched off here.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value, 3)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high < 10 * low:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_minor_locator(MaxNLocator(4))
    axes.set_xticks(
        range(len(labels)), [_unformatted(cut_middle(printable(label), 16)) for label in labels], rotation=30
    )
    axes.set_title(title + (f" (x{len(tracks) // len(layers)})" if len(tracks) > len(layers) else ""), loc="left")
    axes.set_ylabel("kappa")
    if len(set(numbers)) > 1:
        figure.colorbar(ScalarMappable(norm, colors), ax=axes, label="layer", ticks=MaxNLocator(6, integer=True))


def plot_comparison(comparison: Comparison, path: str | os.PathLike[str] | None, ax: Any) -> Any:
    """See ``Comparison.plot``."""
    kind = None if path is None else kind_of(path)
    with plain_style("Comparison.plot()"):
        grid = make_grid([change.before for change in comparison])
        figure = ax.figure if ax is not None else new_figure(layout="constrained")
        if grid.cells:
            _draw_ratios(figure, ax, comparison, grid)
        else:
            _draw_ratio_bars(figure, ax, comparison)
        if path is not None and kind is not None:
            write_bytes(path, saved(figure, kind))
    return figure


def _draw_ratios(figure: Any, ax: Any, comparison: Comparison, grid: Grid) -> None:
    """Draw how the geometric means of kappa moved, layers by types; a black frame shows that some move is certain."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle

    if ax is None:
        figure.set_size_inches(max(5.0, 1.6 + 0.86 * len(grid.columns)), 1.9 + 0.24 * len(grid.layers))
        ax = figure.add_subplot()
    ratios = [_mean_log([comparison.changes[i].ratio for i in cell.members]) for cell in grid.cells]
    far = max([abs(r) for r in ratios if not math.isnan(r)], default=0.0) or math.log(1.01)
    norm, colors = TwoSlopeNorm(0.0, -far, far), colormaps["RdBu_r"]
    for cell, ratio in zip(grid.cells, ratios, strict=True):
        certain = any(comparison.changes[i].at_least > 1 for i in cell.members)
        face = "0.94" if math.isnan(ratio) else colors(norm(ratio))
        spot, edge = (cell.column + 0.04, cell.row + 0.06), "black" if certain else "none"
        ax.add_patch(Rectangle(spot, 0.92, 0.88, facecolor=face, edgecolor=edge, linewidth=0.8))
        text = "?" if math.isnan(ratio) else f"{format_number(math.exp(ratio), 3)}x"
        ink = "white" if not math.isnan(ratio) and abs(ratio) > 0.65 * far else "black"
        ax.text(cell.column + 0.5, cell.row + 0.5, text, ha="center", va="center", fontsize=7, color=ink)
    ax.set_xlim(0, len(grid.columns))
    ax.set_ylim(len(grid.layers), 0)
    ax.set_yticks([row + 0.5 for row in range(len(grid.layers))], [str(layer) for layer in grid.layers])
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    labels = column_labels(grid)
    ax.xaxis.tick_top()
    ax.set_xticks([i + 0.5 for i in range(len(labels))], labels, rotation=38, ha="left", rotation_mode="anchor")
    ax.set_title("kappa after over kappa before; framed: certain for some of the cell", loc="left", fontsize=9)
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=ax, orientation="horizontal", shrink=0.6)
    bar.set_ticks([-far, 0, far], labels=[f"{format_number(math.exp(v), 3)}x" for v in (-far, 0.0, far)])


def _draw_ratio_bars(figure: Any, ax: Any, comparison: Comparison) -> None:
    known = sorted(comparison, key=lambda change: -change.size)
    shown = [change for change in known if 0 < change.ratio < math.inf and math.isfinite(change.before.kappa)]
    shown = shown[:_MOST_BARS]
    if not shown:
        raise OptionError("there is nothing to plot: no matrix has a finite kappa in both rankings")
    if ax is None:
        figure.set_size_inches(8, 1.0 + 0.2 * len(shown))
        ax = figure.add_subplot()
    colors = ["#b2182b" if change.ratio > 1 else "#2166ac" for change in shown]
    names = [_unformatted(name) for name in shorten_names([change.key for change in shown], 48)]
    ax.barh(range(len(shown)), [change.ratio - 1 for change in shown], left=1, color=colors)
    ax.set_yticks(range(len(shown)), names)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_xlabel("kappa after over kappa before")


def _mean_log(ratios: Sequence[float]) -> float:
    known = [math.log(ratio) for ratio in ratios if 0 < ratio < math.inf]
    return sum(known) / len(known) if known else math.nan


def _unformatted(text: str) -> str:
    """The text with only ASCII characters and the ellipsis, which the font of matplotlib has."""
    return "".join(c if c == "…" or ord(c) < 128 else c.encode("ascii", "backslashreplace").decode() for c in text)
