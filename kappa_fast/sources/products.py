"""What a layer multiplies its input with: the products of a forward pass, and what their operands were made of."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Products of two tensors: which of the arguments they are.
_PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv", "matmul", "linear", "mkldnn_linear"), (0, 1)),
    **dict.fromkeys(("convolution", "convolution_overrideable", "_convolution", "mkldnn_convolution"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "_addmm_activation"), (1, 2)),
}
_TURNED = ("mm", "addmm", "bmm", "baddbmm", "matmul", "_addmm_activation")  # whose second operand is [inputs, outputs]
_NUMBERS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")  # which Python or shapes may then depend on
# Processes that wait for each other: here one of them may be alone.
_COLLECTIVE = ("c10d", "_c10d_functional", "c10d_functional", "_dtensor")


class Made(enum.Flag):
    """What went into a tensor."""

    NOTHING = 0
    WEIGHT = enum.auto()
    INPUT = enum.auto()
    CHANCE = enum.auto()


@dataclass(frozen=True)
class Operand:
    """What an input was multiplied with, a matrix as [outputs, inputs], and what it was made of."""

    tensor: torch.Tensor
    made_of: Made
    as_it_stands: bool


class Products(TorchDispatchMode):
    """Keeps what tensors that were made of the input alone are multiplied with, where a weight went into it."""

    def __init__(self, weight: torch.Tensor, given: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands: list[Operand] = []
        self.is_steered = False  # numbers of the input may have chosen what is computed
        self._written = False
        self._weight = _storage(weight)
        # With the tensors, so that no other one comes to lie where one of these was.
        self._made_of = {_storage(tensor): (Made.INPUT, tensor) for tensor in given}
        self._made_of[self._weight] = (Made.WEIGHT, weight)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in _COLLECTIVE:
            raise NotImplementedError("a layer that is only looked at does not talk to other processes")
        if func._can_decompose():  # into products, where the caller's mode has kept them together
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name = func._schema.name.partition("::")[2].rstrip("_")
        product = self._product(name, args) if name in _PRODUCTS else None
        result = func(*args, **kwargs)
        if product is None:
            product = self._of((*args, *kwargs.values()))
            if name.startswith("new_") or name.endswith("_like"):  # takes shape, dtype and device only
                product = Made.NOTHING
        if torch.Tag.nondeterministic_seeded in func.tags:
            product |= Made.CHANCE
        self.is_steered |= name in _NUMBERS and bool(product & Made.INPUT)
        self._note(func, args, kwargs, result, product)
        return result

    def _product(self, name: str, args: Any) -> Made | None:
        """What is kept of a product, and what its result is made of; None if it is none with an input."""
        first, second = (args[place] for place in _PRODUCTS[name])
        made = self._of([first]), self._of([second])
        for side, (operand, of_operand, of_other) in enumerate(((first, *made), (second, *made[::-1]))):
            if not of_other & Made.INPUT or of_other & Made.WEIGHT:
                continue
            if of_operand & Made.WEIGHT:
                turned = side == 1 and name in _TURNED
                self._keep(operand.transpose(-1, -2) if turned and operand.dim() >= 2 else operand, of_operand)
            return Made.INPUT
        return None

    def _keep(self, operand: torch.Tensor, made_of: Made) -> None:
        as_it_stands = _storage(operand) == self._weight and not self._written
        self.operands.append(Operand(operand, made_of, as_it_stands))

    def _of(self, values: Iterable[Any]) -> Made:
        found = Made.NOTHING
        for tensor in tree_leaves(list(values)):
            if isinstance(tensor, torch.Tensor):
                found |= self._made_of.get(_storage(tensor), (Made.NOTHING,))[0]
        return found

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, made_of: Made) -> None:
        written = []
        if func._schema.is_mutable:
            given = [*zip(func._schema.arguments, args, strict=False)]
            given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
            written = [value for a, value in given if a.alias_info is not None and a.alias_info.is_write]
        for tensor in tree_leaves([written, result]):
            if isinstance(tensor, torch.Tensor) and made_of:
                self._made_of[_storage(tensor)] = (self._of([tensor]) | made_of, tensor)
        self._written |= any(isinstance(t, torch.Tensor) and _storage(t) == self._weight for t in tree_leaves(written))


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # layouts without one
        return id(tensor)
