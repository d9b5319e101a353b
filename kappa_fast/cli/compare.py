"""``kappa-fast compare A.json B.json ...``: how two rankings differ, or kappa over several; --weights: two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError
from ..texts import cleaned
from .budget import Fill, SelectExclude, SelectInclude, Unit, given_budget, given_options
from .files import read_ranking
from .outcome import BROKEN, EXCEEDED, outcome
from .output import AllRows, Csv, Debug, Json, Output, Quiet, Verbose
from .weights import compare_weights

if TYPE_CHECKING:
    from ..results.comparison import Comparison


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="A.json B.json...", help="Rankings of the model, two or more.", show_default=False),
    ],
    weights: Annotated[
        bool, typer.Option("--weights", help="A and B are models: what changed in their weights.")
    ] = False,
    k: Annotated[
        int | None, typer.Option("--k", min=0, help="With --weights: leading singular directions.", show_default="10")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="With --weights: intruders have a cosine below it.", show_default="0.5")
    ] = None,
    score: Annotated[
        str, typer.Option(metavar="NAME", help="The rank correlation of this: kappa, flatness, stable_rank, ...")
    ] = "kappa",
    fail_above: Annotated[
        float | None,
        typer.Option(metavar="RATIO", help="Exit with 3 if a kappa certainly moved by more than this factor (1.5)."),
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
    fill: Fill = False,
    include: SelectInclude = None,
    exclude: SelectExclude = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="TEXT", help="A name for each ranking, in order.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what moved to this file, .png, .svg or .pdf.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page of two rankings to this file.")
    ] = None,
    json: Json = None,
    csv: Csv = None,
    quiet: Quiet = False,
    limit: Annotated[int, typer.Option(min=0, help="Rows in each direction; 0 for none.")] = 10,
    all_rows: AllRows = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """How two rankings of a model differ, and which changes are certain; or kappa over several, in their order.

    A change is certain if the intervals of kappa do not touch. What makes the comparison unfair is a warning. With
    more than two, --fail-above compares the last with the first. Exit code 3: --fail-above was exceeded; 4: there
    are NaNs or infinities among the weights now that were not there before.

    With --weights A and B are two models, as rank takes them: how much each matrix changed, the stable rank of the
    change, which part of it lies in the leading singular directions of A, and new ones ("intruders") in B.
    """
    with outcome(debug, verbose):
        if weights:
            for_rankings: dict[str, object] = {
                "--fail-above": fail_above is not None,
                "--per-group": per_group,
                "--fill": fill,
            }
            for_rankings |= {
                "--score": score != "kappa",
                "--unit": unit != Unit.MATRIX,
                "--label": labels,
                "--plot": plot,
                "--html": html,
            }
            for_rankings |= {"a budget": given_budget(num_tensors, top_p, max_kappa, max_params)}
            chosen = {"k": k, "threshold": threshold, "include": include or None, "exclude": exclude or None}
            compare_weights(
                files,
                Output("difference", json, csv, quiet=quiet, taken=files),
                None if all_rows else limit,
                {name: value for name, value in chosen.items() if value is not None},
                for_rankings,
            )
            return
        if k is not None or threshold is not None:
            raise OptionError("--k and --threshold are of --weights, which compares the weights of two models")
        if len(files) < 2:
            raise OptionError(f"{files[0]} is one ranking: give two or more")
        if fail_above is not None and not 1 <= fail_above < math.inf:
            raise OptionError(f"--fail-above {fail_above:g}: give a factor from 1 on, such as 1.5")
        budget = given_budget(num_tensors, top_p, max_kappa, max_params)
        options = given_options(per_group, unit, fill, include, exclude)
        if not budget and options:
            raise OptionError("--per-group and --unit say how a budget selects: give --max-params 0.1 or another one")
        if len(files) > 2 and (budget or html is not None or score != "kappa"):
            raise OptionError("budgets, --score and --html compare two rankings: give two files")
        output = Output("comparison", json, csv, quiet=quiet, taken=files)
        rankings = [read_ranking(file) for file in files]
        rows = None if all_rows else limit
        found = rankings[0].compare(rankings[-1], score=score)
        if len(files) == 2:
            overlap = found.overlap(**budget, **options) if budget else None
            output.write_json(lambda file: found.to_json(file, overlap), lambda: found.document(overlap))
            from ..report.frames import rows_of_comparison

            output.write_csv(rows_of_comparison(found))
            output.show(found.table(rows, overlap))
            if plot is not None:
                found.plot(plot)
            if html is not None:
                found.to_html(html)
        else:
            course = rankings[0].series(*rankings[1:], labels=labels or _labels(files))
            output.write_json(course.to_json, course.document)
            from ..report.frames import rows_of_series

            output.write_csv(rows_of_series(course))
            output.show(course.table(rows))
            if plot is not None:
                course.plot(plot)
        output.say_where()
        for path in (plot, html):
            if path is not None:
                output.say(f"written to {path}")
        for caveat in found.caveats:
            typer.echo(f"warning: {cleaned(caveat)}", err=True)
        if fail_above is not None:
            _judge(found, fail_above)


def _labels(files: Sequence[Path]) -> list[str]:
    """The names of the files, with the names of their directories if two files have the same name."""
    names = [file.stem for file in files]
    return names if len(set(names)) == len(names) else [str(file) for file in files]


def _judge(found: Comparison, fail_above: float) -> None:
    """Exit with a code of its own for a result that a gate should refuse."""
    exceeding = found.exceeding(fail_above)
    if not exceeding:
        return
    broken = [change for change in exceeding if change.broke]
    worst = exceeding[0]
    if broken:
        typer.echo(f"failed: NaN or inf in {len(broken)} matrices, {broken[0].key!r} among them", err=True)
        raise typer.Exit(BROKEN)
    typer.echo(
        f"failed: {len(exceeding)} certainly moved by more than {fail_above:g}, {worst.key!r} by at least "
        f"{worst.at_least:.4g}",
        err=True,
    )
    raise typer.Exit(EXCEEDED)
