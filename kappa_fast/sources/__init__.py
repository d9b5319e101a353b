"""Where weights come from. open_source() turns any of them into matrices, and a reason for everything left out."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..entries import Index, Skipped
from ..errors import OptionError, SourceError
from .base import Inventory, Matrix, Place, Source, Stored
from .checkpoint import read_checkpoint
from .filters import Filters, Surroundings
from .layouts import Cut, Part, cut
from .module import read_module
from .names import group_of, layer_of
from .tensors import read_mapping

__all__ = ["Filters", "Matrix", "PlacesOf", "Source", "open_source"]

PlacesOf = Callable[[Inventory], Mapping[str, Place]]  # by the first name of a tensor


def open_source(
    source: torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
    filters: Filters,
    places_of: PlacesOf | None = None,
) -> Source:
    """The matrices of a model: no values are read yet, and nothing is changed.

    ``places_of`` tells which tensors of a checkpoint have another name in the model: they get that one, and keep their
    own as an alias.

    Raises:
        OptionError: ``source`` is of a kind that cannot hold a model.
        SourceNotFoundError: there is no such path, or the index of a checkpoint names a shard that is not there.
        SourceError: the source cannot be read, has no parameter with two or more dimensions, or two with one name.
        NotImplementedError: a parameter is sharded.
    """
    inventory = _read(source)
    around = Surroundings.of(inventory)
    places = places_of(inventory) if places_of is not None else {}
    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    notes: dict[str, str] = {}
    candidates = [t for t in inventory.tensors if len(t.shape) >= 2]
    if not candidates:
        raise SourceError(
            f"{_called(inventory)} holds no parameter with two or more dimensions, so there is nothing to rank: "
            "pass the model itself, or the directory with its weights"
        )
    for found in candidates:
        place = places.get(found.name)
        stored = found if place is None else replace(found, names=(place.name, *found.names))
        reason = filters.reason(stored, around)
        if reason is not None:
            skipped.append(Skipped(stored.name + (place.label if place else ""), stored.shape, reason))
            continue
        pieces = _pieces(stored, place, around, filters.fused == "split")
        if pieces.note:
            notes[group_of(stored.name)] = pieces.note
        reasons = [filters.size_reason(part.shape) for part in pieces.parts]
        if reasons and reasons[0] is not None and len(set(reasons)) == 1:
            skipped.append(Skipped(stored.name + (place.label if place else ""), stored.shape, reasons[0]))
            continue
        for part, small in zip(pieces.parts, reasons, strict=True):
            if small is not None:
                skipped.append(Skipped(stored.name + part.label, part.shape, small))
            else:
                matrices.append(_matrix(stored, part, place))
    _check_keys(matrices)
    quantized = Counter(t.quantization for t in candidates if t.quantization is not None)
    metadata: dict[str, Any] = {**inventory.metadata, "layouts": notes, "quantization": dict(quantized)}
    return Source(tuple(matrices), tuple(skipped), inventory.num_parameters, metadata, inventory.in_memory)


def _pieces(stored: Stored, place: Place | None, around: Surroundings, split: bool) -> Cut:
    if place is None or not place.index:
        return cut(stored, around.shapes, split)
    rows, columns = stored.shape
    return Cut((Part(place.label, place.index, (rows, columns)),))  # the model fuses what is stored on its own


def _read(source: object) -> Inventory:
    if isinstance(source, torch.nn.Module):
        return read_module(source)
    if isinstance(source, Mapping):
        return read_mapping(source)
    if isinstance(source, (str, os.PathLike)):
        if not os.fspath(source):
            raise OptionError("the path of the checkpoint is empty: give a .safetensors file or a directory with them")
        return read_checkpoint(Path(os.fsdecode(source)))
    raise OptionError(
        f"source is of type {type(source).__name__}, which is no model: give an nn.Module, a mapping of names to "
        "tensors, a .safetensors file or a directory with them"
    )


def _check_keys(matrices: Sequence[Matrix]) -> None:
    keys = Counter(matrix.key for matrix in matrices)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise SourceError(
            f"a parameter and a part of another are both called {twice[0]!r}: rename one, leave one out with exclude=, "
            "or rank with fused='stored'"
        )


def _called(inventory: Inventory) -> str:
    metadata = inventory.metadata
    return str(metadata.get("path") or metadata.get("class") or f"the {metadata['kind']}")


def _matrix(stored: Stored, part: Part, place: Place | None) -> Matrix:
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
        load=partial(_load, stored, () if place and place.index else part.index),
        quantization=stored.quantization,
        overhead=stored.overhead + _cut_off(stored, part),
    )


def _cut_off(stored: Stored, part: Part) -> int:
    """Bytes of a dequantized matrix of which only a part is wanted."""
    assert stored.dtype is not None
    whole = math.prod(stored.shape[-2:])
    return whole * stored.dtype.itemsize if stored.quantization is not None and whole > math.prod(part.shape) else 0


def _load(stored: Stored, index: Index, device: torch.device | None = None) -> torch.Tensor:
    tensor = stored.take(index, device)
    return tensor if tensor.dim() == 2 else tensor.flatten(1)
