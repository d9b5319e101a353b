"""Reads the weights of a torch.nn.Module without changing or running it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import ShardedError
from ..results.names import base_name
from .adapters import merged
from .base import COMPUTED, Home, Inventory, Role, Stored
from .called import weight_in_forward
from .classes import looks_up
from .effective import PARAMETRIZATIONS, Effective, effective_weights
from .filters import is_router_module
from .graphs import altered_in_graphs
from .names import has_adapters
from .packed import packed_weights
from .quantized import modules, weights_of
from .tensors import digest_of_headers, identity, is_lazy, model_types_in, own_names, sharded, store
from .unsharded import has_stand_ins

# Names of the parts of reparametrized weights, in modules whose parametrization became a part of a traced graph.
_PARTS = frozenset(("original", "original0", "original1", "weight_g", "weight_v", "weight_orig"))


def read_module(model: torch.nn.Module, adapters: str = "base") -> Inventory:
    """Return the parameters and the quantized weights of a model; a tied one appears once, with all of its names.

    A weight that a module computes from parameters appears as the computed weight, and with ``adapters="merged"`` a
    weight with PEFT adapters as the merged weight.

    Raises:
        ShardedError: a parameter is a part of what it was, and nothing tells where the rest is.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ShardedError(sharded(name or type(model).__name__, "FSDP"))
    places, held, (computed, unclear) = _places(model), _held(model), _computed(model)
    computed, shared = _unshared(computed, held)
    parts = {name for item in computed for name in item.parts}
    groups: dict[object, list[str]] = {}
    for name, item in held.items():
        if name not in parts:
            groups.setdefault(identity(item.tensor), []).append(name)
    own = own_names([*groups.values(), *(item.names for item in computed)])
    heads = set(_output_heads(model))
    plain = [
        _stored(own[names[0]], held[names[0]], _above(names, places), not heads.isdisjoint({key, *names}))
        for key, names in groups.items()
    ]
    plain = [
        _noted(t, unclear.get(id(held[names[0]].holder)), shared.get(key))
        for t, (key, names) in zip(plain, groups.items(), strict=True)
    ]
    found = list(zip((names[0] for names in groups.values()), plain, strict=True))
    for made in computed:
        itself = {identity(held[part].tensor) for part in made.parts if part in held}
        is_head = not heads.isdisjoint({*made.names, *itself})
        found += _made(made, own[made.names[0]], held, _above(made.names, places), is_head)
    order = {name: position for position, name in enumerate(held)}
    stored = [item for _, item in sorted(found, key=lambda pair: order[pair[0]])]  # in the order of the model
    configured = modules.config_in(getattr(model, "config", None))
    tensors = weights_of(stored, lambda item: modules.config_of(item.parent, configured))
    if adapters == "merged":
        tensors = merged(model, tensors, {own[names[0]][0]: held[names[0]].tensor for names in groups.values()})
    weights = {own[names[0]] for names in groups.values() if held[names[0]].is_weight}
    counted = [
        t
        for before, t in zip(stored, tensors, strict=True)
        if "scales" not in t.roles and (t.quantization is not None or before.names in weights)
    ]
    of_parts = {identity(held[name].tensor): held[name].tensor for name in parts if name in held}
    hidden = [*modules.unreadable_stacks(model), *packed_weights(model, _shown(held))]
    unseen = [replace(t, names=own_names([t.names])[t.name]) for t in hidden]
    metadata: dict[str, Any] = {
        "kind": "module",
        "class": type(model).__name__,
        "model_type": next((kind for place in places.values() for kind in place.model_types), None),
        "fingerprint": digest_of_headers(stored),
    }
    # Training needs the names of the parameters from which a weight is computed, if they differ from its own name.
    elsewhere = [made for made in computed if made.parts != made.names]
    if elsewhere:
        metadata["computed"] = {
            own[made.names[0]][0]: [part for part in made.parts if part in held and held[part].is_weight]
            for made in elsewhere
        }
    buffers = own_names([name] for name, _ in model.named_buffers(remove_duplicate=False)).values()
    return Inventory(
        [*tensors, *unseen],
        sum(t.numel for t in (*counted, *unseen)) + sum(t.numel() for k, t in of_parts.items() if k not in groups),
        metadata,
        buffers=[name for names in buffers for name in names],
        in_peft=has_adapters(held),
    )


@dataclass(frozen=True)
class _Held:
    """A tensor of the model, and the module that holds it under the name ``leaf``."""

    tensor: torch.Tensor
    holder: torch.nn.Module
    leaf: str
    is_weight: bool


def _held(model: torch.nn.Module) -> dict[str, _Held]:
    """Return by name: all parameters, weights that are buffers, and the companions of quantized weights."""
    found: dict[str, _Held] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        found |= {start + name: _Held(tensor, module, name, True) for name, tensor in own.items()}
        beside = modules.quantized_attributes(module)
        found |= {start + name: _Held(tensor, module, name, False) for name, tensor in beside.items()}
        frozen = dict(module._buffers.items()).get("weight")  # some make a weight a buffer to hide it from optimizers
        if frozen is not None and frozen.dim() >= 2 and start + "weight" not in found:
            found[start + "weight"] = _Held(frozen, module, "weight", True)
    return found


@dataclass(frozen=True)
class _Computed:
    """A weight that a module computes: its names and those of its parts, for every name of the module."""

    names: tuple[str, ...]
    parts: tuple[str, ...]
    weight: Effective


def _computed(model: torch.nn.Module) -> tuple[list[_Computed], dict[int, str]]:
    """Return all computed weights, and notes on modules whose computation is unknown, by their ids."""
    unclear: dict[int, str] = {}
    prefixes: dict[int, tuple[torch.nn.Module, list[str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if f".{PARAMETRIZATIONS}." in f".{prefix}.":  # the module belongs to a parametrization itself
            continue
        prefixes.setdefault(id(module), (module, []))[1].append(f"{prefix}." if prefix else "")
    found = [
        _Computed(
            tuple(start + weight.leaf for start in starts),
            tuple(start + part for start in starts for part in weight.ingredients),
            weight,
        )
        for module, starts in prefixes.values()
        for weight in _weights_made_by(module, unclear)
    ]
    unclear |= {i: f"its graph applies {how} to it" for i, how in altered_in_graphs(model).items()}
    return found, unclear


def _weights_made_by(module: torch.nn.Module, unclear: dict[int, str]) -> Iterator[Effective]:
    """Yield the weights that a module computes; add a note to ``unclear`` if its forward() cannot be followed."""
    before = list(effective_weights(module))
    for weight in before:
        in_forward = weight_in_forward(module, weight)
        yield in_forward if isinstance(in_forward, Effective) else weight
    found = weight_in_forward(module) if not before else None
    if isinstance(found, Effective):
        yield found
    elif found is not None:
        unclear[id(module)] = found


def _made(
    item: _Computed, names: tuple[str, ...], held: Mapping[str, _Held], places: list[Home], head: bool
) -> Iterator[tuple[str, Stored]]:
    """Yield the computed weight, then its parts of another shape; each with a name that gives its position."""
    weight, parts = item.weight, [name for name in item.parts if name in held]
    roles: set[Role] = {role for place in places for role in place.roles}
    if head:
        roles.add("head")
    aliases = [name for name in parts if tuple(held[name].tensor.shape) == weight.shape]
    whole = Stored(
        names=tuple(dict.fromkeys((*names, *(base_name(name) for name in aliases)))),
        shape=weight.shape,
        dtype=weight.dtype,
        device=weight.device,
        take=weight.take,
        problem=weight.problem,
        parent=places[0].owner,
        model_types=places[0].model_types,
        roles=frozenset(roles),
        overhead=4 * math.prod(weight.shape) * weight.dtype.itemsize,
        evidence=f"{COMPUTED} {weight.how} of {places[0].owner.__class__.__name__}",
        is_spread=has_stand_ins(places[0].owner),
    )
    yield parts[0], whole
    seen = {identity(held[name].tensor) for name in aliases}
    for name in parts:
        if identity(held[name].tensor) not in seen:
            seen.add(identity(held[name].tensor))
            part = store((base_name(name),), held[name].tensor, places[0].owner)
            yield name, replace(part, problem=f"one of the parts that {names[0]} is computed from")


def _unshared(computed: list[_Computed], held: Mapping[str, _Held]) -> tuple[list[_Computed], dict[object, str]]:
    """Return the computed weights without those from a shared parameter, and the problems of these parameters.

    If a forward() computes a weight from a parameter that other layers use too, this parameter acts as more than one
    matrix.
    """
    users: dict[object, set[str]] = {}
    for name, item in held.items():
        users.setdefault(identity(item.tensor), set()).add(name)
    how = {
        identity(held[made.parts[0]].tensor): made.weight.how
        for made in computed
        if made.parts == made.names and users[identity(held[made.parts[0]].tensor)] != set(made.names)
    }
    left = [m for m in computed if m.parts != m.names or identity(held[m.parts[0]].tensor) not in how]
    return left, {key: f"{COMPUTED} {of}, and shared with layers that use it differently" for key, of in how.items()}


def _noted(stored: Stored, unclear: str | None, shared: str | None) -> Stored:
    if shared is not None:
        return replace(stored, problem=shared)
    if unclear is None or stored.quantization is not None:
        return stored
    leaf = stored.name.rpartition(".")[2]
    if leaf in _PARTS:
        return replace(stored, problem=f"a part of a weight ({unclear}): rank the model that the graph was made from")
    # Layers rarely multiply with parameters of other names (tables, scales of channels).
    evidence = f"parameter of {type(stored.parent).__name__}: {unclear}"
    return replace(stored, evidence=evidence, unfollowed=leaf == "weight")


def _shown(held: Mapping[str, _Held]) -> set[str]:
    """Return the names of all modules that hold a matrix, themselves or in a child."""
    shown: set[str] = set()
    for name in (n for n, item in held.items() if is_lazy(item.tensor) or item.tensor.dim() >= 2):
        owner = name.rpartition(".")[0]
        while owner not in shown:
            shown.add(owner)
            owner = owner.rpartition(".")[0]
    return shown


def _stored(names: tuple[str, ...], item: _Held, places: list[Home], head: bool) -> Stored:
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


def homes_of(model: torch.nn.Module) -> dict[str, Home]:
    """Return the homes of parameters (under all names), of weights that modules compute, and of buffers, by name."""
    places, heads = _places(model), set(_output_heads(model))
    named = {name: identity(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    named |= {name: name for weight in _computed(model)[0] for name in weight.names}
    found = {}
    for name, _ in model.named_buffers(remove_duplicate=False):
        found[name] = replace(_above([name], places)[0], is_buffer=name.rpartition(".")[2] != "weight")
    for name, itself in named.items():
        home = _above([name], places)[0]
        is_head = not heads.isdisjoint({itself, name})
        found[name] = replace(home, roles=home.roles | {"head"}) if is_head else home
    return found


def _places(model: torch.nn.Module) -> dict[str, Home]:
    """Return the homes of the parameters of each module, by the name of the module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[str, Home] = {}
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
        places[name] = Home(owner, frozenset(roles), model_types)
    return places


def _above(names: Iterable[str], places: Mapping[str, Home]) -> list[Home]:
    """Return the homes of the parameters with these names."""
    return [places[name.rpartition(".")[0]] for name in names]


def _roles(module: torch.nn.Module, *, is_root: bool) -> Iterator[Role]:
    if looks_up(module):
        yield "embedding"
    if not is_root and is_router_module(module):
        yield "router"


def _adapter_words(module: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the children that a layer of PEFT adds, which every such layer lists."""
    words = getattr(module, "adapter_layer_names", ())
    return tuple(words) if isinstance(words, (tuple, list)) else ()


def _output_heads(model: torch.nn.Module) -> Iterator[object]:
    """Yield the identities of the weights of output heads, and the names of those that are computed."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        getter = getattr(type(module), "get_output_embeddings", None)
        try:
            head = getter(module) if callable(getter) else None
            if isinstance(head, torch.nn.Module) and torch.nn.utils.parametrize.is_parametrized(head, "weight"):
                yield f"{names[id(head)]}.weight"  # reading the attribute would run the parametrization
                continue
            weight = getattr(head, "weight", None)
        except (AttributeError, NotImplementedError, TypeError):  # models without a head raise any of these
            continue
        if isinstance(weight, torch.Tensor):
            yield identity(weight)
