"""``kappa-fast export``: a ranking, or a selection, in the words of another program."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .budget import MaxKappa, MaxParams, NumTensors, PerGroup, TopP, Unit, UnitOption, given_budget
from .outcome import outcome

if TYPE_CHECKING:
    from ..selection import Selection


class Format(StrEnum):
    """What can be written."""

    AXOLOTL = "axolotl"
    MS_SWIFT = "ms-swift"
    SPECTRUM = "spectrum"
    ESFT = "esft"
    NAMES = "names"
    REGEX = "regex"
    LLAMA_FACTORY = "llama-factory"  # refused, with the reason


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
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write to this file.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the log.")] = False,
) -> None:
    """Write a selection for Axolotl, ms-swift, Spectrum or ESFT, as names or as a regular expression.

    A ranking needs one budget; a selection has had its own.
    """
    with outcome(debug):
        budget = given_budget(num_tensors, top_p, max_kappa, max_params)
        selection = _selection(path, budget, {"per_group": per_group, "unit": unit.value})
        text = selection.export(kind.value, output)
        typer.echo(f"written to {output}" if output is not None else text, nl=output is not None)


def _selection(path: Path, budget: dict[str, Any], options: dict[str, Any]) -> Selection:
    from .. import serialize
    from ..ranking import Ranking
    from ..selection import Selection

    raw = serialize.read_json(path)
    if isinstance(raw, dict) and raw.get("format") == serialize.SELECTION_FORMAT:
        if budget or options != {"per_group": False, "unit": "matrix"}:
            raise OptionError(f"{path} is a selection already: leave the budget out, or give the ranking")
        return Selection.from_json(path)
    if not budget:
        raise OptionError("a ranking needs a budget: --max-params 0.1, --top-p, --num-tensors or --max-kappa")
    return Ranking.from_json(path).select(**budget, **options)
