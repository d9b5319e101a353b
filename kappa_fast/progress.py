"""Telling the user how far rank() is: a bar on a terminal, a callable, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .errors import OptionError


@dataclass(frozen=True)
class Progress:
    """What a progress callable receives after every wave.

    operations: floating point operations of the exact Gram matrices and factorizations that stand for the work.
    """

    matrices_done: int
    matrices_total: int
    operations_done: float
    operations_total: float
    seconds: float


ProgressOption = bool | Callable[[Progress], None] | None


def shown(option: ProgressOption) -> bool:
    """Whether the option ``progress`` of rank() asks for bars: True, or None on a terminal."""
    return option is True or (option is None and sys.stderr is not None and sys.stderr.isatty())


class Tracker:
    """Counts finished matrices and reports them."""

    def __init__(
        self,
        total: int,
        operations: float,
        report: Callable[[Progress], None] | None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._started = time.perf_counter()
        self._total, self._operations = total, operations
        self._done, self._done_operations = 0, 0.0
        self._report, self._note = report, note

    @property
    def done(self) -> int:
        return self._done

    def extend(self, matrices: int, operations: float) -> None:
        """More work has turned up."""
        self._total += matrices
        self._operations += operations

    def note(self, text: str) -> None:
        """What is being done before the next matrices; a bar shows it."""
        if self._note is not None:
            self._note(text)

    def advance(self, matrices: int, operations: float) -> None:
        self._done += matrices
        self._done_operations += operations
        if self._report is not None:
            seconds = time.perf_counter() - self._started
            self._report(Progress(self._done, self._total, self._done_operations, self._operations, seconds))


@contextmanager
def tracking(option: ProgressOption, total: int, operations: float) -> Iterator[Tracker]:
    """A Tracker that reports as the option ``progress`` of rank() says.

    Raises:
        OptionError: ``option`` is neither a bool, None nor a callable.
    """
    if option is None:
        option = shown(option)
    if option is False:
        yield Tracker(total, operations, None)
    elif option is True:
        with _bar(total, operations) as (report, note):
            yield Tracker(total, operations, report, note)
    elif callable(option):
        yield Tracker(total, operations, option)
    else:
        raise OptionError(f"progress={option!r}: give True, False, None or a callable that takes a Progress")


@contextmanager
def _bar(total: int, operations: float) -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[matrices]}/{task.fields[total_matrices]} matrices"),
        TextColumn("{task.fields[gflop]:,.0f} Gflop"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # A terminal shows it while it moves; a pipe, which gets one only on demand, keeps its last state.
    with RichProgress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task("ranking", total=operations, matrices=0, total_matrices=total, gflop=operations / 1e9)

        def report(p: Progress) -> None:
            bar.update(
                task,
                description="ranking",
                total=p.operations_total,
                completed=p.operations_done,
                matrices=p.matrices_done,
                total_matrices=p.matrices_total,
                gflop=p.operations_total / 1e9,
            )

        yield report, lambda text: bar.update(task, description=text)
