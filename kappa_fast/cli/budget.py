"""The options that choose a budget, for the commands that select."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from .outcome import count_or_share


class Unit(StrEnum):
    """The units of a selection."""

    MATRIX = "matrix"
    EXPERT = "expert"
    PARAMETER = "parameter"


NumTensors = Annotated[int | None, typer.Option(help="Budget: this many matrices.")]
TopP = Annotated[float | None, typer.Option(help="Budget: this share of the matrices.")]
MaxKappa = Annotated[float | None, typer.Option(help="Budget: all up to this condition number.")]
MaxParams = Annotated[
    str | None, typer.Option(metavar="N|SHARE", help="Budget: weights, a count or a share of all (0.1).")
]
PerGroup = Annotated[bool, typer.Option("--per-group", help="The budget counts within each group.")]
UnitOption = Annotated[Unit, typer.Option("--unit", help="What is selected as a whole.")]


class Order(StrEnum):
    """Which matrices a budget takes first."""

    LOWEST = "lowest"
    HIGHEST = "highest"
    RANDOM = "random"


class Match(StrEnum):
    """What a random draw has in common with the lowest."""

    TYPE = "type"
    LAYER = "layer"
    MARGINS = "margins"


OrderOption = Annotated[Order, typer.Option("--order", help="Which come first; the others are controls.")]
Seed = Annotated[int | None, typer.Option(help="Of the random order.", show_default="0")]
MatchOption = Annotated[
    list[Match] | None,
    typer.Option(
        "--match",
        help="Draw as many as the lowest of each type, in each layer, or (twice) of each type in each layer; "
        "margins: of each type and in each layer in sum, for dense models.",
    ),
]


class By(StrEnum):
    """The rows of a summary."""

    GROUP = "group"
    LAYER = "layer"


Fill = Annotated[bool, typer.Option("--fill", help="Pass over what does not fit --max-params, and go on.")]
SelectInclude = Annotated[
    list[str] | None, typer.Option("--include", metavar="REGEX", help="Only matrices in whose name this is found.")
]
SelectExclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="REGEX", help="No matrices in whose name this is found.")
]
Including = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="Train besides: parameters of the model with such names, ranked or not."),
]
Excluding = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="Do not train: parameters with such names, selected or not.")
]


def given_options(
    per_group: bool, unit: Unit, fill: bool, include: list[str] | None, exclude: list[str] | None
) -> dict[str, Any]:
    """The options of ``Ranking.select`` beside budgets, without those that have their default."""
    options: dict[str, Any] = {"per_group": per_group, "unit": unit.value, "fill": fill}
    options |= {"include": include or None, "exclude": exclude or None}
    usual = {"per_group": False, "unit": "matrix", "fill": False, "include": None, "exclude": None}
    return {name: value for name, value in options.items() if value != usual[name]}


def given_order(order: Order, seed: int | None, match: list[Match] | None) -> dict[str, Any]:
    """The order, as options of ``Ranking.select``, without what was left as it is."""
    options: dict[str, Any] = {} if order == Order.LOWEST else {"order": order.value}
    options |= {} if seed is None else {"seed": seed}
    return options | ({"match": tuple(item.value for item in match)} if match else {})


def given_budget(
    num_tensors: int | None, top_p: float | None, max_kappa: float | None, max_params: str | None
) -> dict[str, Any]:
    """The budgets that were given, as arguments of ``Ranking.select``.

    Raises:
        OptionError: ``max_params`` is neither a count nor a share.
    """
    budget: dict[str, Any] = {"num_tensors": num_tensors, "top_p": top_p, "max_kappa": max_kappa}
    if max_params is not None:
        budget["max_params"] = count_or_share(max_params, "--max-params")
    return {name: value for name, value in budget.items() if value is not None}
