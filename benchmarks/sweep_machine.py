"""The roofline of this machine: what the libraries' own products, factorizations and reads from memory reach."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sweep_cells import Cell

N = 2048
READ = 256 << 20  # bytes: more than any cache
RUNS = 5


def rates() -> dict[str, float]:
    """Operations per second (a multiply-add is two) and bytes per second, with the threads that torch has."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(N, N, generator=generator)
    found = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64), ("bfloat16", torch.bfloat16)):
        x = a.to(dtype)
        found[f"product {name}"] = 2 * N**3 / _seconds(lambda x=x: x.T @ x)
    if importlib.util.find_spec("scipy"):
        from scipy.linalg import blas

        for name, routine, dtype in (("float32", blas.ssyrk, torch.float32), ("float64", blas.dsyrk, torch.float64)):
            x = a.to(dtype).numpy()
            found[f"scipy syrk {name}"] = N**3 / _seconds(lambda r=routine, x=x: r(1.0, x.T, lower=1))
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        g = a.to(dtype).T @ a.to(dtype) + N * torch.eye(N, dtype=dtype)
        found[f"Cholesky {name}"] = N**3 / 3 / _seconds(lambda g=g: torch.linalg.cholesky_ex(g))
    wide = a.double()
    found["LU float64"] = 2 * N**3 / 3 / _seconds(lambda: torch.linalg.lu_factor_ex(wide))
    long = torch.ones(READ // 4)
    found["read"] = READ / _seconds(long.sum)
    other = torch.empty_like(long)
    found["copy"] = 2 * READ / _seconds(lambda: other.copy_(long))
    return found


def floor(cell: Cell, rates: dict[str, float]) -> float:
    """Seconds that a way over Gram matrices cannot go below at these rates.

    The weights are read once, or the lower triangles of the Gram matrices and their Cholesky factors take the rate of
    float32 products, whichever is longer.
    """
    n = min(cell.rows, cell.columns)
    width = 2 if cell.dtype == "bfloat16" else 4
    read = cell.count * cell.rows * cell.columns * width / rates["read"]
    return max(read, (cell.operations + cell.count * n**3 / 3) / rates["product float32"])


def _seconds(work: Callable[[], Any]) -> float:
    work()
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
