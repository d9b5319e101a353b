"""FP8 weights with scales for blocks, rows or columns, or with one scale.

The weight is the code times the scale, both as float32, as in DeepSeek-V3's ``weight_dequant`` and transformers'
``Fp8Dequantize``. ``weight_scale_inv`` multiplies too, despite its name, as does ``weight_scale`` of FBGEMM,
compressed-tensors and modelopt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ...errors import SourceError
from ..base import Stored
from .config import is_left_plain, method_of, scheme_of, whole_number
from .recipe import Candidate, Recipe, fills_tiles, in_unknown_order, refuse
from .unpack import block_sizes, scale_values, times_blocks

FORMATS = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2fnuz: "e5m2fnuz",
}
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
# Methods whose FP8 weights all have scales.
_SCALED = {"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"}
MX_BLOCK = 32  # weights that share an E8M0 scale in MXFP8
_ROLES = ("scale_inv", "scale", "scale_weight")


class FP8:
    """Recognizes eight-bit floats with scales; those without scales are weights themselves."""

    name = "fp8"

    def recognize(self, candidate: Candidate, /) -> Recipe | None:
        """See ``Family``. Raises SourceError if a scale does not fit, or is missing although the config says FP8."""
        codes = candidate.codes
        kind = FORMATS.get(codes.dtype) if codes.dtype is not None else None
        if kind is None or len(codes.shape) not in (2, 3) or 0 in codes.shape:
            return None
        if not candidate.companions and method_of(candidate.config) in _SCALED:
            _refuse_missing(candidate)
        scale = candidate.find(*_ROLES)
        if scale is None or len(candidate.companions) > 1:
            return None
        if scale.dtype not in SCALES:
            raise refuse(candidate, scale, "scales are float32, bfloat16, float16 or E8M0")
        rows, columns = _laid_out(candidate, scale)
        if min(rows, columns) == 1 and scale.name.rpartition(".")[2] == "scale":
            return None  # only the blocks of DeepSeek have scales of this name; other formats may divide by them
        block = _block(candidate, scale, rows, columns)
        microscaled = scale.dtype in (torch.uint8, torch.float8_e8m0fnu) and block == (1, MX_BLOCK)
        if microscaled and method_of(candidate.config) == "" and fills_tiles(scale.shape):
            raise in_unknown_order(candidate, "compressed-tensors")
        # One line of scales for a square matrix may be for its rows or for its columns.
        line = max(rows, columns) if min(rows, columns) == 1 and scale.shape[-1:] != (1,) else 0
        doubtful = candidate.plain_name if codes.shape[-2:] == (line, line) else ""
        return Recipe(
            quantization=f"fp8 {kind}, {describe_blocks(codes.shape, block)}",
            shape=codes.shape,
            dtype=torch.float32,
            inputs={"codes": codes, "scale": scale},
            dequantize=partial(_dequantize, counts=(rows, columns), block=block, doubtful=doubtful),
            peak=1,
        )


def describe_blocks(shape: Sequence[int], block: tuple[int, int]) -> str:
    """Describe how the entries of a matrix share scales."""
    rows, columns = block[0] >= shape[-2], block[1] >= shape[-1]
    if rows and columns:
        return "one scale"
    if columns and block[0] == 1:
        return "a scale for each row"
    if rows and block[1] == 1:
        return "a scale for each column"
    return f"{block[0]}x{block[1]} blocks"


def _laid_out(candidate: Candidate, scale: Stored) -> tuple[int, int]:
    """Return the number of scales along the rows and along the columns of one matrix."""
    shape, found = candidate.codes.shape, scale.shape
    if len(shape) == 3:
        if found == (shape[0],):  # one for each expert
            return 1, 1
        if len(found) == 3 and found[0] == shape[0]:
            return found[1], found[2]
        if len(found) == 2 and found[0] == shape[0] and found[1] in (1, shape[1]):
            return found[1], 1
    elif len(found) == 2:
        if found == (1, shape[0]) and scale.name.endswith("weight_scale") and _configured(candidate, 1) is None:
            return found[1], 1  # one scale per row: transformers transposes the scales for its kernel
        return found[0], found[1]
    elif len(found) == 1 and found[0] in (1, shape[0]):
        return found[0], 1
    if scale.numel == 1:
        return 1, 1
    raise refuse(candidate, scale, "one scale, one for each row, or one for each block is expected")


def _block(candidate: Candidate, scale: Stored, *counts: int) -> tuple[int, int]:
    """Return the rows and columns of a block; without a config, blocks are square or divide the matrix equally."""
    shape = candidate.codes.shape[-2:]
    configured = _configured(candidate, 0), _configured(candidate, 1)
    plausible = [_plausible(*of_axis) for of_axis in zip(shape, counts, configured, strict=True)]
    square = plausible[0] & plausible[1]
    if len(square) == 1 and all(1 < count < size for size, count in zip(shape, counts, strict=True)):
        plausible = [square, square]
    if len(candidate.codes.shape) == 3 and counts[0] == 2 and _has_two_halves(shape, counts[1], plausible, configured):
        plausible[0] = {shape[0] // 2}
    for axis, along in enumerate(("rows", "columns")):
        if len(plausible[axis]) != 1:
            why = f"{counts[axis]} scales along {shape[axis]} {along} "
            fixed = configured[axis]
            why += "do not determine the size of a block" if fixed is None else f"do not fit blocks of {fixed}"
            raise refuse(candidate, scale, why)
    return min(plausible[0]), min(plausible[1])


def _plausible(size: int, count: int, configured: int | None) -> set[int]:
    if configured is not None and -(-size // max(configured, 1)) != count:
        return set()
    return {1} if count == size else block_sizes(size, count, configured)


def _has_two_halves(
    shape: Sequence[int], across: int, plausible: Sequence[set[int]], configured: Sequence[int | None]
) -> bool:
    """Return whether two scales along the rows are those of gate and up, which transformers fuses.

    They are if a block would contain both, or if no block size is configured and square blocks would split the columns.
    """
    if configured[0] is not None:
        return configured[0] >= shape[0] and shape[0] % 2 == 0
    return across == 1 and shape[0] % 2 == 0 and all(size < shape[1] for size in plausible[0])


def _configured(candidate: Candidate, axis: int) -> int | None:
    scheme = scheme_of(candidate.plain_name, candidate.config)
    for block in (candidate.config.get("weight_block_size"), scheme.get("block_structure")):
        if isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(size, int) for size in block):
            return int(block[axis])
    return whole_number(scheme, "group_size") if axis == 1 else None


def _check_line(values: torch.Tensor, name: str, largest: float, is_for_rows: bool) -> None:
    """Refuse scales that belong to columns instead of rows, or the reverse.

    Quantization scales each line (row or column) so that its largest code is the largest number, unless it is zero.

    Raises:
        SourceError: every line of the other kind reaches the largest number, and not every line of this kind does.
    """
    full = values.abs() == largest
    reached = [bool((full.any(axis) | ~values.any(axis)).all()) for axis in (1, 0)]  # rows, columns
    this, other = ("row", "column") if is_for_rows else ("column", "row")
    if reached[is_for_rows] and not reached[not is_for_rows] and bool(full.any()):
        raise SourceError(
            f"every {other} of {name!r} reaches {largest:g} and not every {this}, so that its scales are for {other}s, "
            f"although their shape and name say {this}s: load the model dequantized and rank that, or leave the weight "
            f"out with exclude={name!r}",
            says_exclude=True,
        )


def _dequantize(
    inputs: Mapping[str, torch.Tensor], *, counts: tuple[int, int], block: tuple[int, int], doubtful: str
) -> torch.Tensor:
    values = inputs["codes"].to(torch.float32)
    if doubtful:
        _check_line(values, doubtful, torch.finfo(inputs["codes"].dtype).max, counts[0] > 1)
    return times_blocks(values, scale_values(inputs["scale"]).reshape(counts), block)


def _refuse_missing(candidate: Candidate) -> None:
    config: Mapping[str, Any] = candidate.config
    if is_left_plain(candidate.plain_name, config):
        return
    raise SourceError(
        f"{candidate.name!r} of shape {candidate.codes.shape} is FP8, and the config says {method_of(config)!r}, but "
        "its scale is missing (weight_scale_inv or weight_scale): give the directory if it is in another file, "
        "else download it again"
    )
