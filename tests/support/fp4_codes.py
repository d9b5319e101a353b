"""Weights in MXFP4 and NVFP4 as checkpoints hold them."""

from __future__ import annotations

import numpy as np
import torch
from packing import at_blocks, from_nibbles, in_bytes, nibbles, numbers, powers


def microscaled(weight: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Nibbles, and E8M0 scales for 32 weights each along the last dimension."""
    blocks = weight.double().numpy().reshape(*weight.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
    codes = nibbles(blocks / 2.0 ** exponents[..., None])
    return codes.reshape(weight.shape), torch.from_numpy((exponents + 127).astype(np.uint8))


def as_in_gpt_oss(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """What is stored for experts (experts, in, out), and the values it stands for."""
    codes, scales = microscaled(weight.transpose(1, 2).contiguous())
    packed = in_bytes(codes).reshape(*codes.shape[:2], -1, 16)
    values = from_nibbles(codes) * at_blocks(powers(scales), codes.shape, (1, 32))
    return {f"{name}_blocks": packed, f"{name}_scales": scales}, values.transpose(0, 2, 1)


def nvfp4(weight: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, float]:
    """Nibbles, E4M3 scales for 16 weights each, and by what those were multiplied to fill E4M3."""
    blocks = weight.double().numpy().reshape(*weight.shape[:-1], -1, 16)
    largest = np.abs(blocks).max(-1)
    by = float(np.float32(6 * 448 / largest.max()))
    scale = torch.from_numpy(largest / 6 * by).to(torch.float8_e4m3fn)
    codes = nibbles(blocks * by / numbers(scale).astype(np.float64)[..., None])
    return codes.reshape(weight.shape), scale, by
