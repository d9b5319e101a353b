"""How fast a device multiplies, by arithmetic: what the first rung is chosen by.

Published peaks are where it starts. A device that is used is measured once, by a few small products of torch, and what
was found is kept in the user's cache directory, so that later runs choose alike; where it cannot be kept, the published
figures count, since a choice that changes from run to run would change results.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..errors import RankingFileError
from ..io.documents import read_document
from ..io.limits import LARGEST_CONFIG
from ..io.writing import make_folders, write_bytes

log = logging.getLogger("kappa_fast")

T = 1e12
SIDE = 4096  # of the products that are timed: about a millisecond each
TIMES = 3
FILE = "rates.json"
# What a rung multiplies: the arithmetic of its Gram matrix, how many products that takes, the arithmetic of its factor.
WORK = {
    "weights16": ("float16", 1, "float32"),
    "slices2": ("int8", 4, "float32"),
    "bytes2": ("int8", 4, "float32"),
    "slices3": ("int8", 9, "float64"),
    "slices4": ("int8", 16, "float64"),
    "cholesky": ("float64", 1, "float64"),
    "qr": ("float64", 2, "float64"),
    "lu": ("float64", 0, "float64"),
}


@dataclass(frozen=True)
class Rates:
    """Operations per second, multiplications and additions counted apart, without sparsity.

    float64, and float32 as float32 factors are made (TF32 taken three times, or float32 itself if that is faster);
    float16 stands for bfloat16 as well.
    """

    float64: float
    float32: float
    float16: float
    int8: float

    def seconds(self, shape: tuple[int, int], kind: str) -> float:
        """A floor for the first part of a rung on a matrix (m, n), m >= n: Gram matrix and factor at these rates."""
        m, n = shape
        gram, products, factor = WORK[kind]
        if kind == "lu":
            return 2 / 3 * n**3 / self.float64
        return products * m * n**2 / self._of(gram) + n**3 / 3 / self._of(factor)

    def _of(self, arithmetic: str) -> float:
        rate: float = getattr(self, arithmetic)
        return rate


# By compute capability, of the largest device that has it: NVIDIA's data sheets and architecture whitepapers, dense.
# float32 is a third of TF32.
PUBLISHED = {
    (8, 0): Rates(19.5 * T, 52 * T, 312 * T, 624 * T),  # A100
    (8, 6): Rates(0.56 * T, 35.6 * T, 71 * T, 284 * T),  # RTX 3090
    (8, 9): Rates(1.29 * T, 82.6 * T, 165 * T, 660 * T),  # RTX 4090
    (9, 0): Rates(67 * T, 165 * T, 989 * T, 1979 * T),  # H100, H200
    (10, 0): Rates(37 * T, 367 * T, 2250 * T, 4500 * T),  # B200
    (10, 3): Rates(1.2 * T, 375 * T, 2250 * T, 150 * T),  # B300, which gave up int8 and float64 units
    (12, 0): Rates(1.64 * T, 104 * T, 209 * T, 838 * T),  # RTX 5090
}
CDNA3 = Rates(163 * T, 163 * T, 1307 * T, 2614 * T)  # MI300X, AMD's data sheet


def published(capability: tuple[int, int], hip: bool = False) -> Rates:
    """Those of the capability, or of the nearest one below it that is listed."""
    if hip:
        return CDNA3
    below = [known for known in PUBLISHED if known <= capability]
    return PUBLISHED[max(below, default=min(PUBLISHED))]


def rates_of(device: torch.device) -> Rates:
    """Of a device: as kept, else as measured now and kept from now on, else as published."""
    if device.type != "cuda":
        return PUBLISHED[9, 0]  # the interpreter does what an H200 would do
    properties = torch.cuda.get_device_properties(device)
    start = published(torch.cuda.get_device_capability(device), bool(torch.version.hip))
    return _kept(f"{properties.name} {properties.multi_processor_count}", start, lambda: measured(device, start))


@functools.lru_cache(maxsize=16)
def _directory() -> Path | None:
    where = os.environ.get("KAPPA_FAST_CACHE")
    if where:
        return Path(where)
    try:
        from platformdirs import user_cache_path

        found = user_cache_path("kappa_fast", appauthor=False)
    except (ImportError, OSError, RuntimeError):
        return None
    return found if found.is_absolute() else None


def _kept(name: str, start: Rates, measure: Callable[[], Rates], directory: Path | None = None) -> Rates:
    """What the file says of a device; if it says nothing, what ``measure`` finds, provided that it can be kept."""
    directory = directory or _directory()
    if directory is None:
        return start
    path = directory / FILE
    known = _read(path)
    if name in known:
        return known[name]
    try:
        make_folders(directory, 0o700)
        if not os.access(directory, os.W_OK):
            return start
        found = measure()
        known = {**_read(path), name: found}
        document = {key: asdict(value) for key, value in known.items()}
        write_bytes(path, json.dumps(document, indent=1).encode())
    except (OSError, RuntimeError, RankingFileError) as error:
        log.info("rates of %s are taken as published (%s)", name, error)
        return start
    return found


def _read(path: Path) -> dict[str, Rates]:
    """What a file holds; nothing where it is missing, or is not what this version writes."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        found = {str(key): Rates(**value) for key, value in read_document(path, LARGEST_CONFIG).items()}
        if all(math.isfinite(x) and x > 0 for rates in found.values() for x in asdict(rates).values()):
            return found
    return {}


def measured(device: torch.device, start: Rates) -> Rates:
    """What products of torch reach, the best of a few; what torch cannot multiply is taken as published."""

    def rate(dtype: torch.dtype, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], side: int) -> float:
        x = torch.ones((side, side), dtype=dtype, device=device)
        times = []
        for _ in range(TIMES + 1):  # the first one warms up
            torch.cuda.synchronize(device)
            begun = time.perf_counter()
            multiply(x, x.T)
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begun)
        return 2.0 * side**3 / min(times[1:])

    with torch.cuda.device(device):
        float64 = rate(torch.float64, torch.mm, SIDE // 2)
        float16 = rate(torch.bfloat16, torch.mm, SIDE)
        float32 = rate(torch.float32, torch.mm, SIDE)
        try:
            int8 = rate(torch.int8, torch._int_mm, SIDE)
        except RuntimeError:  # not on this device, or not in this layout
            int8 = start.int8
    # TF32 runs at half the rate of 16 bits, on every device that has it.
    return Rates(float64, max(float32, float16 / 6), float16, int8)
