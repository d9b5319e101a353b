"""Weights from a torch.nn.Module, which is only looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from .base import Inventory, Role, Stored
from .filters import is_router_module
from .names import has_adapters
from .quantized import modules, weights_of
from .tensors import fingerprint, identity, is_lazy, model_types_in, own_names, sharded, store


@dataclass(frozen=True)
class _Place:
    """Where in the model a parameter is: its owner, what that is for, and the types of the model around it."""

    owner: torch.nn.Module
    roles: frozenset[Role]
    model_types: tuple[str, ...]


def read_module(model: torch.nn.Module) -> Inventory:
    """The parameters of a model, tied ones once with all their names; the quantized weights of its modules.

    Raises:
        SourceError: the scales of a quantized weight are missing or do not fit.
        NotImplementedError: a parameter is sharded (DTensor, FSDP, ZeRO-3).
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise NotImplementedError(sharded(name or type(model).__name__, "FSDP"))
    places = _places(model)
    held = _held(model)
    groups: dict[object, list[str]] = {}
    for name, item in held.items():
        groups.setdefault(identity(item.tensor), []).append(name)
    own = own_names(groups.values())
    heads = {identity(weight) for weight in _output_heads(model)}
    stored = [
        _stored(own[names[0]], held[names[0]], [places[name.rpartition(".")[0]] for name in names], key in heads)
        for key, names in groups.items()
    ]
    configured = modules.config_in(getattr(model, "config", None))
    tensors = weights_of(stored, lambda item: modules.config_of(item.parent, configured))
    weights = {own[names[0]] for names in groups.values() if held[names[0]].is_parameter}
    counted = [
        t
        for before, t in zip(stored, tensors, strict=True)
        if "scales" not in t.roles and (t.quantization is not None or before.names in weights)
    ]
    unseen = [replace(t, names=own_names([t.names])[t.name]) for t in modules.out_of_reach(model, _shown(held))]
    metadata = {
        "kind": "module",
        "class": type(model).__name__,
        "model_type": next((kind for place in places.values() for kind in place.model_types), None),
        "fingerprint": fingerprint(stored),
    }
    buffers = own_names([name] for name, _ in model.named_buffers(remove_duplicate=False)).values()
    return Inventory(
        [*tensors, *unseen],
        sum(t.numel for t in (*counted, *unseen)),
        metadata,
        buffers=[name for names in buffers for name in names],
        in_peft=has_adapters(held),
    )


@dataclass(frozen=True)
class _Held:
    """A tensor of the model, and the module that has it under the name ``leaf``."""

    tensor: torch.Tensor
    holder: torch.nn.Module
    leaf: str
    is_parameter: bool


def _held(model: torch.nn.Module) -> dict[str, _Held]:
    """Every parameter, and what belongs to the codes of quantized weights, by name."""
    found: dict[str, _Held] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        found |= {start + name: _Held(tensor, module, name, True) for name, tensor in own.items()}
        beside = modules.beside_codes(module)
        found |= {start + name: _Held(tensor, module, name, False) for name, tensor in beside.items()}
    return found


def _shown(held: Mapping[str, _Held]) -> set[str]:
    """All modules that hold a matrix, themselves or further down."""
    shown: set[str] = set()
    for name in (n for n, item in held.items() if is_lazy(item.tensor) or item.tensor.dim() >= 2):
        owner = name.rpartition(".")[0]
        while owner not in shown:
            shown.add(owner)
            owner = owner.rpartition(".")[0]
    return shown


def _stored(names: tuple[str, ...], item: _Held, places: list[_Place], head: bool) -> Stored:
    roles: set[Role] = {role for place in places for role in place.roles}
    if head:
        roles.add("head")
    if modules.is_scale(item.holder, item.leaf):
        roles.add("scales")
    owner, model_types = places[0].owner, places[0].model_types
    tensor = modules.as_on_disk(item.holder, item.leaf, item.tensor)
    found = store(names, tensor, owner, model_types, frozenset(roles), item.holder)
    problem = modules.problem_of(item.holder, item.leaf)
    return replace(found, problem=problem) if problem is not None and found.problem is None else found


def _places(model: torch.nn.Module) -> dict[str, _Place]:
    """By the name of the module that holds a parameter."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[str, _Place] = {}
    for name, module in modules.items():
        above, _, last = name.rpartition(".")
        parent = places[above] if name else None
        model_types = model_types_in(getattr(module, "config", None)) or (parent.model_types if parent else ())
        owner = module
        if isinstance(module, torch.nn.utils.parametrize.ParametrizationList) and above:
            owner = modules[above.rpartition(".")[0]]  # X of X.parametrizations.weight
        roles = set(_roles(module, is_root=parent is None))
        if parent is not None:
            roles |= parent.roles & {"adapter"}
            roles |= {"router"} if above and is_router_module(parent.owner) else set()
            roles |= {"adapter"} if last in _adapter_words(parent.owner) else set()
        places[name] = _Place(owner, frozenset(roles), model_types)
    return places


def _roles(module: torch.nn.Module, *, is_root: bool) -> Iterator[Role]:
    kind = type(module).__name__
    looked_up = isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) or kind.endswith("Embedding")
    if looked_up and not isinstance(module, torch.nn.modules.conv._ConvNd):
        yield "embedding"
    if not is_root and is_router_module(module):
        yield "router"


def _adapter_words(module: torch.nn.Module) -> tuple[str, ...]:
    """What a layer of PEFT calls the children that it adds: every such layer lists them."""
    words = getattr(module, "adapter_layer_names", ())
    return tuple(words) if isinstance(words, (tuple, list)) else ()


def _output_heads(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        getter = getattr(type(module), "get_output_embeddings", None)
        try:
            weight = getattr(getter(module), "weight", None) if callable(getter) else None
        except (AttributeError, NotImplementedError, TypeError):  # a model without one may say so in any of these ways
            continue
        if isinstance(weight, torch.Tensor):
            yield weight
