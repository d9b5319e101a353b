"""Finds PEFT adapters in a model, tells whether they have been trained, and merges them into copies of the weights.

The classes of PEFT are recognized by their attributes, so that PEFT need not be imported.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..errors import SourceError
from ..results.entries import Index
from .base import COMPUTED, Stored
from .placements import is_dtensor, local_of
from .tensors import identity
from .twins import copied, copy_module
from .unsharded import has_stand_ins, stands_for

NO_MERGE = "the adapters of {} cannot be merged into it: adapters='base' ranks it without them"


@dataclass(frozen=True)
class Adapted:
    """A weight and the PEFT layer that changes it; ``copied`` is the copy that the layer uses instead, if any."""

    layer: Any
    weight: torch.Tensor
    copied: torch.Tensor | None = None


def adapted_in(model: torch.nn.Module) -> str | None:
    """Return the name of the first module of PEFT in the model; None if there is none."""
    for name, module in model.named_modules():
        around = any(k.__name__ == "PeftModel" and k.__module__.startswith("peft.") for k in type(module).__mro__)
        if around or _is_layer(module) or _is_saved(module):
            return name or type(module).__name__
    return None


def has_trained_adapters(model: torch.nn.Module) -> bool:
    """Return whether the active adapters change a weight. At most one layer is merged to find out."""
    found = list(_adapted(model))
    lora = [a.layer for a in found if a.copied is None and hasattr(a.layer, "lora_B")]
    if any(_moved(layer) for layer in lora) or any(
        a.copied is not None and not torch.equal(local_of(a.copied), local_of(a.weight)) for a in found
    ):
        return True
    others = [a for a in found if a.copied is None and not any(a.layer is layer for layer in lora)]
    if not others:
        return False
    if any(is_dtensor(a.weight) for a in others):  # to try one is to wait for others
        return True
    one = min(others, key=lambda a: a.weight.numel())
    with torch.no_grad():
        made = _merge(one)
    return made is None or not torch.equal(made, one.weight)


def merged(model: torch.nn.Module, tensors: Sequence[Stored], held: Mapping[str, torch.Tensor]) -> list[Stored]:
    """Return the tensors with the active adapters merged, as PEFT's merge_and_unload() would store them.

    Args:
        model: the model.
        tensors: the tensors of the model.
        held: the parameters of the model, by the names of ``tensors``.
    """
    found = list(_adapted(model))
    layers = {identity(adapted.weight): adapted for adapted in found}
    around = {id(adapted.layer.get_base_layer()): adapted for adapted in found if adapted.copied is None}
    made = []
    for stored in tensors:
        weight = held.get(stored.name)
        if weight is not None and (adapted := layers.get(identity(weight))) is not None:
            made.append(_made(stored, adapted))
        elif stored.evidence.startswith(COMPUTED) and (adapted := around.get(id(stored.parent))) is not None:
            # The layer adds the adapters to the computed weight; merging would add them to the weight's parts.
            made.append(replace(stored, problem=NO_MERGE.format(type(adapted.layer).__name__)))
        else:
            made.append(stored)
    return made


def _made(stored: Stored, adapted: Adapted) -> Stored:
    kind = type(adapted.layer).__name__
    if adapted.copied is not None:
        evidence = f"the copy that {kind} uses"
        found = stands_for(adapted.copied)
        take_copy = partial(_take_copied, adapted.copied) if found is None else found[0].taker(found[1])
        return replace(stored, take=take_copy, evidence=evidence, is_spread=stored.is_spread or found is not None)
    if stored.quantization is not None:
        plain = hasattr(adapted.layer, "lora_B") and not getattr(adapted.layer, "lora_variant", None)
        if not plain or not hasattr(adapted.layer, "get_delta_weight"):
            return replace(stored, problem=NO_MERGE.format(kind))
        take = partial(_take_added, stored, adapted)
    elif not callable(getattr(adapted.layer, "merge", None)):
        return replace(stored, problem=NO_MERGE.format(kind))
    else:
        take = partial(_take_merged, stored, adapted)
    size = 0 if stored.dtype is None else 4 * math.prod(stored.shape) * stored.dtype.itemsize
    evidence = f"with the adapters of {kind}"
    spread = stored.is_spread or has_stand_ins(adapted.layer)
    if spread and take.func is _take_added:
        return replace(stored, problem=NO_MERGE.format(f"{kind}, which lie on several processes,"))
    return replace(stored, take=take, stamp=None, overhead=stored.overhead + size, evidence=evidence, is_spread=spread)


def _take_copied(copied: torch.Tensor, index: Index, device: torch.device | None = None) -> torch.Tensor:
    return copied.detach()[index]


def _take_added(stored: Stored, adapted: Adapted, index: Index, device: torch.device | None = None) -> torch.Tensor:
    """``Stored.take`` of a quantized weight with LoRA: the dequantized weight plus the product of the factors."""
    weight = stored.take(index, device)
    with torch.no_grad():
        for adapter in _in_use(adapted.layer):
            weight = weight + adapted.layer.get_delta_weight(adapter)[index].to(weight.device, weight.dtype)
    return weight


def _take_merged(stored: Stored, adapted: Adapted, index: Index, device: torch.device | None = None) -> torch.Tensor:
    with torch.no_grad():
        made = _merge(adapted)
    if made is None:
        raise SourceError(f"{stored.name!r}: {NO_MERGE.format(type(adapted.layer).__name__)}")
    return made.detach()[index]


def _adapted(model: torch.nn.Module) -> Iterator[Adapted]:
    """Yield each weight that active adapters change, with the outermost PEFT layer around it."""
    inner: set[int] = set()
    for module in model.modules():
        if _is_saved(module) and module._active_adapter and not getattr(module, "_disable_adapters", False):
            yield from _replaced(module)
        if not _is_layer(module) or id(module) in inner or not hasattr(module, "base_layer"):
            continue
        chain = list(_chain(module))
        inner |= {id(layer) for layer in chain}
        base: Any = chain[-1].base_layer
        seen: set[str] = set()
        for layer in chain:
            leaf = getattr(layer, "parameter_name", "weight")
            weight = _held(base, leaf)
            if isinstance(weight, torch.Tensor) and leaf not in seen and _in_use(layer):
                seen.add(leaf)
                yield Adapted(layer, weight)


def _held(base: Any, leaf: str) -> object:
    """Return the tensor named ``leaf``, or the first part of a parametrized one: computing it may change buffers."""
    computed = getattr(base, "parametrizations", {})
    if leaf in computed:
        return next(iter(computed[leaf].parameters()), None)
    return getattr(base, leaf, None)


def _replaced(module: Any) -> Iterator[Adapted]:
    active = module._active_adapter
    name = active if isinstance(active, str) else active[0]
    if name in module.modules_to_save:
        copies = dict(module.modules_to_save[name].named_parameters())
        for leaf, weight in module.original_module.named_parameters():
            if leaf in copies:
                yield Adapted(module, weight, copies[leaf])


def _chain(layer: Any) -> Iterator[Any]:
    while _is_layer(layer) and hasattr(layer, "base_layer"):
        yield layer
        layer = layer.base_layer


def _is_layer(module: Any) -> bool:
    return bool(getattr(module, "adapter_layer_names", ())) and hasattr(module, "_active_adapter")


def _is_saved(module: Any) -> bool:
    return hasattr(module, "original_module") and hasattr(module, "modules_to_save")


def _in_use(layer: Any) -> list[str]:
    """Return the adapters of a layer that are active and not merged into its base weight."""
    if layer.disable_adapters:
        return []
    known = {name for words in layer.adapter_layer_names for name in _names(getattr(layer, words, None))}
    return [name for name in layer.active_adapters if name in known and name not in layer.merged_adapters]


def _names(holder: Any) -> Iterator[str]:
    yield from getattr(holder, "keys", tuple)()


def _moved(layer: Any) -> bool:
    """Return whether the second factor of an active LoRA is not zero; it is initialized with zeros."""
    factors = (getattr(layer, words, {}) for words in ("lora_B", "lora_embedding_B"))
    weights = [getattr(f[n], "weight", f[n]) for f in factors for n in _in_use(layer) if n in f]
    return any(bool(local_of(weight).count_nonzero()) for weight in weights)


def _merge(adapted: Adapted) -> torch.Tensor | None:
    """Return the weight that a copy of the layer has after merging its adapters; None if merging is not supported."""
    try:
        spread = has_stand_ins(adapted.layer)
        layer = copy_module(adapted.layer, copied) if spread else copy.deepcopy(adapted.layer)
        layer.merge(safe_merge=False)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    base: Any = layer.get_base_layer()
    found: torch.Tensor = getattr(base, getattr(adapted.layer, "parameter_name", "weight"))
    return found
