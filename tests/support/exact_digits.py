"""Matrices whose products are exact."""

from __future__ import annotations

import numpy as np

from kappa_fast.kernels.problems import PAD


def digits(problems, slices):
    """Q of every matrix as Python-exact integers (object arrays would be slow: int64 holds 28 bits)."""
    found = []
    for i, (m, n) in enumerate(zip(problems.m.tolist(), problems.n.tolist(), strict=True)):
        pitch = -(-m // PAD.value) * PAD.value
        start = int(problems.table[i, 7])
        total = np.zeros((n, pitch), dtype=np.int64)
        for k in range(slices.count):
            part = slices.data[k, start : start + n * pitch].view(n, pitch).numpy().astype(np.int64)
            total = total * 128 + part
        found.append(total[:, :m].T)
    return found
