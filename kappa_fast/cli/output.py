"""The output of commands: a table on stdout, JSON and CSV to files or, for ``-``, to stdout instead of the table."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from ..errors import OptionError, RankingFileError
from ..texts import format_seconds, printable
from .words import as_options

if TYPE_CHECKING:
    from ..execution.progress import Progress

EVERY = 30.0  # seconds between lines about the progress, if stderr is not a terminal

Json = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the result as JSON to this file, or to stdout (-).")
]
Csv = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows as CSV to this file, or to stdout (-).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no table and no progress, only warnings and errors.")]
Limit = Annotated[int, typer.Option(min=0, help="Rows of the table; 0 for none.")]
AllRows = Annotated[bool, typer.Option("--all", help="All rows of the table, whatever --limit says.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the log.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Show the log on stderr; twice: all of it.")]
Threads = Annotated[int | None, typer.Option(min=1, help="How many threads compute; by default what torch takes.")]


class Shown(Protocol):
    """A table that can be printed at any width."""

    def to_text(self, width: int = 100) -> str:
        """The table as plain text."""


class Output:
    """The destinations of the results of one command."""

    def __init__(
        self,
        what: str,
        json: Path | None = None,
        csv: Path | None = None,
        *,
        quiet: bool = False,
        taken: Sequence[Path] = (),
    ) -> None:
        """Check that the files can be written, before an hour of work.

        what: the content of the JSON, in a word.  taken: files that must not be overwritten.

        Raises:
            OptionError: a path is not the name of a file, or both go to stdout.
            RankingFileError: a file cannot be written.
        """
        self._json, self._csv = json, csv
        to_stdout = [path for path in (json, csv) if path is not None and str(path) == "-"]
        if len(to_stdout) > 1:
            raise OptionError("--json - and --csv - would both go to stdout: give one of them the name of a file")
        self._silent = quiet or bool(to_stdout)
        for option, path in (("--json", json), ("--csv", csv)):
            if path is None or str(path) == "-":
                continue
            check_writable(path, option, what)
            if any(file.exists() and path.exists() and path.samefile(file) for file in taken):
                raise OptionError(f"{option} {path} is one of the files that are read: give another name")
        if json is not None and csv is not None and os.path.realpath(json) == os.path.realpath(csv):
            raise OptionError(f"--json and --csv are both {json}: give them different names")

    def write_json(self, write: Callable[[Path], None], document: Callable[[], Mapping[str, Any]]) -> None:
        """Write JSON with ``write`` to the file, or the same document to stdout."""
        from ..results import serialize

        if self._json is not None and str(self._json) == "-":
            typer.echo(serialize.document_text(document()), nl=False)
        elif self._json is not None:
            write(self._json)

    def write_csv(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write CSV with a line of headers, which are the keys of the first row."""
        from ..results import serialize

        if self._csv is None:
            return
        text = csv_text(rows)
        if str(self._csv) == "-":
            typer.echo(text, nl=False)
        else:
            serialize.write_text(self._csv, text)

    def show(self, table: Shown) -> None:
        """Print a table, on a terminal fitted to its width; elsewhere no name is shortened, for grep and awk."""
        if self._silent:
            return
        if sys.stdout.isatty():
            from rich.console import Console

            console = Console()
            with console.capture() as shown:
                console.print(table)
            typer.echo(as_options(shown.get()), nl=False)
        else:
            typer.echo(as_options(table.to_text(10_000)))

    def say(self, line: str) -> None:
        """Print a line below the table."""
        if not self._silent:
            typer.echo(as_options(printable(line)))

    def say_where(self) -> None:
        """Print the names of the files that were written."""
        for path in (self._json, self._csv):
            if path is not None and str(path) != "-":
                self.say(f"written to {path}")


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Comma-separated values with a header; None and nan are empty."""
    page = io.StringIO()
    writer: Any = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(page, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({key: "" if value is None or value != value else value for key, value in row.items()})
    return page.getvalue()


def check_writable(path: Path, option: str = "--json", what: str = "ranking") -> None:
    """Check that the result can be written, before an hour of work; it will replace an old file at once.

    Raises:
        OptionError: the path is not the name of a file.  RankingFileError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise OptionError(f"{option} {path}: give the name of a file to write the {what} to, or - for stdout")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # raises if the name is too long
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise RankingFileError(
            f"{option} {path} cannot be written: {error.strerror}; choose another directory"
        ) from error


def progress_option(progress: bool | None, quiet: bool) -> bool | Callable[[Progress], None] | None:
    """The option ``progress`` of rank(): if stderr is not a terminal, a plain line every half minute."""
    if quiet and progress is None:
        return False
    if progress is None and not (sys.stderr is not None and sys.stderr.isatty()):
        return Lines()
    return progress


class Lines:
    """Prints a line on stderr every ``every`` seconds, for logs of jobs that run for hours."""

    def __init__(self, every: float = EVERY) -> None:
        self._every, self._last = every, time.monotonic()

    def __call__(self, now: Progress) -> None:
        """See ``rank(progress=)``."""
        if time.monotonic() - self._last < self._every:
            return
        self._last = time.monotonic()
        share = now.operations_done / now.operations_total if now.operations_total else 1.0
        left = f", about {format_seconds(now.seconds * (1 / share - 1))} left" if share > 0.01 else ""
        done = f"{now.matrices_done:,} of {now.matrices_total:,} matrices, {100 * share:.0f}% of the work"
        typer.echo(f"ranking: {done} in {format_seconds(now.seconds)}{left}", err=True)
