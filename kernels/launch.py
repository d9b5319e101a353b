"""The one way a kernel is started: on the device of its tensors, counted, and known by name when something fails.

Triton launches on the current device and its current stream, wherever the tensors are; torch works where they are. A
failure on a device is found by the host at a later read, so the names of the last launches are kept until one succeeds.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Any

import torch

REMEMBERED = 64  # launches between two reads, at most; a step of a wave takes fewer


class _Tally(threading.local):
    """What this thread has launched. recent: names since the last read of the host, oldest first."""

    def __init__(self) -> None:
        self.launches = 0
        self.recent: deque[str] = deque(maxlen=REMEMBERED)


tally = _Tally()


def name_of(kernel: Any) -> str:
    """What a kernel is called in reports: the name of its function without decoration."""
    name: str = kernel.__name__
    return name.strip("_").removesuffix("_kernel")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its tensor arguments, on the current stream of that device.

    Does not wait. The current device of the caller is what it was afterwards. With tensors of the device "meta" the
    kernel is compiled for the current device of Triton's driver, and not started: see jit_cache.py.
    """
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    if device.type == "meta":
        kernel.run(*arguments, grid=grid, warmup=True, **options)
        return
    tally.launches += 1
    tally.recent.append(f"{kernel.__module__.rpartition('.')[2]}.{name_of(kernel)}")
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)
