"""Computing as if the caller had changed nothing: no autograd, and none of the shortcuts that torch may take."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator

import torch

from .threads import usual_threads

EXACT = ("ieee", "none")
HOST = torch.device("cpu")
ENTRIES_PER_THREAD = 1 << 15  # below it torch leaves elementwise work to fewer threads


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Neither autograd nor autocast, and float32 products in full: one in bfloat16 or TF32 must not pass for one."""
    usual_threads()  # asked for the first time in a thread, torch keeps what it finds
    with undisturbed_thread(), _PRODUCTS.changed(), _THREADS.changed():
        yield


@contextlib.contextmanager
def undisturbed_thread() -> Iterator[None]:
    """The part of it that torch keeps for each thread."""
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.get_default_device() != HOST:  # asked first, since the mode takes its share of every call to torch
            stack.enter_context(HOST)
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_with_subnormals())
        yield


def flushes() -> bool:
    """Whether arithmetic in this thread takes subnormal numbers for zero, as operand or as result."""
    least = sys.float_info.min
    return least * 0.5 == 0.0 or math.ldexp(1.0, -1074) * 2.0**52 == 0.0


def emulates_float64(device: torch.device) -> bool:
    """Whether cuBLAS was asked, by a variable of the environment, to make float64 products of smaller numbers on this
    device: their errors are relative to the largest entries, which no bound on the rounding of sums allows for."""
    asked = os.environ.get("CUBLAS_EMULATE_DOUBLE_PRECISION", "").strip()
    return device.type == "cuda" and asked not in ("", "0")


def is_exact() -> bool:
    """Whether arithmetic in this thread is as ``undisturbed`` has made it: somebody may have changed it since."""
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    exact = all(product.fp32_precision in EXACT for product in products) and not torch.is_autocast_enabled("cpu")
    half = 2.0**-53  # of the spacing behind 1: rounding to nearest, ties to even
    rounds = 1.0 + half == 1.0 and 1.0 + 1.5 * half > 1.0 and -1.0 - half == -1.0
    return exact and rounds and not flushes()


@contextlib.contextmanager
def _with_subnormals() -> Iterator[None]:
    # A processor keeps the mode for each thread, and a new thread starts with that of its parent. torch cannot be asked
    # for it, and libraries that were compiled for fast mathematics set it without torch.
    flushing = flushes()
    if flushing:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushing:
            torch.set_flush_denormal(True)


class _Shared:
    """Settings of the whole process, changed while at least one run goes on, whichever began first or ends last.

    Each of several runs at once would otherwise take for the caller's what another one has set, and put that back.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        """change: makes the change, or nothing where it is made already, and returns what takes it back."""
        self._change, self._lock = change, threading.Lock()
        self._runs, self._takes_back = 0, list[Callable[[], None]]()

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        with self._lock:
            # Once more for each run: the caller may have set it anew in the meantime.
            self._takes_back.append(self._change())
            self._runs += 1
        try:
            yield
        finally:
            with self._lock:
                self._runs -= 1
                while not self._runs and self._takes_back:
                    self._takes_back.pop()()


def _alone_where_workers_flush() -> Callable[[], None]:
    # The threads that torch began for this one in its other mode stay in that: then it does the work alone.
    threads = torch.get_num_threads()
    if threads == 1 or not _workers_flush(threads):
        return lambda: None
    torch.set_num_threads(1)
    return lambda: torch.set_num_threads(threads)


def _workers_flush(threads: int) -> bool:
    small = torch.full((threads * ENTRIES_PER_THREAD,), sys.float_info.min, dtype=torch.float64, device="cpu")
    return bool(((small * 0.5) == 0).any())


def _exact_products() -> Callable[[], None]:
    # torch has two ways to set this, and may refuse to read the older one after the newer one was used.
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [product.fp32_precision for product in products]
    try:
        older: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None

    def take_back() -> None:
        if older not in (None, "highest"):
            torch.set_float32_matmul_precision(older)
        for product, precision in zip(products, precisions, strict=True):
            if product.fp32_precision != precision:
                product.fp32_precision = precision

    try:
        if older not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        for product in products:
            if product.fp32_precision not in EXACT:
                product.fp32_precision = "ieee"
    except BaseException:
        take_back()
        raise
    return take_back


_PRODUCTS, _THREADS = _Shared(_exact_products), _Shared(_alone_where_workers_flush)
