"""``kappa-fast compare BEFORE AFTER --weights``: what training did to the weights of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import OptionError
from ..texts import cleaned
from .outcome import BROKEN

if TYPE_CHECKING:
    from .output import Output


def compare_weights(
    models: Sequence[Path], output: Output, limit: int | None, options: Mapping[str, Any], refused: Mapping[str, Any]
) -> None:
    """Print and write what ``difference()`` finds.

    Args:
        models: files, directories or ids on the hub, as ``kappa-fast rank`` takes them.
        options: arguments of ``difference()``.
        refused: by name, the values of options of ``compare`` that are for rankings; all must be without effect.

    Raises:
        OptionError: these are not two models, or an option is for rankings.
        typer.Exit: with 4 if there are NaNs or infinities in one of them.
    """
    given = next((name for name, value in refused.items() if value), None)
    if given is not None:
        raise OptionError(f"{given} is for rankings, and --weights compares the weights of two models: leave one out")
    if len(models) != 2:
        raise OptionError(f"--weights compares two models, and {len(models)} are given")
    for model in models:
        if model.suffix == ".json":
            raise OptionError(f"{model}: --weights takes the models themselves, not rankings: a file or a directory")
    from ..report.frames import rows_of_difference
    from ..updates import difference

    found = difference(str(models[0]), str(models[1]), **options)
    output.write_json(found.to_json, found.document)
    output.write_csv(rows_of_difference(found))
    output.show(found.table(limit))
    output.say_where()
    for caveat in found.caveats:
        typer.echo(f"warning: {cleaned(caveat)}", err=True)
    if found.non_finite:
        typer.echo(
            f"failed: NaN or inf in {len(found.non_finite)} matrices, {found.non_finite[0].key!r} among them", err=True
        )
        raise typer.Exit(BROKEN)
