"""``kappa-fast export``: write a selection in the format of another program."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .budget import (
    Excluding,
    Fill,
    Including,
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
from .outcome import outcome
from .output import Debug, Verbose

if TYPE_CHECKING:
    from torch import nn

    from ..results.selection import Selection


class Format(StrEnum):
    """The formats of the command."""

    AXOLOTL = "axolotl"
    MS_SWIFT = "ms-swift"
    SPECTRUM = "spectrum"
    ESFT = "esft"
    NAMES = "names"
    REGEX = "regex"
    LLAMA_FACTORY = "llama-factory"  # export() refuses it and says why


def export(
    path: Annotated[
        Path,
        typer.Argument(metavar="JSON", help="A ranking or a selection, as to_json() wrote it.", show_default=False),
    ],
    kind: Annotated[Format, typer.Option("--format", help="Whose words.", show_default=False)],
    num_tensors: NumTensors = None,
    top_p: TopP = None,
    max_kappa: MaxKappa = None,
    max_params: MaxParams = None,
    per_group: PerGroup = False,
    unit: UnitOption = Unit.MATRIX,
    fill: Fill = False,
    include: SelectInclude = None,
    exclude: SelectExclude = None,
    including: Including = None,
    excluding: Excluding = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to this file.")] = None,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Write a selection for Axolotl, ms-swift, Spectrum or ESFT, as names or as a regular expression.

    A ranking needs a budget; a selection has had its own. --including needs the model's config.json beside the
    weights, and transformers.
    """
    with outcome(debug, verbose):
        budget = given_budget(num_tensors, top_p, max_kappa, max_params)
        selection = _selection(path, budget, given_options(per_group, unit, fill, include, exclude))
        selection = selection.including(*(including or ())).excluding(*(excluding or ()))
        text = selection.export(kind.value, output, model=_model(selection) if selection.include else None)
        typer.echo(f"written to {output}" if output is not None else text, nl=output is not None)


def _model(selection: Selection) -> nn.Module:
    """The model that the config.json beside the ranked weights describes, whose parameters patterns name."""
    from ..matching.checkpoint_names import described_by

    model = described_by(selection.settings.get("source"))
    if model is None:
        raise OptionError(
            f"--including {selection.include[0]} names parameters of the model, whose config.json is not known: it "
            "needs the checkpoint where it was ranked, with its config.json, and transformers"
        )
    return model


def _selection(path: Path, budget: dict[str, Any], options: dict[str, Any]) -> Selection:

    from ..results import serialize
    from ..results.ranking import Ranking
    from ..results.selection import Selection

    raw = serialize.read_json(path)
    if isinstance(raw, dict) and raw.get("format") == serialize.SELECTION_FORMAT:
        if budget or options:
            raise OptionError(f"{path} is a selection already: leave the budget out, or give the ranking")
        return Selection.from_json(path)
    if not budget:
        raise OptionError("a ranking needs a budget: --max-params 0.1, --top-p, --num-tensors or --max-kappa")
    return Ranking.from_json(path).select(**budget, **options)
