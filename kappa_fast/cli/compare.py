"""``kappa-fast compare A.json B.json``: how two rankings differ."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, RankingFileError
from ..texts import cleaned
from .budget import Unit
from .outcome import FAILURE, count_or_share, outcome
from .rank import check_writable

if TYPE_CHECKING:
    from ..ranking import Ranking


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="A ranking.", show_default=False)],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Another one of the model.", show_default=False)],
    fail_above: Annotated[
        float | None,
        typer.Option(metavar="RATIO", help="Exit with 1 if a kappa certainly moved by more than this factor (1.5)."),
    ] = None,
    num_tensors: Annotated[int | None, typer.Option(help="Compare selections: this many matrices.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Compare selections: this share of the matrices.")] = None,
    max_kappa: Annotated[
        float | None, typer.Option(help="Compare selections: all up to this condition number.")
    ] = None,
    max_params: Annotated[
        str | None, typer.Option(metavar="N|SHARE", help="Compare selections: weights, a count or a share (0.1).")
    ] = None,
    per_group: Annotated[bool, typer.Option("--per-group", help="The budget counts within each group.")] = False,
    unit: Annotated[Unit, typer.Option(help="What is selected as a whole.")] = Unit.MATRIX,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the comparison to this file.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows in each direction.")] = 10,
    all_rows: Annotated[bool, typer.Option("--all", help="All rows, whatever --limit says.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the log.")] = False,
) -> None:
    """How two rankings of a model differ, and which changes are certain.

    A change is certain if the intervals of kappa do not touch. What makes the comparison unfair is a warning.
    """
    with outcome(debug):
        if fail_above is not None and not 1 <= fail_above < math.inf:
            raise OptionError(f"--fail-above {fail_above:g}: give a factor from 1 on, such as 1.5")
        budget: dict[str, Any] = {"num_tensors": num_tensors, "top_p": top_p, "max_kappa": max_kappa}
        budget = {key: value for key, value in budget.items() if value is not None}
        if max_params is not None:
            budget["max_params"] = count_or_share(max_params, "--max-params")
        if not budget and (per_group or unit is not Unit.MATRIX):
            raise OptionError("--per-group and --unit say how a budget selects: give --max-params 0.1 or another one")
        if json is not None:
            check_writable(json, "comparison")
            if any(file.exists() and json.exists() and json.samefile(file) for file in (before, after)):
                raise OptionError(f"--json {json} is one of the rankings: give another name")
        found = _read(before).compare(_read(after))
        exceeding = [] if fail_above is None else found.exceeding(fail_above)
        overlap = found.overlap(**budget, per_group=per_group, unit=unit.value) if budget else None
        if json is not None:
            found.to_json(json, overlap)
        rows = None if all_rows else limit
        if sys.stdout.isatty():
            from rich.console import Console

            Console().print(found.table(rows, overlap))
        else:  # for grep and awk: no name is shortened
            typer.echo(found.to_text(rows, overlap, width=10_000))
        if json is not None:
            typer.echo(f"written to {json}")
        for caveat in found.caveats:
            typer.echo(f"warning: {cleaned(caveat)}", err=True)
        if exceeding:
            worst = exceeding[0]
            typer.echo(
                f"failed: {len(exceeding)} certainly moved by more than {fail_above:g}, {worst.key!r} by at least "
                f"{worst.at_least:.4g}",
                err=True,
            )
            raise typer.Exit(FAILURE)


def _read(path: Path) -> Ranking:
    """A ranking, with a word about what else the file may be."""
    from .. import serialize
    from ..ranking import Ranking

    try:
        return Ranking.from_json(path)
    except RankingFileError:
        raw = serialize.read_json(path)
        if isinstance(raw, dict) and raw.get("format") == serialize.SELECTION_FORMAT:
            raise OptionError(f"{path} is a selection: give the ranking that it was selected from") from None
        raise
