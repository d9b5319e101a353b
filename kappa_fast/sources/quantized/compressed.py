"""compressed-tensors (llm-compressor, vLLM): packed and plain integers, and NVFP4; also NVFP4 of modelopt.

Integers follow ``dequantize`` of compressed_tensors: (code - zero point) * scale in the dtype of the scales. NVFP4 has
an E4M3 scale for each 16 weights, and one scale for the matrix: ``weight_global_scale`` of compressed-tensors divides,
``weight_scale_2`` of modelopt multiplies; both are computed in float32. FP8 is in ``fp8.py``, MXFP4 in ``mxfp4.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from ..base import Stored
from .config import is_left_plain, method_of, scheme_of, whole_number
from .packed import FLOATS, checked_groups
from .recipe import Candidate, Recipe, fills_tiles, in_unknown_order, refuse
from .unpack import WORD, affine, block_size, e2m1, fields, times_blocks

BITS = (2, 4, 8)  # three bits have two layouts with the same name
NVFP4_BLOCK = 16
_METHODS = {"", "compressed-tensors"}


class CompressedInts:
    """Recognizes ``weight_packed`` in int32 (pack-quantized) or ``weight`` in int8 (int-quantized) with scales."""

    name = "compressed-tensors"

    def recognize(self, candidate: Candidate, /) -> Recipe | None:
        """See ``Family``. Raises SourceError if a companion does not fit, or is missing although the config has one."""
        codes, config = candidate.codes, candidate.config
        packed = codes.dtype == torch.int32 and candidate.name.endswith("weight_packed")
        plain = codes.dtype == torch.int8 and candidate.name.endswith("weight")
        if not (packed or plain) or method_of(config) not in _METHODS or len(codes.shape) not in (2, 3):
            return None
        if 0 in codes.shape or codes.device.type == "meta" or config.get("format") == "marlin-24":
            return None
        scale, zero = candidate.find("scale"), candidate.find("zero_point")
        if scale is None:
            promised = method_of(config) != "" and not is_left_plain(candidate.plain_name, config)
            if promised and not candidate.companions.keys() - {"shape", "zero_point"}:
                raise candidate.missing("weight_scale")
            return None
        if scale.dtype not in FLOATS:
            raise refuse(candidate, scale, "scales are float16, bfloat16 or float32")
        return _ints(candidate, scale, zero, packed)


def _ints(candidate: Candidate, scale: Stored, zero: Stored | None, packed: bool) -> Recipe | None:
    codes, scheme = candidate.codes, scheme_of(candidate.plain_name, candidate.config)
    bits, shape = 8, codes.shape
    if packed:
        shape = _logical_shape(candidate)
        stated = whole_number(scheme, "num_bits")
        fitting = [b for b in (BITS if stated is None else (stated,)) if -(-shape[-1] * b // WORD) == codes.shape[-1]]
        if len(fitting) != 1:
            why = f"{stated} bits per weight do not fit" if stated else "no number of bits per weight fits"
            raise refuse(candidate, candidate.companions["shape"], why)
        bits = fitting[0]
        if bits not in BITS:
            return None
    groups = _groups(candidate, scale, shape)
    size = whole_number(scheme, "group_size")
    group = block_size(shape[-1], groups, size if size is not None and size > 0 else None)
    order = candidate.find("g_idx")
    if order is not None and (order.shape != shape[-1:] or order.dtype not in (torch.int32, torch.int64)):
        raise refuse(candidate, order, f"the group of each of {shape[-1]} inputs as an int32 is expected")
    if group is None:
        raise refuse(candidate, scale, f"{groups} groups of {shape[-1]} inputs do not determine the size of a group")
    if zero is not None:
        _check_zero(candidate, scale, zero, bits if packed else None)
    elif scheme.get("symmetric") is False:
        raise candidate.missing("weight_zero_point")
    found = {"codes": codes, "scale": scale, "zero": zero, "g_idx": order}
    return Recipe(
        quantization=f"int{bits}, {_described(scale, groups, group)} (compressed-tensors)",
        shape=shape,
        dtype=scale.dtype or torch.bfloat16,
        inputs={role: stored for role, stored in found.items() if stored is not None},
        dequantize=partial(
            _dequantize_ints,
            name=candidate.name,
            bits=bits,
            packed=packed,
            group=group,
            columns=shape[-1],
            groups=groups,
        ),
        peak=3 if packed or order is not None else 0,
    )


def _logical_shape(candidate: Candidate) -> tuple[int, ...]:
    """Return the shape in ``weight_shape``; it has to be read, since packing rounds columns up to whole words."""
    stored = candidate.find("shape")
    if stored is None:
        raise candidate.missing("weight_shape")
    rank = len(candidate.codes.shape)
    if stored.shape != (rank,) or stored.dtype not in (torch.int32, torch.int64):
        raise refuse(candidate, stored, f"{rank} integers are expected")
    shape = tuple(int(size) for size in stored.take(()))
    if shape[:-1] != candidate.codes.shape[:-1] or shape[-1] < 1:
        raise refuse(candidate, stored, f"the shape in it is {shape}")
    return shape


def _groups(candidate: Candidate, scale: Stored, shape: tuple[int, ...]) -> int:
    """Return the number of scales along the columns; there is one row of scales for all rows, or one for each."""
    above = shape[:-1]
    if scale.shape in (above, (*above, 1)) or (scale.numel == 1 and len(shape) == 2):
        return 1
    if len(scale.shape) == len(shape) and scale.shape[:-1] == above and scale.shape[-1] > 0:
        return scale.shape[-1]
    raise refuse(candidate, scale, "one scale, one for each row or one for each group of a row is expected")


def _check_zero(candidate: Candidate, scale: Stored, zero: Stored, bits: int | None) -> None:
    """Raise SourceError unless zero points are int8 in the shape of the scales, or packed along the rows."""
    if bits is None or zero.dtype == torch.int8:
        good = zero.dtype == torch.int8 and zero.shape == scale.shape
    else:
        good = zero.dtype == torch.int32 and len(scale.shape) > 1
        good = good and zero.shape == (*scale.shape[:-2], -(-scale.shape[-2] * bits // WORD), scale.shape[-1])
    if not good:
        raise refuse(candidate, zero, f"zero points do not match scales of shape {scale.shape}")


def _described(scale: Stored, groups: int, group: int) -> str:
    if groups > 1:
        return f"groups of {group}"
    return "one scale" if scale.numel == 1 else "a scale for each row"


def _dequantize_ints(
    inputs: Mapping[str, torch.Tensor],
    *,
    name: str,
    bits: int,
    packed: bool,
    group: int,
    columns: int,
    groups: int,
) -> torch.Tensor:
    scale, zero = inputs["scale"].reshape(-1, groups), inputs.get("zero")
    codes = fields(inputs["codes"], bits, columns) if packed else inputs["codes"]
    if zero is not None and zero.dtype == torch.int32:
        zero = fields(zero.t(), bits, scale.shape[0]).t()  # unsigned, as the codes
    elif packed:  # codes are unsigned, zero points are signed
        middle = torch.full((1, 1), 1 << (bits - 1), dtype=torch.int32, device=codes.device)
        zero = middle if zero is None else zero.reshape(-1, groups).int() + middle
    elif zero is not None:
        zero = zero.reshape(-1, groups)
    order = inputs.get("g_idx")
    if order is None or int(order.max()) == -1:  # all are -1: the order was never set
        return affine(codes, scale, zero, group)
    return affine(codes, scale, zero, checked_groups(order, groups, name))


class NVFP4:
    """Recognizes four-bit floats in uint8 with E4M3 scales and one float32 scale for the matrix."""

    name = "nvfp4"

    def recognize(self, candidate: Candidate, /) -> Recipe | None:
        """See ``Family``. Raises SourceError if the scales do not fit the codes."""
        codes = candidate.codes
        whole, divides = candidate.find("global_scale"), True
        if not candidate.name.endswith("weight_packed"):
            whole, divides = candidate.find("scale_2"), False
        scale = candidate.find("scale")
        if codes.dtype != torch.uint8 or len(codes.shape) not in (2, 3) or scale is None or whole is None:
            return None
        *above, half = codes.shape
        if (
            scale.dtype != torch.float8_e4m3fn
            or scale.shape != (*above, half * 2 // NVFP4_BLOCK)
            or half * 2 % NVFP4_BLOCK
        ):
            raise refuse(candidate, scale, f"an E4M3 scale for each {NVFP4_BLOCK} weights (8 bytes) is expected")
        if not divides and method_of(candidate.config) == "" and fills_tiles(scale.shape):
            raise in_unknown_order(candidate, "modelopt")
        if whole.dtype != torch.float32 or (whole.numel != 1 and whole.shape != codes.shape[: len(codes.shape) - 2]):
            raise refuse(candidate, whole, "one float32, or one for each expert, is expected")
        return Recipe(
            quantization="nvfp4",
            shape=(*above, half * 2),
            dtype=torch.float32,
            inputs={"codes": codes, "scale": scale, "whole": whole},
            dequantize=partial(_dequantize_nvfp4, divides=divides),
            peak=5,
        )


def _dequantize_nvfp4(inputs: Mapping[str, torch.Tensor], *, divides: bool) -> torch.Tensor:
    scale, whole = inputs["scale"].to(torch.float32), inputs["whole"].reshape(1, 1)
    scale = scale / whole if divides else scale * whole
    return times_blocks(e2m1(inputs["codes"], torch.float32), scale, (1, NVFP4_BLOCK))
