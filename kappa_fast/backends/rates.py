"""The rates at which a device multiplies, by which the Triton backend chooses the first rung of a matrix.

A device is measured once with a few small products of torch, and the rates are kept in the user's cache directory, so
that later runs choose the same rung and get the same results. Where rates cannot be kept, published peaks are used.
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
SIDE = 4096  # the products that are timed have this size, and take about a millisecond each
TIMES = 3
FILE = "rates.json"
# By kind of rung: the arithmetic of its Gram matrix, the number of products for that, the arithmetic of its factor.
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
    """Operations per second without sparsity; a multiplication and an addition are two operations.

    float32 is the rate at which float32 factors are computed (with TF32 products taken three times, or in float32 if
    that is faster). float16 is also the rate of bfloat16.
    """

    float64: float
    float32: float
    float16: float
    int8: float

    def seconds(self, shape: tuple[int, int], kind: str) -> float:
        """The least time of Gram matrix and factor of a rung for a matrix (m, n), m >= n."""
        m, n = shape
        gram, products, factor = WORK[kind]
        if kind == "lu":
            return 2 / 3 * n**3 / self.float64
        return products * m * n**2 / self._of(gram) + n**3 / 3 / self._of(factor)

    def _of(self, arithmetic: str) -> float:
        rate: float = getattr(self, arithmetic)
        return rate


# By compute capability, dense rates of the largest device that has it, from NVIDIA's data sheets and architecture
# whitepapers. float32 is a third of TF32.
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


def published_rates(capability: tuple[int, int], hip: bool = False) -> Rates:
    """The published rates for a capability, or for the nearest lower one that is listed."""
    if hip:
        return CDNA3
    below = [known for known in PUBLISHED if known <= capability]
    return PUBLISHED[max(below, default=min(PUBLISHED))]


def rates_of(device: torch.device) -> Rates:
    """The rates of a device: the kept ones, else measured ones if they can be kept, else the published ones."""
    if device.type != "cuda":
        return PUBLISHED[9, 0]  # Triton's interpreter chooses the rungs of an H200
    properties = torch.cuda.get_device_properties(device)
    start = published_rates(torch.cuda.get_device_capability(device), bool(torch.version.hip))
    name = f"{properties.name} {properties.multi_processor_count}"
    return _kept_or_measured(name, start, lambda: measure_rates(device, start))


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


def _kept_or_measured(name: str, start: Rates, measure: Callable[[], Rates], directory: Path | None = None) -> Rates:
    """The rates that the file has for a device; else those of ``measure`` if they can be kept; else ``start``."""
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
    """The rates in a file by device; none if the file is missing or of another form than this version's."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        found = {str(key): Rates(**value) for key, value in read_document(path, LARGEST_CONFIG).items()}
        if all(math.isfinite(x) and x > 0 for rates in found.values() for x in asdict(rates).values()):
            return found
    return {}


def measure_rates(device: torch.device, start: Rates) -> Rates:
    """The highest rates that a few products of torch reach; ``start`` for a dtype that torch cannot multiply."""

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
        except RuntimeError:  # torch has no int8 product for this device or layout
            int8 = start.int8
    # TF32 runs at half the rate of 16 bits, on every device that has it.
    return Rates(float64, max(float32, float16 / 6), float16, int8)
