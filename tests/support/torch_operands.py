"""Operands of the torch backend, and how near its results are to their float64 twins."""

from __future__ import annotations

import torch

from kappa_fast.backends.base import Operand
from kappa_fast.backends.torch_backend import TorchBackend

BACKEND = TorchBackend(torch.device("cpu"))
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}


def operand(matrix: torch.Tensor) -> Operand:
    """A prepared matrix."""
    return BACKEND.prepare([matrix])[0]


def wide(a: Operand) -> torch.Tensor:
    """Its values in float64."""
    return a.tensor.double()


def close(got: torch.Tensor, want: torch.Tensor, units: float, unit: float = 2.0**-53) -> bool:
    """Whether the difference is within so many units roundoff of the largest entry."""
    return float((got.double() - want).abs().max()) <= units * unit * float(want.abs().max())
