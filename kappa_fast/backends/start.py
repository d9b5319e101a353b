"""Gaussian start blocks on the host, and the keys that they are drawn from on any device."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from .base import Tensor


def block_key(n: int, width: int, salt: int, seed: bytes) -> bytes:
    """32 bytes for one block: ``seed`` is the digest of a matrix, ``salt`` tells its blocks apart."""
    return hashlib.sha256(f"{n} {width} {salt} ".encode() + seed).digest()


def gaussian_block(n: int, width: int, salt: int, seed: bytes = b"", device: torch.device | None = None) -> Tensor:
    """A standard Gaussian (n, width) block in float64 that depends on its arguments alone.

    Generators of their own: the global random state is neither read nor moved. torch's on a CPU would not do: it takes
    32 bits of a seed, and weights can be orthogonal to several of so few blocks.
    """
    key = block_key(n, width, salt, seed)
    if device is not None and device.type == "cuda":
        generator = torch.Generator(device).manual_seed(int.from_bytes(key[:8], "little"))
        return torch.randn(n, width, generator=generator, dtype=torch.float64, device=device)
    bits = np.random.SFC64(np.random.SeedSequence(int.from_bytes(key[:16], "little")))
    return torch.from_numpy(np.random.Generator(bits).standard_normal((n, width))).to(device)
