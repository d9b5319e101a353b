"""Sets of tensors of quantized formats to damage."""

from __future__ import annotations

import torch
from fp4_codes import as_in_gpt_oss
from fp8_codes import FP8, quantized
from packed_codes import awq, config, gptq, in_turn
from packing import trained
from torchao_codes import in_int4, in_nvfp4

WEIGHT = trained(64, 64)


FP8_TENSORS = dict(zip(("a.weight", "a.weight_scale_inv"), quantized(WEIGHT, (32, 32)), strict=True))
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


SETS: list[tuple[dict[str, torch.Tensor], dict[str, object]]] = [
    (FP8_TENSORS, FP8 | {"weight_block_size": [32, 32]}),
    (FP8_TENSORS, {}),
    (as_in_gpt_oss("experts.down_proj", WEIGHT[None].contiguous())[0], {"quant_method": "mxfp4"}),
    (in_nvfp4(WEIGHT), {}),
    (in_nvfp4(WEIGHT), {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
    (gptq(WEIGHT, 4, in_turn(16, 64), symmetric=True)[0], config(4, 16)),
    (gptq(WEIGHT, 3, in_turn(16, 64), symmetric=True)[0], {}),
    (awq(WEIGHT, 16)[0], {"quant_method": "awq"}),
    (in_int4(WEIGHT), COMPRESSED),
    (in_int4(WEIGHT), {}),
    ({"a.weight": torch.ones(64, 64).char(), "a.weight_scale": torch.ones(64, 1).bfloat16()}, COMPRESSED),
]
DTYPES = [
    *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]
