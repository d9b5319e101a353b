"""Splits parameters into matrices: stacks of experts, fused projections, convolutions.

The layout of a fused tensor comes from the module that owns it, else from config.model_type, else from the shape of its
down_proj sibling. A tensor of unknown layout is ranked as stored, and a note says so.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..results.entries import Index
from . import classes, names
from .base import Stored

ALL = slice(None)
Along = Literal["rows", "columns"]


@dataclass(frozen=True)
class Part:
    """One matrix of a parameter: its label, its index into the parameter, and its shape after flattening."""

    label: str
    index: Index
    shape: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """All matrices of one parameter, and a note if the layout is a guess or is unknown."""

    parts: tuple[Part, ...]
    note: str | None = None


class _Fused(NamedTuple):
    """How a fused matrix is composed: the pieces one after the other, or ``interleaved`` row by row."""

    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    along: Along
    interleaved: bool = False


_GATE_UP = re.compile(r"(?:^|\.)(?:gate_up_proj|ffn_gate_up_exps)(?:\.weight)?$")
# Model types with other names for gate_up_proj.
_GATE_UP_OF = {
    "jetmoe": re.compile(r"\.mlp\.input_linear\.weight$"),
    "granitemoe": re.compile(r"\.(?:block_sparse_moe|shared_mlp)\.input_linear\.weight$"),
}
_GATE_UP_OF |= dict.fromkeys(("granitemoeshared", "granitemoehybrid", "granitemoe_swa"), _GATE_UP_OF["granitemoe"])
_DOWN = {"gate_up_proj": "down_proj", "ffn_gate_up_exps": "ffn_down_exps", "input_linear": "output_linear"}

# Model types that store experts transposed ([experts, in, 2 x width]). Here the columns of gate and up alternate, ...
_ALTERNATING = {"gpt_oss"}
# ... and here all columns of gate come first. The shapes are the same.
_GATE_COLUMNS_FIRST = {
    *("aria", "aria_text", "llama4", "llama4_text", "openai_privacy_filter"),
    *("qwen3_vl_moe", "qwen3_vl_moe_text"),  # in checkpoints
}

_FUSED_QKV = re.compile(
    r"(?:^|[._])(?:query_key_value|qkv(?:_proj|_linear)?|Wqkv|W_pack|c_attn|att_proj)(?:\.weight)?$|(?:^|\.)in_proj_weight$"
)
# Model types with all rows of q, then of k, then of v. GPT-NeoX, BLOOM, Falcon, MiniMax and CodeGen alternate by head.
_QKV_ROWS = {
    "dbrx": re.compile(r"\.Wqkv\.weight$"),
    "modernbert": re.compile(r"\.Wqkv\.weight$"),
    "mpt": re.compile(r"\.Wqkv\.weight$"),
    "phi3": re.compile(r"\.qkv_proj\.weight$"),
    "phi4_multimodal": re.compile(r"\.qkv_proj\.weight$"),
}
# The same along columns, because Conv1D stores its weight transposed.
_QKV_COLUMNS = dict.fromkeys(
    ("decision_transformer", "gpt2", "imagegpt", "openai-gpt"), re.compile(r"\.c_attn\.weight$")
)
_KV_ROWS = {"jetmoe": re.compile(r"\.kv_proj\.weight$")}
# The projection after attention, whose input is as wide as q.
_AFTER_ATTENTION = ("o_proj.weight", "out_proj.weight")

_DBRX_EXPERTS = re.compile(r"^(?P<ffn>(?:.*\.)?ffn)\.experts\.mlp\.(?:w1|v1|w2)$")
_KNOWN_STACK = re.compile(r"expert|moe|_(?:ch)?exps|(?:input|output)_linear")


def layout_of(stored: Stored, shapes: Mapping[str, tuple[int, ...]], split: bool) -> Layout:
    """Return the matrices of a parameter with two or more dimensions.

    Args:
        stored: the parameter; none of its dimensions may be 0.
        shapes: the shapes of all tensors by name, to look up siblings.
        split: True splits fused projections into their parts.
    """
    shape = stored.shape
    flat = (shape[0], stored.numel // shape[0])
    if len(shape) > 2 and (note := _convolution(stored)) is not None:
        return Layout((Part("", (), flat),), note or None)
    if len(shape) > 3:
        return Layout(
            (Part("", (), flat),), f"{len(shape)} dimensions of unknown meaning, flattened like a convolution"
        )
    height = _rows_per_expert(stored, shapes)
    if len(shape) == 2 and height is None:
        fused, note = _fused(stored, shape, shapes) if split else (None, None)
        return Layout(tuple(_pieces("", (), flat, fused)), note)
    fused, note = None, None
    if height is not None:
        slots: list[Index] = [(slice(start, start + height), ALL) for start in range(0, shape[0], height)]
        inner = (height, shape[1])
    else:
        slots, inner = [(expert,) for expert in range(shape[0])], (shape[1], shape[2])
        fused, note = _fused(stored, inner, shapes) if split else (None, None)
        if not classes.is_stack(stored.parent) and not _KNOWN_STACK.search(stored.name):
            note = note or "3 dimensions, treated as a stack of matrices"
    parts = [part for e, slot in enumerate(slots) for part in _pieces(f"[{e}]", slot, inner, fused)]
    return Layout(tuple(parts), note)


def _convolution(stored: Stored) -> str | None:
    """Return None if the tensor is not a convolution, else a note: "" if it is certain."""
    if classes.class_names(stored.parent):
        return classes.convolution(stored.parent, stored.shape)
    if not names.is_convolution(stored.name):
        return None
    return "treated as a convolution because of its name" if len(stored.shape) == 3 else ""


def _rows_per_expert(stored: Stored, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the rows of one expert if a 2-D parameter stacks all experts of a layer, as in DBRX; else None."""
    found = _DBRX_EXPERTS.search(stored.name)
    router = shapes.get(f"{found['ffn']}.router.layer.weight", ()) if found else ()
    if len(stored.shape) != 2 or len(router) != 2 or stored.shape[0] % router[0]:
        return None
    return stored.shape[0] // router[0]


def _pieces(label: str, slot: Index, shape: tuple[int, int], fused: _Fused | None) -> list[Part]:
    if fused is None:
        return [Part(label, slot, shape)]
    rows, columns = shape
    parts = []
    ends = list(itertools.accumulate(fused.sizes))
    for i, (piece, size, end) in enumerate(zip(fused.labels, fused.sizes, ends, strict=True)):
        taken = slice(i, ends[-1], len(ends)) if fused.interleaved else slice(end - size, end)
        index = (taken, ALL) if fused.along == "rows" else (ALL, taken)
        parts.append(
            Part(f"{label}.{piece}", (*slot, *index), (size, columns) if fused.along == "rows" else (rows, size))
        )
    return parts


def _fused(
    stored: Stored, shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[_Fused | None, str | None]:
    """Return how a matrix of the parameter is composed, and a note; None if it is not fused or of unknown layout."""
    if _GATE_UP.search(stored.name) or _matches(_GATE_UP_OF, stored):
        return _gate_up(stored, shape, shapes)
    if _FUSED_QKV.search(stored.name) or _matches(_KV_ROWS, stored):
        fused = _qkv(stored, shape, shapes)
        return fused, None if fused else "fused q, k and v, interleaved or of unknown layout: ranked as stored"
    return None, None


def _gate_up(
    stored: Stored, shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[_Fused | None, str | None]:
    along, alternating, note = _gate_up_layout(stored, shape, shapes)
    size = shape[0] if along == "rows" else shape[1]
    if along is None or alternating is None or size % 2:
        return None, "module, model type and shapes do not say which half is gate and which is up: ranked as stored"
    kinds = set(stored.model_types)
    up_first = "phi4_multimodal_audio" in kinds or ("phi4_multimodal" in kinds and "audio" in stored.name)
    labels = ("up", "gate") if up_first else ("gate", "up")
    return _Fused(labels, (size // 2, size // 2), along, alternating), note


def _gate_up_layout(
    stored: Stored, shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Along | None, bool | None, str | None]:
    """Return the dimension that has the halves, whether they alternate (None: unknown), and a note on a guess."""
    transposed = getattr(stored.parent, "is_transposed", None)
    concatenated = getattr(stored.parent, "is_concatenated", None)
    if isinstance(transposed, bool) and isinstance(concatenated, bool):  # experts of transformers have these attributes
        return "columns" if transposed else "rows", not concatenated, None
    along = _along_of_sibling(stored.name, shape, shapes)
    if along is None and stored.name.endswith("input_linear.weight"):
        along = "rows"
    if not _ALTERNATING.isdisjoint(stored.model_types):
        return along or "columns", True, None
    if not _GATE_COLUMNS_FIRST.isdisjoint(stored.model_types):
        return along or "columns", False, None
    if along == "columns":
        return along, None, None
    return along, False, None if stored.model_types else "gate is assumed to come first, as usual"


def _along_of_sibling(name: str, shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]) -> Along | None:
    fused, down = next((pair for pair in _DOWN.items() if pair[0] in name), ("", ""))
    sibling = shapes.get(name.replace(fused, down), ()) if fused else ()
    if len(sibling) < 2:
        return None
    if shape == (2 * sibling[-1], sibling[-2]):
        return "rows"
    return "columns" if shape == (sibling[-1], 2 * sibling[-2]) else None


def _qkv(stored: Stored, shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]) -> _Fused | None:
    rows, columns = shape
    owners = classes.class_names(stored.parent)
    of_torch = not owners or "MultiheadAttention" in owners
    if stored.name.endswith("in_proj_weight") and rows == 3 * columns and of_torch:
        return _Fused(("q", "k", "v"), (columns,) * 3, "rows")  # torch.nn.MultiheadAttention
    if _matches(_QKV_COLUMNS, stored) and columns in (2 * rows, 3 * rows):
        labels = ("k", "v") if columns == 2 * rows else ("q", "k", "v")  # cross-attention has a separate q
        return _Fused(labels, (rows,) * len(labels), "columns")
    if _matches(_KV_ROWS, stored) and rows % 2 == 0:
        return _Fused(("k", "v"), (rows // 2,) * 2, "rows")
    if not _matches(_QKV_ROWS, stored):
        return None
    block = stored.name.removesuffix(".weight").rpartition(".")[0]
    after = next((shapes[f"{block}.{n}"] for n in _AFTER_ATTENTION if len(shapes.get(f"{block}.{n}", ())) == 2), None)
    q = after[1] if after is not None else columns if rows == 3 * columns else rows
    if q >= rows or (rows - q) % 2:
        return None
    return _Fused(("q", "k", "v"), (q, (rows - q) // 2, (rows - q) // 2), "rows")


def _matches(table: Mapping[str, re.Pattern[str]], stored: Stored) -> bool:
    return any(kind in table and table[kind].search(stored.name) for kind in stored.model_types)
