"""A sharded model as it was before it was sharded: the same modules with the same names, shapes and classes.

Where a process holds a part of a parameter, a stand-in without values has the shape of the whole; what reads it puts
it together. So everything else in this room finds in a sharded model what it finds in the whole one. The model itself
is only looked at, and nobody else is asked.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ShardedError
from .flattened import is_partitioned, is_wrapper, spread_by_wrapper, spread_by_zero
from .placements import is_dtensor, spread_of
from .spread import Shards, Spread

_SHARDED = "_kappa_fast_spread"  # an attribute of a stand-in
_FLATTENED = "_fsdp_flattened"  # FSDP1 marks with it what it has taken the parameters of


def stands_for(tensor: object) -> tuple[Shards, Spread] | None:
    """What a tensor without values stands for; None for all others."""
    found: tuple[Shards, Spread] | None = getattr(tensor, _SHARDED, None)
    return found


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is, or what it stands for."""
    found = stands_for(tensor)
    return tensor.device if found is None else found[1].device


def has_stand_ins(module: nn.Module) -> bool:
    """Whether something that the module or its children hold lies on several processes."""
    return any(stands_for(t) is not None for t in (*module.parameters(), *module.buffers()))


def whole_module(model: nn.Module) -> tuple[nn.Module, Shards | None]:
    """The model as it was before it was sharded; itself, and no shards, where nothing of it is sharded.

    Raises:
        ShardedError: it is sharded in a way, or in a state, that is not understood.
    """
    if not is_sharded(model):
        return model, None
    copy = _Copy(model)
    return copy.module(model), copy.shards


def whole_mapping(weights: Mapping[str, torch.Tensor]) -> tuple[Mapping[str, torch.Tensor], Shards | None]:
    """The same for a state dict."""
    if not any(is_dtensor(tensor) for tensor in weights.values()):
        return weights, None
    stands = _StandIns()
    return {name: stands.of(str(name), tensor) for name, tensor in weights.items()}, stands.shards


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of a parameter, or of a buffer, where the model had the whole."""
    held = [t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values())]
    tensors = any(t is not None and (is_dtensor(t) or is_partitioned(t) or hasattr(t, _FLATTENED)) for t in held)
    return tensors or any(is_wrapper(module) or _fsdp_state(module) is not None for module in model.modules())


class _StandIns:
    """One for each tensor, however often it is met."""

    def __init__(self) -> None:
        self.shards = Shards()
        self._made: dict[object, torch.Tensor] = {}
        self._kept: list[object] = []  # an id is one of these as long as they are there

    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself where this process has all of it."""
        if not (is_dtensor(tensor) or is_partitioned(tensor)):
            return tensor
        key = id(tensor)
        if key not in self._made:
            found = spread_of(name, tensor) if is_dtensor(tensor) else spread_by_zero(name, tensor)
            itself = _identity(found)
            if itself not in self._made:
                self._made[itself] = self.for_spread(found, tensor)
            self._made[key] = self._made[itself]
        self._kept.append(tensor)
        return self._made[key]

    def for_spread(self, spread: Spread, like: torch.Tensor | None = None) -> torch.Tensor:
        """A new one."""
        self.shards.tensors[spread.name] = spread
        made = torch.empty(spread.shape, dtype=spread.dtype, device="meta")
        if like is None or isinstance(like, nn.Parameter):
            made = nn.Parameter(made, requires_grad=spread.dtype.is_floating_point)
        setattr(made, _SHARDED, (self.shards, spread))
        return made


def _identity(spread: Spread) -> object:
    """Equal for tensors that are the same weights."""
    local = spread.local
    # Where this process has nothing of it, views of one storage are the same weights all the same.
    at = local.data_ptr() if local.numel() else (local.untyped_storage()._cdata, local.storage_offset())
    return at, local.stride(), spread.shape, spread.dtype, spread.how, spread.over


class _Copy:
    """Of the modules of a model; what they hold beside parameters and children is the same."""

    def __init__(self, model: nn.Module) -> None:
        self._stands = _StandIns()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._known: dict[int, nn.Module] = {}
        self._flattened: dict[tuple[int, str], torch.Tensor] = {}
        self._rows: set[int] = set()  # what they have been flattened to, by id
        stands: dict[int, torch.Tensor] = {}
        for module in model.modules():
            if is_wrapper(module):
                self._rows.add(id(getattr(getattr(module, "_handle", None), "flat_param", None)))
                for owner, leaf, found in spread_by_wrapper(module, self._plain_name(module)):
                    if id(found) not in stands:
                        stands[id(found)] = self._stands.for_spread(found)
                    self._flattened[id(owner), leaf] = stands[id(found)]

    @property
    def shards(self) -> Shards:
        return self._stands.shards

    def module(self, module: nn.Module) -> nn.Module:
        if is_wrapper(module):
            inner: Any = module._fsdp_wrapped_module
            return self.module(inner)
        if id(module) in self._known or isinstance(module, torch.jit.ScriptModule):
            return self._known.get(id(module), module)
        state = _fsdp_state(module)
        if state is not None:
            _check_state(state, self._names.get(id(module), "") or type(module).__name__)
        made: Any = object.__new__(_class_of(module))
        self._known[id(module)] = made
        # FSDP1 leaves views of what it has freed, under the names of the parameters.
        freed = {leaf for owner, leaf in self._flattened if owner == id(module)}
        vars(made).update({name: value for name, value in vars(module).items() if name not in freed})
        for name in ("forward", "_old_forward"):  # a method of the instance, which would run the module itself
            own = vars(made).get(name)
            if isinstance(own, types.MethodType) and own.__self__ is module:
                vars(made)[name] = types.MethodType(own.__func__, made)
        vars(made)["_parameters"] = self._parameters(module)
        vars(made)["_buffers"] = {
            leaf: None if t is None else self._stands.of(self._named(module, leaf), t)
            for leaf, t in module._buffers.items()
        }
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):  # those of ZeRO-3 gather parameters, and change nothing
            kept = {key: hook for key, hook in vars(module)[hooks].items() if not _is_of_deepspeed(hook)}
            vars(made)[hooks] = type(vars(module)[hooks])(kept)
        vars(made)["_modules"] = {n: None if m is None else self.module(m) for n, m in module._modules.items()}
        copied: nn.Module = made
        return copied

    def _parameters(self, module: nn.Module) -> dict[str, torch.Tensor | None]:
        found: dict[str, torch.Tensor | None] = {}
        for leaf, tensor in module._parameters.items():
            if id(tensor) in self._rows and tensor is not None:
                continue
            found[leaf] = self._flattened.get((id(module), leaf))
            if found[leaf] is None and tensor is not None:
                if hasattr(tensor, _FLATTENED):
                    raise ShardedError(
                        f"{self._named(module, leaf)} is sharded by FSDP1, and what FSDP1 has put around the model is "
                        "not there: give rank() the module that FullyShardedDataParallel(...) returned"
                    )
                found[leaf] = self._stands.of(self._named(module, leaf), tensor)
        # With use_orig_params=False the modules have lost them.
        lost = {leaf: made for (owner, leaf), made in self._flattened.items() if owner == id(module)}
        return {**found, **{leaf: made for leaf, made in lost.items() if leaf not in found}}

    def _named(self, module: nn.Module, leaf: str) -> str:
        prefix = self._plain_name(module)
        return f"{prefix}.{leaf}" if prefix else leaf

    def _plain_name(self, module: nn.Module) -> str:
        words = self._names.get(id(module), "").split(".")
        return ".".join(word for word in words if word != "_fsdp_wrapped_module")


def _is_of_deepspeed(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class that fully_shard() has made another one of, which only adds to it."""
    kind = type(module)
    added = [base for base in kind.__bases__ if base.__name__ == "FSDPModule"]
    others = [base for base in kind.__bases__ if base not in added]
    return others[0] if added and len(others) == 1 else kind


def _fsdp_state(module: nn.Module) -> Any:
    """What FSDP2 keeps of a module; None where it has none."""
    if not any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
        return None
    getter = getattr(module, "_get_fsdp_state", None)
    if getter is None:
        raise ShardedError(f"{type(module).__name__} is of a release of FSDP2 that is not known: rank the checkpoint")
    return getter()


def _check_state(state: Any, name: str) -> None:
    """Between forward and backward, or where resharding is off, the shards may be newer than what the modules show."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [group for group in [getattr(state, "_fsdp_param_group", None)] if group is not None]
    for group in groups:
        if not getattr(group, "is_sharded", False):
            raise ShardedError(
                f"FSDP2 has gathered the parameters of {name} and holds them beside its shards, which may be newer: "
                "call reshard() of the module first"
            )
