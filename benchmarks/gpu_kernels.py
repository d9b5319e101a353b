"""The stages of gpu.py that time single kernels, beside the library's and below what the device was measured to reach.

Kernels work on a wave of matrices; the library gets one matrix, and every number says how many it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_timing import Bench, without_canaries


def ceilings(bench: Bench) -> None:
    """Bytes per second of a copy, and operations per second of square products: what floors are counted with."""
    side, size = (64, 1 << 16) if bench.smoke else (8192, 1 << 30)

    def copies() -> float:
        source = torch.zeros(size, dtype=torch.int8, device=bench.device)
        target = torch.empty_like(source)
        return 2 * size / bench.time(lambda: target.copy_(source)).median

    def uploads() -> float:
        source = torch.zeros(size, dtype=torch.int8, pin_memory=bench.device.type == "cuda")
        target = torch.empty_like(source, device=bench.device)
        return size / bench.time(lambda: target.copy_(source, non_blocking=True)).median

    def products(dtype: torch.dtype, n: int) -> float:
        a = torch.randn(n, n, device=bench.device).to(dtype)
        return 2 * n**3 / bench.time(lambda: a @ a).median

    def tf32() -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return products(torch.float32, side)
        finally:
            torch.set_float32_matmul_precision(before)

    def int8() -> float:
        q = torch.randint(-64, 64, (side, side), dtype=torch.int8, device=bench.device)
        return 2 * side**3 / bench.time(lambda: torch._int_mm(q, q.T)).median

    bench.attempt("bandwidth", copies)
    bench.attempt("from pinned memory", uploads)
    bench.attempt("bf16", partial(products, torch.bfloat16, side))
    bench.attempt("float64", partial(products, torch.float64, side // 2))
    bench.attempt("float32", partial(products, torch.float32, side // 2))
    bench.attempt("tf32", tf32)
    bench.attempt("int8", int8)


def gram(bench: Bench) -> None:
    """Gram matrices of 64 matrices 14336 x 4096 in bfloat16; operations of the lower triangles."""
    from kappa_fast.kernels.gram import gram_of_slices, gram_of_weights
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.quantize import column_peaks, quantize

    m, n = (160, 64) if bench.smoke else (14336, 4096)
    count = max(1, min(2 if bench.smoke else 64, bench.free() // (2 * (8 * n * n + 6 * m * n))))
    matrices = [torch.randn(m, n, device=bench.device).bfloat16() for _ in range(count)]
    problems = Problems.of(matrices)
    peaks = column_peaks(problems)

    def row(work: Callable[[], Any], matrices: int) -> dict[str, float]:
        spread = bench.time(work)
        operations = float(matrices) * m * n * (n + 1)
        return {"matrices": matrices, **spread.as_json(), "useful per second": operations / spread.median}

    bench.attempt("of 16-bit weights", lambda: row(lambda: gram_of_weights(problems), count))
    bench.attempt("column peaks", lambda: row(lambda: column_peaks(problems), count))

    def to_slices(k: int, bits: int) -> dict[str, float]:
        return row(lambda: quantize(problems, peaks, k, bits=bits), count)

    def of_slices(k: int, bits: int) -> dict[str, float]:
        slices = quantize(problems, peaks, k, bits=bits)
        return row(lambda: gram_of_slices(problems, slices), count)

    for k, bits in ((1, 7), (2, 7), (3, 7), (2, 8)):
        name = f"{k} {'bytes' if bits == 8 else 'slices'}"
        bench.attempt(f"to {name}", partial(to_slices, k, bits))
        bench.attempt(f"of {name}", partial(of_slices, k, bits))
    a = matrices[0]
    bench.attempt("torch: bf16 product", lambda: row(lambda: a.T @ a, 1))
    high, low = (torch.randint(-64, 64, (n, m), dtype=torch.int8, device=bench.device) for _ in range(2))
    bench.attempt("torch: int8 product", lambda: row(lambda: torch._int_mm(high, high.T), 1))

    def three_products() -> torch.Tensor:
        cross = torch._int_mm(high, low.T).double()
        total = torch._int_mm(high, high.T).double().mul_(2.0**14)
        return total.add_(cross + cross.T, alpha=2.0**7).add_(torch._int_mm(low, low.T))

    bench.attempt("torch: what two slices do", lambda: row(three_products, 1))


def cholesky(bench: Bench) -> None:
    """Cholesky factors of 64 matrices of order 4096, beside the library's of one and of a batch of eight."""
    from kappa_fast.kernels.cholesky import cholesky as factor
    from kappa_fast.kernels.coarse import coarse_factors
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.shifted import Mirrored

    n = 96 if bench.smoke else 4096
    count = max(1, min(2 if bench.smoke else 64, bench.free() // (5 * 8 * n * n)))
    problems = Problems.of([torch.empty(n, n, device=bench.device) for _ in range(count)])
    packed = torch.zeros(problems.gram_elements, dtype=torch.float64, device=bench.device)
    a = torch.randn(n, n, dtype=torch.float64, device=bench.device)
    gram = a @ a.T + n * torch.eye(n, dtype=torch.float64, device=bench.device)
    for view in problems.gram_views(packed):
        view.copy_(gram)

    def row(work: Callable[[], Any], matrices: int) -> dict[str, float]:
        return {"matrices": matrices, **bench.time(work).as_json()}

    bench.attempt("copy of what is factored", lambda: row(lambda: packed.clone(), count))
    bench.attempt("kappa_fast, with that copy", lambda: row(lambda: factor(problems, packed.clone()), count))

    def attempt_of_a_proof() -> dict[str, float]:
        mirrored = Mirrored.of(problems, packed.clone())

        def once() -> torch.Tensor:
            factors = mirrored.factored(range(count), [1.0] * count, 1)
            return factors.deviations(*factors.residuals())

        return row(once, count)

    def attempt_at_the_upper_end() -> dict[str, float]:
        mirrored = Mirrored.of(problems, packed.clone())
        bounds = [1.01 * float(torch.linalg.eigvalsh(gram)[-1])] * count
        return row(lambda: coarse_factors(mirrored, range(count), bounds).residuals()[0], count)

    bench.attempt("for a proof, from shift to check", attempt_of_a_proof)
    bench.attempt("for the upper end, from shift to residual", attempt_at_the_upper_end)
    narrow = packed.float()
    bench.attempt("in float32, with that copy", lambda: row(lambda: factor(problems, narrow.clone()), count))
    bench.attempt("torch", lambda: row(lambda: torch.linalg.cholesky_ex(gram), 1))
    batch = min(count, 8)
    bench.attempt("torch, a batch", lambda: row(lambda: torch.linalg.cholesky_ex(gram.expand(batch, n, n)), batch))


def krylov(bench: Bench) -> None:
    """One product, one solve and one extension of a basis of 64 columns for a wave; the library's for one matrix."""
    from kappa_fast.backends.base import Panel
    from kappa_fast.backends.triton_backend import TritonBackend

    without_canaries()
    m, n, count = (96, 64, 2) if bench.smoke else (8192, 4096, 64)
    count = max(1, min(count, bench.free() // (3 * (8 * n * n + 2 * m * n))))
    backend = TritonBackend(bench.device)
    weights = [torch.randn(m, n, device=bench.device).bfloat16() for _ in range(count)]
    factors = backend.factor(backend.prepare(weights), [backend.rungs((m, n), torch.bfloat16)[0]] * len(weights))
    x = Panel(torch.randn(count * n, 16, dtype=torch.float64, device=bench.device), factors.ns)
    lower = torch.linalg.cholesky(weights[0].double().T @ weights[0].double())
    block = x.data[:n]
    basis = Panel(torch.randn(x.data.shape[0], 64, dtype=torch.float64, device=bench.device) / n**0.5, x.rows)
    scale = torch.ones(count, dtype=torch.float64, device=bench.device)

    def row(work: Callable[[], Any], matrices: int) -> dict[str, float]:
        return {"matrices": matrices, **bench.time(work).as_json()}

    bench.attempt("product", lambda: row(lambda: backend.product(factors, x), count))
    bench.attempt("solve", lambda: row(lambda: backend.solve(factors, x), count))
    bench.attempt("extend by 16 beside 64", lambda: row(lambda: backend.extend(basis, x, scale), count))
    bench.attempt("torch: product", lambda: row(lambda: lower @ (lower.T @ block), 1))
    bench.attempt("torch: solve", lambda: row(lambda: torch.cholesky_solve(block, lower), 1))
