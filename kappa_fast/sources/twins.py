"""Copies of modules that can be run without changing the modules.

Parameters are converted; buffers and all other mutable attributes are copied; hooks are left out; methods and
references to a module are replaced by those to its copy.
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
# Objects that are shared with the copy: they cannot be copied, or belong to the whole process. A partial copy of a
# graph would mix its nodes with those of the original, and iterating over it would never end.
_SHARED = (
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, logging.Logger, threading.Thread),
    *(torch.fx.Graph, torch.fx.Node),
)
_DEEPEST = 3  # nesting depth of objects that are copied; the depth of containers is not limited


class UnreachableError(Exception):
    """The module cannot be copied: the copy would behave differently."""


def copy_module(module: nn.Module, convert: Convert) -> Any:
    """Return a copy of a module in eval mode.

    Args:
        module: the module; modules to which its attributes refer are copied too, even if they are not its children.
        convert: is applied to parameters, and to buffers and other tensors before these are cloned.

    Raises:
        UnreachableError: the forward() of an instance was replaced by a function that is not one of its methods.
    """
    return _Copier(convert).module(module)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """Return a detached copy of a tensor, of a sharded one the whole: code of users may work in place."""
    found = stands_for(tensor)
    return tensor.detach().clone() if found is None else found[0].read(found[1]).clone()


class _Copier:
    def __init__(self, convert: Convert) -> None:
        self._convert = convert
        self._on_meta = convert(torch.empty(0)).is_meta
        self._known: dict[int, Any] = {}
        self._kept: list[object] = []  # keeps the originals alive, so that their ids stay unique

    def module(self, module: nn.Module, elsewhere: bool = False) -> Any:
        """Return the copy of a module.

        elsewhere: the module is not a child of the layer; its parameters, which may be large, are not cloned.
        """
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
        """Copy a forward() that belongs to the instance, without the wrapper that accelerate adds for its hooks."""
        own = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward")
        if own is None:
            return
        if not isinstance(own, types.MethodType) or own.__self__ is not module:
            raise UnreachableError("forward() was replaced by another function")
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
        """Return a copy of an attribute, and of the objects that it contains."""
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
        """Return a copy of an object of any class, or the object itself if copying fails."""
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
