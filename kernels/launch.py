"""launch(): all files start their kernels with it, on the device of the tensors; it counts and remembers launches.

Triton launches on the current device and its current stream, even if the tensors are on another device. The host finds
a failure on a device at a later read, so the names of the last launches are kept until a read succeeds.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Any

import torch
import triton

REMEMBERED = 64  # launches between two reads, at most; a step of a wave takes fewer


class _Tally(threading.local):
    """The launches of this thread. recent: names since the last read of the host, oldest first."""

    def __init__(self) -> None:
        self.launches = 0
        self.recent: deque[str] = deque(maxlen=REMEMBERED)


tally = _Tally()


def name_of(kernel: Any) -> str:
    """The name of a kernel in reports: that of its function without decoration."""
    name: str = kernel.__name__
    return name.strip("_").removesuffix("_kernel")


_settled: set[int] = set()  # by id: the hash of a function is made of its key
_settling = threading.RLock()


def settle(function: Any) -> None:
    """Let the key of a kernel in Triton's cache depend on no order in which kernels are used.

    Triton puts the constants that a called function uses into the key of the caller, but only those that are known when
    it makes the key: if a process made the key of the called function before. So all keys are made from the bottom up.
    """
    if id(function) in _settled or not isinstance(function, triton.JITFunction):  # interpreted functions have no key
        return
    with _settling:  # another thread must not go on before the key is made
        for name in function.fn.__code__.co_names:
            called = function.fn.__globals__.get(name)
            if called is not function:
                settle(called)
        _ = function.cache_key
        _settled.add(id(function))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its tensor arguments, on the current stream of that device.

    This does not wait for the kernel, and restores the caller's current device. With tensors of the device "meta" the
    kernel is compiled for the current device of Triton's driver, and not started: see jit_cache.py.
    """
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    settle(kernel)
    if device.type == "meta":
        kernel.run(*arguments, grid=grid, warmup=True, **options)
        return
    tally.launches += 1
    tally.recent.append(f"{kernel.__module__.rpartition('.')[2]}.{name_of(kernel)}")
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)
