"""Masks of the frozen weights of a parameter, which broadcast against it and take a few bytes per expert and row."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import OptionError
from ..matching.names import Target
from ..matching.pieces import box_of
from ..results.entries import Index
from ..sources.placements import pieces_here

Tensor = torch.Tensor
_OF_WHOLE: tuple[type, ...] = tuple(filter(None, (getattr(torch.optim, "Adafactor", None),)))


def frozen_mask(target: Target) -> Tensor:
    """True for frozen weights; bool on the CPU, of size 1 along dimensions that are selected or frozen as a whole."""
    shape = target.parameter.shape
    boxes = [box_of(index, shape) for index in target.indices]
    full = [all(len(box.ranges[d]) == size for box in boxes) for d, size in enumerate(shape)]
    frozen = torch.ones([1 if whole else size for whole, size in zip(full, shape, strict=True)], dtype=torch.bool)
    for box in boxes:
        parts = zip(box.ranges, full, strict=True)
        frozen[tuple(slice(None) if whole else slice(r.start, r.stop, r.step) for r, whole in parts)] = False
    return frozen


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    from torch.distributed import is_available

    if not is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor on this rank; a plain tensor itself."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return part


def local_mask(mask: Tensor, tensor: Tensor) -> Tensor:
    """The part of a parameter's mask that belongs to the part of the parameter on this rank."""
    if not is_sharded(tensor):
        return mask
    local = local_part(tensor)
    made = torch.ones([1 if m == 1 else n for m, n in zip(mask.shape, local.shape, strict=True)], dtype=torch.bool)
    for piece in pieces_here(tensor):
        parts = list(zip(mask.shape, piece.start, piece.size, piece.at, strict=True))
        there = tuple(slice(None) if m == 1 else slice(at, at + size) for m, _, size, at in parts)
        made[there] = mask[tuple(slice(None) if m == 1 else slice(start, start + size) for m, start, size, _ in parts)]
    return made


def element_by_element(optimizer_cls: type, target: Target, indices: tuple[Index, ...]) -> tuple[Index, ...]:
    """The pieces of a parameter, each of which this optimizer can train alone.

    Raises:
        OptionError: it takes statistics of whole matrices, and only parts of shards are to be trained.
    """
    if is_sharded(target.parameter) and issubclass(optimizer_cls, _OF_WHOLE):
        raise OptionError(
            f"{optimizer_cls.__name__} takes statistics of whole matrices, and {target.name!r} is a sharded parameter "
            "of which a part is selected: use an optimizer that works element by element, or unit='parameter'"
        )
    return indices


class Frozen:
    """The mask of one parameter, which is moved to the parameter's device once."""

    def __init__(self, target: Target) -> None:
        self.mask = frozen_mask(target)
        self._local: dict[tuple[object, ...], Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The mask for the local part of a tensor of the parameter's shape."""
        itself: Any = tensor
        where = (itself.placements, str(itself.device_mesh)) if is_sharded(tensor) else ()
        key = (tensor.device, where, tuple(local_part(tensor).shape))
        if key not in self._local:
            self._local[key] = local_mask(self.mask, tensor).to(tensor.device)
        return self._local[key]

    def clear(self, gradient: Tensor) -> None:
        """Zero the gradients of frozen weights in place, also nan and inf."""
        local_part(gradient).masked_fill_(self.of(gradient), 0)

    def kept(self, parameter: Tensor) -> Tensor:
        """A copy of the parameter's local part, for put_back()."""
        return local_part(parameter.detach()).clone()

    def put_back(self, parameter: Tensor, kept: Tensor) -> None:
        """Set the frozen weights to those of ``kept``; the selected weights stay as they are."""
        local = local_part(parameter.detach())
        local.copy_(torch.where(self.of(parameter), kept, local))
