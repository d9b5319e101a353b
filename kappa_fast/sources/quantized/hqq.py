"""HQQ: codes of 1 to 8 bits with a scale and a fractional zero point, and settings as further tensors.

``HQQLinear.state_dict()`` has its settings as small tensors: numbers, and texts as bytes. The fields of a byte, highest
bits first, belong to consecutive blocks of the first dimension; ten fields of three bits share an int32. The weight is
(code - zero) * scale in the compute dtype of the layer, in groups along the inputs (axis 1) or the rows (axis 0)
(``Quantizer.dequantize``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from ...errors import SourceError
from ..base import Stored
from .recipe import Candidate, Recipe, refuse

# The number of codes in an element, and the bits of each.
PACKINGS = {"8bit_u8": (1, 8), "4bit_u8": (2, 4), "3bit_32": (10, 3), "2bit_u8": (4, 2), "1bit_u8": (8, 1)}
DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float16", "bfloat16", "float32")}
SETTINGS = ("group_size", "shape", "axis", "packing", "compute_dtype", "view_as_float", "unpack_view_dtype")
_LONGEST = 64  # elements of a setting


class HQQ:
    """Recognizes ``W_q`` with ``scale`` and ``zero``."""

    name = "hqq"

    def recognize(self, candidate: Candidate, /) -> Recipe | str | None:
        """See ``Family``. Raises SourceError if settings are missing, or contradict the tensors."""
        if not candidate.name.endswith("W_q"):
            return None
        scale, zero = candidate.find("scale"), candidate.find("zero")
        if scale is None or zero is None:
            return "codes of HQQ without their scale or zero point; this quantized format is not supported"
        said = {name: _setting(candidate, name) for name in SETTINGS}
        packing, axis = _text(said["packing"]), _number(said["axis"])
        dtype = DTYPES.get(_text(said["compute_dtype"]) or "torch.float16")
        shape = tuple(said["shape"] or ())
        if packing not in PACKINGS or axis not in (0, 1) or dtype is None or _number(said["view_as_float"]):
            return f"codes of HQQ packed as {packing!r} along axis {axis}; this quantized format is not supported"
        if len(shape) != 2 or min(shape) < 1 or not scale.dtype or not scale.dtype.is_floating_point:
            raise _damaged(candidate, f"a weight of shape {shape} and scales of {scale.dtype}")
        return _recipe(candidate, scale, zero, said, packing, axis, dtype)


def _recipe(
    candidate: Candidate,
    scale: Stored,
    zero: Stored,
    said: Mapping[str, list[int] | None],
    packing: str,
    axis: int,
    dtype: torch.dtype,
) -> Recipe:
    rows, columns = said["shape"] or (0, 0)
    group = _number(said["group_size"])
    if group is None:  # a group is a whole row, or a whole column for axis 0
        group = columns if axis == 1 else rows
    if group < 1 or rows * columns % group:
        raise _damaged(candidate, f"groups of {group} in {rows} x {columns} weights")
    grouped = (rows * columns // group, group) if axis == 1 else (group, rows * columns // group)
    each, bits = PACKINGS[packing]
    stored = (-(-grouped[0] // each), grouped[1])
    word = torch.int32 if packing == "3bit_32" else torch.uint8
    if candidate.codes.shape != stored or candidate.codes.dtype != word or (each != 10 and grouped[0] % each):
        raise _damaged(candidate, f"{packing} codes of {stored} for {rows} x {columns} weights in groups of {group}")
    scales = (grouped[0], 1) if axis == 1 else (1, grouped[1])
    for companion in (scale, zero):
        if companion.shape != scales and companion.numel != 1:
            raise refuse(candidate, companion, f"{scales} are expected")
    assert scale.dtype is not None
    assert zero.dtype is not None
    result = torch.promote_types(dtype, torch.promote_types(scale.dtype, zero.dtype))
    return Recipe(
        quantization=f"hqq {bits} bits, groups of {group}" + (", axis 0" if axis == 0 else ""),
        shape=(rows, columns),
        dtype=result,
        inputs={"codes": candidate.codes, "scale": scale, "zero": zero},
        dequantize=partial(_dequantize, packing=packing, grouped=grouped, shape=(rows, columns), dtype=dtype),
        peak=3 * result.itemsize + 4,
    )


def _dequantize(
    inputs: Mapping[str, torch.Tensor],
    *,
    packing: str,
    grouped: tuple[int, int],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    each, bits = PACKINGS[packing]
    codes = inputs["codes"]
    fields = [codes >> (bits * (each - 1 - place)) & ((1 << bits) - 1) for place in range(each)]
    values = torch.cat(fields)[: grouped[0]].to(dtype)
    return ((values - inputs["zero"]) * inputs["scale"]).reshape(shape)


def _setting(candidate: Candidate, name: str) -> list[int] | None:
    """Return the integers in a small tensor with a setting; None if there is no such tensor."""
    stored = candidate.find(name)
    if stored is None:
        return None
    if stored.numel > _LONGEST or stored.dtype is None or stored.dtype.is_floating_point:
        raise refuse(candidate, stored, "an integer, or a text as bytes, is expected")
    return [int(value) for value in stored.take(()).flatten()]


def _number(said: list[int] | None) -> int | None:
    return said[0] if said else None


def _text(said: list[int] | None) -> str:
    return "".join(chr(value) for value in said or () if 0 <= value < 128)


def _damaged(candidate: Candidate, what: str) -> SourceError:
    return SourceError(
        f"the settings of {candidate.name!r} of shape {candidate.codes.shape} describe {what}, which does not fit: "
        "download it again"
    )
