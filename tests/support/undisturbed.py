"""Checks that a call leaves modes of torch, generators and the model as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def of_model(model: nn.Module) -> dict[str, Any]:
    """All that can be told of a model without running it; tensors stand for themselves, with copies of their values."""
    found: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found[name] = (tensor.dtype, tensor.device, tensor.stride(), tensor.data_ptr(), tensor._version, id(tensor))
        found[name] += (tensor.requires_grad, tensor.is_leaf, id(tensor.grad), list(tensor._backward_hooks or ()))
        found[name] += (tensor.detach().contiguous().view(torch.uint8).numpy().tobytes(),)
        if tensor.grad is not None:
            found[name] += (tensor.grad.numpy().tobytes(),)
    for name, module in model.named_modules():
        hooks = {k: list(v) if isinstance(v, dict) else v for k, v in vars(module).items() if "hook" in k}
        found[f"module {name}"] = (type(module), module.training, hooks, sorted(vars(module)))
    return found


def of_process() -> dict[str, Any]:
    """Random states and settings of torch, numpy and Python."""
    numpy_state = np.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "precision": [product.fp32_precision for product in PRODUCTS],
        "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "print": torch._tensor_str.PRINT_OPTS,
    }


@contextlib.contextmanager
def nothing_changes(model: nn.Module) -> Iterator[None]:
    before = of_model(model), of_process()
    yield
    after = of_model(model), of_process()
    assert after[0] == before[0]
    assert after[1] == before[1]


def after(calls: int, then: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    counted: list[int] = []

    def call(*arguments: Any, **options: Any) -> Any:
        counted.append(1)
        return (then if len(counted) > calls else otherwise)(*arguments, **options)

    return call


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def older_switch(value: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(value)
    try:
        yield
        assert torch.get_float32_matmul_precision() == value
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def newer_switch(product: Any, value: str) -> Iterator[None]:
    before = product.fp32_precision
    product.fp32_precision = value
    try:
        yield
    finally:
        product.fp32_precision = before


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autograd off": torch.no_grad,
    "inference": torch.inference_mode,
    "default dtype float64": default_dtype,
    "default device meta": default_device,
    "in a block of device meta": lambda: torch.device("meta"),
    "float32 products at medium": lambda: older_switch("medium"),
    "float32 products at high": lambda: older_switch("high"),
    "TF32 on CUDA by the newer switch": lambda: newer_switch(PRODUCTS[0], "tf32"),
    "bfloat16 on the CPU by the newer switch": lambda: newer_switch(PRODUCTS[1], "bf16"),
    "deterministic algorithms": deterministic,
}
