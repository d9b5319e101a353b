"""Computing as if the caller had changed nothing: no autograd, and none of the shortcuts that torch may take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

EXACT = ("ieee", "none")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Neither autograd nor autocast, and float32 products in full: one in bfloat16 or TF32 must not pass for one."""
    with undisturbed_thread(), _full_float32():
        yield


@contextlib.contextmanager
def undisturbed_thread() -> Iterator[None]:
    """The part of it that torch keeps for each thread."""
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


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
