"""Weights in FP8 with scales, and what they are once dequantized."""

from __future__ import annotations

import numpy as np
import torch
from packing import at_blocks, numbers

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def quantized(
    weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 scales of a matrix or a stack, so that the largest entry of a block is the largest code."""
    *above, rows, columns = weight.shape
    counts = (-(-rows // block[0]), -(-columns // block[1]))
    scale = torch.zeros(*above, *counts)
    codes = torch.zeros(weight.shape, dtype=dtype)
    for i in range(counts[0]):
        for j in range(counts[1]):
            place = (..., slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            part = weight[place]
            scale[..., i, j] = part.abs().amax((-2, -1)) / torch.finfo(dtype).max
            codes[place] = (part / scale[..., i, j, None, None]).to(dtype)
    return codes, scale


def dequantized(codes: torch.Tensor, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    return numbers(codes) * at_blocks(scale.astype(np.float32), codes.shape, block)
