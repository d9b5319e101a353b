"""torchao: tensor subclasses that dequantize themselves, in models and in safetensors files of torchao.

In a file a quantized weight ``q_proj.weight`` consists of tensors ``q_proj._weight_qdata``, ``q_proj._weight_scale``
and so on; JSON in the header of the file says which subclass they form (torchao.prototype.safetensors).
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import SourceError, missing_extra
from ...io.documents import parse_json
from ...results.entries import Index
from .. import codes
from ..base import Stored, release_of
from .recipe import Candidate, Recipe

CODES = "qdata"

# Measured bytes per weight that dequantize() needs in addition to its result; _PEAK for classes that are not listed.
_PEAKS = {"NVFP4Tensor": 29, "NF4Tensor": 13, "MXTensor": 3, "IntxUnpackedToInt8Tensor": 3}
_PEAK = 9

Dequantize = Callable[[torch.Tensor], torch.Tensor]


def dequantizer(tensor: torch.Tensor) -> Dequantize | None:
    """Return a function that dequantizes a tensor subclass, or None if there is none.

    The function is ``dequantize`` of the subclass, or ``get_original_weight`` of torchao's NF4Tensor. For torchao's
    Int4Tensor, which only its GPU kernels can read, it is ``_int4``.
    """
    kind = type(tensor)
    if callable(getattr(kind, "get_original_weight", None)):
        return lambda t: t.get_original_weight()  # type: ignore[attr-defined]
    if kind.__name__ == "Int4Tensor" and hasattr(tensor, "zero_point"):
        return _int4
    if kind.dequantize is torch.Tensor.dequantize:
        return None
    return lambda t: t.dequantize()


def peak_of(kind: str) -> int:
    """Return the bytes per weight that a tensor subclass needs while it is dequantized, in addition to the result."""
    return _PEAKS.get(kind, _PEAK)


def refusal(tensor: torch.Tensor, dequantize: Dequantize) -> str | None:
    """Return why ``dequantize`` does not return a plain tensor of the same shape and dtype, or None.

    It is tried on the meta device.
    """
    try:
        empty = tensor.detach().to("meta")
        found = dequantize(empty)
    except Exception as error:  # a subclass may raise anything
        return f"dequantize() fails: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    if type(found) is not torch.Tensor or found.shape != tensor.shape or found.dtype != tensor.dtype:
        return f"dequantize() returns {type(found).__name__} of shape {tuple(found.shape)}, {found.dtype}"
    return None


def _int4(tensor: Any) -> torch.Tensor:
    """Dequantize an Int4Tensor: code times scale plus zero point, in float32, rounded once.

    A byte has two signed codes, the first in the lower half. ``scale`` and ``zero_point`` are [groups, rows], or
    [experts, groups, rows], as ``int4_row_quantize_zp`` of MSLK (formerly FBGEMM) computes them for torchao's kernels.
    """
    packed = tensor.qdata.view(torch.int8)
    values = torch.stack([(packed << 4) >> 4, packed >> 4], -1).flatten(-2).float()  # shifts of int8 extend the sign
    scale, zero = (t.float().transpose(-1, -2).unsqueeze(-1) for t in (tensor.scale, tensor.zero_point))
    grouped = values.view(*scale.shape[:-1], -1)
    return grouped.mul_(scale).add_(zero).flatten(-2).to(tensor.dtype)


class Torchao:
    """Recognizes the tensors of a file by their names and the header."""

    name = "torchao"

    def recognize(self, candidate: Candidate, /) -> Recipe | str | None:
        """See ``Family``.

        Raises:
            SourceError: a part is missing, or the description in the header is not valid.
            MissingExtraError: torchao is not installed.
        """
        if not candidate.name.endswith("_" + CODES):
            return None
        name = codes.weight_name(candidate.name)
        said = candidate.header.get(name)
        if said is None:
            raise SourceError(
                f"{candidate.name!r} is quantized by torchao, but the header of its file does not describe {name!r}: "
                "give the path of the checkpoint as torchao wrote it"
            )
        if importlib.util.find_spec("torchao") is None:
            raise missing_extra("torchao", "torchao", f"{name!r}, quantized by torchao,")
        recipe = _recipe(name, _description(name, said), candidate)
        return recipe if isinstance(recipe, str) else replace(recipe, detail=f"{said} by {release_of('torchao')}")


def _description(name: str, said: str) -> Mapping[str, Any]:
    try:
        description = parse_json(said.encode("utf-8", "surrogatepass"), name)
        kind, parts = description["_type"], description["_tensor_data_names"]
        if not isinstance(kind, str) or not isinstance(parts, list) or not isinstance(description["_data"], dict):
            raise TypeError("not a description of a tensor")
    except SourceError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(name, error) from error
    return description


def _recipe(name: str, description: Mapping[str, Any], candidate: Candidate) -> Recipe | str:
    parts = {CODES: candidate.codes}
    for part in description["_tensor_data_names"]:
        if part == CODES:
            continue
        if part not in candidate.companions:
            raise candidate.missing(f"{candidate.name.removesuffix(CODES)}{part}")
        parts[part] = candidate.companions[part]
    kind, peak = f"torchao {description['_type']}", peak_of(description["_type"])
    empty = {part: torch.empty(s.shape, dtype=s.dtype, device="meta") for part, s in parts.items()}
    whole = _made(name, description, empty)
    dequantize = dequantizer(whole)
    why = refusal(whole, dequantize) if dequantize is not None else "it has no dequantize()"
    if why is not None:
        return f"quantized by {kind}, which cannot be dequantized ({why}): rank the model before it is quantized"
    shape, dtype = tuple(whole.shape), whole.dtype
    experts = shape[0] if len(shape) == 3 else 0
    one = _of_one_expert(name, description, shape, parts) if experts else None
    if one is not None:

        def of_expert(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            stacked = {p: t if t.shape == parts[p].shape else t.unsqueeze(0) for p, t in inputs.items()}
            return _dequantized(name, one, stacked)[0]

        return Recipe(kind, shape, dtype, parts, of_expert, peak)
    if experts:  # the parts cannot be split by expert
        every = Stored((name,), shape, dtype, candidate.codes.device, _Whole(name, description, parts))
        return Recipe(kind, shape, dtype, {"weights": every}, lambda i: i["weights"], (peak + dtype.itemsize) * experts)
    return Recipe(kind, shape, dtype, parts, lambda inputs: _dequantized(name, description, inputs), peak)


def _of_one_expert(
    name: str, description: Mapping[str, Any], shape: tuple[int, ...], parts: Mapping[str, Stored]
) -> Mapping[str, Any] | None:
    """Return the description of a stack with one expert; None if experts share scales or the like."""
    one = copy.deepcopy(dict(description))
    if "shape" in one["_data"]:
        one["_data"]["shape"] = [1, *shape[1:]]
    cut = {part: (1, *s.shape[1:]) if s.shape[:1] == shape[:1] else s.shape for part, s in parts.items()}
    shared = [size for part, size in cut.items() if size == parts[part].shape and math.prod(size) > 1]
    if shared and shape[0] > 1:
        return None
    try:
        empty = {p: torch.empty(size, dtype=parts[p].dtype, device="meta") for p, size in cut.items()}
        stack = _made(name, one, empty)
    except SourceError:
        return None
    dequantize = dequantizer(stack)
    fits = stack.shape == (1, *shape[1:]) and dequantize is not None and refusal(stack, dequantize) is None
    return one if fits else None


def _made(name: str, description: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Build the tensor subclass from its description and its parts.

    Raises:
        SourceError: torchao does not know the subclass, or cannot build it.
    """
    from torchao.prototype.safetensors.safetensors_utils import ALLOWED_TENSORS_SUBCLASSES, object_from_dict

    if description["_type"] not in ALLOWED_TENSORS_SUBCLASSES:
        raise SourceError(
            f"{name!r} is quantized by torchao as {description['_type']}, which the installed version of torchao does "
            "not know: install a newer one, or rank the model before it is quantized"
        )
    filled = {"_type": description["_type"], "_data": {**description["_data"], **parts}}
    try:
        made: torch.Tensor = object_from_dict(filled)
    except Exception as error:  # a constructor may raise anything for arguments from a file
        raise _unreadable(name, error) from error
    return made


def _dequantized(name: str, description: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tensor = _made(name, description, parts)
    dequantize = dequantizer(tensor)
    assert dequantize is not None  # _recipe() has checked the same class on the meta device
    return dequantize(tensor)


@dataclass(frozen=True)
class _Whole:
    """``Stored.take`` of the weights of one expert, or of all, if only the whole stack can be dequantized."""

    name: str
    description: Mapping[str, Any]
    parts: Mapping[str, Stored]

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        values = _dequantized(self.name, self.description, {p: s.take(()) for p, s in self.parts.items()})
        return values[index].clone() if index else values


def _unreadable(name: str, error: Exception) -> SourceError:
    return SourceError(
        f"{name!r} is quantized by torchao, but its parts are not valid ({error!r}): download the checkpoint again"
    )
