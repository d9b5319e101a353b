"""Backends: the operations on a wave of matrices that spectrum/ needs, one file per implementation."""

from __future__ import annotations

import logging

import torch

from ..errors import BackendError
from .base import Backend

__all__ = ["Backend", "get_backend"]

log = logging.getLogger("kappa_fast")


def get_backend(name: str, device: torch.device) -> Backend:
    """The backend called ``name`` on ``device``; "auto" takes the fastest one that works, and warns if Triton does not.

    Raises:
        BackendError: the name is unknown, or the backend cannot work on this device.
    """
    if name == "auto":
        try:
            return get_backend(preferred(device), device)
        except BackendError as error:
            log.warning("%s: going on with backend='torch'", error)
            name = "torch"
    if name == "torch":
        from .torch_backend import TorchBackend

        return TorchBackend(device)
    if name == "triton":
        from .triton_backend import TritonBackend

        return TritonBackend(device)
    raise BackendError(f"backend={name!r} is unknown; choose 'auto', 'torch' or 'triton'")


def preferred(device: torch.device) -> str:
    """The backend that "auto" tries first."""
    return "triton" if device.type == "cuda" else "torch"
