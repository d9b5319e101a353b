"""Names and dtypes of quantized weights: which tensors are codes, and which are their companions (scales, ...)."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

ON_META = "on the meta device, without values: rank from the checkpoint"
NOT_SUPPORTED = "this quantized format is not supported"

# Float dtypes whose values may be weights; of the eight-bit ones only those with a sign and a mantissa.
RANKED = frozenset(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "bfloat16", "float16"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
    if hasattr(torch, name)
)

# The endings of names of codes. A companion appends a suffix to the name (_APPENDED) or replaces the ending (_BESIDE).
_ENDING = re.compile(r"(?:qweight|weight_packed|weight|_blocks|(?:(?<=\.)|^)(?:W_q|bitmask))$")
# torchao calls the parts of a.weight a._weight_qdata, a._weight_scale, ...
_QDATA = re.compile(r"^(?P<owner>(?:.*\.)?)_(?P<weight>\w+)_qdata$")
_TORCHAO = (
    *("scale", "zero_point", "scale_and_zero", "per_tensor_scale", "act_pre_scale"),
    *("act_quant_scale", "act_quant_zero_point", "act_per_tensor_scale"),
)
# quanto calls the codes of a.weight a.weight._data, or a.weight._data._data if they have fewer than eight bits.
_QUANTO = re.compile(r"^(?P<weight>(?:.*\.)?weight)\._data(?:\._data)?$")
_APPENDED = (
    "_scale_inv",
    "_scale",
    "_scale_2",
    "_scales",
    "_global_scale",
    "_zero_point",
    "_shape",
    "_g_idx",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)
_BESIDE = (
    "weight_scale_inv",
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_format",
    "scale_weight",
    "scale_inv",
    "scale",
    "SCB",
    "scales",
    "biases",
    "comfy_quant",
    "qzeros",
    "g_idx",
    "_scales",
)


# Companions of the codes of HQQ and of the bits of sparse weights; for other formats these names mean nothing.
_OF_HQQ = (
    *("scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float"),
    *("quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero"),
)
_OF_BITMASKS = ("compressed", "shape", "row_offsets", "weight_scale", "weight_zero_point")

# Names that only scales have: they are recognized even if their codes are in another file.
_UNMISTAKABLE = re.compile(r"(?:(?:weight|_proj)_scale(?:_inv|_2)?|weight_global_scale)$")


def may_be_codes(dtype: torch.dtype | None) -> bool:
    """Return True for dtypes in which quantized weights are stored."""
    return dtype is not None and not dtype.is_complex and (not dtype.is_floating_point or dtype.itemsize == 1)


def is_of_quanto(name: str) -> bool:
    """Return True for names that optimum-quanto gives to codes."""
    return _QUANTO.match(name) is not None


def companions(name: str, names: Collection[str]) -> list[str]:
    """Return those of ``names`` that are scales, zero points and the like of the codes ``name``."""
    if found := _QDATA.match(name):
        return [c for part in _TORCHAO if (c := f"{found['owner']}_{found['weight']}_{part}") in names]
    if found := _QUANTO.match(name):
        return [c for part in ("scale", "shift") if (c := f"{found['weight']}._{part}") in names]
    stem = _ENDING.sub("", name)
    for ending, beside in (("W_q", _OF_HQQ), ("bitmask", _OF_BITMASKS)):
        if stem + ending == name:
            return [stem + word for word in beside if stem + word in names]
    candidates = [name + suffix for suffix in _APPENDED]
    candidates += [stem + suffix for suffix in _BESIDE if stem != name]
    return [candidate for candidate in dict.fromkeys(candidates) if candidate != name and candidate in names]


def is_orphan(name: str, names: Collection[str]) -> bool:
    """Return True for the name of scales if the name of their codes is not among ``names``."""
    found = _UNMISTAKABLE.search(name)
    if found is None:
        return False
    stem = name[: found.start()]
    owner = stem + ("_proj" if found.group().startswith("_proj") else "weight")
    return not any(candidate in names for candidate in (owner, f"{stem}weight_packed", f"{owner}_packed"))


def role_of(name: str, companion: str) -> str:
    """Return the role of a companion of the codes ``name``, such as "scale_inv", "zero_point", "qzeros" or "absmax".

    The role does not depend on how the codes are named: that of ``weight_scale`` is "scale" both for ``weight`` and for
    ``weight_packed``.
    """
    if found := _QDATA.match(name):
        return companion.removeprefix(f"{found['owner']}_{found['weight']}_")
    if found := _QUANTO.match(name):
        return companion.removeprefix(f"{found['weight']}._")
    rest = companion.removeprefix(name) if companion.startswith(name) else companion.removeprefix(_ENDING.sub("", name))
    return rest.lstrip("._").removeprefix("weight_")


def weight_name(name: str) -> str:
    """Return the name that the weight with the codes ``name`` has in the model before quantization."""
    if found := _QDATA.match(name):
        return f"{found['owner']}{found['weight']}"
    if found := _QUANTO.match(name):
        return found["weight"]
    ending = _ENDING.search(name)
    if ending is None:
        return name
    return name[: ending.start()] + ("" if ending.group() == "_blocks" else "weight")


def scales_reason(companion: str) -> str:
    """Return why a companion is not ranked; only the last word of its name is shown, so that equal reasons add up."""
    return f"scales or zero points of quantized weights ({_last_word(companion)}), not a weight"


def codes_reason(companion_names: Collection[str], method: str = "") -> str:
    """Return why codes that have companions are not ranked; ``method`` is the name of the format in the config."""
    listed = ", ".join(sorted({_last_word(name) for name in companion_names}))
    return f"quantized codes that need their scales ({listed}); {NOT_SUPPORTED}" + (f" ({method})" if method else "")


def unexpected_reason(quantization: str, found: Collection[str]) -> str:
    """Return why codes of a known format are not dequantized: the module has tensors that the format does not have."""
    return f"quantized ({quantization}), but the layer also has {', '.join(found)}, which is not part of that format"


def dtype_reason(dtype: torch.dtype | None) -> str | None:
    """Return why values of this dtype are not weights, or None."""
    if dtype is None:
        return "stored in a dtype that torch does not have"
    if dtype in RANKED:
        return None
    called = str(dtype).removeprefix("torch.")
    if dtype.is_complex:
        return f"complex numbers ({called})"
    if dtype.is_floating_point:
        return f"{called} holds scales or packed codes, not weights: {NOT_SUPPORTED}"
    return f"{called} values: codes, indices or a mask, not weights"


def _last_word(name: str) -> str:
    words = name.split(".")
    return ".".join(words[-2:]) if words[-1].startswith("bitsandbytes__") else words[-1]
