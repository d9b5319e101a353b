"""Telling the user how far rank() is: a bar on a terminal, a callable, or nothing."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib import import_module
from typing import Any

from ..errors import OptionError
from ..texts import format_seconds


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
    """Whether the option ``progress`` of rank() asks for bars: True, or None on a terminal or in a notebook."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    return option is True or (option is None and (on_terminal or in_notebook()))


def in_notebook() -> bool:
    """Whether the kernel of a notebook runs this."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


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
        with (_notebook_bar if in_notebook() else _bar)(total, operations) as (report, note):
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


@contextmanager
def _notebook_bar(total: int, operations: float) -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    """The bar of a browser below the cell, gone when the work is done; widgets are not needed."""
    display: Any = import_module("IPython.display")
    shown_at = -math.inf

    def page(share: float, words: str) -> Any:
        return display.HTML(f"<progress value='{share:.4f}' max='1'></progress> {escape(words)}")

    handle = display.display(page(0.0, f"ranking {total:,} matrices"), display_id=True)

    def report(p: Progress) -> None:
        nonlocal shown_at
        if time.perf_counter() - shown_at < 0.2:  # every update is a message to the browser
            return
        shown_at = time.perf_counter()
        share = p.operations_done / p.operations_total if p.operations_total else 1.0
        left = f", about {format_seconds(p.seconds * (1 / share - 1))} left" if share > 0.01 else ""
        handle.update(page(share, f"{p.matrices_done:,} of {p.matrices_total:,} matrices{left}"))

    try:
        yield report, lambda text: handle.update(page(0.0, text))
    finally:
        handle.update(display.HTML(""))
