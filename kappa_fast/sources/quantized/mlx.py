"""MLX: codes of 2 to 8 bits in uint32 words, a scale and a bias, or a microscaling scale, for each group of inputs.

The formats are those of ``mlx.core.quantize``. Mode "affine" is scale * code + bias; codes are consecutive from the
lowest bit of the words on, and may extend into the next word. Modes "mxfp4", "mxfp8" and "nvfp4" have no biases, and
scales in bytes. The result is in float32, as in the kernels of mlx before they round.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ...errors import SourceError
from ..base import Stored
from .config import method_of, whole_number
from .packed import FLOATS
from .recipe import Candidate, Recipe, refuse
from .unpack import WORD, e2m1, fields, scale_values, times_blocks

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
# The bits of a code, and the number of codes that share a scale.
MICROSCALED = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


class MLX:
    """Recognizes ``weight`` in uint32 with ``scales``, and ``biases`` in the affine mode."""

    name = "mlx"

    def recognize(self, candidate: Candidate, /) -> Recipe | None:
        """See ``Family``. Raises SourceError if companions do not fit, or do not determine bits and group size."""
        codes, scales = candidate.codes, candidate.find("scales")
        if codes.dtype != torch.uint32 or len(codes.shape) not in (2, 3) or 0 in codes.shape:
            return None
        if not candidate.name.endswith("weight") or method_of(candidate.config) not in ("", "mlx"):
            return None
        if scales is None:
            if method_of(candidate.config) == "mlx":
                raise candidate.missing("scales")
            return None
        if scales.shape[:-1] != codes.shape[:-1] or 0 in scales.shape:
            raise refuse(candidate, scales, "a scale for each group of a row is expected")
        return _microscaled(candidate, scales) if scales.dtype == torch.uint8 else _affine(candidate, scales)


def _affine(candidate: Candidate, scales: Stored) -> Recipe:
    codes, biases = candidate.codes, candidate.find("biases")
    if _mode(candidate) not in (None, "affine"):
        raise refuse(candidate, scales, f"the config says mode {_mode(candidate)!r}, whose scales are bytes")
    if biases is None:
        raise candidate.missing("biases")
    if scales.dtype not in FLOATS:
        raise refuse(candidate, scales, "scales are float16, bfloat16 or float32")
    if (biases.shape, biases.dtype) != (scales.shape, scales.dtype):
        raise refuse(candidate, biases, f"biases of the shape {scales.shape} and dtype of the scales are expected")
    bits, group = _bits_and_group(candidate, scales)
    columns = scales.shape[-1] * group
    return Recipe(
        quantization=f"mlx affine {bits} bits, groups of {group}",
        shape=(*codes.shape[:-1], columns),
        dtype=torch.float32,
        inputs={"codes": codes, "scales": scales, "biases": biases},
        dequantize=partial(_dequantize_affine, bits=bits, group=group),
        peak=3 if WORD % bits == 0 else 25,
    )


def _bits_and_group(candidate: Candidate, scales: Stored) -> tuple[int, int]:
    """Return the bits and the group size in the config if they fit, or else the only ones that fit the shapes."""
    words, groups = candidate.codes.shape[-1], scales.shape[-1]
    fitting = [(b, g) for b in BITS for g in GROUPS if words * WORD == groups * g * b]
    settings = settings_of(candidate)
    bits, group = whole_number(settings, "bits"), whole_number(settings, "group_size")
    if bits is not None and group is not None:
        if bits in BITS and group > 0 and words * WORD == groups * group * bits:
            return bits, group
        raise refuse(
            candidate,
            scales,
            f"the config says {bits} bits in groups of {group}, but {words} words with {groups} scales fit "
            f"{_listed(fitting)}: correct 'quantization' in config.json, or the file",
        )
    if len(fitting) == 1:
        return fitting[0]
    raise SourceError(
        f"no config says how {candidate.name!r} of shape {candidate.codes.shape} was quantized by mlx: {words} words "
        f"with {groups} scales fit {_listed(fitting)}; give the checkpoint's directory with its config.json"
    )


def _listed(fitting: list[tuple[int, int]]) -> str:
    return " or ".join(f"{bits} bits in groups of {group}" for bits, group in fitting) or "no known setting"


def settings_of(candidate: Candidate) -> Mapping[str, Any]:
    """Return the settings of this weight in the config, in which its module may have settings of its own."""
    config = candidate.config
    own = config.get(candidate.plain_name.removesuffix(".weight"))
    return {**config, **own} if isinstance(own, Mapping) else config


def _mode(candidate: Candidate) -> str | None:
    mode = settings_of(candidate).get("mode")
    return mode if isinstance(mode, str) else None


def _microscaled(candidate: Candidate, scales: Stored) -> Recipe:
    codes, said = candidate.codes, _mode(candidate)
    words, groups = codes.shape[-1], scales.shape[-1]
    mode = next((m for m, (bits, group) in MICROSCALED.items() if words * WORD == groups * group * bits), None)
    if mode is None or said not in (None, mode):
        told = f"the config says mode {said!r}" if said else "the config has no mode"
        raise refuse(candidate, scales, f"{words} words with {groups} scales in bytes fit {mode or 'no mode'}; {told}")
    if candidate.find("biases") is not None:
        raise refuse(candidate, candidate.companions["biases"], f"mode {mode!r} has no biases")
    group = MICROSCALED[mode][1]
    return Recipe(
        quantization=f"mlx {mode}",
        shape=(*codes.shape[:-1], groups * group),
        dtype=torch.float32,
        inputs={"codes": codes, "scales": scales},
        dequantize=partial(_dequantize_microscaled, mode=mode),
        peak=5,
    )


def _dequantize_affine(inputs: Mapping[str, torch.Tensor], *, bits: int, group: int) -> torch.Tensor:
    scales, biases = inputs["scales"].float(), inputs["biases"].float()
    columns = scales.shape[1] * group
    values = fields(inputs["codes"].view(torch.int32), bits, columns).float()
    grouped = values.view(values.shape[0], -1, group)
    grouped.mul_(scales[..., None]).add_(biases[..., None])
    return values


def _dequantize_microscaled(inputs: Mapping[str, torch.Tensor], *, mode: str) -> torch.Tensor:
    codes, scales = inputs["codes"].contiguous().view(torch.uint8), inputs["scales"]
    values = codes.view(torch.float8_e4m3fn).float() if mode == "mxfp8" else e2m1(codes, torch.float32)
    spread = scales.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else scale_values(scales)
    return times_blocks(values, spread, (1, MICROSCALED[mode][1]))
