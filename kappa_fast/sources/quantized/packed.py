"""GPTQ and AWQ: integers of a few bits in int32 words, with a scale and a zero point for each group of inputs.

GPTQ follows ``PackableQuantLinear.dequantize_weight`` of gptqmodel and the earlier QuantLinear of AutoGPTQ; AWQ follows
``dequantize_gemm`` of AutoAWQ: (code - zero point) * scale, in the dtype of the scales (usually float16). Both store
the transposed weight. The shapes differ: GPTQ packs along the inputs, AWQ along the outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ...errors import SourceError
from ..base import Stored
from .config import is_left_plain, method_of, whole_number
from .recipe import Candidate, Recipe, refuse
from .unpack import WORD, affine, block_size, fields

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
GPTQ_BITS = (2, 3, 4, 8)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # for each column, its field in a word
_METHODS = {"", "gptq", "awq", "auto-round", "intel/auto-round"}
# The names of supported layouts in configs; other layouts use the same names of tensors for other contents. Some
# configs (llm-compressor, AutoRound) have numbers of versions instead.
_LAYOUTS = {"none", "gptq", "gptq_v2", "gemm", "exllama"}
_LAYOUTS |= {f"auto_round:{word}" for word in ("auto_gptq", "gptq", "auto_awq", "awq")}
_NUMBERS = re.compile(r"[\d.]+")
_FEW = 32  # fewer equal zero points may be a coincidence


class PackedInts:
    """Recognizes ``qweight`` with ``scales`` and ``qzeros``, and GPTQ's ``g_idx``."""

    name = "gptq, awq"

    def recognize(self, candidate: Candidate, /) -> Recipe | None:
        """See ``Family``. Raises SourceError if a companion does not fit, or is missing although the config has one."""
        codes, config = candidate.codes, candidate.config
        if not candidate.name.endswith("qweight") or codes.dtype != torch.int32 or len(codes.shape) != 2:
            return None
        stated = [config.get(key) for key in ("checkpoint_format", "format", "packing_format", "version")]
        if not all(str(word).lower() in _LAYOUTS or _NUMBERS.fullmatch(str(word)) for word in stated):
            return None
        if method_of(config) not in _METHODS or 0 in codes.shape:
            return None
        scales, zeros = candidate.find("scales"), candidate.find("qzeros")
        if scales is None or zeros is None:
            lacking = "scales" if scales is None else "qzeros"
            if method_of(config) == "" or is_left_plain(candidate.plain_name, config):
                return None
            raise candidate.missing(lacking)
        if scales.dtype not in FLOATS or len(scales.shape) != 2 or 0 in scales.shape:
            raise refuse(candidate, scales, "scales are float16, bfloat16 or float32, a row for each group of inputs")
        if zeros.dtype != torch.int32 or len(zeros.shape) != 2 or zeros.shape[0] != scales.shape[0]:
            raise refuse(candidate, zeros, "zero points are packed into int32, a row for each row of scales")
        along_inputs = codes.shape[1] == scales.shape[1]
        if method_of(config) == "gptq" or (method_of(config) != "awq" and along_inputs):
            return _gptq(candidate, scales, zeros)
        return _awq(candidate, scales, zeros)


def _gptq(candidate: Candidate, scales: Stored, zeros: Stored) -> Recipe:
    groups, outputs = scales.shape
    if candidate.codes.shape[1] != outputs:
        raise refuse(candidate, scales, "as many columns as qweight has are expected")
    # Layers may differ from the config ("dynamic"), so the bits follow from the shapes.
    bits = next((b for b in GPTQ_BITS if zeros.shape[1] * WORD == outputs * b), None)
    if bits is None or candidate.codes.shape[0] * WORD % bits:
        raise refuse(candidate, zeros, f"{outputs} zero points of 2, 3, 4 or 8 bits do not fill it")
    inputs = candidate.codes.shape[0] * WORD // bits
    read = {"codes": candidate.codes, "scales": scales, "zeros": zeros}
    order = candidate.find("g_idx")
    group = _group_size(candidate, scales, inputs, groups)
    if order is not None:
        if order.shape != (inputs,) or order.dtype not in (torch.int32, torch.int64):
            raise refuse(candidate, order, f"the group of each of {inputs} inputs as an int32 is expected")
        read["g_idx"] = order
    elif group is None:
        raise refuse(candidate, scales, f"{groups} groups of {inputs} inputs do not determine the size of a group")
    size = (
        f"groups of {group}" if group is not None and groups > 1 else f"{groups} groups" if groups > 1 else "one group"
    )
    return Recipe(
        quantization=f"gptq {bits} bits, {size}",
        shape=(outputs, inputs),
        dtype=scales.dtype or torch.float16,
        inputs=read,
        dequantize=partial(
            _dequantize_gptq,
            name=candidate.name,
            bits=bits,
            group=group,
            offset=_zero_offset(candidate.config),
            symmetric=candidate.config.get("sym") is True,
        ),
        peak=3 if bits != 3 else 17,
    )


def _awq(candidate: Candidate, scales: Stored, zeros: Stored) -> Recipe:
    codes = candidate.codes
    groups, outputs = scales.shape
    if codes.shape[1] * 8 != outputs:
        raise refuse(candidate, scales, "a scale for each output is expected, eight for each column of qweight")
    if zeros.shape != (groups, codes.shape[1]):
        raise refuse(candidate, zeros, f"{outputs} zero points of 4 bits do not fill it")
    group = _group_size(candidate, scales, codes.shape[0], groups)
    if group is None or codes.shape[0] % group:
        why = f"{groups} groups of {codes.shape[0]} inputs do not determine the size of a group"
        raise refuse(candidate, scales, why)
    return Recipe(
        quantization=f"awq 4 bits, groups of {group}",
        shape=(outputs, codes.shape[0]),
        dtype=scales.dtype or torch.float16,
        inputs={"codes": codes, "scales": scales, "zeros": zeros},
        dequantize=partial(_dequantize_awq, group=group),
        peak=3,
    )


def _group_size(candidate: Candidate, scales: Stored, inputs: int, groups: int) -> int | None:
    """Return the inputs in a group, or None if unknown. Raises SourceError if the config contradicts the shapes."""
    configured = whole_number(candidate.config, "group_size", "q_group_size")
    if configured == -1:
        configured = inputs
    found = block_size(inputs, groups, configured)
    layers_differ = bool(candidate.config.get("dynamic"))
    if configured is not None and not layers_differ and -(-inputs // max(configured, 1)) != groups:
        raise refuse(candidate, scales, f"the config says groups of {configured} inputs")
    return found if found is not None or not layers_differ else block_size(inputs, groups, None)


def _zero_offset(config: Mapping[str, Any]) -> int | None:
    """Return what is added to a stored zero point: 1 in version 1 of GPTQ's format, 0 in version 2, None if unknown."""
    stated = {str(config.get(key)).lower() for key in ("checkpoint_format", "format")}
    if "gptq_v2" in stated:
        return 0
    return 1 if method_of(config) == "gptq" else None


def _dequantize_gptq(
    inputs: Mapping[str, torch.Tensor],
    *,
    name: str,
    bits: int,
    group: int | None,
    offset: int | None,
    symmetric: bool,
) -> torch.Tensor:
    scales = inputs["scales"].t()  # (outputs, groups)
    groups: torch.Tensor | int | None = group
    if "g_idx" in inputs:
        groups = checked_groups(inputs["g_idx"], scales.shape[1], name)
    codes = fields(inputs["codes"].t().contiguous(), bits, inputs["codes"].shape[0] * WORD // bits)
    zeros = fields(inputs["zeros"], bits, scales.shape[0]).t()
    if offset is None:
        offset = _offset_of(zeros, bits, name)
    else:
        _check_version(zeros, bits, name, offset, symmetric)
    # Version 1 stores the zero point 0 as the largest code.
    zeros = (zeros.int() + offset) & ((1 << bits) - 1)
    if isinstance(groups, torch.Tensor) and group is not None and _are_consecutive(groups, group):
        groups = group
    return affine(codes, scales, zeros, groups if groups is not None else codes.shape[1])


def _are_consecutive(order: torch.Tensor, group: int) -> bool:
    """Return whether the inputs of each group are consecutive, as without desc_act."""
    return torch.equal(order, (torch.arange(len(order), device=order.device) // group).to(order.dtype))


def checked_groups(order: torch.Tensor, groups: int, name: str) -> torch.Tensor:
    """Return ``order`` (``g_idx``) if its groups are exactly those that have scales.

    Raises:
        SourceError: they are not.
    """
    low, high = int(order.min()), int(order.max())
    if 0 <= low <= high < groups:
        used = int((torch.bincount(order.flatten().long(), minlength=groups) > 0).sum())
        if used == groups:
            return order
        raise SourceError(
            f"g_idx of {name!r} has inputs in {used} groups, but there are scales for {groups}, each of which needs "
            "inputs: correct g_idx, or download the file again"
        )
    raise SourceError(
        f"g_idx of {name!r} has groups from {low} to {high}, but there are scales for {groups}: download it again"
    )


def _offset_of(zeros: torch.Tensor, bits: int, name: str) -> int:
    """Return the offset of symmetric zero points, which are in the middle of the range, without help of a config."""
    middle = 1 << (bits - 1)
    low, high = int(zeros.min()), int(zeros.max())
    if low == high and low in (middle - 1, middle):
        return middle - low
    raise SourceError(
        f"the zero points of {name!r} may be those of version 1 or 2 of GPTQ's format, which differ by 1, and no "
        "config says which: give the checkpoint's directory with its config.json"
    )


def _check_version(zeros: torch.Tensor, bits: int, name: str, offset: int, symmetric: bool) -> None:
    """Refuse symmetric zero points of another version than the config says.

    Symmetric zero points are in the middle of the range; version 1 stores them less 1. Asymmetric ones prove nothing.

    Raises:
        SourceError: the zero points are those of the other version.
    """
    middle = 1 << (bits - 1)
    low, high = int(zeros.min()), int(zeros.max())
    if low == high == middle - 1 + offset and (symmetric or zeros.numel() >= _FEW):
        says, means = ("gptq", "gptq_v2") if offset else ("gptq_v2", "gptq")
        raise SourceError(
            f"all zero points of {name!r} are stored as {low}, which is the middle in the format {means!r}, but the "
            f"config says {says!r}: set checkpoint_format in quantization_config to {means!r}, or, if the config is "
            "right, download the file again"
        )


def _dequantize_awq(inputs: Mapping[str, torch.Tensor], *, group: int) -> torch.Tensor:
    scales = inputs["scales"]
    codes, zeros = (fields(inputs[role], 4, scales.shape[1], AWQ_ORDER).t() for role in ("codes", "zeros"))
    return affine(codes.contiguous(), scales.t(), zeros, group)
