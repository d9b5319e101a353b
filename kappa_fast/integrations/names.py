"""From the names of a ranking to the parameters of the model at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..entries import Index, TensorKappa
from ..errors import OptionError
from ..selection import Selection
from ..sources.names import base_name

# What wrappers put before or between the words of a name.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Target:
    """A parameter of the model, and what of it is selected.

    name: as ``model.named_parameters()`` has it.  indices: what to index the parameter with to get each selected
    piece, disjoint, in the order of memory; ``((),)`` for all of it.  entries: what selected it, empty for what an
    ``including`` pattern brought in.
    """

    name: str
    parameter: nn.Parameter
    indices: tuple[Index, ...]
    entries: tuple[TensorKappa, ...]

    @property
    def whole(self) -> bool:
        """Whether all of the parameter is selected."""
        return self.indices == ((),)


def plain_name(name: str) -> str:
    """The name without the prefixes of compile, DDP, FSDP and activation checkpointing, and without PEFT's wrappers."""
    return base_name(_WRAPPERS.sub("", name))


def match(selection: Selection, model: nn.Module) -> list[Target]:
    """The parameters of ``model`` that ``selection`` names, in the order of ``named_parameters()``.

    Raises:
        OptionError: the selection names a parameter that the model does not have, or one of another shape.
    """
    parameters = dict(model.named_parameters())
    by_plain = {plain_name(name): name for name in parameters}
    entries: dict[str, list[TensorKappa]] = {}
    for entry in selection.entries:
        found = next((by_plain[n] for n in map(plain_name, (entry.name, *entry.aliases)) if n in by_plain), None)
        if found is None:
            raise OptionError(f"the model has no parameter {entry.name!r}: was the ranking made from another model?")
        entries.setdefault(found, []).append(entry)
    included = _matching(selection.include, parameters)
    excluded = _matching(selection.exclude, parameters)
    targets = []
    for name, parameter in parameters.items():
        if name in excluded or not (name in entries or name in included):
            continue
        chosen = tuple(entries.get(name, ()))
        indices: tuple[Index, ...] = ((),) if name in included else tuple(entry.index for entry in chosen)
        targets.append(Target(name, parameter, ((),) if () in indices else indices, chosen))
    return targets


def _matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return {name for name in names if any(p.search(name) or p.search(plain_name(name)) for p in compiled)}
