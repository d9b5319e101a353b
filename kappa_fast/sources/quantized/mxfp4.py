"""MXFP4 and MXFP6: floats of four (E2M1) or six bits (E2M3), of which 32 share a power of two (E8M0) as a scale.

The formats are those of the OCP Microscaling Formats specification. MXFP4 has three layouts: experts of gpt-oss
(``_blocks`` and ``_scales``), ``mxfp4-pack-quantized`` of compressed-tensors, and experts of FP8 checkpoints in int8
(``expert_dtype`` of the config). MXFP6 is ``mxfp6-pack-quantized`` of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .config import scheme_of
from .fp8 import SCALES
from .recipe import Candidate, Recipe, refuse
from .unpack import e2m1, scale_values, times_blocks

BLOCK = 32


class MXFP4:
    """Recognizes both formats by the names and dtypes of codes and scales."""

    name = "mxfp4"

    def recognize(self, candidate: Candidate, /) -> Recipe | None:
        """See ``Family``. Raises SourceError if the scales do not fit the codes."""
        codes = candidate.codes
        if codes.dtype == torch.uint8 and candidate.name.endswith("_blocks") and len(codes.shape) == 4:
            return _of_gpt_oss(candidate)
        packed = codes.dtype == torch.uint8 and candidate.name.endswith("weight_packed")
        experts = codes.dtype == torch.int8 and candidate.config.get("expert_dtype") == "fp4"
        scale = candidate.find("scale", "scale_inv")
        if not (packed or experts) or len(codes.shape) not in (2, 3) or scale is None:
            return None
        scheme = scheme_of(candidate.plain_name, candidate.config)
        stated = [word for word in (candidate.config.get("format"), scheme.get("format")) if isinstance(word, str)]
        if packed and "marlin-24" in stated:
            return None
        if packed and (scale.dtype not in (torch.uint8, torch.float8_e8m0fnu) or candidate.find("global_scale")):
            return None
        if scale.dtype not in SCALES:
            raise refuse(candidate, scale, "scales of MXFP4 are E8M0")
        *above, columns = codes.shape
        sixes = scale.shape == (*above, columns * 4 // 3 // BLOCK) and columns * 4 % (3 * BLOCK) == 0
        if packed and (sixes or "mxfp6-pack-quantized" in stated):
            if not sixes or "mxfp4-pack-quantized" in stated:
                raise refuse(candidate, scale, f"the config says {stated[0]!r}, whose scales have another shape")
            shape = (*above, columns * 4 // 3)
            return Recipe(
                "mxfp6 e2m3", shape, torch.float32, {"codes": codes, "scale": scale}, _dequantize_six, peak=20
            )
        if scale.shape != (*above, columns * 2 // BLOCK) or columns * 2 % BLOCK:
            raise refuse(candidate, scale, f"one scale for {BLOCK} weights, two of them in a byte, is expected")
        shape = (*above, columns * 2)
        return Recipe("mxfp4", shape, torch.float32, {"codes": codes, "scale": scale}, _dequantize, peak=5)


def _of_gpt_oss(candidate: Candidate) -> Recipe | None:
    """Return the recipe of ``convert_moe_packed_tensors`` of transformers: rows of 16 bytes, result transposed."""
    codes, scale = candidate.codes, candidate.find("scales")
    if scale is None:
        return None
    if scale.dtype != torch.uint8 or scale.shape != codes.shape[:-1] or codes.shape[-1] * 2 != BLOCK:
        raise refuse(candidate, scale, "a byte for each row of 16 bytes of codes is expected")
    experts, rows, blocks, _ = codes.shape
    inputs = {"codes": codes, "scale": scale}
    return Recipe("mxfp4", (experts, blocks * BLOCK, rows), torch.bfloat16, inputs, _dequantize_blocks, peak=5)


def _dequantize(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return times_blocks(e2m1(inputs["codes"], torch.float32), scale_values(inputs["scale"]), (1, BLOCK))


def _dequantize_six(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Dequantize four codes in three bytes, lowest bits first; E2M3 of the specification, section 5.3.2."""
    packed = inputs["codes"]
    three = packed.view(packed.shape[0], -1, 3).int()
    word = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
    codes = torch.stack([word >> shift & 0x3F for shift in (0, 6, 12, 18)], -1).flatten(1)
    sizes = [m / 8 if e == 0 else (1 + m / 8) * 2 ** (e - 1) for e in range(4) for m in range(8)]
    table = torch.tensor(sizes + [-size for size in sizes], device=codes.device)
    return times_blocks(table[codes], scale_values(inputs["scale"]), (1, BLOCK))


def _dequantize_blocks(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    # Scales and products are exact in bfloat16, which has the exponents of float32.
    scale = scale_values(inputs["scale"]).to(torch.bfloat16)
    values = e2m1(inputs["codes"], torch.bfloat16).mul_(scale[..., None])
    return values.flatten(1).t()
