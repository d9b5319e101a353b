"""Compile the kernels of a wave without running them, also into a compile cache for a GPU that is not present.

    python -m kappa_fast.kernels.aot --jit-cache DIR [--archive FILE] [--dtypes DTYPE,...] TARGET

fills DIR, a cache directory of Triton's, with every kernel that rank() launches on TARGET, and packs it into FILE.
Triton specializes on dtypes, alignment and sizes of 1, which only a launch knows. So the launchers run on tensors of
the device "meta", which have shapes, strides and alignment, but no memory, and a launch with such tensors only compiles
its kernel (launch.py). The keys are those of real launches, so the cache is used wherever Triton's build, its options
and these files are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from . import apply, cholesky, coarse, gram, orthogonal, panel, quantize, ritz, shifted, start, triangular
from .problems import INNER_COLUMNS, INNER_NONE, TARGETS, Problems, Storage, Tensor, storages, supported

META = torch.device("meta")
# Tall, square, narrow, and so long and narrow that its work is split along the rows.
SHAPES = ((14336, 4096), (4096, 4096), (2048, 1024), (65536, 256))
KEPT = (".cubin", ".hsaco", ".json")  # the files of a compiled kernel that a launch reads; other files are for people
MANIFEST = "jit-cache.json"


def stand_in(storage: Storage, shape: tuple[int, int]) -> Tensor:
    """A matrix (m, n) of a storage class on the device "meta"."""
    (m, n), odd = shape, 0 if storage.aligned else 1
    if storage.inner == INNER_NONE:
        return torch.empty_strided((m, n), (2 * n, 2), dtype=storage.dtype, device=META)
    if storage.inner == INNER_COLUMNS:
        return torch.empty((m, n + odd), dtype=storage.dtype, device=META)[:, :n]
    return torch.empty((n, m + odd), dtype=storage.dtype, device=META)[:, :m].T


def like(matrix: Tensor) -> Tensor:
    """A tensor on the device "meta" with the layout of this one, transposed if that makes m >= n."""
    size = 1 + sum((n - 1) * step for n, step in zip(matrix.shape, matrix.stride(), strict=True))
    shift = matrix.data_ptr() % 16 // matrix.element_size() if matrix.device != META else matrix.storage_offset()
    whole = torch.empty(shift + size, dtype=matrix.dtype, device=META)
    found = whole.as_strided(matrix.shape, matrix.stride(), shift)
    return found.T if found.shape[0] < found.shape[1] else found


def launch_all(matrices: Sequence[Tensor]) -> None:
    """Call every launcher that rank() calls for a wave of such matrices (m, n), m >= n, on the device "meta".

    Each kernel is compiled, for the current device of Triton's driver, once for every way in which it is launched.
    """
    problems = Problems.of(matrices)
    narrow = torch.empty(problems.gram_elements, dtype=torch.float32, device=META)
    half = [i for i, a in enumerate(matrices) if a.dtype in (torch.bfloat16, torch.float16)]
    for out in (narrow, None) if half else ():
        gram.gram_of_weights(problems, half, out)
    packed = _slices(problems, narrow)
    _factors(problems, cholesky.cholesky(problems, narrow))
    _factors(problems, cholesky.cholesky(problems, packed))
    _blocks(problems)
    _weights(problems)
    _proofs(problems, packed)


def _slices(problems: Problems, narrow: Tensor) -> Tensor:
    peaks = quantize.column_peaks(problems)
    for count in range(1, quantize.MAX_SLICES + 1):
        slices = quantize.quantize(problems, peaks, count)
        packed = gram.gram_of_slices(problems, slices)
        if count == 2:
            gram.gram_of_slices(problems, slices, narrow)
        if 2 <= count < quantize.MAX_SLICES:
            quantize.quantize(problems, peaks, count + 1, slices)
    for copy in (None, narrow):
        gram.gram_of_slices(problems, quantize.quantize(problems, peaks, 2, bits=8), copy=copy)
    return packed


def _factors(problems: Problems, factored: cholesky.Factored) -> None:
    members = triangular.Members.of(problems)
    x = _empty(members.rows, 16)
    for work in (
        triangular.lower_product,
        triangular.transposed_product,
        triangular.forward_solve,
        triangular.backward_solve,
    ):
        work(problems, factored, members, x)


def _blocks(problems: Problems) -> None:
    members = triangular.Members.of(problems)
    x = _empty(members.rows, 16)
    rows = panel.Rows.of(problems.n, META)
    for width in (16, 3):  # whose sizes the compiler is told of, and others
        block = _empty(members.rows, width)
        coefficients = panel.inner(rows, _empty(members.rows, 64), block)
        panel.subtract(rows, _empty(members.rows, 64), coefficients, block)
        panel.combine(rows, _empty(members.rows, 64), coefficients)
    orthogonal.orthonormalized(rows, x, _empty(rows.members))
    start.gaussian_blocks(rows, [0] * rows.members)
    columns = [_empty(rows.members, 16 * (j + 1), 16) for j in range(3)]
    t = ritz.Tridiagonal.of(columns, _empty(rows.members, 16, 16))
    theta = ritz.largest_eigenvalue(t)
    ritz.reach(t, _empty(rows.members, 25))
    ritz.leading_vectors(t, theta)


def _weights(problems: Problems) -> None:
    start.column_digests(problems)
    blocks = apply.Blocks.of(problems)
    x = _empty(blocks.short_rows, 16)
    image, _ = apply.times(problems, blocks, x)
    apply.times(problems, blocks, x, squares=False)
    apply.transposed_times(problems, blocks, image)
    apply.binade_times(problems, blocks, x)


def _proofs(problems: Problems, packed: Tensor) -> None:
    kept = shifted.Mirrored.of(problems, packed)
    kept.traces()
    chosen = range(len(problems.n))
    factors = kept.factored(chosen, [0.0 for _ in chosen], 1)
    factors.deviations(*factors.residuals())
    coarse.coarse_factors(kept, chosen, [0.0 for _ in chosen]).residuals()


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=META)


@dataclass
class Compiled:
    """The names of the kernels of some waves that were compiled, found in the cache, or failed."""

    compiled: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    failed: list[BaseException] = field(default_factory=list)


def compile_all(
    waves: Iterable[Sequence[Tensor]], workers: int, progress: Callable[[int, int], None] | None = None
) -> Compiled:
    """Compile every kernel that waves of such matrices need, for the current device of Triton's driver.

    ``waves``: matrices on the device "meta", see ``like`` and ``stand_in``. ``workers`` threads compile side by side.
    ``progress(done, begun)`` is called as kernels are done, from those threads. Kernels that this process has compiled
    before are in neither list; a kernel that fails stops no other.
    """
    result, lock, begun = Compiled(), threading.Lock(), []
    before = knobs.compilation.listener

    def listen(**event: Any) -> None:
        with lock:
            (result.found if event["cache_hit"] else result.compiled).append(event["src"].name)
        if before is not None:
            before(**event)

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Future:
            future = super().submit(*arguments, **options)
            begun.append(future)
            future.add_done_callback(lambda _: progress and progress(sum(f.done() for f in begun), len(begun)))
            return future

    knobs.compilation.listener = listen
    try:
        with Pool(workers) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for wave in waves:
                launch_all(wave)
    finally:
        knobs.compilation.listener = before
    result.failed = [error for future in begun if (error := future.exception()) is not None]
    return result


def warmup(
    weights: torch.nn.Module | Iterable[Tensor],
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Compiled:
    """Compile now, on all cores, the kernels that ranking these weights on a GPU launches, into Triton's cache.

    Args:
        weights: a module, or matrices with two dimensions, on any device ("meta" too); no value is read.
        device: the GPU, by default torch's current one.
        progress: called with the number of kernels that are done and that are known of so far.

    Returns:
        The kernels that were compiled and those that were found; ``failed`` has the errors of all others.

    Raises:
        RuntimeError: torch has no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("kernels are compiled for a GPU that torch can use, and torch finds none")
    tensors = weights.parameters() if isinstance(weights, torch.nn.Module) else weights
    # A layer of convolutions is ranked as a matrix, a stack of experts one by one.
    matrices = [t[0] if t.ndim == 3 else t.flatten(1) for t in (t.detach() for t in tensors) if t.ndim >= 2 and len(t)]
    wave = representatives(matrices)
    if not wave:
        return Compiled()
    with torch.cuda.device(device):
        return compile_all([wave, wave[:1]], os.cpu_count() or 1, progress)


def representatives(matrices: Iterable[Tensor]) -> list[Tensor]:
    """The largest of each storage class that kernels read, on the device "meta"."""
    found: dict[Storage, Tensor] = {}
    for matrix in matrices:
        if supported(matrix.dtype) and matrix.numel():
            alike = like(matrix)
            known = found.setdefault(Storage.of(alike), alike)
            if alike.numel() > known.numel():
                found[Storage.of(alike)] = alike
    return list(found.values())


class Pretended:
    """A driver for a device that is not present: it can compile kernels and cannot launch them."""

    def __init__(self, target: str) -> None:
        hip = target.startswith("gfx")
        self._target = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def fill(directory: Path, target: str, dtypes: Sequence[torch.dtype], workers: int) -> Compiled:
    """Fill a cache directory of Triton's for a target. This process can launch nothing afterwards."""
    knobs.cache.dir = str(directory.absolute())
    driver.set_active(Pretended(target))  # type: ignore[arg-type]
    wave = [stand_in(s, shape) for s in storages() if s.dtype in dtypes for shape in SHAPES]
    return compile_all([wave, wave[:1]], workers)


def identity() -> dict[str, str]:
    """The properties, beside the kernels and the target, that must be equal where a cache is made and used."""
    from triton.runtime.cache import triton_key

    build = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"triton": triton.__version__, "build": build, "python": python}


def pack(directory: Path, archive: Path, target: str) -> int:
    """Write what launches read of a cache directory into a .tar.xz file; the number of kernels in it."""
    kernels = sorted(path for path in directory.glob("*/__grp__*.json"))
    with tarfile.open(archive, "w:xz") as tar:
        _add(tar, MANIFEST, json.dumps({"target": target, **identity()}).encode())
        for group in kernels:
            for file in sorted(group.parent.iterdir()):
                if file.suffix in KEPT and file != group:
                    _add(tar, f"{group.parent.name}/{file.name}", file.read_bytes())
    return len(kernels)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def unpack(archive: Path, directory: Path) -> list[str]:
    """Put the kernels of an archive into a cache directory; returns the reasons why they will not be used, if any.

    Triton finds the files of a kernel by a list of absolute paths, which is written here for the directory they are in.
    """
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    made = json.loads((directory / MANIFEST).read_text())
    for metadata in directory.glob("*/*.json"):
        if not metadata.name.startswith("__grp__"):
            files = {file.name: str(file.absolute()) for file in metadata.parent.iterdir() if file.suffix in KEPT}
            group = {name: path for name, path in files.items() if not name.startswith("__grp__")}
            metadata.with_name(f"__grp__{metadata.name}").write_text(json.dumps({"child_paths": group}))
    return [f"made with {key} {made[key]}, here is {here}" for key, here in identity().items() if made[key] != here]


def main(arguments: Sequence[str]) -> int:
    """The command: 0; 1 if a kernel does not compile."""
    known = {str(s.dtype).removeprefix("torch."): s.dtype for s in storages()}
    parser = argparse.ArgumentParser(prog="python -m kappa_fast.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--jit-cache", type=Path, required=True, metavar="DIR")
    parser.add_argument("--archive", type=Path, metavar="FILE")
    parser.add_argument("--dtypes", default=",".join(known), help="of the weights, with commas between")
    options = parser.parse_args(arguments)
    names = options.dtypes.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"unknown dtypes {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    done = fill(options.jit_cache, options.target, [known[name] for name in names], os.cpu_count() or 1)
    for error in done.failed:
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{len(done.compiled)} kernels compiled, {len(done.found)} found in {options.jit_cache}")
    if options.archive is not None:
        count = pack(options.jit_cache, options.archive, options.target)
        print(f"{count} kernels in {options.archive}, {options.archive.stat().st_size / 1e6:.1f} MB")
    return 1 if done.failed else 0
