"""Weights that a layer computes in its own forward(): standardized, masked or scaled before the multiplication.

A layer with its own forward() may multiply with a matrix that differs from its parameter. A copy of the layer is called
with an input of ones; the matrix with which it multiplies the input is the weight. The layer itself is not called. If
the copy multiplies with several matrices, or with one that is random or depends on the input, the weight has no
condition number and is skipped with that reason.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from ..results.entries import Index
from .base import COMPUTED, Stored
from .classes import looks_up
from .effective import PARAMETRIZATIONS, RANDOM, ComputedTake, Effective, exclusive
from .products import Origin, Products
from .twins import Convert, copied, copy_module
from .unsharded import device_of, has_stand_ins

_BUILT_IN = (nn.Linear, _ConvNd)
_SPREAD = "it asks for values that lie on several processes to be followed: rank the model before it is sharded"
_OF_INPUT = "it depends on the input, so that it has no single condition number"


def weight_in_forward(module: nn.Module, computed: Effective | None = None) -> Effective | str | None:
    """Return the weight that a layer computes in its own forward().

    Args:
        module: the layer.
        computed: the weight that the layer computes before its forward(), if it does.

    Returns:
        None if the layer multiplies with its parameter; a note if the forward() cannot be followed, so that the weight
        is unknown.
    """
    leaf = computed.leaf if computed is not None else _leaf_of(module)
    if leaf is None or not _has_own_forward(module) or (computed is not None and computed.problem is not None):
        return None
    take = _ForwardTake(module, leaf)
    found = take.observe()
    if found is None:
        return f"{_how(module)} cannot be followed: the parameter is ranked as stored"
    if found == _Observed():
        return None
    like = found.weight if found.weight is not None else _own(module, leaf)
    how = _how(module) if computed is None else f"{computed.how}, {_how(module)}"
    device = computed.device if computed is not None else device_of(_own(module, leaf))
    ingredients = (leaf,) if computed is None else computed.ingredients
    problem = f"computed by {how}: {found.problem}" if found.problem is not None else None
    return Effective(leaf, ingredients, how, tuple(like.shape), like.dtype, device, take, problem)


def as_computed(stored: Stored, owner: nn.Module) -> Stored:
    """Return a weight of a file as its layer computes it from the stored values.

    owner: the layer, on the meta device.
    """
    made = weight_in_forward(owner) if stored.name.endswith("weight") and stored.quantization is None else None
    if isinstance(made, str):
        return replace(stored, evidence=f"parameter of {type(owner).__name__}: {made}", unfollowed=True)
    if (
        not isinstance(made, Effective)
        or stored.dtype is None
        or stored.problem is not None
        or made.shape != stored.shape
    ):
        return stored
    take = _FileForwardTake(owner, stored)
    if made.problem is None and not take.works():
        reason = f"computed by {made.how} from more than the stored weight: rank the model"
        return replace(stored, problem=reason)
    return replace(
        stored,
        take=take,
        problem=made.problem,
        overhead=4 * stored.numel * stored.dtype.itemsize,
        evidence=f"{COMPUTED} {made.how}",
        stamp=None,
    )


def _how(module: nn.Module) -> str:
    return f"forward() of {type(module).__name__}"


def _own(module: nn.Module, leaf: str) -> torch.Tensor:
    found: torch.Tensor | None = module._parameters.get(leaf)
    found = module._buffers.get(leaf) if found is None else found
    return vars(module)[leaf] if found is None else found  # a hook has set the attribute


def _leaf_of(module: nn.Module) -> str | None:
    """Return the name of the only weight that a layer has; None if it has none, several, or children with weights."""
    if isinstance(module, torch.jit.ScriptModule) or PARAMETRIZATIONS in module._modules:
        return None
    if not isinstance(module, _BUILT_IN) and any(True for child in module.children() for _ in child.parameters()):
        return None  # the children multiply with their own weights
    every: dict[str, Any] = {**module._buffers, **module._parameters}
    own = {"weight": every["weight"]} if every.get("weight") is not None else {}
    own = own or {n: t for n, t in module._parameters.items() if t is not None and t.dim() >= 2}
    ((leaf, weight),) = own.items() if len(own) == 1 else ((None, None),)
    if weight is None or type(weight) not in (nn.Parameter, torch.Tensor, nn.Buffer) or not _is_plain(weight):
        return None
    return leaf


def _has_own_forward(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "adapter_layer_names") or looks_up(module):
        return False
    if getattr(module, "quantization_scheme", None) is not None:  # compressed-tensors: see quantized/
        return False
    if "forward" in vars(module) and "_hf_hook" not in vars(module):
        return True
    methods = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
    return any(m is not None and not _is_of_torch(str(m.__module__)) for m in methods)


def _is_of_torch(module: str) -> bool:
    """Return whether the module defines ordinary layers of torch; those for quantized training compute their weight."""
    return module.startswith("torch.nn.modules.")


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize > 1 and weight.dim() >= 2


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def _wide_on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float32 tensor for floats: then a cast of the weight to float32 returns the weight itself."""
    return torch.empty_like(tensor, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype, device="meta")


@dataclass(frozen=True)
class _Observed:
    """With what a copy of a layer multiplied its input.

    Attributes:
        weight: the computed matrix, in the shape of the parameter; None if it is the parameter itself.
        problem: why there is no single matrix; None if there is one.
    """

    weight: torch.Tensor | None = None
    problem: str | None = None


class _ForwardTake(ComputedTake):
    """``Stored.take`` of a weight that a layer computes in its forward()."""

    def observe(self) -> _Observed | None:
        """Return with what the layer multiplies its input; None if nothing was observed.

        The meta device is tried first; values are used if the layer needs them, for example to evaluate a mask.
        """
        with exclusive():
            seen = self._observe(_on_meta)
            if seen is not None and seen.weight is not None and self._observe(_wide_on_meta) == _Observed():
                return _Observed()
            whole = not any(t.is_meta for t in (*self._module.parameters(), *self._module.buffers()))
            if seen is None and has_stand_ins(self._module):
                return _Observed(problem=_SPREAD)
            if seen is None and whole:
                seen = self._observe(copied)
        return seen

    def _observe(self, convert: Convert) -> _Observed | None:
        """Return None if nothing was observed, because the layer raises or uses other operations."""
        try:
            return self._on_copy(convert, self._observe_copy)
        except Exception:  # code of users may raise anything
            return None

    def _result(self, twin: Any) -> Any:
        seen = self._observe_copy(twin)
        if seen is None or seen.weight is None:
            raise ValueError("forward() multiplies with another matrix than before")
        return seen.weight

    def _observe_copy(self, twin: Any) -> _Observed | None:
        with parametrize.cached() if PARAMETRIZATIONS in twin._modules else contextlib.nullcontext():
            return observe_products(twin, super()._result(twin))


class _FileForwardTake:
    """``Stored.take`` of a weight that a layer on the meta device computes from a stored tensor."""

    def __init__(self, owner: nn.Module, stored: Stored) -> None:
        self._owner, self._stored = owner, stored

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        values = self._stored.take(())
        made = self._made(values if device is None else values.to(device))
        return made[index].clone() if index else made

    def works(self) -> bool:
        """Return whether the weight can be computed from the stored tensor alone."""
        try:
            return not self._made(torch.ones(self._stored.shape, dtype=self._stored.dtype)).is_meta
        except Exception:  # code of users may raise anything
            return False

    def _made(self, values: torch.Tensor) -> torch.Tensor:
        with exclusive(), torch.no_grad():
            twin = copy_module(self._owner, lambda t: t.detach())
            leaf = _leaf_of(self._owner) or "weight"
            vars(twin)["_parameters"][leaf] = values.detach().clone()
            seen = observe_products(twin, vars(twin)["_parameters"][leaf])
        if seen is None or seen.weight is None:
            raise ValueError(f"{type(self._owner).__name__} does not compute a weight from {self._stored.name!r}")
        return seen.weight


def observe_products(twin: Any, weight: torch.Tensor) -> _Observed | None:
    """Call a copy of a layer, and return with what it multiplied its input; None if nothing was observed."""
    more = _more_arguments(twin.forward, weight.device)
    for shape in _inputs(twin, weight):
        given = weight.new_ones(shape)
        before = _states()
        # Modes of the caller, such as a counter of operations, must not observe this call.
        with _disable_current_modes(), Products(weight, (given, *more.values())) as products, _quiet():
            twin.forward(given, **more)
        if products.operands:
            flat = isinstance(twin, _ConvNd)
            return _judged(products, weight, before != _states(), flat)
    return None


def _judged(products: Products, weight: torch.Tensor, drawn: bool, flat: bool) -> _Observed:
    others = [o for o in products.operands if not o.is_weight]
    origin = Origin.NOTHING
    for operand in others:
        origin |= operand.origin
    if not others:
        return _used(products, weight, flat)
    if origin & Origin.INPUT or products.depends_on_input:
        return _Observed(problem=_OF_INPUT)
    if origin & Origin.CHANCE:
        return _Observed(problem=RANDOM)
    if drawn:
        return _Observed(problem="the forward() draws random numbers of Python or NumPy, on which it may depend")
    if len({o.tensor.untyped_storage()._cdata for o in others}) > 1 or len(others) < len(products.operands):
        return _Observed(problem="the layer multiplies with several matrices, which have no common condition number")
    found = _shaped(others[0].tensor, weight, flat)
    if found is None:
        shapes = f"{tuple(others[0].tensor.shape)} instead of {tuple(weight.shape)}"
        return _Observed(problem=f"the layer multiplies with a matrix of shape {shapes}")
    return _Observed(found)


def _used(products: Products, weight: torch.Tensor, flat: bool) -> _Observed:
    """Return the result for a layer that multiplies with its parameter: a problem if it uses only a part of it.

    flat: as for ``_shaped``. A call need not use all matrices of a stack.
    """
    views = {(o.tensor.storage_offset(), o.tensor.shape, o.tensor.stride()): o.tensor for o in products.operands}
    if (weight.dim() > 2 and not flat) or _entries_of(list(views.values())) >= weight.numel():
        return _Observed()
    shape = tuple(next(iter(views.values())).shape)
    return _Observed(problem=f"the layer multiplies with a part of shape {shape} of {tuple(weight.shape)}")


def _entries_of(views: list[torch.Tensor]) -> int:
    """Return how many entries of a storage the views cover together.

    Views with gaps are marked in a mask of one byte per entry, because they may lie within each other.
    """
    found, end = 0, 0
    spans = sorted((int(v.storage_offset()), int(v.storage_offset()) + _extent(v)) for v in views)
    if any(_extent(view) != view.numel() for view in views):
        mask = torch.zeros(max(stop for _, stop in spans), dtype=torch.bool, device="cpu")
        for view in views:
            shape = [1 if stride == 0 else n for n, stride in zip(view.shape, view.stride(), strict=True)]
            mask.as_strided(shape, view.stride(), view.storage_offset()).fill_(True)
        return int(mask.count_nonzero())
    for start, stop in spans:
        found += max(0, stop - max(start, end))
        end = max(end, stop)
    return found


def _extent(view: torch.Tensor) -> int:
    """Return the number of entries from the first to the last of a view, in the order of its storage."""
    return 1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.stride(), strict=True)) if view.numel() else 0


def _shaped(operand: torch.Tensor, weight: torch.Tensor, flat: bool) -> torch.Tensor | None:
    """Return the operand in the shape of the weight if they differ in dimensions of 1 or a transposition; else None.

    flat: True for a convolution, which is ranked as a matrix with one row per output; its columns may be in any order.
    """
    if operand.shape == weight.shape:
        return operand
    full, other = [s for s in weight.shape if s != 1], [s for s in operand.shape if s != 1]
    if full == other:
        return operand.reshape(weight.shape)
    if len(full) == 2 and other == full[::-1]:
        return operand.squeeze().t().reshape(weight.shape)
    if flat and other == [weight.shape[0], weight.numel() // weight.shape[0]]:
        return operand.reshape(weight.shape)
    return None


def _more_arguments(forward: Callable[..., Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the required arguments of a forward() after its input, each 1, which may be a factor or an index."""
    _, *others = inspect.signature(forward).parameters.values()
    wanted = [p for p in others if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: torch.ones((), dtype=torch.int64, device=device) for p in wanted}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress exceptions and warnings of a copy of a layer."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        yield


def _states() -> list[object]:
    """Return the states of the random number generators of Python and NumPy."""
    state: Any = np.random.get_state()
    return [random.getstate(), state[1].tobytes(), *state[2:]]


def _inputs(layer: Any, weight: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """Yield shapes of inputs that the layer may accept, the smallest first."""
    if weight.dim() == 2:
        either = tuple(dict.fromkeys((weight.shape[1], weight.shape[0])))
        sizes = (int(layer.in_features),) if isinstance(layer, nn.Linear) else either
        # In a layer with groups, each group has its own rows and its own input.
        counts = sorted({n for n in vars(layer).values() if type(n) is int and n > 1 and weight.shape[0] % n == 0})
        yield from (shape for size in sizes for shape in ((1, size), (1, 1, size)))
        yield from (shape for n in counts for size in sizes for shape in ((1, n, size), (1, 1, n, size)))
        return
    kernel = tuple(getattr(layer, "kernel_size", weight.shape[2:]))
    dilation = tuple(getattr(layer, "dilation", ()) or ()) if isinstance(layer, _ConvNd) else (1,) * len(kernel)
    channels = layer.in_channels if isinstance(layer, _ConvNd) else weight.shape[1] * int(getattr(layer, "groups", 1))
    least = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    for more in (0, 8):
        yield (1, channels, *(size + more for size in least))
    if not isinstance(layer, _ConvNd):  # a stack of matrices
        yield from ((1, size) for size in dict.fromkeys((weight.shape[-1], weight.shape[-2])))
