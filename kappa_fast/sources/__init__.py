"""Where weights come from. open_source() turns any of them into matrices, and a reason for everything left out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..entries import Skipped
from ..errors import OptionError, SourceError
from .base import Inventory, Matrix, Source, Stored
from .checkpoint import read_checkpoint
from .filters import Filters
from .layouts import Part, cut
from .module import read_module
from .names import group_of, layer_of
from .tensors import read_mapping

__all__ = ["Filters", "Matrix", "Source", "open_source"]


def open_source(
    source: torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str], filters: Filters
) -> Source:
    """The matrices of a model: no values are read yet, and nothing is changed.

    Raises:
        OptionError: ``source`` is of a kind that cannot hold a model.
        SourceError: the source cannot be read, or holds no matrix at all.
        NotImplementedError: a parameter is sharded.
    """
    inventory = _read(source)
    shapes = {name: t.shape for t in inventory.tensors for name in t.names}
    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    notes: dict[str, str] = {}
    candidates = [t for t in inventory.tensors if len(t.shape) >= 2]
    if not candidates:
        raise SourceError(
            f"the {inventory.metadata['kind']} holds no parameter with two or more dimensions: nothing to rank"
        )
    for stored in candidates:
        reason = filters.reason(stored, shapes)
        if reason is not None:
            skipped.append(Skipped(stored.name, stored.shape, reason))
            continue
        pieces = cut(stored, shapes, inventory.config, filters.fused == "split")
        if pieces.note:
            notes[group_of(stored.name)] = pieces.note
        reasons = [filters.size_reason(part.shape) for part in pieces.parts]
        if reasons and reasons[0] is not None and len(set(reasons)) == 1:
            skipped.append(Skipped(stored.name, stored.shape, reasons[0]))
            continue
        for part, small in zip(pieces.parts, reasons, strict=True):
            if small is not None:
                skipped.append(Skipped(stored.name + part.label, part.shape, small))
            else:
                matrices.append(_matrix(stored, part))
    metadata: dict[str, Any] = {**inventory.metadata, "layouts": notes}
    return Source(tuple(matrices), tuple(skipped), inventory.num_parameters, metadata, inventory.in_memory)


def _read(source: object) -> Inventory:
    if isinstance(source, torch.nn.Module):
        return read_module(source)
    if isinstance(source, Mapping):
        return read_mapping(source)
    if isinstance(source, (str, os.PathLike)):
        return read_checkpoint(Path(source))
    raise OptionError(
        f"a {type(source).__name__} is no model: give an nn.Module, a mapping of names to tensors, a .safetensors file "
        "or a directory with them"
    )


def _matrix(stored: Stored, part: Part) -> Matrix:
    assert stored.dtype is not None  # the filters have refused those without
    return Matrix(
        name=stored.name,
        aliases=tuple(sorted(stored.names[1:])),
        part=part.label,
        index=part.index,
        layer=layer_of(stored.name),
        group=group_of(stored.name) + part.label[part.label.find("]") + 1 :],
        shape=part.shape,
        dtype=stored.dtype,
        device=stored.device,
        load=partial(_load, stored, part),
    )


def _load(stored: Stored, part: Part) -> torch.Tensor:
    tensor = stored.take(part.index)
    return tensor if tensor.dim() == 2 else tensor.flatten(1)
