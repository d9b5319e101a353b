"""``kappa-fast select RANKING.json``: select the matrices that a budget takes, and write the selection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from ..report.table import TextTable
from ..results.orders import Order as OrderOf
from .budget import (
    By,
    Excluding,
    Fill,
    Including,
    MatchOption,
    MaxKappa,
    MaxParams,
    NumTensors,
    Order,
    OrderOption,
    PerGroup,
    Seed,
    SelectExclude,
    SelectInclude,
    TopP,
    Unit,
    UnitOption,
    given_budget,
    given_options,
    given_order,
)
from .files import read_ranking
from .options import SortOption
from .outcome import outcome
from .output import AllRows, Csv, Debug, Json, Limit, Output, Quiet, Verbose

if TYPE_CHECKING:
    from ..results.selection import Selection


def select(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RANKING.json",
            help="A ranking, as to_json() or the reference implementation wrote it.",
            show_default=False,
        ),
    ],
    score: SortOption = None,
    num_tensors: NumTensors = None,
    top_p: TopP = None,
    max_kappa: MaxKappa = None,
    max_params: MaxParams = None,
    per_group: PerGroup = False,
    unit: UnitOption = Unit.MATRIX,
    fill: Fill = False,
    include: SelectInclude = None,
    exclude: SelectExclude = None,
    order: OrderOption = Order.LOWEST,
    seed: Seed = None,
    match: MatchOption = None,
    including: Including = None,
    excluding: Excluding = None,
    summary: Annotated[By | None, typer.Option(help="Show what is taken of each group or layer.")] = None,
    json: Json = None,
    csv: Csv = None,
    quiet: Quiet = False,
    limit: Limit = 40,
    all_rows: AllRows = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Select the matrices to train, and keep the selection as JSON (Selection.from_json reads it).

    Budgets may be combined: a matrix is selected if each of them alone would select it.
    """
    with outcome(debug, verbose):
        output = Output("selection", json, csv, quiet=quiet, taken=(path,))
        budget = given_budget(num_tensors, top_p, max_kappa, max_params)
        if not budget:
            raise OptionError("give a budget: --max-params 0.1, --top-p, --num-tensors or --max-kappa, or several")
        ranking = read_ranking(path, score)
        options = given_options(per_group, unit, fill, include, exclude) | given_order(order, seed, match)
        found = ranking.select(**budget, **options)
        found = found.including(*(including or ())).excluding(*(excluding or ()))
        output.write_json(found.to_json, found.document)
        from ..report.frames import rows_of

        output.write_csv(rows_of(found.entries))
        output.show(_Chosen(found, None if all_rows else limit))
        if summary is not None:
            output.show(ranking.summary(summary.value, selection=found).table())
        for line in lines_of(found):
            output.say(line)
        output.say_where()


def lines_of(selection: Selection) -> list[str]:
    """The lines about a selection, the last of which says whether the cut is certain."""
    low, high = selection.kappa_range
    kappas = "kappa not computed" if math.isnan(low) else f"kappa {low:.4g} to {high:.4g}"
    lines = [f"{len(selection):,} matrices of {len(selection.names):,} parameters, {kappas}"]
    lines += [selection.describe()] if all(entry.numel for entry in selection) else []
    order = OrderOf.in_words(selection.settings)
    lines += [f"a control: {order}"] if order else []
    lines += [f"took {selection.took()}"] if selection.took() else []
    lines += [selection.unfit()] if selection.unfit() else []
    certain = "certain: exact values would take the same" if selection.boundary_certain else "uncertain"
    return [*lines, f"the cut is {certain}"]


@dataclass(frozen=True)
class _Chosen(TextTable):
    """The selected matrices as a table."""

    selection: Selection
    limit: int | None

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from ..report.table import RankingTable
        from ..results.ranking import Ranking

        if self.limit != 0:
            table = RankingTable(Ranking(self.selection.entries), self.limit)
            yield table.rows_alone(options.max_width)
