"""Waves of block tridiagonal matrices."""

from __future__ import annotations

import torch
from spectra import gaussian

N = 160
SPECTRA = {
    "even": torch.linspace(0.01, 1, N, dtype=torch.float64),
    "steep": torch.logspace(-8, 6, N, dtype=torch.float64),
    "crowded": 5 + torch.linspace(0, 1e-3, N, dtype=torch.float64),
    "lonely": torch.cat([torch.ones(N - 1, dtype=torch.float64), torch.tensor([1e7], dtype=torch.float64)]),
}


def lanczos(values, blocks, seed):
    """Block columns of T and the coupling, by block Lanczos with full orthogonalization."""
    q = torch.linalg.qr(gaussian(N, N, seed)).Q
    h = q @ torch.diag(values) @ q.T
    block = torch.linalg.qr(gaussian(N, 16, seed + 1)).Q
    basis, columns = block, []
    for _ in range(blocks):
        image = h @ block
        first = basis.T @ image
        image = image - basis @ first
        second = basis.T @ image
        columns.append(first + second)
        block, coupling = torch.linalg.qr(image - basis @ second)
        basis = torch.cat([basis, block], dim=1)
    return columns, coupling


def a_wave(blocks, names=tuple(SPECTRA)):
    made = [lanczos(SPECTRA[name], blocks, seed) for seed, name in enumerate(names)]
    columns = [torch.stack(parts) for parts in zip(*(columns for columns, _ in made), strict=True)]
    return columns, torch.stack([coupling for _, coupling in made])


def dense(t):
    """T as (w, k, k)."""
    w, blocks = t.members, t.blocks
    full = torch.zeros((w, 16 * blocks, 16 * blocks), dtype=torch.float64)
    for j in range(blocks):
        here = slice(16 * j, 16 * j + 16)
        full[:, here, here] = t.diagonal[:, j]
        if j + 1 < blocks:
            after = slice(16 * j + 16, 16 * j + 32)
            full[:, here, after], full[:, after, here] = t.upper[:, j], t.upper[:, j].mT
    return full
