"""Quantized weights of models in memory, whose scales are attributes of the parameter or of its module.

These are parameters of bitsandbytes, tensor subclasses that dequantize themselves (torchao, optimum-quanto), and layers
of HQQ. These packages are not imported; the objects are recognized by their attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...errors import SourceError
from ...results.entries import Index
from .. import codes
from ..base import Stored
from . import bitsandbytes as bnb
from . import torchao
from .recipe import Candidate, Recipe, compose

PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


def weights_in(stored: Stored, tensor: torch.Tensor, holder: nn.Module | None = None) -> Stored | None:
    """Return the weight that a tensor in memory encodes, with a dequantizing ``take``; None if it is not recognized.

    Args:
        stored: the tensor without dequantization.
        tensor: the tensor itself, with its attributes.
        holder: the module in whose ``_parameters`` the tensor is.

    Raises:
        SourceError: the quantization state of the tensor does not fit.
    """
    if stored.device.type == "meta":
        return replace(stored, problem=codes.ON_META) if stored.problem is not None else None
    for reader in (_four_bits, _eight_bits, _not_yet_quantized, _of_itself, _of_layer):
        found = reader(stored, tensor, holder)
        if found is not None:
            return found
    return None


def _four_bits(stored: Stored, tensor: torch.Tensor, holder: nn.Module | None) -> Stored | None:
    """Recognize a Params4bit, or a parameter whose module has the quantization state (FSDP, parametrizations)."""
    states = [getattr(tensor, "quant_state", None)]
    if isinstance(holder, nn.utils.parametrize.ParametrizationList):
        states += [getattr(step, "quant_state", None) for step in holder]
        stored = replace(stored, names=tuple(dict.fromkeys((*map(_parametrized, stored.names), *stored.names))))
    elif stored.shape[1:] == (1,):
        states.append(getattr(holder, "quant_state", None))
    state = next((s for s in states if all(hasattr(s, a) for a in ("absmax", "blocksize", "quant_type"))), None)
    if state is None or not isinstance(state.absmax, torch.Tensor) or state.shape is None:
        return None
    if state.quant_type not in bnb.TABLES or state.dtype not in bnb.DTYPES.values():
        return None
    second = getattr(state, "state2", None)
    blocks = bnb.Blocks(
        state.quant_type,
        state.blocksize,
        tuple(state.shape),
        state.dtype,
        second.blocksize if second is not None else 0,
        float(state.offset) if second is not None else 0.0,
    )
    if getattr(state, "packing_format_for_cpu", False):
        recipe = _packed_for_cpu(stored, tensor, state.absmax, blocks)
    else:
        companions = {"absmax": plain_stored(f"{stored.name}.absmax", state.absmax)}
        if second is not None:
            companions["nested_absmax"] = plain_stored(f"{stored.name}.nested_absmax", second.absmax)
            companions["nested_quant_map"] = plain_stored(f"{stored.name}.nested_quant_map", second.code)
        recipe = bnb.four_bits(Candidate(plain_stored(stored.name, tensor), companions), blocks)
    return compose(replace(stored, problem=None), recipe)


def _packed_for_cpu(stored: Stored, tensor: torch.Tensor, absmax: torch.Tensor, blocks: bnb.Blocks) -> Recipe:
    """Return the recipe after a forward pass on a CPU: codes in another order, scales transposed and in bfloat16."""
    rows, columns = blocks.shape
    if tensor.numel() * 2 != blocks.numel or absmax.shape != (columns // blocks.size, rows) or rows % 32:
        raise SourceError(
            f"{stored.name!r} of shape {blocks.shape} was packed by bitsandbytes for CPUs in an unknown layout "
            f"({tuple(tensor.shape)} codes, {tuple(absmax.shape)} scales): rank the checkpoint, or the model before "
            "its first forward pass"
        )

    def dequantize(inputs: Any) -> torch.Tensor:
        codes = bnb.unpacked_from_cpu(inputs["codes"], (rows, columns))
        return bnb.dequantize_4bit(codes, inputs["scales"].t().float().flatten(), blocks).view(rows, columns)

    inputs = {"codes": plain_stored(stored.name, tensor), "scales": plain_stored(f"{stored.name}.absmax", absmax)}
    return Recipe(blocks.description, blocks.shape, blocks.dtype, inputs, dequantize, peak=8)


def _eight_bits(stored: Stored, tensor: torch.Tensor, holder: nn.Module | None) -> Stored | None:
    """Recognize an Int8Params; the first forward pass moves its scales from the parameter to the layer's state."""
    if tensor.dtype != torch.int8:
        return None
    scales = getattr(tensor, "SCB", None)
    if scales is None:
        scales = getattr(getattr(holder, "state", None), "SCB", None)
    if not isinstance(scales, torch.Tensor):
        return None
    owner = stored.name.removesuffix("weight")
    candidate = Candidate(plain_stored(stored.name, tensor), {"SCB": plain_stored(f"{owner}SCB", scales)})
    return compose(replace(stored, problem=None), bnb.eight_bits(candidate))


def _not_yet_quantized(stored: Stored, tensor: torch.Tensor, holder: nn.Module | None) -> Stored | None:
    """Recognize a parameter that bitsandbytes quantizes when it is moved to a device; until then it has the weights."""
    known = type(tensor).__name__ in ("Params4bit", "Int8Params")
    carries = any(getattr(tensor, name, None) is not None for name in ("quant_state", "SCB"))
    whole = tensor.is_floating_point() and not getattr(tensor, "bnb_quantized", False)
    if not known or carries or not whole:
        return None
    return replace(stored, problem=None, take=plain_stored(stored.name, tensor).take)


def _of_itself(stored: Stored, tensor: torch.Tensor, holder: nn.Module | None) -> Stored | None:
    """Recognize a tensor subclass that can be dequantized to a plain tensor of its shape and dtype."""
    kind = type(tensor)
    if kind in PLAIN or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return None
    dequantize = torchao.dequantizer(tensor)
    if dequantize is None:
        return None
    called = f"{kind.__module__.partition('.')[0]} {kind.__name__}"
    if (why := torchao.refusal(tensor, dequantize)) is not None:
        return replace(stored, problem=f"quantized or other tensor subclass {called}; {why}")
    cut = tensor.dim() == 3 and _can_be_cut(tensor)
    overhead = tensor.shape[-2:].numel() * torchao.peak_of(kind.__name__)
    if tensor.dim() > 2 and not cut:  # the whole stack is dequantized for each matrix
        overhead = tensor.numel() * (torchao.peak_of(kind.__name__) + tensor.dtype.itemsize)
    take = _Dequantized(tensor, dequantize, cut)
    return replace(stored, take=take, problem=None, quantization=called, overhead=overhead)


def _can_be_cut(tensor: torch.Tensor) -> bool:
    try:
        last = tensor.detach()[tensor.shape[0] - 1]  # indexing with 0 works even if experts share their scales
    except Exception:  # a subclass may raise anything if it does not support indexing
        return False
    dequantize = torchao.dequantizer(last)
    same = type(last) is type(tensor.detach()) and last.shape == tensor.shape[1:]
    return same and dequantize is not None and torchao.refusal(last, dequantize) is None


@dataclass(frozen=True)
class _Dequantized:
    """``Stored.take`` of a tensor that dequantizes itself; ``cut``: it can be indexed by expert first."""

    tensor: torch.Tensor
    dequantize: Callable[[torch.Tensor], torch.Tensor]
    cut: bool

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        part = self.tensor.detach()
        if self.cut and index and isinstance(index[0], int):
            part, index = part[index[0]], index[1:]
        if device is not None and part.device != device:
            part = part.to(device)
        values = self.dequantize(part)
        return values[index].clone() if index else values


def _of_layer(stored: Stored, tensor: torch.Tensor, holder: nn.Module | None) -> Stored | None:
    """Recognize an HQQLinear, which has its codes in W_q and everything else in a dictionary."""
    if holder is None or not any(c.__name__ == "HQQLinear" for c in type(holder).__mro__):
        return None
    meta = getattr(holder, "meta", None)
    if not stored.name.endswith("W_q") or not isinstance(meta, dict) or "shape" not in meta:
        return None
    shape, dtype = tuple(meta["shape"]), vars(holder)["compute_dtype"]
    names = tuple(dict.fromkeys((*(n.removesuffix("W_q") + "weight" for n in stored.names), *stored.names)))
    description = f"hqq {meta['nbits']} bits, groups of {meta['group_size']}"
    numel = shape[0] * shape[1]
    return replace(
        stored,
        names=names,
        shape=shape,
        dtype=dtype,
        take=_Layer(names[0], holder, shape),
        problem=None,
        quantization=description,
        overhead=numel * 3 * dtype.itemsize,
    )


@dataclass(frozen=True)
class _Layer:
    """``Stored.take`` of an HQQLinear; its dequantize() writes to ``meta``, so a copy of the layer is used."""

    name: str
    layer: nn.Module
    shape: tuple[int, ...]

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        worker: Any = copy.copy(self.layer)
        worker.meta = dict(worker.meta)
        values: torch.Tensor = worker.dequantize().detach()
        if tuple(values.shape) != self.shape:
            raise SourceError(
                f"{self.name!r}: dequantize() of {type(self.layer).__name__} returns {tuple(values.shape)} instead of "
                f"{self.shape}: rank the model before it is quantized, or leave it out with exclude={self.name!r}",
                says_exclude=True,
            )
        return values[index].clone() if index else values


def plain_stored(name: str, tensor: torch.Tensor) -> Stored:
    """Return a tensor in memory as a Stored with a name, as a plain torch.Tensor without the subclass."""
    plain = tensor.detach().as_subclass(torch.Tensor)

    def take(index: Index, device: torch.device | None = None) -> torch.Tensor:
        return plain[index] if index else plain

    return Stored((name,), tuple(plain.shape), plain.dtype, plain.device, take)


def _parametrized(name: str) -> str:
    """Return ``a.w`` for ``a.parametrizations.w.original``."""
    return name.removesuffix(".original").replace("parametrizations.", "")
