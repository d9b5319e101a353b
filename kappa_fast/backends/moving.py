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


def places(which: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions as an int64 tensor (w,), kept for later calls: not to be changed."""
    return _places(which, device, stream_of(device))


@lru_cache(maxsize=32)  # many tensors of a step are picked from alike
def _places(which: tuple[int, ...], device: torch.device, _: int) -> Tensor:
    return moved(torch.tensor(which, dtype=torch.int64, device="cpu"), device)


def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers that every step needs, as float64 (k,), kept for later calls: not to be changed."""
    return _constants(values, device, stream_of(device))


@lru_cache(maxsize=32)
def _constants(values: tuple[float, ...], device: torch.device, _: int) -> Tensor:
    return on_device(values, device)


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as a number. What is kept is kept for one stream: another thread may use it in
    another one, before the copy to the device is done."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
