"""Records what a layer multiplies its input with in a forward pass, and from what these operands were computed."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Products of two tensors, with the positions of the two arguments.
_PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv", "matmul", "linear", "mkldnn_linear"), (0, 1)),
    **dict.fromkeys(("convolution", "convolution_overrideable", "_convolution", "mkldnn_convolution"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "_addmm_activation"), (1, 2)),
}
# Products whose second operand is [inputs, outputs].
_TRANSPOSED = ("mm", "addmm", "bmm", "baddbmm", "matmul", "_addmm_activation")
_NUMBERS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")  # Python code or shapes may depend on the result
# Namespaces of collective operations, which would wait for other processes.
_COLLECTIVE = ("c10d", "_c10d_functional", "c10d_functional", "_dtensor")


class Origin(enum.Flag):
    """From what a tensor was computed."""

    NOTHING = 0
    WEIGHT = enum.auto()
    INPUT = enum.auto()
    CHANCE = enum.auto()


@dataclass(frozen=True)
class Operand:
    """A tensor with which an input was multiplied: a matrix is [outputs, inputs]; and from what it was computed.

    ``is_weight`` is True for the unchanged weight, or a view of it.
    """

    tensor: torch.Tensor
    origin: Origin
    is_weight: bool


class Products(TorchDispatchMode):
    """Records the operands that a weight went into, of products with a tensor computed from the input alone."""

    def __init__(self, weight: torch.Tensor, given: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands: list[Operand] = []
        self.depends_on_input = False  # values of the input may have decided what was computed
        self._written = False
        self._weight = _storage(weight)
        # The tensors are kept alive, so that no other tensor can get the same storage.
        self._origins = {_storage(tensor): (Origin.INPUT, tensor) for tensor in given}
        self._origins[self._weight] = (Origin.WEIGHT, weight)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in _COLLECTIVE:
            raise NotImplementedError("a layer that is only traced cannot communicate with other processes")
        if func._can_decompose():  # inference mode does not decompose composite operations by itself
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name = func._schema.name.partition("::")[2].rstrip("_")
        product = self._product(name, args) if name in _PRODUCTS else None
        result = func(*args, **kwargs)
        if product is None:
            product = self._origin_of((*args, *kwargs.values()))
            if name.startswith("new_") or name.endswith("_like"):  # only shape, dtype and device are used
                product = Origin.NOTHING
        if torch.Tag.nondeterministic_seeded in func.tags:
            product |= Origin.CHANCE
        self.depends_on_input |= name in _NUMBERS and bool(product & Origin.INPUT)
        self._record(func, args, kwargs, result, product)
        return result

    def _product(self, name: str, args: Any) -> Origin | None:
        """Record the operand of a product with an input, and return the origin of the result; None for others."""
        first, second = (args[place] for place in _PRODUCTS[name])
        made = self._origin_of([first]), self._origin_of([second])
        for side, (operand, of_operand, of_other) in enumerate(((first, *made), (second, *made[::-1]))):
            if not of_other & Origin.INPUT or of_other & Origin.WEIGHT:
                continue
            if of_operand & Origin.WEIGHT:
                transposed = side == 1 and name in _TRANSPOSED
                self._keep(operand.transpose(-1, -2) if transposed and operand.dim() >= 2 else operand, of_operand)
            return Origin.INPUT
        return None

    def _keep(self, operand: torch.Tensor, origin: Origin) -> None:
        is_weight = _storage(operand) == self._weight and not self._written
        self.operands.append(Operand(operand, origin, is_weight))

    def _origin_of(self, values: Iterable[Any]) -> Origin:
        found = Origin.NOTHING
        for tensor in tree_leaves(list(values)):
            if isinstance(tensor, torch.Tensor):
                found |= self._origins.get(_storage(tensor), (Origin.NOTHING,))[0]
        return found

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any, origin: Origin) -> None:
        written = []
        if func._schema.is_mutable:
            given = [*zip(func._schema.arguments, args, strict=False)]
            given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
            written = [value for a, value in given if a.alias_info is not None and a.alias_info.is_write]
        for tensor in tree_leaves([written, result]):
            if isinstance(tensor, torch.Tensor) and origin:
                self._origins[_storage(tensor)] = (self._origin_of([tensor]) | origin, tensor)
        self._written |= any(isinstance(t, torch.Tensor) and _storage(t) == self._weight for t in tree_leaves(written))


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse layouts have no storage
        return id(tensor)
