"""Checks that a loaded state of an optimizer belongs to its parameters; torch itself matches both by position only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import OptionError

# State of common optimizers that has the shape of the parameter. Fused optimizers crash if it has another shape.
ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "exp_inf", "sum")
AGAIN = (
    "select what it was saved with (Selection.to_json keeps a selection, a checkpoint of KappaTuneCallback has it as "
    "kappa_selection.json), or begin with a new optimizer"
)


def check_names(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare the selected pieces by the names of parameters, in the order of the state.

    Raises:
        OptionError: ``saved`` and ``own`` differ; the message says where.
    """
    if list(saved.items()) == list(own.items()):
        return
    gone = [name for name in saved if name not in own]
    new = [name for name in own if name not in saved]
    parts = [name for name in own if name in saved and own[name] != saved[name]]
    what = [f"it has {gone[0]!r}, which this one lacks"] if gone else []
    what += [f"it lacks {new[0]!r}, which this one has"] if new else []
    what += [f"it has other parts of {parts[0]!r}"] if parts and not what else []
    detail = " and ".join(what) or "it has them in another order (other parameter groups)"
    raise OptionError(
        f"the state of the optimizer belongs to another selection of {len(saved)} parameters, of which this one has "
        f"{len(own)}: {detail}. Resume with the same selection: {AGAIN}"
    )


def check_shapes(states: Iterable[tuple[str, Mapping[str, Any], Iterable[tuple[int, ...]]]]) -> None:
    """Check the states of parameters, each given by a name, a state, and the shapes that the state may have.

    Raises:
        OptionError: a state has another shape.
    """
    for name, state, shapes in states:
        known = [tuple(shape) for shape in shapes]
        for key in ELEMENTWISE:
            value = state.get(key)
            if isinstance(value, torch.Tensor) and value.dim() and tuple(value.shape) not in known:
                raise OptionError(
                    f"the state of the optimizer belongs to other parameters: {key!r} for {name!r} is "
                    f"{tuple(value.shape)}, and the parameter {known[0]}. Resume with the same selection: {AGAIN}"
                )
