"""What a GPU that is not here could do at best: a floor model from published peak figures. Nothing in it is measured.

For every matrix m x n, the Gram matrix' lower triangle takes m n^2 operations (multiplications and additions counted
apart, as in the figures) times the number of products its first rung needs, and the Cholesky factor n^3 / 3 in float64.
Divided by the peak rates, and no less than one pass over the weights at the peak bandwidth. Krylov steps, launches,
copies from the host, higher rungs and everything below peak come on top: real runs take longer, possibly several times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..backends.torch_backend import SLENDER
from ..errors import OptionError

T = 1e12
GB = 10**9


@dataclass(frozen=True)
class DeviceModel:
    """Published peaks without sparsity: operations per second by arithmetic, memory in bytes, bandwidth in bytes/s.

    float64: of tensor cores where they have it.
    """

    name: str
    memory: int
    bandwidth: float
    float64: float
    bfloat16: float
    int8: float
    source: str


@dataclass(frozen=True)
class Floor:
    """Seconds at the least, for a device that was named: gram and cholesky at peak rates, weights at peak bandwidth.

    ``low`` is for the matrices that are resolved for certain (``top``), ``seconds`` for all.
    """

    device: DeviceModel
    gram: float
    cholesky: float
    proofs: float
    reading: float
    seconds: float
    low: float
    weights_fit: bool
    measured: bool = False  # for whoever finds the number in a file


_HOPPER = dict(float64=67 * T, bfloat16=989.5 * T, int8=1979 * T)
DEVICES: dict[str, DeviceModel] = {
    d.name: d
    for d in (
        # Half of the figures that are given with sparsity. The data sheets speak of the SXM modules.
        DeviceModel("h200", 141 * GB, 4.8 * T, **_HOPPER, source="NVIDIA H200 Tensor Core GPU, data sheet (SXM)"),
        DeviceModel("h100", 80 * GB, 3.35 * T, **_HOPPER, source="NVIDIA H100 Tensor Core GPU, data sheet (SXM)"),
        DeviceModel("a100", 80 * GB, 2.039 * T, 19.5 * T, 312 * T, 624 * T, "NVIDIA A100, data sheet (SXM, 80 GB)"),
        # Of the Ada generation float64 runs at 1/64 of the rate of float32, 91.6 and 82.6 T: NVIDIA Ada whitepaper.
        DeviceModel("l40s", 48 * GB, 0.864 * T, 1.43 * T, 362 * T, 733 * T, "NVIDIA L40S, data sheet; Ada whitepaper"),
        DeviceModel("rtx4090", 24 * GB, 1.008 * T, 1.29 * T, 165.2 * T, 660.6 * T, "NVIDIA Ada whitepaper, appendix"),
    )
}


def device_model(name: object) -> DeviceModel:
    """The published figures of a device; spaces and hyphens in its name do not matter.

    Raises:
        OptionError: none are listed for that name.
    """
    found = DEVICES.get(re.sub(r"[\s_-]", "", name.lower())) if isinstance(name, str) else None
    if found is None:
        raise OptionError(f"device_model={name!r} has no published figures here: choose one of {', '.join(DEVICES)}")
    return found


def first_products(shape: tuple[int, int], dtype: torch.dtype) -> tuple[str, int]:
    """Arithmetic of the first rung of the Triton backend for such a matrix, and how many products it takes.

    Slices k need k (k + 1) / 2 products of int8 digits (docs/numerics.md).
    """
    m, n = max(shape), min(shape)
    if dtype == torch.float64:
        return "float64", 1
    if n >= SLENDER * m:
        return "int8", 6
    return ("bfloat16", 1) if dtype in (torch.bfloat16, torch.float16) else ("int8", 3)


def floor_of(
    device: DeviceModel,
    every: Mapping[tuple[tuple[int, int], torch.dtype], int],
    certain: Mapping[tuple[tuple[int, int], torch.dtype], int],
    proven: Mapping[tuple[tuple[int, int], torch.dtype], int],
) -> Floor:
    """The floor for matrices counted by shape and dtype: all, those resolved for certain, and those to be proven."""
    gram, cholesky, reading = _parts(device, every)
    proofs = _proofs(device, proven)
    least_gram, least_cholesky, least_reading = _parts(device, certain)
    return Floor(
        device=device,
        gram=gram,
        cholesky=cholesky,
        proofs=proofs,
        reading=reading,
        seconds=max(gram + cholesky + proofs, reading),
        low=max(least_gram + least_cholesky + proofs, least_reading),
        weights_fit=reading * device.bandwidth <= device.memory,
    )


def _parts(
    device: DeviceModel, counts: Mapping[tuple[tuple[int, int], torch.dtype], int]
) -> tuple[float, float, float]:
    gram = cholesky = nbytes = 0.0
    for (shape, dtype), count in counts.items():
        m, n = max(shape), min(shape)
        arithmetic, products = first_products(shape, dtype)
        gram += count * products * m * n**2 / float(getattr(device, arithmetic))
        cholesky += count * n**3 / 3 / device.float64
        nbytes += count * m * n * dtype.itemsize
    return gram, cholesky, nbytes / device.bandwidth


def _proofs(device: DeviceModel, counts: Mapping[tuple[tuple[int, int], torch.dtype], int]) -> float:
    """A float64 Gram matrix, two factorizations and the product of each factor with itself (spectrum/certify.py)."""
    operations = 0.0
    for (shape, _), count in counts.items():
        m, n = max(shape), min(shape)
        operations += count * (m * n**2 + 4 * n**3 / 3)
    return operations / device.float64
