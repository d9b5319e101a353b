"""The stages of gpu.py that say whether what runs on a device is right, and how long whole models take there.

Weights are on the device in every one of them.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_models import build, filled, shapes_of
from gpu_timing import Bench, without_canaries
from record import commit, versions

import kappa_fast

NEEDED = ("torch", "triton")  # by rank() of a module; what else pyproject.toml lists serves files, caches and terminals
OTHERS = ("numpy", "safetensors", "rich", "typer", "xxhash", "platformdirs", "transformers", "peft")
RUNS = 3
ROWS_OF_PROFILE = 60


def describe(bench: Bench) -> None:
    """Hardware, versions, sources, and which packages are missing."""

    def hardware() -> dict[str, Any]:
        if bench.device.type != "cuda":
            return {"name": "Triton's interpreter on a CPU: timings mean nothing", "memory": 1 << 40}
        p = torch.cuda.get_device_properties(bench.device)
        found = {"name": p.name, "memory": p.total_memory, "free": bench.free(), "capability": f"{p.major}.{p.minor}"}
        return found | {
            "multiprocessors": p.multi_processor_count,
            "second-level cache": getattr(p, "L2_cache_size", None),
        }

    def software() -> dict[str, Any]:
        import triton

        built = {"triton": triton.__version__, "cuda": str(torch.version.cuda), "hip": str(torch.version.hip)}
        return {"versions": versions() | built, **commit(), "processors": os.cpu_count(), "interpreted": bench.smoke}

    def missing() -> list[str]:
        return [name for name in (*NEEDED, *OTHERS) if importlib.util.find_spec(name) is None]

    bench.attempt("hardware", hardware)
    bench.attempt("software", software)
    bench.attempt("missing packages", missing)


def compiling(bench: Bench, archive: Path | None = None) -> None:
    """Every kernel that 16-bit models need, compiled on all processors or found in a cache."""
    from kappa_fast.kernels import jit_cache
    from kappa_fast.kernels.problems import storages

    if archive is not None:
        from triton import knobs

        bench.attempt("reasons why the archive is not used", lambda: jit_cache.unpack(archive, Path(knobs.cache.dir)))

    def all_kernels() -> dict[str, Any]:
        wave = [jit_cache.stand_in(s, x) for s in storages() if s.dtype == torch.bfloat16 for x in jit_cache.SHAPES]
        started = time.perf_counter()
        done = jit_cache.compile_all([wave, wave[:1]], os.cpu_count() or 1)
        found: dict[str, Any] = {"compiled": len(done.compiled), "found in the cache": len(done.found)}
        found["seconds"] = time.perf_counter() - started
        if done.failed:
            raise RuntimeError(f"{len(done.failed)} kernels do not compile, the first of them: {done.failed[0]}")
        return found

    bench.attempt("kernels", all_kernels)


def canaries(bench: Bench, *, everything: bool = False) -> None:
    """Known answers from every kernel, for the storage classes of aligned 16-bit models, or for all."""
    from kappa_fast.kernels import canary
    from kappa_fast.kernels.problems import storages

    def passed(check: Callable[[], None]) -> dict[str, Any]:
        return {"passed": True, "seconds": bench.clock(check)[0]}

    common = [s for s in storages() if s.dtype == torch.bfloat16 and s.aligned]
    if not everything:
        bench.attempt("kernels without a dtype", partial(passed, partial(canary.check_device, bench.device)))
    chosen = [s for s in storages() if s not in common] if everything else common
    for storage in chosen[:1] if bench.smoke else chosen:
        bench.attempt(str(storage), partial(passed, partial(canary.check_storage, bench.device, storage)))


def full_size(bench: Bench) -> None:
    """Matrices as large as those of models, against float64; and the same bits from any wave and any repetition."""
    for m, n in ((160, 64), (64, 64)) if bench.smoke else ((14336, 4096), (4096, 4096)):
        count = 2 if bench.smoke else 64
        weights = {f"w{i}": _outliers(bench, m, n, i) for i in range(count)}
        _kernels_at(bench, f"{m}x{n}", weights["w0"])
        _waves_at(bench, f"{m}x{n}", weights)


def _outliers(bench: Bench, m: int, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(bench.device).manual_seed(seed)
    return filled(torch.empty(m, n, dtype=torch.bfloat16, device=bench.device), 3.0, generator)


def _kernels_at(bench: Bench, where: str, weight: torch.Tensor) -> None:
    """Gram matrices, the Cholesky factor and the solves of one matrix: errors relative to float64 and to torch's."""
    from kappa_fast.kernels import cholesky, gram, quantize, triangular
    from kappa_fast.kernels.problems import Problems

    problems = Problems.of([weight])
    wide = weight.double()
    exact, size = wide.T @ wide, float(torch.linalg.matrix_norm(wide))
    norm = float(torch.linalg.matrix_norm(exact))

    def distance(packed: torch.Tensor) -> float:
        (view,) = problems.gram_views(packed)
        return float(torch.linalg.matrix_norm(torch.tril(view) - torch.tril(exact)))

    def gram_of_weights() -> float:
        return _at_most(distance(gram.gram_of_weights(problems)) / norm, 1e-5)

    def gram_of_slices(count: int, bits: int) -> dict[str, float]:
        slices = quantize.quantize(problems, quantize.column_peaks(problems), count, bits=bits)
        error, left = distance(gram.gram_of_slices(problems, slices)), float(slices.residual) ** 0.5
        return {"error": _at_most(error / norm, (left * (2 * size + left) + 1e-13 * norm) / norm), "left": left / size}

    def factor(dtype: torch.dtype) -> dict[str, float]:
        # In float32 a matrix that it can factor: what it cannot is for other rungs to find out.
        shift = 0.0 if dtype == torch.float64 else 1e-2 * size**2 / len(exact)
        wanted = (exact + shift * torch.eye(len(exact), dtype=torch.float64, device=bench.device)).to(dtype)
        packed = torch.zeros(problems.gram_elements, dtype=dtype, device=bench.device)
        (view,) = problems.gram_views(packed)
        view.copy_(wanted)
        factored = cholesky.cholesky(problems, packed)
        lower, library = torch.tril(view).double(), torch.linalg.cholesky(wanted).double()
        ours, theirs = (float(torch.linalg.matrix_norm(wanted - x @ x.T)) / norm for x in (lower, library))
        rounding = 1e-14 if dtype == torch.float64 else 1e-6
        found = {"residual": _at_most(ours, 2 * theirs + rounding), "of torch": theirs}
        members = triangular.Members.of(problems)
        x = torch.ones(len(exact), 16, dtype=torch.float64, device=bench.device)
        down = triangular.forward_solve(problems, factored, members, x)
        y = triangular.backward_solve(problems, factored, members, down)
        up = triangular.lower_product(problems, factored, members, down)
        for name, rest, of in (("L (L^-1 x) - x", up - x, down), ("L^T y - L^-1 x", lower.T @ y - down, y)):
            scale = float(torch.linalg.matrix_norm(lower)) * float(torch.linalg.matrix_norm(of))
            found[name] = _at_most(float(torch.linalg.matrix_norm(rest)) / scale, 10 * rounding)
        return found

    bench.attempt(f"{where}, Gram matrix of weights", gram_of_weights)
    for count, bits in ((2, 7), (3, 7), (2, 8)):
        name = f"{count} {'bytes' if bits == 8 else 'slices'}"
        bench.attempt(f"{where}, Gram matrix of {name}", partial(gram_of_slices, count, bits))
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        bench.attempt(f"{where}, factor and solves in {name}", partial(factor, dtype))


def _at_most(error: float, allowed: float) -> float:
    if not error <= allowed:
        raise ArithmeticError(f"{error:.3g}, where {allowed:.3g} is allowed")
    return error


def _waves_at(bench: Bench, where: str, weights: dict[str, torch.Tensor]) -> None:
    """The values against float64; all matrices in one wave twice, and some of them in waves of one."""
    few = {name: weights[name] for name in list(weights)[:: max(1, len(weights) // 3)]}
    seen: dict[str, Any] = {}
    known: dict[str, tuple[float, float]] = {}

    def together() -> dict[str, Any]:
        seconds, seen["wave"] = bench.clock(lambda: _rank(weights))
        return {"matrices": len(weights), "seconds": seconds, "metadata": _counts(seen["wave"])}

    def again() -> bool:
        return _alike(_rank(weights), seen["wave"])

    def alone() -> bool:
        return _alike(_rank(few, memory_budget="1MB"), seen["wave"])

    def exact(name: str) -> tuple[float, float]:
        """Kappa by float64, and what float64 makes of the smallest eigenvalue, relative to it."""
        values = torch.linalg.eigvalsh(few[name].double().T @ few[name].double())
        kappa = float((values[-1] / values[0]).sqrt())
        return kappa, 1e-15 * len(values) * kappa**2

    def contained(ranking: kappa_fast.Ranking) -> dict[str, Any]:
        found = {}
        for name in list(few)[:2]:
            entry = next(e for e in ranking if e.name == name)
            if name not in known:
                known[name] = exact(name)
            kappa, slack = known[name]
            if not entry.lower * (1 - slack) <= kappa <= entry.upper * (1 + slack):
                raise ArithmeticError(f"{name}: {kappa!r} is not in {entry.lower!r} .. {entry.upper!r}")
            found[name] = {"kappa": kappa, "found": entry.kappa, "lower": entry.lower, "upper": entry.upper}
        return found

    def proven() -> dict[str, Any]:
        ranking = _rank(few, certify=True)
        if not all(e.certified for e in ranking):
            raise ArithmeticError(f"{sum(not e.certified for e in ranking)} of {len(ranking)} are not proven")
        return contained(ranking)

    if _even_if_canaries_die(bench, f"{where}, one wave", together) is not None:
        bench.attempt(f"{where}, kappa in its interval", lambda: contained(seen["wave"]))
        bench.attempt(f"{where}, kappa in its proven interval", proven)
        bench.attempt(f"{where}, the same bits again", again)
        bench.attempt(f"{where}, the same bits in waves of one", alone)


def _even_if_canaries_die(bench: Bench, key: str, work: Callable[[], Any], seconds: float = 0.0) -> Any:
    """As ``bench.attempt``; what fails comes again without canaries, which have a stage of their own."""
    found, healthy = bench.attempt(key, work, seconds), not bench.failed
    if found is not None or healthy:
        return found
    without_canaries()
    return bench.attempt(f"{key}, without canaries", work, seconds)


def _rank(source: Any, **options: Any) -> kappa_fast.Ranking:
    """By Triton alone: a kernel that fails must not leave a large model to torch for minutes."""
    return kappa_fast.rank(source, backend="triton", progress=False, **options)


def _alike(some: kappa_fast.Ranking, others: kappa_fast.Ranking) -> bool:
    by_key = {e.key: e for e in others}
    for e in some:
        if repr(e) != repr(by_key[e.key]):  # nan is equal to nan in a text
            raise ArithmeticError(f"{e.key}: {e!r} is not {by_key[e.key]!r}")
    return True


def _counts(ranking: kappa_fast.Ranking) -> dict[str, Any]:
    """What metadata says of the run itself: waves, launches, reads of the host."""
    known = {"versions", "settings", "source", "num_parameters", "partial", "threads", "device"}
    rest = {key: value for key, value in ranking.metadata.items() if key not in known}
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in rest.items()}


def model(bench: Bench, name: str) -> None:
    """One model: the first run, three more, what they allocate, one under the profiler, and one with proofs."""
    before = _seconds_of_another(bench, name)
    seconds, built = bench.clock(lambda: build(name, bench.device, smoke=bench.smoke))
    bench.keep(
        "weights", {"where": "on the device", "bytes": sum(p.nbytes for p in built.parameters()), "made in": seconds}
    )
    rankings: list[kappa_fast.Ranking] = []

    def run(**options: Any) -> dict[str, Any]:
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        allocated = torch.cuda.memory_allocated(bench.device) if bench.device.type == "cuda" else 0
        taken, ranking = bench.clock(lambda: _rank(built, **options))
        rankings.append(ranking)
        found: dict[str, Any] = {"seconds": taken, "metadata": _counts(ranking)}
        if bench.device.type == "cuda":
            found["peak bytes"] = torch.cuda.max_memory_allocated(bench.device) - allocated
        return found

    first = _even_if_canaries_die(bench, "first run", run, before)
    if first is None:
        return
    bench.keep("what was found", _summary(rankings[0]))
    sizes = [(max(e.shape), min(e.shape)) for e in rankings[0]]
    bench.keep("shapes", {f"{m}x{n}": count for (m, n), count in collections.Counter(sizes).items()})
    runs = []
    for i in range(1 if bench.smoke else RUNS):
        found = bench.attempt(f"run {i + 1}", run, min([first["seconds"], *(r["seconds"] for r in runs)]))
        runs += [found] if found else []
    if not runs:
        return
    median = statistics.median(r["seconds"] for r in runs)
    bench.keep("median", {"seconds": median, "runs": len(runs)})
    bench.attempt("runs agree", lambda: all(_alike(r, rankings[0]) for r in rankings[1:]))
    bench.attempt("profile", lambda: _profile(bench, lambda: _rank(built)), 3 * median)
    if bench.attempt("certify", lambda: run(certify=True), 4 * median) is not None:
        bench.keep("certified", sum(e.certified for e in rankings[-1]))


def _seconds_of_another(bench: Bench, name: str) -> float:
    """What the first run of a model takes, by the one of Llama-3.1-8B and the operations of both; 0 if it has none."""
    keys = ("first run", "first run, without canaries")
    known = next((x for x in (bench.found("Llama-3.1-8B", key) for key in keys) if x), None)
    if known is None or name == "Llama-3.1-8B" or bench.smoke:
        return 0.0

    def operations(of: str) -> float:
        return sum(count * (m * n * n + n**3 / 3) for (m, n), count in shapes_of(of).items())

    return known["seconds"] * operations(name) / operations("Llama-3.1-8B")


def _summary(ranking: kappa_fast.Ranking) -> dict[str, Any]:
    good = [e for e in ranking if e.status == "ok"]
    return {
        "matrices": len(ranking),
        "statuses": dict(collections.Counter(e.status for e in ranking)),
        "methods": dict(collections.Counter(e.method for e in ranking)),
        "kappa": [good[0].kappa, good[-1].kappa] if good else [],
        "widest half-width": max(((e.upper - e.lower) / 2 / e.kappa for e in good), default=0.0),
    }


def _profile(bench: Bench, work: Callable[[], Any]) -> dict[str, Any]:
    """Calls, seconds and share of every kernel in one run."""
    from torch.profiler import ProfilerActivity, profile

    on_device = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]) as seen:
        seconds, _ = bench.clock(work)
    rows = []
    for event in seen.key_averages():
        taken = (event.self_cpu_time_total, event.self_device_time_total)[on_device]
        if taken:
            rows.append((event.key, event.count, taken / 1e6))
    rows.sort(key=lambda row: -row[2])
    busy = sum(row[2] for row in rows)
    kernels = {key[:120]: {"calls": c, "seconds": t, "share": t / busy} for key, c, t in rows[:ROWS_OF_PROFILE]}
    found = {"seconds": seconds, "seconds in kernels": busy, "calls": sum(row[1] for row in rows)}
    return {**found, "kernels": kernels}


def peers(bench: Bench, names: Sequence[str]) -> None:
    """Other ways to kappa, on one matrix of every shape that the models have; the small ones first."""
    shapes = {"smoke": {(64, 48): 1}} if bench.smoke else {name: shapes_of(name) for name in names}
    with contextlib.suppress(ImportError):  # its turn tells what is missing; loading it is no part of its time
        import peft  # noqa: F401
    bench.keep("matrices of each shape", {n: {f"{a}x{b}": c for (a, b), c in s.items()} for n, s in shapes.items()})
    wanted = sorted({shape for found in shapes.values() for shape in found}, key=lambda s: s[0] * s[1] ** 2)
    spent: dict[str, float] = {}  # seconds per operation
    for m, n in wanted:
        weight = _outliers(bench, m, n, m + n)
        for name, work in _ways(weight).items():
            expected = spent.get(name, 0.0) * m * n * n

            def once(work: Callable[[], Any] = work) -> dict[str, float]:
                return {"matrices": 1, "seconds": bench.clock(work)[0]}

            found = bench.attempt(f"{name}, {m}x{n}", once, expected)
            if found is not None:
                spent[name] = found["seconds"] / (m * n * n)


def _ways(weight: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def eigenvalues() -> torch.Tensor:
        wide = weight.double()
        return torch.linalg.eigvalsh(wide.T @ wide)

    def selector() -> None:
        from peft.helpers import KappaTuneSelector

        linear = torch.nn.Linear(1, 1, bias=False)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        KappaTuneSelector(torch.nn.Sequential(linear), show_progress=False)._compute_kappas()

    return {
        "eigvalsh of the float64 Gram matrix": eigenvalues,
        "PEFT's KappaTuneSelector, svdvals in float32": selector,
        "svdvals, float64": lambda: torch.linalg.svdvals(weight.double()),
    }
