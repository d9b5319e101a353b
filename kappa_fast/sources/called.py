"""Weights that a layer computes in its own forward(): standardized, masked or scaled before the layer multiplies.

A subclass of a linear or convolutional layer that has a forward() of its own may hand another weight to torch than the
parameter that it holds. A copy of the layer is called with an input of ones, and what it hands to
torch.nn.functional.linear or a convolution is its weight. The layer itself is not called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from ..entries import Index
from .base import Stored
from .effective import PARAMETRIZATIONS, Asked, Effective, described, twin_of

_BUILT_IN = (nn.Linear, _ConvNd)
# A layer that makes its weight from this much more than its input would need to be called as its model calls it.
_MULTIPLIES = frozenset(
    {"linear", *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)), "_conv_forward"}
)


def weight_in_forward(module: nn.Module) -> Effective | None:
    """The weight that a layer computes in its own forward(); None where it multiplies with its parameter."""
    weight = module._parameters.get("weight") if _has_own_forward(module) else None
    if weight is None or type(weight) is not nn.Parameter or not _is_plain(weight):
        return None
    found = _handed_over(twin_of(module, lambda t: torch.empty_like(t, dtype=_wide(t), device="meta")))
    if found is None:
        return None
    return described("weight", ("weight",), _how(module), weight, _Called(module), None)


def as_computed(stored: Stored, owner: nn.Module) -> Stored:
    """A weight of a file as the layer of the model that it belongs to would compute it from what is stored.

    owner: that layer, without values.
    """
    made = weight_in_forward(owner) if stored.name.endswith("weight") and stored.quantization is None else None
    if made is None or stored.dtype is None or stored.problem is not None or made.shape != stored.shape:
        return stored
    called = _CalledWith(owner, stored)
    if made.problem is None and not called.works():
        reason = f"computed by {made.how} from more than the stored weight: rank the model"
        return replace(stored, problem=reason)
    return replace(
        stored,
        take=called,
        problem=made.problem,
        overhead=4 * stored.numel * stored.dtype.itemsize,
        evidence=f"computed by {made.how}",
        stamp=None,
    )


def _how(module: nn.Module) -> str:
    return f"forward() of {type(module).__name__}"


def _has_own_forward(module: nn.Module) -> bool:
    if not isinstance(module, _BUILT_IN) or isinstance(module, torch.jit.ScriptModule):
        return False
    if PARAMETRIZATIONS in module._modules or hasattr(module, "adapter_layer_names"):
        return False
    methods = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
    return any(m is not None and not str(m.__module__).startswith("torch.") for m in methods)


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize > 1 and weight.dim() >= 2


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """float32 for floats, so that a cast of the weight to the dtype of the input is no other weight."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


class _Watch(TorchFunctionMode):
    """Keeps what is handed to torch as the weight of a linear or convolutional layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _MULTIPLIES:
            found = kwargs.get("weight", args[1] if len(args) > 1 else None)
            if isinstance(found, torch.Tensor):
                self.weights.append(found)
        return func(*args, **kwargs)


def _handed_over(twin: Any) -> torch.Tensor | None:
    """What a copy of a layer multiplies with; None if that is a parameter as it stands, or of another shape."""
    weight = twin._parameters["weight"]
    with torch.no_grad(), _Watch() as watch, contextlib.suppress(Exception):  # what users write may fail in any way
        twin.forward(_input(twin, weight))
    own = [t for t in (*twin._parameters.values(), *twin._buffers.values()) if t is not None]
    if any(_same(seen, weight) for seen in watch.weights):
        return None
    made = [seen for seen in watch.weights if seen.shape == weight.shape and not any(_same(seen, t) for t in own)]
    return made[0] if len(made) == 1 else None


def _same(seen: torch.Tensor, tensor: torch.Tensor) -> bool:
    return seen is tensor or seen._base is tensor


def _input(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Ones, of the smallest shape that the layer takes."""
    if isinstance(layer, nn.Linear):
        return weight.new_ones((1, layer.in_features))
    sizes = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return weight.new_ones((1, layer.in_channels, *sizes))


class _Called(Asked):
    """``Stored.take`` of a weight that a layer computes in its forward()."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "weight")

    def _result(self, twin: Any) -> Any:
        found = _handed_over(twin)
        if found is None:
            raise ValueError("it hands another weight to torch each time")
        return found


class _CalledWith:
    """The same for a weight of a file and a layer without values."""

    def __init__(self, owner: nn.Module, stored: Stored) -> None:
        self._owner, self._stored = owner, stored

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        values = self._stored.take(())
        made = self._made(values if device is None else values.to(device))
        return made[index].clone() if index else made

    def works(self) -> bool:
        """Whether the stored weight is enough."""
        try:
            return not self._made(torch.ones(self._stored.shape, dtype=self._stored.dtype)).is_meta
        except Exception:  # what users write may fail in any way
            return False

    def _made(self, values: torch.Tensor) -> torch.Tensor:
        convert: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.detach()  # noqa: E731
        twin = twin_of(self._owner, convert)
        vars(twin)["_parameters"]["weight"] = values.detach().clone()
        found = _handed_over(twin)
        if found is None:
            raise ValueError(f"{type(self._owner).__name__} computes no weight from {self._stored.name!r}")
        return found
