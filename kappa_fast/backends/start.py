"""Gaussian start blocks for the backends, drawn on the host, and the keys from which any device draws them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from .base import Tensor


def block_key(n: int, width: int, salt: int, seed: bytes) -> bytes:
    """The key of one block, 32 bytes: ``seed`` is the digest of a matrix, each of whose blocks has another ``salt``."""
    return hashlib.sha256(f"{n} {width} {salt} ".encode() + seed).digest()


def gaussian_block(n: int, width: int, salt: int, seed: bytes = b"", device: torch.device | None = None) -> Tensor:
    """A standard Gaussian (n, width) block in float64 that depends on its arguments alone.

    The global random state is neither read nor changed. torch's CPU generator is not used because it takes only 32 bits
    of a seed, and weights can be made orthogonal to several of so few blocks.
    """
    key = block_key(n, width, salt, seed)
    if device is not None and device.type == "cuda":
        generator = torch.Generator(device).manual_seed(int.from_bytes(key[:8], "little"))
        return torch.randn(n, width, generator=generator, dtype=torch.float64, device=device)
    bits = np.random.SFC64(np.random.SeedSequence(int.from_bytes(key[:16], "little")))
    return torch.from_numpy(np.random.Generator(bits).standard_normal((n, width))).to(device)
