"""Kernels and rank() on a GPU: checked against float64 first, then timed beside the libraries.

    python benchmarks/gpu.py [--only gram,cholesky,...] [--models NAME,...] [--repeats N] [--output FILE]

Writes benchmarks/results/<device>.json, whole after every section. ``--smoke`` runs every line at toy sizes under
Triton's interpreter, on a CPU, to see that it works: its timings mean nothing and it writes nothing unless told where.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import torch
from gpu_models import MODELS, build, layers_of, size_of
from gpu_timing import Bench, Spread, ceilings, default_target, describe
from rich.console import Console
from rich.table import Table

import kappa_fast

console = Console()


def check(bench: Bench) -> dict[str, Any]:
    """Every kernel against float64 on the host, for every storage class."""
    from kappa_fast.kernels import canary
    from kappa_fast.kernels.problems import storages

    classes = storages()[:6:5] if bench.smoke else storages()
    canary.check_device(bench.device)
    for storage in classes:
        canary.check_storage(bench.device, storage)
    return {"device": "passed", "storage_classes": len(classes)}


def gram(bench: Bench) -> dict[str, Any]:
    """(a) Gram matrices of 64 matrices 14336 x 4096 in bfloat16; operations per second of the lower triangles."""
    from kappa_fast.kernels.gram import gram_of_slices, gram_of_weights
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.quantize import column_peaks, quantize

    m, n = (160, 64) if bench.smoke else (14336, 4096)
    count = max(1, min(2 if bench.smoke else 64, bench.free() // (2 * (8 * n * n + 6 * m * n))))
    matrices = [torch.randn(m, n, device=bench.device).bfloat16() for _ in range(count)]
    problems = Problems.of(matrices)
    peaks = column_peaks(problems)
    operations = float(count) * m * n * (n + 1)
    found: dict[str, Any] = {"matrices": count, "shape": [m, n], "operations": operations}

    def add(name: str, spread: Spread) -> None:
        found[name] = {**spread.as_json(), "useful_per_second": operations / spread.median}

    for k in (1, 2, 3):
        slices = quantize(problems, peaks, k)
        add(f"quantize, {k} slices", bench.time(lambda k=k: quantize(problems, peaks, k)))  # type: ignore[misc]
        add(f"gram of {k} slices", bench.time(lambda s=slices: gram_of_slices(problems, s)))  # type: ignore[misc]
    add("gram of 16-bit weights", bench.time(lambda: gram_of_weights(problems)))
    del slices
    add("torch: bf16 products", bench.time(lambda: [a.T @ a for a in matrices]))
    digits = [torch.randint(-64, 64, (m, n), dtype=torch.int8, device=bench.device) for _ in range(2)]
    high, low = digits
    add("torch: int8 products", bench.time(lambda: [torch._int_mm(high.T, high) for _ in range(count)]))

    def three_products() -> torch.Tensor:
        cross = torch._int_mm(high.T, low).double()
        total = torch._int_mm(high.T, high).double().mul_(2.0**14)
        return total.add_(cross + cross.T, alpha=2.0**7).add_(torch._int_mm(low.T, low))

    add("torch: what two slices do", bench.time(lambda: [three_products() for _ in range(count)]))
    found["two_slices_over_torch"] = found["torch: what two slices do"]["median"] / found["gram of 2 slices"]["median"]
    return found


def cholesky(bench: Bench) -> dict[str, Any]:
    """(b) Cholesky factors of 64 matrices of order 4096, float64, beside the library's, one by one and in a batch."""
    from kappa_fast.kernels.cholesky import cholesky as factor

    problems, packed, grams = _definite(bench)
    found: dict[str, Any] = {"matrices": len(grams), "order": len(grams[0])}
    restored = bench.time(lambda: packed.clone())
    ours = bench.time(lambda: factor(problems, packed.clone()))
    found["copy of what is factored"] = restored.as_json()
    found["kappa_fast"] = ours.as_json()
    found["torch, one by one"] = bench.time(lambda: [torch.linalg.cholesky_ex(g) for g in grams]).as_json()
    stacked = torch.stack(grams)
    found["torch, batched"] = bench.time(lambda: torch.linalg.cholesky_ex(stacked)).as_json()
    return found


def krylov(bench: Bench) -> dict[str, Any]:
    """(c) One product, one solve, one extension of a basis of 64 columns, and both ends of the spectrum."""
    from kappa_fast.backends.base import Panel
    from kappa_fast.backends.triton_backend import TritonBackend
    from kappa_fast.spectrum.krylov import WIDTH, gaussian_panel, largest

    m, n, count = (96, 64, 2) if bench.smoke else (8192, 4096, 64)
    count = max(1, min(count, bench.free() // (3 * (8 * n * n + 2 * m * n))))
    backend = TritonBackend(bench.device)
    weights = [torch.randn(m, n, device=bench.device).bfloat16() for _ in range(count)]
    operands = backend.prepare(weights)
    rung = backend.rungs((m, n), torch.bfloat16)[0]
    factors = backend.factor(operands, rung)
    x = gaussian_panel(factors.ns, [b""] * len(factors.ns), WIDTH, 5, torch.float64, bench.device)
    lowers = [torch.linalg.cholesky(w.double().T @ w.double()) for w in weights]
    blocks = list(x.blocks())
    wide = torch.randn(x.data.shape[0], 64, dtype=torch.float64, device=bench.device)
    basis = Panel(wide / n**0.5, x.rows)
    scale = torch.ones(count, dtype=torch.float64, device=bench.device)
    found: dict[str, Any] = {"matrices": count, "order": n}
    found["product"] = bench.time(lambda: backend.product(factors, x)).as_json()
    found["torch: product"] = bench.time(
        lambda: [lo @ (lo.T @ b) for lo, b in zip(lowers, blocks, strict=True)]
    ).as_json()
    found["solve"] = bench.time(lambda: backend.solve(factors, x)).as_json()

    def library_solve() -> list[torch.Tensor]:
        return [torch.cholesky_solve(b, lo) for lo, b in zip(lowers, blocks, strict=True)]

    found["torch: solve"] = bench.time(library_solve).as_json()
    found["extend by 16 beside 64"] = bench.time(lambda: backend.extend(basis, x, scale)).as_json()

    def ends() -> None:
        def noise(which: Sequence[int], theta: torch.Tensor) -> torch.Tensor:
            return torch.full_like(theta, 1e-15)

        for operator, salt in ((backend.product, 0), (backend.solve, 1)):
            largest(backend, operator, factors, [b""] * len(factors.ns), noise, 1.2e-2, salt=salt)

    found["both ends to 1.2%"] = bench.wall(ends, 1 if bench.smoke else bench.repeats).as_json()
    return found


def rank(bench: Bench, names: Sequence[str]) -> dict[str, Any]:
    """(d), (e) Whole models: time, memory, proofs, the sum of floors, and the peers on one layer scaled up."""
    rates = bench.document.get("ceilings") or ceilings(bench)
    found = {}
    for name in names:
        if not bench.smoke and size_of(name) * 1.25 > bench.free():
            found[name] = {"skipped": f"{size_of(name) / 1e9:.0f} GB of weights do not fit on this device"}
            continue
        found[name] = _ranked(bench, name, rates)
        bench.keep("rank", found)
    return found


def _ranked(bench: Bench, name: str, rates: dict[str, float]) -> dict[str, Any]:
    rows = _ours(bench, build(name, bench.device, smoke=bench.smoke), rates)
    rows["peers, one layer times the number of layers"] = _peers(bench, name)
    return rows


def _ours(bench: Bench, model: torch.nn.Module, rates: dict[str, float]) -> dict[str, Any]:
    backend = "triton" if bench.smoke else "auto"

    def run(certify: bool = False) -> kappa_fast.Ranking:
        return kappa_fast.rank(model, backend=backend, certify=certify, progress=False)

    rows: dict[str, Any] = {"peak_bytes": bench.peak(run)}
    plain, ranking = bench.wall(run, min(3, bench.repeats)), run()
    rows |= {"matrices": len(ranking), "backend": ranking.metadata["backend"], "kappa_fast": plain.as_json()}
    rows["floor"] = sum(_floor(e.shape, rates) for e in ranking)
    rows["over_floor"] = plain.median / rows["floor"]
    rows["certify"] = bench.wall(lambda: run(certify=True), 1).as_json()
    return rows


def _peers(bench: Bench, name: str) -> dict[str, float]:
    """Seconds for the whole model, from those of one layer."""
    sample = build(name, bench.device, layers=1, smoke=bench.smoke)
    times = 1 if bench.smoke else layers_of(name)
    entries = kappa_fast.rank(sample, backend="torch", progress=False)
    parameters = dict(sample.named_parameters())
    weights = [parameters[e.name].detach()[e.index] for e in entries]

    def gram_eigenvalues() -> None:
        for w in weights:
            tall = (w if w.shape[0] >= w.shape[1] else w.T).double()
            torch.linalg.eigvalsh(tall.T @ tall)

    found = {
        "svdvals, float32": times * bench.wall(lambda: [torch.linalg.svdvals(w.float()) for w in weights], 1).median,
        "eigvalsh of the float64 Gram matrix": times * bench.wall(gram_eigenvalues, 1).median,
    }
    try:
        from peft.helpers import KappaTuneSelector
    except ImportError as error:
        console.print(f"PEFT's selector is left out: {error}")
        return found

    def selector() -> None:
        KappaTuneSelector(sample, show_progress=False)._compute_kappas()

    found["PEFT's KappaTuneSelector"] = times * bench.wall(selector, 1).median
    return found


def _floor(shape: tuple[int, int], rates: dict[str, float]) -> float:
    """Seconds that no way of working with this matrix could go below at the measured rates of the libraries.

    Gram matrix in 16 bits, Cholesky, six steps at both ends that read the factor twice each, weights read three times.
    """
    m, n = max(shape), min(shape)
    product = m * n * n / rates["bf16"]
    factor = n**3 / 3 / rates["float64"]
    steps = 12 * 2 * (4 * n * n) / rates["bandwidth"]
    return product + factor + steps + 3 * 2 * m * n / rates["bandwidth"]


def _definite(bench: Bench) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    from kappa_fast.kernels.problems import Problems

    n = 96 if bench.smoke else 4096
    count = max(1, min(2 if bench.smoke else 64, bench.free() // (5 * 8 * n * n)))
    problems = Problems.of([torch.empty(n, n, device=bench.device) for _ in range(count)])
    packed = torch.zeros(problems.gram_elements, dtype=torch.float64, device=bench.device)
    grams = []
    for view in problems.gram_views(packed):
        a = torch.randn(n, n, dtype=torch.float64, device=bench.device)
        grams.append(a @ a.T + n * torch.eye(n, dtype=torch.float64, device=bench.device))
        view.copy_(grams[-1])
    return problems, packed, grams


def show(section: str, found: Any) -> None:
    """A section as a table."""
    table = Table(title=section)
    table.add_column("")
    table.add_column("found", justify="right")
    for name, value in _flat(found):
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def _flat(found: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(found, dict):
        return [(prefix, found)]
    return [row for key, value in found.items() for row in _flat(value, f"{prefix}, {key}" if prefix else str(key))]


SECTIONS: dict[str, Callable[[Bench], Any]] = {
    "ceilings": ceilings,
    "gram": gram,
    "cholesky": cholesky,
    "krylov": krylov,
}


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The options, or an end with what is wrong with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="ceilings,gram,cholesky,krylov,rank", help="sections, with commas between")
    parser.add_argument("--models", default=",".join(MODELS), help="of the section rank, with commas between")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true")
    found = parser.parse_args(given)
    found.only, found.models = found.only.split(","), found.models.split(",")
    unknown = [*(set(found.only) - {*SECTIONS, "rank"}), *(set(found.models) - set(MODELS))]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; sections {', '.join(SECTIONS)}, rank; models {', '.join(MODELS)}")
    return found


def main(given: Sequence[str]) -> int:
    """0; 1 if a kernel is wrong or a section failed; 2 without a GPU."""
    options = arguments(given)
    if not options.smoke and not torch.cuda.is_available():
        print("this benchmark needs a GPU that torch can use (or --smoke, to see that it runs)", file=sys.stderr)
        return 2
    device = torch.device("cpu") if options.smoke else torch.device("cuda", torch.cuda.current_device())
    target = options.output or (None if options.smoke else default_target(device))
    bench = Bench(device, 1 if options.smoke else options.repeats, options.smoke, target)
    bench.document = describe(device, options.smoke)
    console.print(bench.document["hardware"]["name"])
    try:
        bench.keep("check", check(bench))
    except Exception as error:
        bench.keep("check", f"failed: {error}")
        print(f"a kernel is wrong or does not run, so nothing is timed: {error}", file=sys.stderr)
        return 1
    failed = False
    for section in options.only:
        try:
            found = rank(bench, options.models) if section == "rank" else SECTIONS[section](bench)
        except Exception as error:  # what the other sections find is not lost
            traceback.print_exc()
            found, failed = f"failed: {type(error).__name__}: {error}", True
        bench.keep(section, found)
        show(section, found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
