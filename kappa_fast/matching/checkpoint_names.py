"""The parameters that the tensors of a checkpoint become in the model, where transformers renames or fuses them.

Most checkpoints of mixtures of experts hold one tensor per expert and projection, which transformers fuses into one
parameter when it loads them. A ranking that is used for training needs the names of these parameters.
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

# Model types whose checkpoints have the names of the model. Other types are looked up, which imports transformers.
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
_BARE = re.compile(r"(?<!Head)(?<!Heads)Model$")  # classes without a head
# The prefix of the base model in most models with a head.
_BASE = re.compile(r"(?:model\.(?!model\.)|backbone\.|transformer\.(?:h|blocks)\.)")
_EXPERT = re.compile(r"\.experts?\.\d+\.")


def places_of(inventory: Inventory) -> dict[str, Place | Division]:
    """Return, by the name of each tensor on disk, the parameter (and part) or the parameters that it becomes.

    Empty if config.json does not name a model of transformers, if transformers is not installed, or if the names do not
    change. transformers is imported only if a checkpoint has one tensor per expert, a nested config or an unusual name.
    Tensors that loading permutes have no place.
    """
    if not _may_be_renamed(inventory):
        return {}
    model = architecture(inventory.config, f"the config.json of {inventory.metadata.get('path')}")
    if model is None:
        return {}
    finder = _Places(Conversion(model, lambda name: name))
    # Scales are not parameters of the model, although their names resemble those of parameters.
    weights = [stored for stored in inventory.tensors if "scales" not in stored.roles]
    found = _placed(finder, weights, "")
    prefix = ""
    # A module around the model, from which the checkpoint was saved, adds a prefix to all names.
    while 2 * len(found) < len(weights) and (word := _shared_word(weights, prefix)):
        prefix += word
        inner = _placed(finder, weights, prefix)
        found = inner if len(inner) > len(found) else found
    return _unambiguous(found, inventory)


def _placed(finder: _Places, weights: Sequence[Stored], prefix: str) -> dict[str, Place | Division]:
    """Return the places of the tensors whose names without ``prefix`` have one."""
    found: dict[str, Place | Division] = {}
    for stored in weights:
        names = (stored.name.removeprefix(prefix), *stored.names[1:])
        place = finder.place(replace(stored, names=names) if prefix else stored)
        if place is not None:
            found[stored.name] = place
    return found


def _shared_word(weights: Sequence[Stored], prefix: str) -> str:
    """Return the word that follows ``prefix`` in all names, with its dot; "" if the names differ there."""
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
    """Return whether layers have the usual prefix: "model.layers.0" or "bert.layer.0" in a model with a head.

    A wrong False costs only a look-up.
    """
    layers = [name for name in names if _LAYER.search(name)]
    if not layers or not config["architectures"]:
        return True
    kind = str(config["model_type"]).replace("-", "_")
    words = [name.split(".")[:2] for name in layers]
    if any(len(second) > 2 and second in kind for _, second in words):  # another module contains the base model
        return False
    of_base = [name for name, (first, _) in zip(layers, words, strict=True) if _BASE.match(name) or first in kind]
    if _BARE.search(str(config["architectures"][0])):
        return not of_base
    return len(of_base) == len(layers)


def described_by(source: object) -> torch.nn.Module | None:
    """Build the model of a ranked checkpoint from its config.json, on the meta device; None if it cannot be built.

    source: ``Ranking.metadata["source"]``, which has the path of the checkpoint.
    """
    path = source.get("path") if isinstance(source, Mapping) else None
    if not isinstance(path, str):
        return None
    try:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        config = read_document(folder / "config.json", LARGEST_CONFIG)
    except (OSError, ValueError):
        return None
    return architecture(config, str(folder / "config.json")) if isinstance(config, dict) else None


class _Places:
    """Finds places of tensors among the matrices into which ranking splits the parameters of the model."""

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        self._parts: dict[str, dict[str, Part]] = {}  # by parameter, then by the repr of the full index

    def place(self, stored: Stored) -> Place | Division | None:
        """Return the place or places of a tensor in the model; None if no index selects it."""
        if (division := self._conversion.division(stored.name, stored.shape)) is not None:
            return division
        try:
            place = self._conversion.place(stored.name, stored.shape)
        except OptionError as error:
            log.info("%s", error)
            return None
        except IndexError:  # the tensor is larger than the parameter of which it should be a part
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
    """Return the index with a number or (start, stop, step) for every dimension, for comparison."""
    padded = (*index, *(slice(None) for _ in range(len(shape) - len(index))))
    return tuple(p.indices(size) if isinstance(p, slice) else p for p, size in zip(padded, shape, strict=True))


def _unambiguous(places: dict[str, Place | Division], inventory: Inventory) -> dict[str, Place | Division]:
    """Return the places that only one tensor has, and whose name no other tensor has on disk."""
    each = {n: [p] if isinstance(p, Place) else [part for _, part in p.parts] for n, p in places.items()}
    claims = Counter(place.name + place.label for claimed in each.values() for place in claimed)
    same = {name for name, (place, *more) in each.items() if not more and (place.name, place.index) == (name, ())}
    kept = {n for stored in inventory.tensors for n in stored.names if stored.name not in places or stored.name in same}
    return {
        name: places[name]
        for name, claimed in each.items()
        if all(claims[p.name + p.label] == 1 and (name in same or p.name not in kept) for p in claimed)
    }
