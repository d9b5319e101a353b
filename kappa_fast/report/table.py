"""The table of a ranking: one line per matrix, fitted to the width of the page."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..results.entries import TensorKappa
from ..texts import printable
from .names import shorten_names

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, JustifyMethod, RenderableType, RichCast
    from rich.table import Table

    from ..results.ranking import Ranking

_MIN_NAME = 12
_MIN_TAIL = 8
_MIN_WIDTH = 60
_MAX_FORMAT = 8
_RIGHT = ("#", "score", "kappa", "sens.")
_DISPENSABLE = ("method", "sens.", "dtype", "proven")  # columns that are omitted for longer names, in this order
_STYLES = {"ok": "", "rank_deficient": "yellow", "bounded": "dim", "scored": "", "non_finite": "red"}


class TextTable:
    """A table that a ``rich.console.Console`` prints, and that can be had as text."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        raise NotImplementedError

    def to_text(self, width: int = 100) -> str:
        """The table as text without colors, ``width`` columns wide.

        Raises:
            OptionError: less than 60 columns.
        """
        return to_plain_text(self, width)


@dataclass(frozen=True)
class RankingTable(TextTable):
    """The first ``limit`` entries of a ranking (None: all), printed by a ``rich.console.Console`` or ``to_text``.

    Columns: position; key, shortened in the middle where the page is too narrow; shape and dtype, or the format of
    quantized weights with an asterisk; kappa; the interval, its ends rounded outward; whether it is proven; the
    sensitivity; the method, or the status of an entry without a finite kappa; the score if it is not kappa. A page that
    is too narrow for all columns omits some.

    Raises:
        OptionError: ``limit`` is not a count.
    """

    ranking: Ranking
    limit: int | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        shown = self.ranking.entries[: self.limit]
        if shown:
            yield self.rows_alone(options.max_width)
        yield from map(Text, self.lines(len(shown)))
        if formats := self._formats():
            yield Text(shorten(formats, options.max_width), no_wrap=True, overflow="crop")

    def rows_alone(self, width: int) -> RenderableType:
        """The rows without the lines below them."""
        from rich.table import Table
        from rich.text import Text

        shown = self.ranking.entries[: self.limit]
        columns, gap, name_width = _fit(self.columns(shown), width)
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
        for header in columns:
            justify: JustifyMethod = "right" if header in _RIGHT else "left"
            # Wide characters (CJK) take two columns each, so a shortened name may be too long and is cut here.
            limit = name_width if header == "tensor" else None
            table.add_column(Text(header, "bold"), justify=justify, no_wrap=True, max_width=limit)
        for entry, *cells in zip(shown, *columns.values(), strict=True):
            table.add_row(*map(Text, cells), style=_STYLES[entry.status])
        return table

    def columns(self, shown: Sequence[TensorKappa]) -> dict[str, list[str]]:
        """By the header of a column the full texts of its cells for these entries."""
        columns = {
            "#": [str(i) for i in range(1, len(shown) + 1)],
            "tensor": [printable(entry.key) for entry in shown],
            "shape": ["x".join(map(str, entry.shape)) if entry.numel else "?" for entry in shown],
            "dtype": [_short_dtype(entry) for entry in shown],
            "score": [format_number(entry.score) if _is_scored(entry) else "?" for entry in shown],
            "kappa": [format_number(entry.kappa, max(4, _digits(entry))) for entry in shown],
            "interval": [format_interval(entry) for entry in shown],
            "proven": [("yes" if entry.certified else "no") if _is_settled(entry) else "-" for entry in shown],
            "sens.": [format_relative(entry.sensitivity) for entry in shown],
            "method": [_how(entry) for entry in shown],
        }
        if all(entry.score == entry.kappa for entry in self.ranking if _is_scored(entry)):
            del columns["score"]
        return columns

    def _formats(self) -> str:
        """The line that explains the asterisks; "" if there are none."""
        found = Counter(entry.quantization for entry in self.ranking if entry.quantization)
        listed = "; ".join(f"{count} {printable(name)}" for name, count in found.most_common())
        return f"* dequantized: {listed}" if listed else ""

    def lines(self, shown: int) -> Iterable[str]:
        """The lines below a table of ``shown`` rows."""
        ranking = self.ranking
        if len(ranking) > shown:
            yield f"... {len(ranking) - shown} more"
        proven = sum(entry.certified for entry in ranking)
        counts = [f"{len(ranking)} ranked", f"{proven} of them proven", f"{len(ranking.skipped)} skipped"]
        yield ", ".join(counts) + (" (ranking.skipped says why)" if ranking.skipped else "")
        if ranking.metadata.get("partial"):
            yield "interrupted: matrices are missing"


def table_of_numbers(title: str, headers: Iterable[str], rows: Iterable[Iterable[str]], **options: Any) -> Table:
    """A table of ``rich``: a column of names with this title and these options, and columns of numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(Text(title, "bold"), **options)
    for header in headers:
        table.add_column(Text(header, "bold"), justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table


def width_for_names(columns: Iterable[tuple[str, Iterable[str]]], width: int) -> int:
    """The width that columns of numbers, given by header and cells, leave for names."""
    return width - sum(max(map(len, (header, *cells))) + 2 for header, cells in columns)


def check_limit(limit: object) -> None:
    """Raises OptionError unless this is a number of rows, or None for all."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise OptionError(f"limit={limit!r}: give a count of rows, or None for all")


def to_plain_text(page: RichCast | ConsoleRenderable, width: int) -> str:
    """The output of ``rich`` as text without colors, ``width`` columns wide.

    Raises:
        OptionError: less than 60 columns.
    """
    from rich.console import Console

    if not isinstance(width, int) or width < _MIN_WIDTH:
        raise OptionError(f"width={width!r}: the table needs at least {_MIN_WIDTH} columns")
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(page)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _is_settled(entry: TensorKappa) -> bool:
    return entry.status in ("ok", "rank_deficient")


def _is_scored(entry: TensorKappa) -> bool:
    return _is_settled(entry) or entry.status == "scored"


def _how(entry: TensorKappa) -> str:
    return printable(entry.method) if entry.status in ("ok", "scored") else entry.status.removeprefix("rank_")


def _short_dtype(entry: TensorKappa) -> str:
    """A short name of the dtype: bf16, f32, e4m3fn; for quantized weights that of the format, "gptq*"."""
    if entry.quantization:
        return printable(re.split(r"[ ,]", entry.quantization, maxsplit=1)[0][:_MAX_FORMAT]) + "*"
    return printable(entry.dtype.removeprefix("float8_").replace("bfloat", "bf").replace("float", "f"))


def _fit(columns: dict[str, list[str]], width: int) -> tuple[dict[str, list[str]], int, int]:
    """The columns that fit into ``width``, the gap between them (2 if all columns fit, else 1), and the width of keys.

    Columns are omitted so that keys fit; if that is not enough, keys are shortened.
    """
    kept = dict(columns)
    longest = max(map(len, ("tensor", *columns["tensor"])))

    def name_width(gap: int) -> int:
        others = [max(map(len, (header, *cells))) for header, cells in kept.items() if header != "tensor"]
        return width - sum(others) - gap * len(others)

    gap = 2 if name_width(2) >= longest else 1
    for header in _DISPENSABLE:
        if name_width(gap) < longest:
            del kept[header]
    left = max(name_width(gap), _MIN_NAME)
    kept["tensor"] = shorten_names(columns["tensor"], left)
    return kept, gap, left


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, with "..." in its middle; it keeps the layer number if possible."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    layer = re.match(r".*?(?<![^.])\d+(?![^.])", text)
    if layer and layer.end() + 3 + _MIN_TAIL <= width:
        head = layer.end()
    return f"{text[:head]}...{text[head + 3 - width :]}"


def format_number(value: float, digits: int = 4, rounding: str = ROUND_HALF_EVEN) -> str:
    """``value`` to ``digits`` significant digits: "14.28", "80120", "8.012e15", "inf", "nan"."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = Context(prec=digits, rounding=rounding).create_decimal_from_float(value)
    # 14 becomes 14.00, so that all numbers of a column have equally many digits.
    rounded = rounded.quantize(Decimal(1).scaleb(rounded.adjusted() - digits + 1))
    if -3 <= rounded.adjusted() < 6:
        return f"{rounded:f}"
    mantissa, _, exponent = f"{rounded:e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def format_interval(entry: TensorKappa) -> str:
    """The interval of an entry, rounded outward: the printed interval contains the exact one."""
    if entry.status == "non_finite" or (entry.lower <= 1 and math.isinf(entry.upper)):
        return "-"
    digits = _digits(entry)
    lower = format_number(entry.lower, digits, ROUND_FLOOR)
    upper = format_number(entry.upper, digits, ROUND_CEILING)
    return f">= {lower}" if upper == "inf" else lower if lower == upper else f"{lower}..{upper}"


def format_relative(value: float) -> str:
    """A relative change as a percentage, "<0.1%", "5.3%", "540%", or from 10 on as a factor, "13x"."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "inf"
    if value < 0.001:
        return "<0.1%"
    if value >= 10:
        return f"{format_number(value, 2)}x"
    return f"{100 * value:.1f}%" if value < 0.1 else f"{100 * value:.0f}%"


def _digits(entry: TensorKappa) -> int:
    """Significant digits that show the width of the interval: one more than its ends have in common."""
    width = (entry.upper - entry.lower) / max(entry.lower, 1.0)
    if not width < 1:
        return 3
    return 5 if width <= 1e-4 else max(3, 1 + math.ceil(-math.log10(width)))
