"""Small tensors that the host makes for a device, without waiting for the device.

A copy from memory that is not pinned makes the host wait until the device has done all that it was told. Then the
device waits for the host to say what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

Tensor = torch.Tensor


def accelerated(device: torch.device) -> bool:
    """Whether every operation on the device is a launch, so that few large ones are faster than many small ones."""
    return device.type != "cpu"


def on_device(values: Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Numbers as a float64 tensor of the same shape."""
    return moved(torch.tensor(values, dtype=torch.float64, device="cpu"), device)


def moved(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def pick(values: Tensor, which: Sequence[int]) -> Tensor:
    """The rows ``which`` (ascending) of a small tensor, which is not copied if these are all rows."""
    if len(which) == values.shape[0]:
        return values
    return values.index_select(0, places(tuple(which), values.device))


@lru_cache(maxsize=32)  # many tensors of a step are picked from alike
def places(which: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions as an int64 tensor (w,)."""
    return moved(torch.tensor(which, dtype=torch.int64, device="cpu"), device)


@lru_cache(maxsize=32)
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers that every step needs, as float64 (k,)."""
    return on_device(values, device)
