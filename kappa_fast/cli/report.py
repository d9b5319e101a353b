"""``kappa-fast report``: write a ranking as an HTML page and as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from .budget import (
    Fill,
    MaxKappa,
    MaxParams,
    NumTensors,
    PerGroup,
    SelectExclude,
    SelectInclude,
    TopP,
    Unit,
    UnitOption,
    given_budget,
    given_options,
)
from .options import SortOption
from .outcome import outcome
from .output import Debug, Quiet, Verbose


def report(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RANKING.json",
            help="A ranking, as to_json() or the reference implementation wrote it.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the page to this file; by default beside the ranking."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the heat map to this file too, .png, .svg or .pdf.")
    ] = None,
    score: SortOption = None,
    show: Annotated[
        str | None, typer.Option(metavar="NAME", help="What colors and axes show: kappa, flatness, stable_rank, ...")
    ] = None,
    num_tensors: NumTensors = None,
    top_p: TopP = None,
    max_kappa: MaxKappa = None,
    max_params: MaxParams = None,
    per_group: PerGroup = False,
    unit: UnitOption = Unit.MATRIX,
    fill: Fill = False,
    include: SelectInclude = None,
    exclude: SelectExclude = None,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Write a page with the heat map, the sorted curve and the table of a ranking.

    A budget is shown as what would be selected; more of them can be tried in the page.
    """
    with outcome(debug, verbose):
        page = path.with_suffix(".html") if output is None else output
        targets = [target for target in (page, plot) if target is not None]
        _check_targets(path, targets)
        budget = given_budget(num_tensors, top_p, max_kappa, max_params)
        options = given_options(per_group, unit, fill, include, exclude)
        if not budget and options:
            raise OptionError("--per-group and --unit go with a budget: --max-params 0.1, for example")
        from ..results.ranking import Ranking

        ranking = Ranking.from_json(path)
        ranking = ranking if score is None else ranking.by(score)
        selection = ranking.select(**budget, **options) if budget else None
        if plot is not None:  # first, because it can fail for more reasons
            ranking.plot(plot, selection=selection, show=show)
        ranking.to_html(page, selection=selection, show=show)
        for target in () if quiet else targets:
            typer.echo(f"written to {target}")


def _check_targets(path: Path, targets: list[Path]) -> None:
    """Raises OptionError if one file would overwrite another."""
    known = [os.path.realpath(path)]
    for target in targets:
        if os.path.realpath(target) in known:
            raise OptionError(f"{target} would be written over {path} or over the page: give another name")
        known.append(os.path.realpath(target))
