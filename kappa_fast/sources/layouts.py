"""How parameters are cut into matrices: stacks of experts, fused projections, convolutions.

The layout of a fused tensor comes from the module that owns it, else from config.model_type, else from the shape of its
down_proj sibling. Where none of them tells, it is ranked as stored, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..entries import Index
from . import names
from .base import Stored

Layout = Literal["rows", "columns", "interleaved"]  # of gate and up; the latter two for experts stored transposed
ALL = slice(None)

# model_type -> layout of fused gate_up_proj experts, where it is not gate rows first.
TRANSPOSED: dict[str, Layout] = {
    "gpt_oss": "interleaved",
    "llama4": "columns",
    "llama4_text": "columns",
    "aria": "columns",
    "aria_text": "columns",
    "openai_privacy_filter": "columns",
}
CONTIGUOUS_QKV = {"phi3", "phi4_multimodal", "phi4mm", "phimoe"}
FUSED_QKV = re.compile(r"(?:^|\.)(?:(?:query_key_value|qkv_proj|qkv|Wqkv|W_pack|c_attn)(?:\.weight)?|in_proj_weight)$")


@dataclass(frozen=True)
class Part:
    """One matrix of a parameter: its label, what to index the parameter with, and its shape after flattening."""

    label: str
    index: Index
    shape: tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """All parts of one parameter, and a note where the layout had to be left as it is."""

    parts: tuple[Part, ...]
    note: str | None = None


def cut(stored: Stored, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], split: bool) -> Cut:
    """The matrices in a parameter with two or more dimensions.

    shapes: of all tensors by name, to look at siblings.  split: whether fused projections are taken apart.
    """
    shape = stored.shape
    if _is_convolution(stored):
        return Cut((Part("", (), (shape[0], stored.numel // shape[0])),))
    if len(shape) == 3:
        return _stack(stored, shapes, config, split)
    if len(shape) > 3:
        flat = (shape[0], stored.numel // shape[0])
        return Cut(
            (Part("", (), flat),), f"{len(shape)} dimensions of unknown meaning: flattened to {flat[0]} x {flat[1]}"
        )
    experts = _flat_experts(stored, config)
    if experts:
        return Cut(experts)
    return _dense(stored, shapes, config, split)


def _is_convolution(stored: Stored) -> bool:
    if stored.parent is not None:
        return isinstance(stored.parent, torch.nn.modules.conv._ConvNd)
    return len(stored.shape) > 2 and names.is_convolution(stored.name)


def _stack(stored: Stored, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], split: bool) -> Cut:
    experts, rows, columns = stored.shape
    whole = Cut(tuple(Part(f"[{e}]", (e,), (rows, columns)) for e in range(experts)))
    if not re.search(r"(?:^|\.)gate_up_proj(?:\.weight)?$", stored.name) or not split:
        return whole
    layout, note = _gate_up_layout(stored, shapes, config)
    if layout is None:
        return Cut(whole.parts, note)
    halves = _halves(rows, columns, layout)
    return Cut(
        tuple(Part(f"[{e}].{label}", (e, *index), half) for e in range(experts) for label, index, half in halves)
    )


def _halves(rows: int, columns: int, layout: Layout) -> list[tuple[str, tuple[slice, slice], tuple[int, int]]]:
    if layout == "rows":
        h = rows // 2
        return [("gate", (slice(0, h), ALL), (h, columns)), ("up", (slice(h, rows), ALL), (rows - h, columns))]
    h = columns // 2
    if layout == "columns":
        return [("gate", (ALL, slice(0, h)), (rows, h)), ("up", (ALL, slice(h, columns)), (rows, columns - h))]
    return [("gate", (ALL, slice(0, columns, 2)), (rows, h)), ("up", (ALL, slice(1, columns, 2)), (rows, columns - h))]


def _gate_up_layout(
    stored: Stored, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> tuple[Layout | None, str | None]:
    """From the module, the model type, or the sibling; None with a note where they leave it open."""
    _, rows, columns = stored.shape
    layout: Layout | None = None
    transposed = getattr(stored.parent, "is_transposed", None)
    if isinstance(transposed, bool):
        concatenated = getattr(stored.parent, "is_concatenated", True)
        layout = "rows" if not transposed else "columns" if concatenated else "interleaved"
    elif model_type(config) in TRANSPOSED:
        layout = TRANSPOSED[str(model_type(config))]
    else:
        down = shapes.get(stored.name.replace("gate_up_proj", "down_proj"))
        fits_rows = down is not None and len(down) == 3 and rows == 2 * down[2] and columns == down[1]
        fits_columns = down is not None and len(down) == 3 and columns == 2 * down[1] and rows == down[2]
        if fits_rows and (not fits_columns or model_type(config)):
            layout = "rows"
    if layout is None or (rows if layout == "rows" else columns) % 2:
        return None, "gate and up could not be told apart from module, model type or shapes: ranked as stored"
    return layout, None


def _flat_experts(stored: Stored, config: Mapping[str, Any]) -> tuple[Part, ...]:
    """DBRX keeps its experts one below the other in a 2-D parameter."""
    count = getattr(stored.parent, "moe_num_experts", None)
    if count is None and model_type(config) == "dbrx":
        ffn = config.get("ffn_config")
        count = ffn.get("moe_num_experts") if isinstance(ffn, Mapping) else None
    rows, columns = stored.shape
    if not isinstance(count, int) or count < 1 or rows % count or not re.search(r"\.(?:w1|v1|w2)$", stored.name):
        return ()
    height = rows // count
    return tuple(Part(f"[{e}]", (slice(e * height, (e + 1) * height), ALL), (height, columns)) for e in range(count))


def _dense(stored: Stored, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], split: bool) -> Cut:
    rows, columns = stored.shape
    whole = Cut((Part("", (), (rows, columns)),))
    if not split:
        return whole
    if re.search(r"(?:^|\.)gate_up_proj\.weight$", stored.name):
        down = shapes.get(stored.name.replace("gate_up_proj", "down_proj"))
        if down is None or len(down) != 2 or rows != 2 * down[1]:
            return Cut(whole.parts, "gate and up could not be told apart from shapes: ranked as stored")
        return Cut(tuple(Part(f".{label}", index, half) for label, index, half in _halves(rows, columns, "rows")))
    if not FUSED_QKV.search(stored.name):
        return whole
    sizes, along = _qkv_sizes(stored, config)
    if not sizes:
        return Cut(whole.parts, "fused q, k, v whose layout is interleaved or unknown: ranked as stored")
    parts, start = [], 0
    for label, size in zip("qkv", sizes, strict=True):
        piece = slice(start, start + size)
        parts.append(
            Part(f".{label}", (piece, ALL), (size, columns))
            if along == 0
            else Part(f".{label}", (ALL, piece), (rows, size))
        )
        start += size
    return Cut(tuple(parts))


def _qkv_sizes(stored: Stored, config: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """Sizes of contiguous q, k and v, and the dimension along which they lie; () where they are not contiguous."""
    rows, columns = stored.shape
    kind = type(stored.parent).__name__ if stored.parent is not None else ""
    if stored.name.endswith("in_proj_weight") and rows == 3 * columns and kind in ("", "MultiheadAttention"):
        return (columns,) * 3, 0  # torch.nn.MultiheadAttention
    if (
        stored.name.endswith("c_attn.weight")
        and columns == 3 * rows
        and (kind == "Conv1D" or model_type(config) == "gpt2")
    ):
        return (rows,) * 3, 1
    if stored.name.endswith("qkv_proj.weight") and model_type(config) in CONTIGUOUS_QKV:
        heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
        if isinstance(heads, int) and heads > 0:
            groups = groups if isinstance(groups, int) else heads
            head = config.get("head_dim") or columns // heads
            if (heads + 2 * groups) * head == rows:
                return (heads * head, groups * head, groups * head), 0
    return (), 0


def model_type(config: Mapping[str, Any]) -> str | None:
    """config.model_type, or None."""
    found = config.get("model_type")
    return found if isinstance(found, str) else None
