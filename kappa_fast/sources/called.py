"""Weights that a layer computes in its own forward(): standardized, masked or scaled before the layer multiplies.

A layer that has a forward() of its own may multiply with another matrix than the parameter that it holds. A copy of the
layer is called with an input of ones, and what it multiplies the input with is its weight. The layer itself is not
called. Where the copy multiplies with several matrices, or with one that depends on the input or on chance, the weight
has no condition number and is refused by name.
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
from .effective import PARAMETRIZATIONS, RANDOM, Asked, Effective, alone
from .products import Made, Products
from .twins import Convert, copied, twin_of
from .unsharded import device_of, has_stand_ins

_BUILT_IN = (nn.Linear, _ConvNd)
_SPREAD = "it asks for values that lie on several processes to be followed: rank the model before it is sharded"
_OF_INPUT = "made anew from each input, so that it has no single condition number"


def weight_in_forward(module: nn.Module, computed: Effective | None = None) -> Effective | str | None:
    """The weight that a layer computes in its own forward(); None where it multiplies with its parameter.

    Args:
        module: the layer.
        computed: what it computes from others before its forward().

    Returns:
        A text where the forward() is one that cannot be followed, so that nobody knows.
    """
    leaf = computed.leaf if computed is not None else _leaf_of(module)
    if leaf is None or not _has_own_forward(module) or (computed is not None and computed.problem is not None):
        return None
    called = _Called(module, leaf)
    found = called.looked_at()
    if found is None:
        return f"{_how(module)} cannot be followed: ranked as the parameter stands"
    if found == _Seen():
        return None
    like = found.weight if found.weight is not None else _own(module, leaf)
    how = _how(module) if computed is None else f"{computed.how}, {_how(module)}"
    device = computed.device if computed is not None else device_of(_own(module, leaf))
    ingredients = (leaf,) if computed is None else computed.ingredients
    problem = f"computed by {how}: {found.problem}" if found.problem is not None else None
    return Effective(leaf, ingredients, how, tuple(like.shape), like.dtype, device, called, problem)


def as_computed(stored: Stored, owner: nn.Module) -> Stored:
    """A weight of a file as the layer of the model that it belongs to would compute it from what is stored.

    owner: that layer, without values.
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
    called = _CalledWith(owner, stored)
    if made.problem is None and not called.works():
        reason = f"computed by {made.how} from more than the stored weight: rank the model"
        return replace(stored, problem=reason)
    return replace(
        stored,
        take=called,
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
    return vars(module)[leaf] if found is None else found  # as hooks have set it


def _leaf_of(module: nn.Module) -> str | None:
    """What the module calls the one weight that it may compute another from; None if it is no layer of its own."""
    if isinstance(module, torch.jit.ScriptModule) or PARAMETRIZATIONS in module._modules:
        return None
    if not isinstance(module, _BUILT_IN) and any(True for child in module.children() for _ in child.parameters()):
        return None  # what its children multiply with is theirs
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
    if getattr(module, "quantization_scheme", None) is not None:  # compressed-tensors: its own room reads these
        return False
    if "forward" in vars(module) and "_hf_hook" not in vars(module):
        return True
    methods = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
    return any(m is not None and not _is_of_torch(str(m.__module__)) for m in methods)


def _is_of_torch(module: str) -> bool:
    """Whether a method is one of the ordinary layers; those for training with rounded weights compute theirs."""
    return module.startswith("torch.nn.modules.")


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize > 1 and weight.dim() >= 2


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def _wide_on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """float32 for floats, so that a cast of the weight to a wider dtype is no other weight."""
    return torch.empty_like(tensor, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype, device="meta")


@dataclass(frozen=True)
class _Seen:
    """What a copy of a layer multiplied its input with.

    Attributes:
        weight: the one matrix that was computed, of the shape of the parameter; None if it is the parameter itself.
        problem: why there is no such matrix.
    """

    weight: torch.Tensor | None = None
    problem: str | None = None


class _Called(Asked):
    """``Stored.take`` of a weight that a layer computes in its forward()."""

    def looked_at(self) -> _Seen | None:
        """What the layer multiplies with, without values if it does not ask for them; None if nothing is seen.

        Values are taken where it asks for them, as one does that chooses what to compute by its mask.
        """
        with alone():
            seen = self._seen(_on_meta)
            if seen is not None and seen.weight is not None and self._seen(_wide_on_meta) == _Seen():
                return _Seen()
            whole = not any(t.is_meta for t in (*self._module.parameters(), *self._module.buffers()))
            if seen is None and has_stand_ins(self._module):
                return _Seen(problem=_SPREAD)
            if seen is None and whole:
                seen = self._seen(copied)
        return seen

    def _seen(self, convert: Convert) -> _Seen | None:
        """None if nothing was seen, because the layer fails or works in other ways."""
        try:
            return self._asked(convert, self._seen_of)
        except Exception:  # what users write may fail in any way
            return None

    def _result(self, twin: Any) -> Any:
        seen = self._seen_of(twin)
        if seen is None or seen.weight is None:
            raise ValueError("it hands another weight to torch each time")
        return seen.weight

    def _seen_of(self, twin: Any) -> _Seen | None:
        with parametrize.cached() if PARAMETRIZATIONS in twin._modules else contextlib.nullcontext():
            return seen_in(twin, super()._result(twin))


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
        with alone(), torch.no_grad():
            twin = twin_of(self._owner, lambda t: t.detach())
            leaf = _leaf_of(self._owner) or "weight"
            vars(twin)["_parameters"][leaf] = values.detach().clone()
            seen = seen_in(twin, vars(twin)["_parameters"][leaf])
        if seen is None or seen.weight is None:
            raise ValueError(f"{type(self._owner).__name__} computes no weight from {self._stored.name!r}")
        return seen.weight


def seen_in(twin: Any, weight: torch.Tensor) -> _Seen | None:
    """What a copy of a layer multiplies its input with, instead of this weight; None if it cannot be found out."""
    more = _more_arguments(twin.forward, weight.device)
    for shape in _inputs(twin, weight):
        given = weight.new_ones(shape)
        before = _states()
        # Modes of the caller, such as a counter of operations, see nothing of it.
        with _disable_current_modes(), Products(weight, (given, *more.values())) as products, _quiet():
            twin.forward(given, **more)
        if products.operands:
            flat = isinstance(twin, _ConvNd)
            return _judged(products, weight, before != _states(), flat)
    return None


def _judged(products: Products, weight: torch.Tensor, drawn: bool, flat: bool) -> _Seen:
    others = [o for o in products.operands if not o.as_it_stands]
    made_of = Made.NOTHING
    for operand in others:
        made_of |= operand.made_of
    if not others:
        return _used(products, weight, flat)
    if made_of & Made.INPUT or products.is_steered:
        return _Seen(problem=_OF_INPUT)
    if made_of & Made.CHANCE:
        return _Seen(problem=RANDOM)
    if drawn:
        return _Seen(problem="it draws random numbers of Python or NumPy, which may go into it")
    if len({o.tensor.untyped_storage()._cdata for o in others}) > 1 or len(others) < len(products.operands):
        return _Seen(problem="it multiplies with several matrices made of it, which have no condition number together")
    found = _shaped(others[0].tensor, weight, flat)
    if found is None:
        return _Seen(problem=f"it multiplies with {tuple(others[0].tensor.shape)} instead of {tuple(weight.shape)}")
    return _Seen(found)


def _used(products: Products, weight: torch.Tensor, flat: bool) -> _Seen:
    """What is said of a parameter that is multiplied with itself: whole, in pieces that are all there, or in part.

    flat: as for ``_shaped``. Of a stack of matrices a call need not use all.
    """
    views = {(o.tensor.storage_offset(), o.tensor.shape, o.tensor.stride()): o.tensor for o in products.operands}
    if (weight.dim() > 2 and not flat) or _entries_of(list(views.values())) >= weight.numel():
        return _Seen()
    shape = tuple(next(iter(views.values())).shape)
    return _Seen(problem=f"it multiplies with {shape}, a part of {tuple(weight.shape)}")


def _entries_of(views: list[torch.Tensor]) -> int:
    """How many entries of a storage these have; of views with gaps, those that several have count more than once."""
    gaps = sum(view.numel() for view in views if not _is_dense(view))
    found, end = 0, 0
    dense = [(int(v.storage_offset()), v.numel()) for v in views if _is_dense(v)]
    for start, stop in sorted((start, start + count) for start, count in dense):
        found += max(0, stop - max(start, end))
        end = max(end, stop)
    return gaps + found


def _is_dense(view: torch.Tensor) -> bool:
    """Whether its entries lie side by side, in whatever order of the dimensions."""
    return 1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.stride(), strict=True)) == view.numel()


def _shaped(operand: torch.Tensor, weight: torch.Tensor, flat: bool) -> torch.Tensor | None:
    """An operand in the shape of the weight, as far as the two differ in dimensions of 1 or lie the other way round.

    flat: it is a convolution, which is ranked as one row for each output, in whatever order its columns are.
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
    """What a forward() wants beside its input: the number 1, which may be a factor or an index."""
    _, *others = inspect.signature(forward).parameters.values()
    wanted = [p for p in others if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: torch.ones((), dtype=torch.int64, device=device) for p in wanted}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Whatever a copy of a layer raises or warns of is no news to the caller."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        yield


def _states() -> list[object]:
    """Of the generators that torch does not see."""
    state: Any = np.random.get_state()
    return [random.getstate(), state[1].tobytes(), *state[2:]]


def _inputs(layer: Any, weight: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """Shapes of inputs that the layer may take, the smallest first."""
    if weight.dim() == 2:
        either = tuple(dict.fromkeys((weight.shape[1], weight.shape[0])))
        sizes = (int(layer.in_features),) if isinstance(layer, nn.Linear) else either
        # Of groups, each has rows and an input of its own.
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
