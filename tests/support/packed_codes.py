"""Weights packed as GPTQ and AWQ pack them."""

from __future__ import annotations

import numpy as np
import torch
from packing import by_groups, packed

ROWS, COLUMNS, GROUP = 96, 128, 32


def gptq(
    weight: torch.Tensor, bits: int, group: np.ndarray, *, symmetric: bool, offset: int = 1
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """What is stored for a weight (out, in), and the values it stands for.

    group: of each input. offset: what the format takes from zero points before they are stored.
    """
    codes, scales, zeros = by_groups(weight.numpy(), bits, group, symmetric=symmetric)
    stored = {
        "qweight": packed(codes, bits).T,  # packed along the inputs: each column is a stream
        "qzeros": packed(zeros.T - offset, bits),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    steps = codes - zeros[:, group]
    values = (scales[:, group].astype(np.float64) * steps).astype(np.float16)  # one rounding
    return {f"a.{name}": tensor.contiguous() for name, tensor in stored.items()}, values


def in_turn(size: int = GROUP, columns: int = COLUMNS) -> np.ndarray:
    return np.arange(columns) // size


def config(bits: int, group: int = GROUP, **more: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": False} | more


def awq(weight: torch.Tensor, group: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """What is stored for a weight (out, in), and the values it stands for."""
    which = np.arange(weight.shape[1]) // group
    codes, scales, zeros = by_groups(weight.numpy(), 4, which, symmetric=False)

    def in_words(rows: np.ndarray) -> torch.Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each nibble of a word holds
        places = [8 * word + column for word in range(rows.shape[1] // 8) for column in order]
        return packed(rows[:, places], 4)

    stored = {
        "a.qweight": in_words(codes.T),
        "a.qzeros": in_words(zeros.T),
        "a.scales": torch.from_numpy(scales.T.copy()),
    }
    return stored, (scales[:, which].astype(np.float64) * (codes - zeros[:, which])).astype(np.float16)
