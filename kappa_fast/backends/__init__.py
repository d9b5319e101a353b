"""Backends: the few operations on a wave of matrices that the numerics need, one file per implementation."""

from __future__ import annotations

import torch

from ..errors import BackendError
from .base import Backend

__all__ = ["Backend", "get_backend"]


def get_backend(name: str, device: torch.device) -> Backend:
    """The backend called ``name`` on ``device``; "auto" takes the best one there is.

    Raises:
        BackendError: the name is unknown, or the backend cannot work on this device.
    """
    if name in ("auto", "torch"):
        from .torch_backend import TorchBackend

        return TorchBackend(device)
    if name == "triton":
        from .triton_backend import TritonBackend

        return TritonBackend(device)
    raise BackendError(f"backend={name!r} is unknown; choose 'auto', 'torch' or 'triton'")
