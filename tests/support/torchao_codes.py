"""Weights in formats of torchao, and the peak of memory of reading them."""

from __future__ import annotations

import itertools

import torch
from fp4_codes import nvfp4
from packing import in_bytes
from torch.profiler import ProfilerActivity, profile


def peak_of(matrix) -> int:
    """Bytes that torch has allocated at most while the matrix was loaded, what is returned among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        loaded = matrix.load()
    changes = [e.nbytes() for e in recording.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert loaded.numel()
    return max(itertools.accumulate(changes))


def in_nvfp4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scale, by = nvfp4(weight)
    return {"a.weight_packed": in_bytes(codes), "a.weight_scale": scale, "a.weight_global_scale": torch.tensor([by])}


def in_int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    zero = {"a.weight_zero_point": torch.zeros(rows // 8, 4).int(), "a.weight_scale": torch.ones(rows, 4).bfloat16()}
    return zero | {
        "a.weight_packed": torch.zeros(rows, columns // 8).int(),
        "a.weight_shape": torch.tensor([rows, columns]),
    }
