"""The command line, ``kappa-fast`` or ``python -m kappa_fast``, with one file for each command."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from .._version import __version__
from ..machine import signals as stops
from . import compare, demo, export, plan, rank, report, select
from .outcome import INTERRUPTED, TERMINATED

# Plain text instead of typer's boxes stays readable in logs and narrow terminals, and loads faster.
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kappa-fast {__version__}")
        raise typer.Exit()


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Rank the weight matrices of a model by their condition number, lowest first.

    Exit codes: 0 for success, 1 for a failure, 2 for wrong use, 3 if compare --fail-above was exceeded, 4 if there are
    NaNs or infinities among the weights, 5 if nothing was left to rank, 130 after Ctrl-C, 143 after SIGTERM.
    """


app.command("rank")(rank.rank)
app.command("demo")(demo.demo)
app.command("select")(select.select)
app.command("export")(export.export)
app.command("plan")(plan.plan)
app.command("compare")(compare.compare)
app.command("report")(report.report)


def main() -> None:
    """Run the command line on ``sys.argv``; ends the process with the exit code."""
    code: int | str | None
    with stops.listening():
        try:
            app()
            code = 0
        except SystemExit as end:
            code = end.code
        except KeyboardInterrupt:
            code = INTERRUPTED
    # A SIGTERM decides the exit code, even if a command has handled its exception.
    sys.exit(TERMINATED if stops.received(signal.SIGTERM) else code)
