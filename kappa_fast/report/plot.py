"""The heat map of a ranking as a matplotlib Figure, drawn without pyplot."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, missing_extra
from ..io.writing import write_bytes
from ..results.entries import Status
from ..texts import printable
from .grid import Cell, Grid, color_range, make_grid
from .names import shorten_names
from .page import title_of
from .shown import KAPPA, Shown
from .table import format_number, shorten

if TYPE_CHECKING:
    from ..results.ranking import Ranking
    from ..results.selection import Selection

_FORMATS = (".png", ".svg", ".pdf")
_MOST_BARS = 40
_DPI = 144
_MAX_NUMBERS = 4000  # with more cells no kappa is written into them, which would take minutes
_HATCHES: dict[Status, tuple[str, str]] = {
    "rank_deficient": ("///", "rank deficient"),
    "bounded": ("---", "only bounded from below"),
    "scored": ("...", "without kappa, which the score does not need"),
    "non_finite": ("xxx", "NaN or inf among the weights"),
}
# Inches.
_CELL_WIDTH, _CELL_HEIGHT, _LAYER_NAMES, _MARGIN, _SCALE = 0.86, 0.24, 0.7, 0.15, 0.55
_CHARACTER = 0.062
_TURN = 38  # degrees


def plot(
    ranking: Ranking,
    path: str | os.PathLike[str] | None = None,
    ax: Any = None,
    selection: Selection | None = None,
    show: str | None = None,
) -> Any:
    """The figure, drawn into ``ax`` if axes are given, and written to ``path`` (all at once) if one is given.

    Raises:
        OptionError: the name does not end in .png, .svg or .pdf, or there is nothing to plot, see ``Shown.chosen``.
        MissingExtraError: matplotlib is not installed.
        RankingFileError: the file cannot be written.
    """
    kind = None if path is None else kind_of(path)
    with plain_style("Ranking.plot()"):
        figure = _figure(ranking, ax, selection, Shown.chosen(ranking, show))
        if path is not None and kind is not None:
            write_bytes(path, saved(figure, kind))
    return figure


def kind_of(path: str | os.PathLike[str]) -> str:
    """The format by the ending of the name: "png", "svg" or "pdf".

    Raises:
        OptionError: the name has another ending.
    """
    suffix = PurePath(path).suffix.lower()
    if suffix not in _FORMATS:
        raise OptionError(f"cannot plot to {path}: end the name in .png, .svg or .pdf")
    return suffix[1:]


@contextmanager
def plain_style(what: str) -> Iterator[None]:
    """Use matplotlib's default settings instead of the user's within the context; the backend stays as it is.

    Raises:
        MissingExtraError: matplotlib, which ``what`` needs, is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra("matplotlib", "report", what) from error
    settings = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    # Dollars and underscores in names are not mathematics; a fixed salt makes the ids in SVG files reproducible.
    settings |= {"text.parse_math": False, "svg.hashsalt": "kappa_fast", "font.size": 8.0}
    with matplotlib.rc_context(settings):
        yield


def saved(figure: Any, kind: str) -> bytes:
    """The figure as bytes of a file without time and program, so that the same figure gives the same bytes."""
    page = io.BytesIO()
    metadata: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None}}.get(kind, {"CreationDate": None})
    figure.savefig(page, format=kind, dpi=_DPI, metadata=metadata)
    return page.getvalue()


def new_figure(**options: Any) -> Any:
    """A matplotlib Figure that notebooks show as a picture, which they do not do by themselves without pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(facecolor="white", **options)
    figure._repr_png_ = partial(saved, figure, "png")  # type: ignore[attr-defined]
    return figure


def render_plot(ranking: Ranking, kind: str, selection: Selection | None = None) -> bytes:
    """The picture as the bytes of a "png", "svg" or "pdf". The same ranking and matplotlib give the same bytes.

    Raises:
        OptionError: there is nothing to plot.
        MissingExtraError: matplotlib is not installed.
    """
    with plain_style("Ranking.plot()"):
        return saved(_figure(ranking, None, selection, Shown.of(ranking.metadata)), kind)


def _figure(ranking: Ranking, ax: Any, selection: Selection | None, what: Shown) -> Any:
    grid = make_grid(ranking.entries, what)
    figure = new_figure() if ax is None else ax.figure
    if grid.cells:
        _draw(figure, ranking, grid, ax, set(selection.keys) if selection is not None else None, what)
    else:
        _draw_bars(figure, ranking, ax, set(selection.keys) if selection is not None else set(), what)
    return figure


def _draw_bars(figure: Any, ranking: Ranking, ax: Any, chosen: Collection[str], what: Shown) -> None:
    """The lowest matrices as bars, for models whose matrices have no layer."""
    shown = [entry for entry in ranking if not math.isnan(what.value(entry))][:_MOST_BARS]
    if not shown:
        raise OptionError(f"there is nothing to plot: no ranked matrix has a finite {what.name}")
    names = [_unformatted(name) for name in shorten_names([entry.key for entry in shown], 48)]
    if ax is None:
        left, height = 0.3 + _CHARACTER * max(map(len, names)), 0.75 + 0.2 * len(shown)
        figure.set_size_inches(left + 4.2, height)
        ax = figure.add_axes((left / (left + 4.2), 0.4 / height, 4.0 / (left + 4.2), (height - 0.75) / height))
    colors = ["#21918c" if entry.key in chosen or not chosen else "0.75" for entry in shown]
    ax.barh(range(len(shown)), [what.value(entry) for entry in shown], color=colors)
    ax.set_yticks(range(len(shown)), names)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if what.logarithmic:
        ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value, 3)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(_words(what))
    more = f", the first {len(shown):,} of {len(ranking):,}" if len(shown) < len(ranking) else ""
    ax.set_title(f"{_words(what)} of {shorten(_unformatted(title_of(ranking.metadata)), 40)}{more}", loc="left")


def _draw(figure: Any, ranking: Ranking, grid: Grid, ax: Any, chosen: Collection[str] | None, what: Shown) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    labels = column_labels(grid)
    turned = max(map(len, labels)) * _CHARACTER > _CELL_WIDTH
    header = _CHARACTER * max(map(len, labels)) * math.sin(math.radians(_TURN)) + 0.25 if turned else 0.3
    overhang = _CHARACTER * len(labels[-1]) * math.cos(math.radians(_TURN)) - _CELL_WIDTH / 2 if turned else 0.1
    shown = [s for s in _HATCHES if any(c.status == s and (s != "scored" or math.isnan(c.kappa)) for c in grid.cells)]
    notes = _notes(ranking, grid, what)
    notes += ["red frames: selected, with how many of how many where it is a part"] if chosen is not None else []
    body = (_CELL_WIDTH * len(grid.columns), _CELL_HEIGHT * len(grid.layers))
    width = max(_LAYER_NAMES + body[0] + max(overhang, 0.2) + _MARGIN, 5.0)
    footer = _SCALE + 0.2 * len(shown) + 0.17 * len(notes) + _MARGIN
    height = 0.35 + header + body[1] + footer
    low, high = color_range(grid.cells)
    top = high if high > low else low + 0.01 * abs(low)
    norm = LogNorm(low, top) if what.logarithmic else Normalize(low, top)
    texts = [_cell_text(cell, ranking, chosen, what) for cell in grid.cells]
    taken = [_taken(cell, ranking, chosen) > 0 for cell in grid.cells]
    title = f"{_words(what)} of {shorten(_unformatted(title_of(ranking.metadata)), 60)}"
    if ax is not None:  # the caller's figure keeps its size and layout
        _draw_cells(ax, grid, colormaps["viridis"], norm, texts, taken)
        _draw_names(ax, grid, labels, turned)
        ax.set_title(title, loc="left")
        _draw_ticks(figure.colorbar(ScalarMappable(norm, "viridis"), ax=ax), low, high, what)
        return
    figure.set_size_inches(width, height)
    axes = figure.add_axes((_LAYER_NAMES / width, footer / height, body[0] / width, body[1] / height))
    _draw_cells(axes, grid, colormaps["viridis"], norm, texts, taken)
    _draw_names(axes, grid, labels, turned)
    figure.text(
        _MARGIN / width,
        1 - 0.12 / height,
        title,
        va="top",
        fontsize=11,
    )
    bar_width = min(3.2, width - _LAYER_NAMES - 0.6)
    scale = figure.add_axes((_LAYER_NAMES / width, (footer - 0.22) / height, bar_width / width, 0.1 / height))
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), cax=scale, orientation="horizontal")
    _draw_ticks(bar, low, high, what)
    _draw_legend(figure, shown, notes, (width, height))


def _draw_cells(axes: Any, grid: Grid, colors: Any, norm: Any, texts: Sequence[str], taken: Sequence[bool]) -> None:
    from matplotlib.patches import Rectangle

    for cell, text, framed in zip(grid.cells, texts, taken, strict=True):
        known = not math.isnan(cell.kappa)
        face = colors(norm(cell.kappa)) if known else (0.94, 0.94, 0.94, 1.0)
        dark = known and _luminance(face) <= 0.179
        plain = cell.status == "ok" or (cell.status == "scored" and known)
        hatch = None if plain else _HATCHES[cell.status][0]
        spot = (cell.column + 0.03, cell.row + 0.05)
        edge = (1.0, 1.0, 1.0, 0.6) if dark else (0.0, 0.0, 0.0, 0.35)
        axes.add_patch(Rectangle(spot, 0.94, 0.9, facecolor=face, hatch=hatch, edgecolor=edge, linewidth=0))
        if framed:
            axes.add_patch(Rectangle(spot, 0.94, 0.9, facecolor="none", edgecolor="#d62728", linewidth=1.4))
        if len(grid.cells) > _MAX_NUMBERS:
            continue
        plate = {"facecolor": face, "edgecolor": "none", "pad": 0.6} if hatch else None
        where = (cell.column + 0.5, cell.row + 0.5)
        ink = "white" if dark else "black"
        axes.text(*where, text, ha="center", va="center", fontsize=7, color=ink, bbox=plate)
    axes.set_xlim(0, len(grid.columns))
    axes.set_ylim(len(grid.layers), 0)


def _draw_names(axes: Any, grid: Grid, labels: Sequence[str], turned: bool) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=3)
    axes.set_yticks([row + 0.5 for row in range(len(grid.layers))], [str(layer) for layer in grid.layers])
    axes.set_ylabel("layer")
    axes.xaxis.tick_top()
    turn = {"rotation": _TURN, "ha": "left", "rotation_mode": "anchor"} if turned else {}
    axes.set_xticks([column + 0.5 for column in range(len(labels))], labels, **turn)


def _words(shown: Shown) -> str:
    return shown.name.replace("_", " ")


def _draw_ticks(bar: Any, low: float, high: float, shown: Shown) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    middle = math.sqrt(low) * math.sqrt(high) if shown.logarithmic else (low + high) / 2
    ticks = [low, middle, high] if high > low else [low]
    bar.ax.xaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.set_xticklabels([_short(tick) for tick in ticks])
    bar.outline.set_linewidth(0.3)


def _draw_legend(figure: Any, shown: Sequence[Status], notes: Sequence[str], size: tuple[float, float]) -> None:
    from matplotlib.patches import Rectangle

    width, height = size
    top = _MARGIN + 0.2 * len(shown) + 0.17 * len(notes)
    left = _LAYER_NAMES / width
    for status in shown:
        hatch, words = _HATCHES[status]
        spot = (left, (top - 0.16) / height)
        look: dict[str, Any] = {"facecolor": (0.94, 0.94, 0.94), "edgecolor": (0.0, 0.0, 0.0, 0.35), "linewidth": 0}
        figure.add_artist(
            Rectangle(spot, 0.3 / width, 0.14 / height, hatch=hatch, transform=figure.transFigure, **look)
        )
        figure.text(left + 0.4 / width, (top - 0.09) / height, words, va="center")
        top -= 0.2
    for note in notes:
        figure.text(left, (top - 0.09) / height, note, va="center", color="0.3")
        top -= 0.17


def _notes(ranking: Ranking, grid: Grid, what: Shown) -> list[str]:
    notes = []
    if any(column.depth > 1 for column in grid.columns):
        mean = "geometric mean" if what.logarithmic else "mean"
        notes.append(f"several matrices in a cell: {mean} of those with a finite {_words(what)}")
    if any(cell.status not in ("ok", "scored") and not math.isnan(cell.kappa) for cell in grid.cells):
        notes.append("hatched and colored: that is so of some of the matrices in the cell")
    if grid.beside:
        notes.append(f"not shown: {len(grid.beside):,} of {len(ranking):,} matrices, which have no place in the map")
    return notes


def column_labels(grid: Grid) -> list[str]:
    """A short name for each type of matrix, with how many of it a layer has."""
    return [_column_label(column.label, column.depth) for column in grid.columns]


def _column_label(label: str, depth: int) -> str:
    return _unformatted(label) + (f" (x{depth})" if depth > 1 else "")


def _unformatted(text: str) -> str:
    """The text with only ASCII characters, which the font of matplotlib has."""
    return printable(text).encode("ascii", "backslashreplace").decode("ascii")


def _cell_text(cell: Cell, ranking: Ranking, chosen: Collection[str] | None, what: Shown) -> str:
    """The number of the cell, or "25/128" if the selection has only some of its matrices."""
    taken = _taken(cell, ranking, chosen)
    return f"{taken:,}/{len(cell.members):,}" if 0 < taken < len(cell.members) else _value_text(cell, what)


def _taken(cell: Cell, ranking: Ranking, chosen: Collection[str] | None) -> int:
    return 0 if chosen is None else sum(ranking.entries[i].key in chosen for i in cell.members)


def _value_text(cell: Cell, what: Shown) -> str:
    if not math.isnan(cell.kappa):
        return _short(cell.kappa)
    singular = "inf" if what == KAPPA else "singular"
    return {"rank_deficient": singular, "bounded": "bounded", "scored": "-", "non_finite": "nan"}.get(cell.status, "?")


def _short(kappa: float) -> str:
    return f"{kappa:.1e}".replace("e+0", "e").replace("e+", "e") if kappa >= 1000 else format_number(kappa, 3)


def _luminance(color: Sequence[float]) -> float:
    """Relative luminance of an sRGB color (WCAG 2, "relative luminance")."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
