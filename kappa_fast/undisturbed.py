"""Computing as if the caller had changed nothing: no autograd, and none of the shortcuts that torch may take."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator

import torch

EXACT = ("ieee", "none")
HOST = torch.device("cpu")
ENTRIES_PER_THREAD = 1 << 15  # below it torch leaves elementwise work to fewer threads


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Neither autograd nor autocast, and float32 products in full: one in bfloat16 or TF32 must not pass for one."""
    with undisturbed_thread(), _full_float32(), _threads_with_subnormals():
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


@contextlib.contextmanager
def _threads_with_subnormals() -> Iterator[None]:
    # The threads that torch began for this one in its other mode stay in that: then it does the work alone.
    threads = torch.get_num_threads()
    alone = threads > 1 and _workers_flush(threads)
    if alone:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if alone:
            torch.set_num_threads(threads)


def _workers_flush(threads: int) -> bool:
    small = torch.full((threads * ENTRIES_PER_THREAD,), sys.float_info.min, dtype=torch.float64, device="cpu")
    return bool(((small * 0.5) == 0).any())


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    # torch has two ways to set this, and may refuse to read the older one after the newer one was used.
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [product.fp32_precision for product in products]
    try:
        older: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    try:
        if older not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        for product in products:
            if product.fp32_precision not in EXACT:
                product.fp32_precision = "ieee"
        yield
    finally:
        if older not in (None, "highest"):
            torch.set_float32_matmul_precision(older)
        for product, precision in zip(products, precisions, strict=True):
            if product.fp32_precision != precision:
                product.fp32_precision = precision
