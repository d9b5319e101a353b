"""Weights that a module computes from parameters before its forward(): the computed weight is ranked.

torch has two mechanisms. ``torch.nn.utils.parametrize`` stores ``originals`` and modules that compute the weight from
them (weight_norm, spectral_norm, orthogonal, low-rank products, masks, code of users). The older mechanism is a hook
that runs before each forward pass and sets a plain attribute (weight_norm, spectral_norm, pruning). Both run on a copy
of the module in eval mode: no parameter, buffer, hook, cache, gradient or random number generator of the model changes.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._python_dispatch import TorchDispatchMode

from ..results.entries import Index
from . import codes
from .twins import Convert, copied, copy_module
from .unsharded import device_of

PARAMETRIZATIONS = "parametrizations"
Answer = TypeVar("Answer")
RANDOM = "it is random at each use, so that it has no single condition number"
# Suffixes that hooks append to the name of a weight for its parts.
_PIECE = re.compile(r"(?:_(?:orig|g|v|u|mask|bar|raw))+")
# One weight is computed at a time, because the state of random number generators is global.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Effective:
    """A weight that a module computes.

    Attributes:
        leaf: the name of the weight in the module, such as "weight".
        ingredients: the names in the module of the parameters and buffers from which the weight is computed.
        how: the classes that compute the weight.
        shape: the shape of the result; (0, 0) if it cannot be computed.
        dtype: the dtype of the result.
        device: the device of the result.
        take: computes the weight, as ``Stored.take`` does.
        problem: why the result is not a weight or cannot be computed; None if it can.
    """

    leaf: str
    ingredients: tuple[str, ...]
    how: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    take: Callable[..., torch.Tensor]
    problem: str | None = None


def effective_weights(module: nn.Module) -> Iterator[Effective]:
    """Yield the weights that this module computes from its own tensors before its forward()."""
    for leaf, steps in _lists(module).items():
        tensors = _tensors(steps)
        how = ", ".join(type(step).__name__ for step in steps)
        hooked = next((type(m).__name__ for m in steps.modules() if m._forward_hooks or m._forward_pre_hooks), None)
        problem = f"computed by {how}, where {hooked} has hooks of its own: remove them to rank it" if hooked else None
        first = next(tensor for name, tensor in tensors.items() if name.startswith("original"))
        yield _described(leaf, _within(leaf, tensors), how, first, ComputedTake(steps, ""), problem)
    for leaf, pieces in _pieces(module).items():
        hooks = [hook for hook in module._forward_pre_hooks.values() if _name_of(hook) == leaf]
        how, like = ", ".join(type(hook).__name__ for hook in hooks), vars(module)[leaf]
        if hooks:
            yield _described(leaf, pieces, how, like, ComputedTake(module, leaf), None)
        else:
            problem = f"computed from {', '.join(pieces)} by unknown code of {type(module).__name__}: make the weight "
            problem += "a plain parameter to rank it"
            yield Effective(leaf, pieces, "", tuple(like.shape), like.dtype, device_of(like), _never, problem)


def ingredients_of(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, by the name of each weight that this module computes, the names of its ingredients."""
    return {leaf: _within(leaf, _tensors(steps)) for leaf, steps in _lists(module).items()} | _pieces(module)


def _lists(module: nn.Module) -> dict[str, ParametrizationList]:
    """Return the parametrizations of a module by the name of the weight, without quantized ones (``quantized/``)."""
    found = None if isinstance(module, torch.jit.ScriptModule) else module._modules.get(PARAMETRIZATIONS)
    return {
        leaf: steps
        for leaf, steps in (found.items() if isinstance(found, nn.ModuleDict) else ())
        if isinstance(steps, ParametrizationList)
        and not any(hasattr(step, "quant_state") for step in steps)
        and not any(codes.may_be_codes(t.dtype) for n, t in _tensors(steps).items() if n.startswith("original"))
    }


def _tensors(steps: ParametrizationList) -> dict[str, torch.Tensor]:
    return {**dict(steps.named_parameters()), **dict(steps.named_buffers())}


def _within(leaf: str, tensors: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{PARAMETRIZATIONS}.{leaf}.{name}" for name in tensors)


def _pieces(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, by the name of each attribute that a hook may set before a forward pass, the names of its parts.

    The name of a part is that of the attribute with a suffix, such as weight_g.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    own = {name: t for name, t in {**module._parameters, **module._buffers}.items() if t is not None}
    kept = {n: t for n, t in vars(module).items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    found = {leaf: tuple(n for n in own if n.startswith(leaf) and _PIECE.fullmatch(n[len(leaf) :])) for leaf in kept}
    inner = {a for a in kept for b in kept if found[b] and a.startswith(b) and _PIECE.fullmatch(a[len(b) :])}
    return {
        leaf: pieces
        for leaf, pieces in found.items()
        if kept[leaf].dim() >= 2 and leaf not in inner and any(piece in module._parameters for piece in pieces)
    }


def _name_of(hook: object) -> str | None:
    """Return the name of the weight that a hook sets; None if it is neither a hook of torch nor built like one."""
    if isinstance(hook, BasePruningMethod):
        return str(hook._tensor_name)
    name = getattr(hook, "name", None)
    return name if isinstance(name, str) and callable(getattr(hook, "compute_weight", None)) else None


def _described(
    leaf: str, ingredients: tuple[str, ...], how: str, like: torch.Tensor, take: ComputedTake, problem: str | None
) -> Effective:
    """Return the Effective, with the shape found on the meta device if possible."""
    shape: tuple[int, ...] = (0, 0)
    dtype = like.dtype
    if problem is None:
        try:
            found, is_random = take.on_meta()
            shape, dtype = tuple(found.shape), found.dtype
            problem = f"computed by {how}: {RANDOM}" if is_random else None
        except Exception as error:  # what users write may fail in any way
            problem = f"computed by {how}, which fails ({type(error).__name__}: {str(error)[:80]})"
    return Effective(leaf, ingredients, how, shape, dtype, device_of(like), take, problem)


def _never(index: Index, device: torch.device | None = None) -> torch.Tensor:
    raise AssertionError("a weight with a problem is never read")


class ComputedTake:
    """``Stored.take`` of a weight that a module computes; ``leaf`` is "" if the module is a ParametrizationList."""

    def __init__(self, module: nn.Module, leaf: str) -> None:
        self._module, self._leaf = module, leaf

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        with exclusive():
            values = self._compute(copied).detach()
        return values[index].clone() if index else values

    def on_meta(self) -> tuple[torch.Tensor, bool]:
        """Return the result on the meta device, and whether it is random; values are used only if they are needed."""
        with exclusive(), _random_operations() as seen:
            try:
                found = self._compute(lambda tensor: tensor.detach().to("meta"))
            except Exception:
                if any(t.is_meta for t in (*self._module.parameters(), *self._module.buffers())):
                    raise
                found = self._compute(copied).to("meta")
        return found, seen.random

    def _compute(self, convert: Convert) -> torch.Tensor:
        result = self._on_copy(convert, self._result)
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"it returns {type(result).__name__} instead of a tensor")
        return result

    def _on_copy(self, convert: Convert, function: Callable[[Any], Answer]) -> Answer:
        """Return the result of a function of a copy of the module."""
        kept, parametrize._cache = parametrize._cache, {}  # or the copy would fill the cache of parametrize.cached()
        try:
            with torch.no_grad():
                return function(copy_module(self._module, convert))
        finally:
            parametrize._cache = kept

    def _result(self, twin: Any) -> Any:
        if not self._leaf:
            return twin.forward()
        for hook in self._module._forward_pre_hooks.values():
            if _name_of(hook) is not None:
                copy.copy(hook)(twin, ())
        return getattr(twin, self._leaf)


class _RandomOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records whether random numbers are drawn."""

    random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _random_operations() -> _RandomOperations:
    return _RandomOperations()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Hold the lock for computing a weight, and restore the random number generators afterwards."""
    with _ONE_AT_A_TIME, _generators_kept():
        yield


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Restore the random number generators of torch (CPU and accelerators), NumPy and Python afterwards."""
    ready = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if ready else 0)
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
