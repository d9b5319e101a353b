"""GPTQ and AWQ: integers of a few bits in int32 words, with a scale and a zero point for each group of inputs.

GPTQ follows ``PackableQuantLinear.dequantize_weight`` of gptqmodel and the QuantLinear of AutoGPTQ before it, AWQ
``dequantize_gemm`` of AutoAWQ: (code - zero point) * scale, in the dtype of the scales (float16 as a rule). Both store
the transposed weight. Which is which can be told by shape: GPTQ packs along the inputs, AWQ along the outputs.
"""

from __future__ import annotations

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
# Layouts of other kernels under the same names.
_OTHER_LAYOUTS = {"marlin", "bitblas", "gemv", "gemv_fast", "llm-awq", "ipex"}


class PackedInts:
    """``qweight`` with ``scales`` and ``qzeros``, and GPTQ's ``g_idx``."""

    name = "gptq, awq"

    def recognize(self, candidate: Candidate, /) -> Recipe | None:
        """Raises SourceError for a companion that is missing, though the config promises one, or that does not fit."""
        codes, config = candidate.codes, candidate.config
        if not candidate.name.endswith("qweight") or codes.dtype != torch.int32 or len(codes.shape) != 2:
            return None
        layouts = {str(config.get(key)).lower() for key in ("checkpoint_format", "format", "version")}
        if method_of(config) not in _METHODS or not layouts.isdisjoint(_OTHER_LAYOUTS) or 0 in codes.shape:
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
            _dequantize_gptq, name=candidate.name, bits=bits, group=group, offset=_zero_offset(candidate.config)
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
    inputs: Mapping[str, torch.Tensor], *, name: str, bits: int, group: int | None, offset: int | None
) -> torch.Tensor:
    scales = inputs["scales"].t()  # (outputs, groups)
    groups: torch.Tensor | int | None = group
    if "g_idx" in inputs:
        groups = checked_groups(inputs["g_idx"], scales.shape[1], name)
    codes = fields(inputs["codes"].t().contiguous(), bits, inputs["codes"].shape[0] * WORD // bits)
    zeros = fields(inputs["zeros"], bits, scales.shape[0]).t()
    if offset is None:
        offset = _offset_of(zeros, bits, name)
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
        return order
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


def _dequantize_awq(inputs: Mapping[str, torch.Tensor], *, group: int) -> torch.Tensor:
    scales = inputs["scales"]
    codes, zeros = (fields(inputs[role], 4, scales.shape[1], AWQ_ORDER).t() for role in ("codes", "zeros"))
    return affine(codes.contiguous(), scales.t(), zeros, group)
