"""The names that the tensors of a checkpoint will have in the model, where transformers gives them others.

Most checkpoints of mixtures of experts hold one tensor for every expert and projection, which transformers fuses while
it loads them. A ranking that is to be trained with should speak of the parameters that will be there.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError
from ..io.documents import read_document
from ..io.limits import LARGEST_CONFIG
from ..results.entries import Index
from ..sources.base import Division, Inventory, Place, Stored
from ..sources.layouts import Part, layout_of
from .architecture import architecture
from .conversion import Conversion

log = logging.getLogger("kappa_fast")

# Types whose checkpoints have the names of the model, so that nothing need be imported to know; others are looked up.
_NAMED_ALIKE = frozenset(
    (
        *("albert", "arcee", "bert", "bloom", "codegen", "cohere", "cohere2", "deberta", "deberta-v2", "distilbert"),
        *("electra", "ernie4_5", "falcon", "gemma", "gemma2", "glm", "glm4", "gpt2", "gpt_bigcode", "gptj", "granite"),
        *("helium", "llama", "mistral", "modernbert", "mpnet", "mpt", "nemotron", "olmo", "olmo2", "opt", "persimmon"),
        *("phi", "phi3", "qwen2", "qwen3", "roberta", "roformer", "smollm3", "stablelm", "starcoder2", "xglm"),
        "xlm-roberta",
    )
)
_LAYER = re.compile(r"\.\d+\.")
_BARE = re.compile(r"(?<!Head)(?<!Heads)Model$")
# What most models with a head call the model below it.
_BASE = re.compile(r"(?:model\.(?!model\.)|backbone\.|transformer\.(?:h|blocks)\.)")
_EXPERT = re.compile(r"\.experts?\.\d+\.")


def places_of(inventory: Inventory) -> dict[str, Place | Division]:
    """By their names on disk, the tensors that the model has: under which name, or as a part of which parameter.

    Or as which parameters, where a tensor is divided.

    Empty where config.json names no model of transformers' own, where transformers is not installed, and for models
    whose names do not change: without experts on their own and without models inside the model, nothing is imported.
    Tensors that are permuted on their way keep the name they have.
    """
    if not _may_be_renamed(inventory):
        return {}
    model = architecture(inventory.config, f"the config.json of {inventory.metadata.get('path')}")
    if model is None:
        return {}
    parts = _Parts(Conversion(model, lambda name: name))
    # Scales have no place in the model, and only their names look as if they had.
    weights = [stored for stored in inventory.tensors if "scales" not in stored.roles]
    found = _placed(parts, weights, "")
    prefix = ""
    while 2 * len(found) < len(weights) and (word := _shared_word(weights, prefix)):  # of a module that held the model
        prefix += word
        inner = _placed(parts, weights, prefix)
        found = inner if len(inner) > len(found) else found
    return _unambiguous(found, inventory)


def _placed(parts: _Parts, weights: Sequence[Stored], prefix: str) -> dict[str, Place | Division]:
    """The places that there are, for names without this prefix."""
    found: dict[str, Place | Division] = {}
    for stored in weights:
        names = (stored.name.removeprefix(prefix), *stored.names[1:])
        place = parts.place(replace(stored, names=names) if prefix else stored)
        if place is not None:
            found[stored.name] = place
    return found


def _shared_word(weights: Sequence[Stored], prefix: str) -> str:
    """The word that comes next in all names, with its dot; "" if they differ."""
    words = {stored.name.removeprefix(prefix).partition(".")[0] for stored in weights}
    ends = any("." not in stored.name.removeprefix(prefix) for stored in weights)
    return f"{words.pop()}." if len(words) == 1 and not ends else ""


def _may_be_renamed(inventory: Inventory) -> bool:
    config = inventory.config
    if not isinstance(config.get("model_type"), str) or not isinstance(config.get("architectures"), list):
        return False
    nested = any(key.endswith("_config") and key != "quantization_config" for key in config)
    names = [stored.name for stored in inventory.tensors]
    usual = config["model_type"] in _NAMED_ALIKE and _has_usual_prefix(names, config)
    return nested or any(_EXPERT.search(name) for name in names) or not usual


def _has_usual_prefix(names: Sequence[str], config: Mapping[str, Any]) -> bool:
    """Whether layers are called as is usual in the architecture: "model.layers.0" or "bert.layer.0" if it has a head.

    It need not be sure: what is unusual is looked up.
    """
    layers = [name for name in names if _LAYER.search(name)]
    if not layers or not config["architectures"]:
        return True
    kind = str(config["model_type"]).replace("-", "_")
    words = [name.split(".")[:2] for name in layers]
    if any(len(second) > 2 and second in kind for _, second in words):  # the base model lies in something else
        return False
    of_base = [name for name, (first, _) in zip(layers, words, strict=True) if _BASE.match(name) or first in kind]
    if _BARE.search(str(config["architectures"][0])):
        return not of_base
    return len(of_base) == len(layers)


def described_by(source: object) -> torch.nn.Module | None:
    """The model that the config.json of a ranked checkpoint describes, if the checkpoint is still there; no values."""
    path = source.get("path") if isinstance(source, Mapping) else None
    if not isinstance(path, str):
        return None
    try:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        config = read_document(folder / "config.json", LARGEST_CONFIG)
    except (OSError, ValueError):
        return None
    return architecture(config, str(folder / "config.json")) if isinstance(config, dict) else None


class _Parts:
    """Places as the parameters of the model are cut into matrices, with the labels that these have."""

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        self._parts: dict[str, dict[str, Part]] = {}  # by parameter and by the text of the full index

    def place(self, stored: Stored) -> Place | Division | None:
        """Where the tensor is in the model, None if nowhere or in no place that an index could name."""
        if (division := self._conversion.division(stored.name, stored.shape)) is not None:
            return division
        try:
            place = self._conversion.place(stored.name, stored.shape)
        except OptionError as error:
            log.info("%s", error)
            return None
        except IndexError:  # larger than the parameter that it should be a part of
            return None
        if place is None:
            return None
        shape = self._conversion.shapes.get(place.name, stored.shape)
        if not place.index:
            return place if shape == stored.shape else None
        parts = self._parts_of(replace(stored, names=(place.name,), shape=shape))
        part = parts.get(repr(_full(place.index, shape)))
        return Place(place.name, part.index, part.label) if part is not None and len(stored.shape) == 2 else None

    def _parts_of(self, parameter: Stored) -> dict[str, Part]:
        if parameter.name not in self._parts:
            cuts = [layout_of(parameter, self._conversion.shapes, split) for split in (False, True)]
            self._parts[parameter.name] = {
                repr(_full(part.index, parameter.shape)): part for found in cuts for part in found.parts
            }
        return self._parts[parameter.name]


def _full(index: Index, shape: tuple[int, ...]) -> tuple[object, ...]:
    """The index with a number or (start, stop, step) for every dimension: equal for what selects the same."""
    padded = (*index, *(slice(None) for _ in range(len(shape) - len(index))))
    return tuple(p.indices(size) if isinstance(p, slice) else p for p, size in zip(padded, shape, strict=True))


def _unambiguous(places: dict[str, Place | Division], inventory: Inventory) -> dict[str, Place | Division]:
    """Without those that two tensors claim, and those whose name another tensor has on disk."""
    each = {n: [p] if isinstance(p, Place) else [part for _, part in p.parts] for n, p in places.items()}
    claims = Counter(place.name + place.label for claimed in each.values() for place in claimed)
    same = {name for name, (place, *more) in each.items() if not more and (place.name, place.index) == (name, ())}
    kept = {n for stored in inventory.tensors for n in stored.names if stored.name not in places or stored.name in same}
    return {
        name: places[name]
        for name, claimed in each.items()
        if all(claims[p.name + p.label] == 1 and (name in same or p.name not in kept) for p in claimed)
    }
