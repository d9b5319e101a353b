"""Copies of modules that can be called in place of the modules: nothing that they do reaches the model.

Parameters are converted, buffers and everything else that may be written to are copied, hooks are left out, and a
method or a reference that leads back to a module leads to its copy.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import logging
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import nn

from .placements import is_dtensor
from .unsharded import stands_for

Convert = Callable[[torch.Tensor], torch.Tensor]
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_always_called"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
)
# What cannot be copied in a way that means anything, or belongs to the whole process.
# Half a copy of a graph would lead from its nodes to those of the original, and walking over them would never end.
_SHARED = (
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, logging.Logger, threading.Thread),
    *(torch.fx.Graph, torch.fx.Node),
)
_DEEPEST = 3  # objects within objects; containers are followed as deep as they go


class UnreachableError(Exception):
    """A copy of the module would not do what the module does."""


def twin_of(module: nn.Module, convert: Convert) -> Any:
    """A copy of a module in eval mode.

    Args:
        module: which one; modules that it refers to without having them as children are copied too.
        convert: what becomes of a parameter, and of a buffer or another tensor before that is cloned.

    Raises:
        UnreachableError: a function that is none of its methods has been put in place of its forward().
    """
    return _Copier(convert).module(module)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """What users write may work in place. Of a tensor that lies on several processes the whole."""
    found = stands_for(tensor)
    return tensor.detach().clone() if found is None else found[0].read(found[1]).clone()


class _Copier:
    def __init__(self, convert: Convert) -> None:
        self._convert = convert
        self._on_meta = convert(torch.empty(0)).is_meta
        self._known: dict[int, Any] = {}
        self._kept: list[object] = []  # an id is one of these as long as they are there

    def module(self, module: nn.Module, elsewhere: bool = False) -> Any:
        """``elsewhere``: it is none of the layer's own, so that its parameters may be large; they are not cloned."""
        if id(module) in self._known:
            return self._known[id(module)]
        made: Any = object.__new__(type(module))
        self._remember(module, made)
        tables: dict[str, Any] = {
            "training": False,
            "_parameters": {n: self._tensor(t, False, elsewhere) for n, t in module._parameters.items()},
            "_buffers": {n: self._tensor(t, True) for n, t in module._buffers.items()},
        }
        vars(made).update(tables)
        vars(made)["_modules"] = {
            n: None if m is None else self.module(m, elsewhere) for n, m in module._modules.items()
        }
        tables["_modules"] = vars(made)["_modules"]
        for name, value in vars(module).items():
            if name in _HOOKS:
                vars(made)[name] = OrderedDict()
            elif name not in tables and name not in ("forward", "_old_forward"):
                vars(made)[name] = self.value(value)
        self._forward(module, made)
        return made

    def _forward(self, module: nn.Module, made: Any) -> None:
        """What accelerate has put around a forward() is left out with the hooks that it is for."""
        own = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward")
        if own is None:
            return
        if not isinstance(own, types.MethodType) or own.__self__ is not module:
            raise UnreachableError("another function was put in its place")
        vars(made)["forward"] = types.MethodType(own.__func__, made)

    def _remember(self, original: object, made: Any) -> Any:
        self._known[id(original)] = made
        self._kept.append(original)
        return made

    def _tensor(self, tensor: torch.Tensor | None, clone: bool, elsewhere: bool = False) -> Any:
        if tensor is not None and id(tensor) not in self._known:
            if is_dtensor(tensor):  # where a module keeps it on the side: to work with it is to wait for others
                raise UnreachableError("a tensor on several processes belongs to it that is no parameter of it")
            shared = elsewhere and not self._on_meta and stands_for(tensor) is None
            converted = tensor.detach() if shared else self._convert(tensor)
            self._remember(tensor, converted.clone() if clone else converted)
        return None if tensor is None else self._known[id(tensor)]

    def value(self, value: Any, depth: int = _DEEPEST) -> Any:
        """A copy of an attribute, and of what it holds."""
        if id(value) in self._known:
            return self._known[id(value)]
        if isinstance(value, nn.Module):
            return self.module(value, elsewhere=True)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, True)
        if isinstance(value, torch.Generator):
            return self._remember(value, value.clone_state())
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.value(value.__self__, depth))
        if isinstance(value, functools.partial):
            function, args = self.value(value.func, depth), [self.value(a, depth) for a in value.args]
            return functools.partial(function, *args, **{k: self.value(v, depth) for k, v in value.keywords.items()})
        if isinstance(value, (dict, list, tuple, set, deque)):
            return self._container(value, depth)
        return value if isinstance(value, _SHARED) or depth == 0 else self._object(value, depth)

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, tuple):
            items = [self.value(inner, depth) for inner in value]
            kind: Any = type(value)
            return kind._make(items) if hasattr(value, "_fields") else kind(items)
        made = self._remember(value, copy.copy(value))
        if isinstance(value, dict):
            for key, inner in value.items():
                dict.__setitem__(made, key, self.value(inner, depth))
        elif not isinstance(value, set):
            for place, inner in enumerate(value):
                made[place] = self.value(inner, depth)
        return made

    def _object(self, value: Any, depth: int) -> Any:
        """An object of any kind, which may not like to be copied."""
        slots = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
        if type(value).__module__ == "builtins" or not (hasattr(value, "__dict__") or slots):
            return value
        with contextlib.suppress(Exception):
            made = self._remember(value, copy.copy(value))
            if made is value:
                return value
            for name in (*vars(value), *slots) if hasattr(value, "__dict__") else slots:
                if hasattr(value, name):
                    object.__setattr__(made, name, self.value(getattr(value, name), depth - 1))
            return made
        return value
