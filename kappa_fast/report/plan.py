"""The table of a plan: the matrices that would be ranked, and lines about the work, time and memory that this takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..texts import format_digits, format_seconds, printable
from .skipped import by_reason
from .table import TextTable, check_limit, table_of_numbers

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from ..planning import Division, Plan, PlannedGroup, Prediction
    from ..planning.devices import Floor
    from ..planning.disk import Reading
    from ..results.entries import Skipped

Line = tuple[str, str]  # subject, text
MOST_REASONS = 8


@dataclass(frozen=True)
class PlanTable(TextTable):
    """The first ``limit`` groups of a plan (None: all), printed by a ``rich.console.Console`` or ``to_text``.

    Raises:
        OptionError: ``limit`` is not a count.
    """

    plan: Plan
    limit: int | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.table import Table
        from rich.text import Text

        shown = list(self.rows())
        if shown:
            headers = ("shape", "dtype", "number", "weights", "Gop", "share")
            yield table_of_numbers("to be ranked", headers, shown, overflow="fold")
        yield from map(Text, self.counts())
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_column(no_wrap=True)
        facts.add_column(overflow="fold")
        for what, text in self.lines():
            facts.add_row(Text(what, "bold"), Text(text))
        yield facts

    def rows(self) -> Iterator[Sequence[str]]:
        """The cells of the table."""
        yield from map(self._row, self.plan.groups[: self.limit])

    def _row(self, group: PlannedGroup) -> Sequence[str]:
        return (
            printable(group.group),
            f"{group.shape[0]}x{group.shape[1]}",
            group.dtype,
            f"{group.count:,}",
            format_amount(group.numel),
            f"{group.operations / 1e9:,.1f}",
            f"{100 * group.operations / (self.plan.operations or 1):.0f}%",
        )

    def counts(self) -> Iterator[str]:
        """The lines with counts below the table."""
        plan, shown = self.plan, len(self.plan.groups[: self.limit])
        if len(plan.groups) > shown:
            rest = plan.groups[shown:]
            yield f"... {len(rest)} more kinds, {sum(g.count for g in rest):,} matrices"
        yield f"{plan.count:,} matrices to be ranked, {len(plan.skipped):,} parameters skipped"
        yield from skipped_lines(plan.skipped)

    def lines(self) -> Iterator[Line]:
        """The lines about the work, time and memory."""
        plan = self.plan
        share = f" ({100 * plan.numel / plan.num_parameters:.0f}%)" if plan.num_parameters else ""
        yield "weights", f"{format_amount(plan.numel)} of {format_amount(plan.num_parameters)}{share}"
        yield "operations", f"{format_amount(plan.operations)} multiply-adds for Gram matrices and Cholesky factors"
        yield "where", f"{', '.join(plan.devices)}, backend {plan.backend}, threads: {plan.threads}"
        beside = "beside the weights" if plan.in_memory else "with the weights that are read"
        waves = f"{_count(plan.waves, 'wave')} of up to {format_bytes(plan.budget)}"
        yield "memory", f"at most {format_bytes(plan.peak)} at a time {beside}; {waves}"
        if plan.to_download:
            yield "to download", f"{format_bytes(plan.to_download)}, whose time is not predicted"
        if not plan.in_memory:
            yield "to read", format_bytes(plan.to_read)
        if plan.prediction is not None:
            yield from _computing(plan.prediction)
        if plan.reading is not None:
            yield "reading", _reading(plan.reading)
        if plan.reading is not None and plan.seconds is not None:
            yield "together", " to ".join(map(format_seconds, plan.seconds))
        if plan.division is not None:
            yield "ranks", _division(plan.division, plan)
        if plan.floor is not None:
            yield from _floor(plan.floor)


def skipped_lines(skipped: Iterable[Skipped]) -> Iterator[str]:
    """One line for each of the most frequent reasons, and one for the rest."""
    reasons = [(reason, len(items)) for reason, items in by_reason(skipped)]
    for reason, number in reasons[:MOST_REASONS]:
        yield f"  skipped: {number:,} {printable(reason)}"
    if rest := sum(number for _, number in reasons[MOST_REASONS:]):
        yield f"  skipped: {rest:,} for other reasons, which the JSON lists"


def _division(found: Division, plan: Plan) -> str:
    fewest, most = found.matrices
    each = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    text = f"{found.ranks:,}, with {each} matrices each; the busiest has {100 * found.share:.3g}% of the predicted cost"
    text += f" ({found.imbalance:.2f} times the mean)"
    if plan.seconds_of_ranks is not None:
        text += f", {' to '.join(map(format_seconds, plan.seconds_of_ranks))} of computing if it is as fast as this one"
    return text if plan.in_memory else f"{text}, and reads {format_bytes(found.nbytes)} at most"


def _computing(found: Prediction) -> Iterator[Line]:
    spread = f"{format_seconds(found.low)} to {format_seconds(found.high)}"
    if found.seconds is None:
        yield "computing", f"{spread}: how many matrices top= leaves to resolve depends on the weights"
    else:
        yield "computing", f"about {format_seconds(found.seconds)} ({spread})"
    if found.hard > 1.05 * found.high:
        yield "", f"up to {format_seconds(found.hard)} if the cheapest factorization resolves no matrix"
    basis = "all shapes of the model"
    if found.exact < 0.9999:
        basis = f"{100 * found.exact:.0f}% of the operations have these shapes, the time of the others is scaled"
    shapes = _count(len(found.shapes), "shape")
    yield "", f"predicted from {shapes} timed here in {format_seconds(found.measured)}: {basis}"


def _reading(reading: Reading) -> str:
    text = f"about {format_seconds(reading.seconds)} at {format_bytes(reading.rate)}/s"
    sampled = format_bytes(reading.sampled)
    if reading.cached is None:
        return f"{text}, measured on {sampled}, which may have been in memory already"
    if reading.cached > 0.02:
        return f"{text}, measured on {sampled}; {100 * reading.cached:.0f}% was in memory, so the disk is slower"
    return f"{text}, measured on {sampled} from the disk"


def _floor(floor: Floor) -> Iterator[Line]:
    least = f"{format_seconds(floor.low)} to " if floor.low < floor.seconds else ""
    yield floor.device.name, f"not under {least}{format_seconds(floor.seconds)}: a floor model, NOT a measurement"
    parts = [f"Gram matrices {format_seconds(floor.gram)}", f"Cholesky {format_seconds(floor.cholesky)}"]
    parts += [f"proofs {format_seconds(floor.proofs)}"] if floor.proofs else []
    yield "", f"{', '.join(parts)}, one pass over the weights {format_seconds(floor.reading)},"
    yield "", f"at published peak rates ({floor.device.source})."
    yield "", "Krylov steps, launches and copies are not in it: a run takes longer, possibly several times."
    if not floor.weights_fit:
        yield "", f"The weights do not fit into its {format_bytes(floor.device.memory)} and come from the host."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def format_amount(value: float) -> str:
    """Three digits and a letter: "21.3 M", "4.96 G"; whole numbers below a thousand have all their digits."""
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit * 0.9995:
            return f"{format_digits(value / limit)} {letter}"
    return f"{value:.0f}"


def format_bytes(value: float) -> str:
    """A number of bytes in decimal units, see format_amount: "1.07 GB"."""
    text = format_amount(value)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"
