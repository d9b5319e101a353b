"""Which processor this is, as far as the fastest way to multiply depends on it."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


@functools.lru_cache(1)
def mkl_is_narrow() -> bool:
    """Whether torch's BLAS multiplies with half of the width of this processor's units.

    That is MKL on processors of AMD with AVX-512: it uses AVX2 there, while oneDNN, which comes with torch too, looks
    at what the processor can do. Products of 2048 x 2048 in float32 on one thread of an EPYC take 0.43 of MKL's time.
    """
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return mkl and torch.backends.cpu.get_cpu_capability() == "AVX512" and _maker() == "AuthenticAMD"


def _maker() -> str:
    """As Linux has it: "GenuineIntel", "AuthenticAMD"; empty where it does not say."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
