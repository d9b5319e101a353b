"""Reading of weights: open_source() returns the matrices of a model, and the skipped tensors with the reasons."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import KappaError, OptionError, SourceError, SourceNotFoundError
from ..io.limits import LONGEST_NAME, MOST_DIMENSIONS, MOST_TENSORS, check_limit
from ..machine.memory import is_out_of_memory
from ..results.entries import Index, Skipped
from ..results.names import group_of, layer_of
from .admission import Neighbors, admit, by_evidence
from .base import Division, Home, Inventory, Matrix, Place, Source, Stamp, Stored
from .boundary import reading, unexpected_error
from .called import as_computed
from .checkpoint import read_checkpoint
from .codes import ON_META
from .divided import divide
from .filters import Filters
from .gguf import is_gguf, read_gguf
from .hub import HubId, hub_id, snapshot
from .hub_headers import headers_of
from .layouts import Layout, Part, layout_of
from .module import read_module
from .names import is_read_directly
from .tensors import count_weights, read_mapping
from .unsharded import whole_mapping, whole_module

__all__ = ["Filters", "Matrix", "PlacesOf", "Source", "open_source"]

_LOG = logging.getLogger(__name__)

PlacesOf = Callable[[Inventory], Mapping[str, Place | Division]]  # the result is by the first name of a tensor


def open_source(
    source: torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
    filters: Filters,
    places_of: PlacesOf | None = None,
    *,
    without_values: bool = False,
    quiet: bool = False,
) -> Source:
    """Return the matrices of a model; no values are read, and the source is not changed.

    Args:
        source: a module, a mapping of names to tensors, a path, or the id of a model on the hub (org/name or
            org/name@revision). A model is downloaded unless the hub's local cache has all of it.
        filters: the options of rank() that decide what is ranked.
        places_of: returns which tensors of a checkpoint have another name in the model; these get the name in the
            model, and keep their own as an alias.
        without_values: for a plan: accept parameters on the meta device, and download only headers.
        quiet: draw no progress bars of downloads on stderr.

    Raises:
        OptionError: ``source`` has a type that cannot hold a model.
        MissingExtraError: a package that the source needs (huggingface_hub, gguf) is not installed.
        SourceNotFoundError: there is no such path or model, or a shard that an index names is missing.
        SourceError: the source cannot be read, has no parameter with two or more dimensions, or two with one name.
        ShardedError: a parameter is sharded in a way, or in a state, that is not understood.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _opened(_read(source, filters, without_values, quiet), filters, places_of, without_values)
    with reading(source):
        found = _opened(_read(source, filters, without_values, quiet), filters, places_of, without_values)
        return replace(found, matrices=tuple(replace(m, load=_GuardedLoad(m)) for m in found.matrices))


def _opened(inventory: Inventory, filters: Filters, places_of: PlacesOf | None, without_values: bool) -> Source:
    inventory, places = divide(inventory, places_of(inventory) if places_of is not None else {})
    inventory = _with_model_facts(inventory, places)
    around = Neighbors.of(_renamed(inventory, places))
    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    absent: list[Skipped] = []
    notes: dict[str, str] = {}
    evidences: list[tuple[str, str]] = []
    candidates = [t for t in inventory.tensors if len(t.shape) >= 2 or t.error is not None]
    if not candidates:
        raise SourceError(
            f"{_description(inventory)} has no parameter with two or more dimensions, so there is nothing to rank: "
            "pass the model itself, or the directory with its weights"
        )
    for found in candidates:
        place = places.get(found.name)
        stored = found if place is None else replace(found, names=tuple(dict.fromkeys((place.name, *found.names))))
        reason, evidence = _decide(stored, around, filters, without_values)
        _LOG.debug("%s %s: %s", stored.name, stored.shape, f"skipped, {reason}" if reason else f"taken, {evidence}")
        if reason is not None:
            skipped.append(Skipped(stored.name + (place.label if place else ""), stored.shape, reason))
            if (stored.out_of_sight or reason == ON_META) and filters.reason(stored, around) is None:
                absent.append(skipped[-1])
            continue
        evidences.append((stored.name, evidence))
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
    metadata: dict[str, Any] = {
        **inventory.metadata,
        "layouts": notes,
        "quantization": dict(quantized),
        "evidence": by_evidence(evidences),
    }
    types = _types_of(candidates)
    direct = {m.name for m in matrices if is_read_directly(m.name, around.shapes, types)}
    metadata |= {"read_directly": sorted(direct)} if direct else {}
    count = inventory.num_parameters
    ranked = {m.name for m in matrices}
    unfollowed = [t.name for t in candidates if t.unfollowed]
    unfollowed = [places[name].name if name in places else name for name in unfollowed]
    return Source(
        matrices=tuple(matrices),
        skipped=tuple(skipped),
        num_parameters=count,
        metadata=metadata,
        in_memory=inventory.in_memory,
        absent=tuple(absent),
        unfollowed=tuple(name for name in unfollowed if name in ranked),
        shards=inventory.shards,
        sizes={t.name: t.numel for t in inventory.tensors},
    )


def _types_of(tensors: Sequence[Stored]) -> set[str]:
    return {kind for stored in tensors for kind in stored.model_types}


def _decide(stored: Stored, around: Neighbors, filters: Filters, without_values: bool) -> tuple[str | None, str]:
    """Return the reason why a tensor is left out, or None and the evidence that it is a weight."""
    chosen = filters.reason(stored, around)
    if stored.error is not None and chosen is not None:
        return chosen, ""  # the options may leave out a tensor that cannot be read
    admission = admit(stored, around, without_values)
    return admission.reason or chosen, admission.evidence


def _with_model_facts(inventory: Inventory, places: Mapping[str, Place]) -> Inventory:
    """Add to the tensors of a checkpoint what the model that config.json describes says about them."""
    homes = {name: place.home for name, place in places.items() if place.home is not None}
    if not homes:
        return inventory
    tensors = [_with_facts(t, homes[t.name]) if t.name in homes and t.parent is None else t for t in inventory.tensors]
    return replace(inventory, tensors=tensors, num_parameters=count_weights(tensors))


def _with_facts(stored: Stored, home: Home) -> Stored:
    if home.is_buffer:
        reason = f"buffer of {type(home.owner).__name__} in the model that config.json describes, not a parameter"
        return replace(stored, problem=reason, roles=stored.roles | {"ingredient"})
    stored = as_computed(stored, home.owner)
    told = bool(stored.evidence) or stored.quantization is not None
    return replace(
        stored,
        parent=home.owner,
        roles=stored.roles | home.roles,
        model_types=home.model_types,
        evidence=stored.evidence if told else f"parameter of {type(home.owner).__name__} in the model of config.json",
    )


def _renamed(inventory: Inventory, places: Mapping[str, Place]) -> Inventory:
    """Add the names of the model to those on disk: tensors are looked up by the names of their siblings.

    A tensor that becomes only a part of a parameter does not get its name, since it has another shape.
    """
    whole = {name: place.name for name, place in places.items() if not place.index}
    if not whole:
        return inventory
    tensors = [replace(t, names=(*t.names, whole[t.name])) if t.name in whole else t for t in inventory.tensors]
    return replace(inventory, tensors=tensors)


def _pieces(stored: Stored, place: Place | None, around: Neighbors, split: bool) -> Layout:
    if place is None or not place.index:
        return layout_of(stored, around.shapes, split)
    rows, columns = stored.shape
    return Layout((Part(place.label, place.index, (rows, columns)),))  # the model fuses this matrix with others


def _read(source: object, filters: Filters, without_values: bool, quiet: bool) -> Inventory:
    if isinstance(source, torch.nn.Module):
        module, shards = whole_module(source)
        return replace(read_module(module, filters.adapters), shards=shards)
    if isinstance(source, Mapping):
        mapping, shards = whole_mapping(source)
        return replace(read_mapping(mapping), shards=shards)
    if isinstance(source, (str, os.PathLike)):
        if not os.fspath(source):
            raise OptionError("the path of the checkpoint is empty: give a .safetensors file or a directory with them")
        if isinstance(source, str) and source.startswith(("https://", "http://")):
            raise SourceNotFoundError(f"{source} is a URL: give the id of the model (org/name), or download it")
        path = Path(os.fsdecode(source))
        wanted = hub_id(source) if isinstance(source, str) and not os.path.lexists(path) else None
        if wanted is not None:
            return _limited((headers_of(wanted) if without_values else None) or _from_hub(wanted, quiet))
        return _limited(read_gguf(path) if is_gguf(path) else read_checkpoint(path))
    raise OptionError(
        f"source is of type {type(source).__name__}, which is not a model: give an nn.Module, a mapping of names to "
        "tensors, a .safetensors or .gguf file, a directory with them, or the id of a model on the hub"
    )


def _limited(inventory: Inventory) -> Inventory:
    """Return the inventory; raise SourceError if its numbers or sizes exceed a limit."""
    where = _description(inventory)
    check_limit(where, "the number of tensors", len(inventory.tensors), MOST_TENSORS)
    for stored in inventory.tensors:
        name = stored.name[:60]
        check_limit(where, f"the length of the name {name!r}...", max(map(len, stored.names)), LONGEST_NAME)
        check_limit(where, f"the number of dimensions of {name!r}", len(stored.shape), MOST_DIMENSIONS)
    return inventory


def _from_hub(wanted: HubId, quiet: bool) -> Inventory:
    directory = snapshot(wanted, quiet)
    inventory = read_checkpoint(directory)
    return replace(inventory, metadata={**inventory.metadata, "id": wanted.name, "revision": directory.name})


def _check_keys(matrices: Sequence[Matrix]) -> None:
    keys = Counter(matrix.key for matrix in matrices)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise SourceError(
            f"a parameter and a part of another one have the same name {twice[0]!r}: rename one, leave one out with "
            "exclude=, or rank with fused='stored'"
        )


def _description(inventory: Inventory) -> str:
    metadata = inventory.metadata
    return str(metadata.get("path") or metadata.get("class") or f"the {metadata['kind']}")


def _matrix(stored: Stored, part: Part, place: Place | None) -> Matrix:
    assert stored.dtype is not None  # admit() refuses tensors without a dtype
    index = () if place and place.index else part.index
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
        load=partial(_load, stored, index),
        quantization=stored.quantization,
        overhead=stored.overhead + _discarded_bytes(stored, part),
        prefetch=None if stored.prefetch is None else partial(stored.prefetch, index),
        location=stored.location,
        is_spread=stored.is_spread,
        stamp=None if stored.stamp is None else _part_of(stored.stamp, part, index),
    )


def _discarded_bytes(stored: Stored, part: Part) -> int:
    """Return the size of the whole matrix if it has to be computed (dequantized, ...) for a part of it; else 0."""
    assert stored.dtype is not None
    whole = math.prod(stored.shape[-2:])
    made = stored.quantization is not None or stored.overhead > 0
    return whole * stored.dtype.itemsize if made and whole > math.prod(part.shape) else 0


def _part_of(stamp: Stamp, part: Part, index: Index) -> Stamp:
    """Return the stamp of a part of a tensor: the index and the shape identify the part, its label does not matter."""
    places = [f"{i.start}:{i.stop}:{i.step}" if isinstance(i, slice) else str(i) for i in index]
    return Stamp(stamp.files, f"{stamp.what} [{', '.join(places)}] {part.shape[0]}x{part.shape[1]}")


class _GuardedLoad:
    """``Matrix.load`` of a matrix in a file; every unexpected error becomes a SourceError that names the tensor."""

    def __init__(self, matrix: Matrix) -> None:
        self._load, self._key = matrix.load, matrix.key
        self._where = matrix.location[0] if matrix.location is not None else "the checkpoint"

    def __call__(self, device: torch.device | None = None) -> torch.Tensor:
        try:
            return self._load(device)
        except (KappaError, Warning):
            raise
        except Exception as error:
            # Errors of a device do not concern the file; a wave that runs out of memory is tried again in two halves.
            if (device is not None and device.type != "cpu") or is_out_of_memory(error):
                raise
            raise unexpected_error(self._where, repr(self._key), error) from error


def _load(stored: Stored, index: Index, device: torch.device | None = None) -> torch.Tensor:
    tensor = stored.take(index, device)
    return tensor if tensor.dim() == 2 else tensor.flatten(1)
