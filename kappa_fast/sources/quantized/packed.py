"""GPTQ and AWQ: integers of a few bits in int32 words, with a scale and a zero point for each group of inputs.

GPTQ follows ``PackableQuantLinear.dequantize_weight`` of gptqmodel and the QuantLinear of AutoGPTQ before it, AWQ
``dequantize_gemm`` of AutoAWQ: (code - zero point) * scale, in the dtype of the scales (float16 as a rule). Both store
the transposed weight. Which is which can be told by shape: GPTQ packs along the inputs, AWQ along the outputs.
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
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the field of a word that holds each column
_METHODS = {"", "gptq", "awq", "auto-round", "intel/auto-round"}
# What configs call the layouts that are read here; others store other things under the same names. A version is not
# a word in every config: llm-compressor's and AutoRound's are numbers.
_LAYOUTS = {"none", "gptq", "gptq_v2", "gemm", "exllama"}
_LAYOUTS |= {f"auto_round:{word}" for word in ("auto_gptq", "gptq", "auto_awq", "awq")}
_NUMBERS = re.compile(r"[\d.]+")
_FEW = 32  # so many equal zero points are no coincidence


class PackedInts:
    """``qweight`` with ``scales`` and ``qzeros``, and GPTQ's ``g_idx``."""

    name = "gptq, awq"

    def recognize(self, candidate: Candidate, /) -> Recipe | None:
        """Raises SourceError for a companion that is missing, though the config promises one, or that does not fit."""
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
    # Not from the config: layers may differ from it ("dynamic").
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
        raise refuse(candidate, scales, f"{groups} groups of {inputs} inputs leave open which belongs to which")
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
        raise refuse(candidate, scales, f"{groups} groups of {codes.shape[0]} inputs leave open which belongs to which")
    return Recipe(
        quantization=f"awq 4 bits, groups of {group}",
        shape=(outputs, codes.shape[0]),
        dtype=scales.dtype or torch.float16,
        inputs={"codes": codes, "scales": scales, "zeros": zeros},
        dequantize=partial(_dequantize_awq, group=group),
        peak=3,
    )


def _group_size(candidate: Candidate, scales: Stored, inputs: int, groups: int) -> int | None:
    """Inputs in a group; None where it cannot be told. Raises SourceError where the config says something else."""
    configured = whole_number(candidate.config, "group_size", "q_group_size")
    if configured == -1:
        configured = inputs
    found = block_size(inputs, groups, configured)
    layers_differ = bool(candidate.config.get("dynamic"))
    if configured is not None and not layers_differ and -(-inputs // max(configured, 1)) != groups:
        raise refuse(candidate, scales, f"groups of {configured} inputs are what the config says")
    return found if found is not None or not layers_differ else block_size(inputs, groups, None)


def _zero_offset(config: Mapping[str, Any]) -> int | None:
    """What is added to a stored zero point: 1 in the first version of GPTQ's format, 0 in the second, None: unknown."""
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
    # In the first version 0 is stored as the largest zero point.
    zeros = (zeros.int() + offset) & ((1 << bits) - 1)
    if isinstance(groups, torch.Tensor) and group is not None and _in_turn(groups, group):
        groups = group
    return affine(codes, scales, zeros, groups if groups is not None else codes.shape[1])


def _in_turn(order: torch.Tensor, group: int) -> bool:
    """Whether the inputs are in the order of their groups, as they are unless desc_act says otherwise."""
    return torch.equal(order, (torch.arange(len(order), device=order.device) // group).to(order.dtype))


def checked_groups(order: torch.Tensor, groups: int, name: str) -> torch.Tensor:
    """``order`` (``g_idx``) if it names only groups that have scales.

    Raises:
        SourceError: it does not.
    """
    low, high = int(order.min()), int(order.max())
    if 0 <= low <= high < groups:
        used = int((torch.bincount(order.flatten().long(), minlength=groups) > 0).sum())
        if used == groups:
            return order
        raise SourceError(
            f"g_idx of {name!r} puts its inputs into {used} groups, but there are scales for {groups}, each for some "
            "inputs: correct g_idx, or download the file again"
        )
    raise SourceError(
        f"g_idx of {name!r} names groups from {low} to {high}, but there are scales for {groups}: download it again"
    )


def _offset_of(zeros: torch.Tensor, bits: int, name: str) -> int:
    """Symmetric quantization has its zero point in the middle, which tells the version where nothing else does."""
    middle = 1 << (bits - 1)
    low, high = int(zeros.min()), int(zeros.max())
    if low == high and low in (middle - 1, middle):
        return middle - low
    raise SourceError(
        f"nothing says whether the zero points of {name!r} are those of GPTQ's first or second version, which differ "
        "by 1: give the checkpoint's directory with its config.json"
    )


def _check_version(zeros: torch.Tensor, bits: int, name: str, offset: int, symmetric: bool) -> None:
    """Refuse symmetric zero points of the version that the config does not say.

    Symmetric quantization puts them in the middle: stored as that less 1 in the first version, as that in the second.
    Anything else is asymmetric, and tells nothing.
    """
    middle = 1 << (bits - 1)
    low, high = int(zeros.min()), int(zeros.max())
    if low == high == middle - 1 + offset and (symmetric or zeros.numel() >= _FEW):
        says, means = ("gptq", "gptq_v2") if offset else ("gptq_v2", "gptq")
        raise SourceError(
            f"all zero points of {name!r} are stored as {low}, the middle as the format {means!r} has it, but the "
            f"config says {says!r}: set checkpoint_format in quantization_config to {means!r}, or, if that is not so, "
            "download the file again"
        )


def _dequantize_awq(inputs: Mapping[str, torch.Tensor], *, group: int) -> torch.Tensor:
    scales = inputs["scales"]
    codes, zeros = (fields(inputs[role], 4, scales.shape[1], AWQ_ORDER).t() for role in ("codes", "zeros"))
    return affine(codes.contiguous(), scales.t(), zeros, group)
