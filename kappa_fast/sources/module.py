"""Weights from a torch.nn.Module, which is only looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .base import Inventory, Role, Stored
from .filters import is_router_module
from .names import has_adapters
from .tensors import fingerprint, identity, model_types_in, own_names, sharded, store


@dataclass(frozen=True)
class _Place:
    """Where in the model a parameter is: its owner, what that is for, and the types of the model around it."""

    owner: torch.nn.Module
    roles: frozenset[Role]
    model_types: tuple[str, ...]


def read_module(model: torch.nn.Module) -> Inventory:
    """The parameters of a model, tied ones once with all their names.

    Raises:
        NotImplementedError: a parameter is sharded (DTensor, FSDP, ZeRO-3).
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise NotImplementedError(sharded(name or type(model).__name__, "FSDP"))
    places = _places(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[object, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(identity(parameter), []).append(name)
    own = own_names(groups.values())
    heads = {identity(weight) for weight in _output_heads(model)}
    tensors = [
        _stored(own[names[0]], parameters[names[0]], [places[name.rpartition(".")[0]] for name in names], key in heads)
        for key, names in groups.items()
    ]
    metadata = {
        "kind": "module",
        "class": type(model).__name__,
        "model_type": next((kind for place in places.values() for kind in place.model_types), None),
        "fingerprint": fingerprint(tensors),
    }
    buffers = own_names([name] for name, _ in model.named_buffers(remove_duplicate=False)).values()
    return Inventory(
        tensors,
        sum(t.numel for t in tensors),
        metadata,
        buffers=[name for names in buffers for name in names],
        in_peft=has_adapters(parameters),
    )


def _stored(names: tuple[str, ...], parameter: torch.Tensor, places: list[_Place], head: bool) -> Stored:
    roles: set[Role] = {role for place in places for role in place.roles}
    if head:
        roles.add("head")
    return store(names, parameter, places[0].owner, places[0].model_types, frozenset(roles))


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
