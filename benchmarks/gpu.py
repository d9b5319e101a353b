"""Kernels and rank() on a GPU, checked and timed in a few minutes: the most valuable numbers first.

    python benchmarks/gpu.py [--minutes 8] [--output DIR] [--jit-cache FILE] [--only STAGE,...] [--models NAME,...]

Needs torch and Triton, and transformers for the models' shapes; kappa_fast is taken from this clone. Every stage is a
process of its own with a time limit, so that an illegal memory access or a hang costs one of them. Every number is in
DIR/gpu.jsonl the moment it exists; DIR/<device>.json is made of these lines after every stage, and keeps what an
earlier run found and this one did not. Exit code: 0; 1 if anything failed (the rest was done all the same); 2: no GPU.

``--smoke`` runs every line at toy sizes under Triton's interpreter, on a CPU, to see that it works: its timings mean
nothing. ``--jit-cache`` takes the archive of ``python -m kappa_fast.kernels.aot --jit-cache``, made without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this clone, whatever is installed

from gpu_results import LINES, LOG, floors, read_lines, table, write_document, write_line  # noqa: E402

SIZES = {  # bytes of the weights in bfloat16: what does not fit need not be built to be known
    "Llama-3.1-8B": 16.1e9,
    "Mixtral-8x7B": 93.4e9,
    "OLMoE-1B-7B": 13.8e9,
    "Qwen3-30B-A3B": 61.1e9,
    "TinyLlama-1.1B": 2.2e9,
}
ROOM = 1.25  # device memory for each byte of weights
RESULTS = HERE / "results"
NO_GPU = 2
LOST = 3  # exit codes of a stage


@dataclass(frozen=True)
class Stage:
    """limit: seconds after which it hangs.  environment: beside the caller's."""

    name: str
    limit: float
    environment: tuple[tuple[str, str], ...] = ()


def stages(models: Sequence[str]) -> list[Stage]:
    """In the order of their worth."""
    found = [Stage("describe", 90), Stage("compile", 150), Stage("canaries", 90), Stage("full size", 120)]
    found += [Stage("ceilings", 60), *(Stage(name, 150) for name in models)]
    found += [Stage("gram", 60), Stage("cholesky", 60), Stage("krylov", 60), Stage("other canaries", 150)]
    if ptxas := shutil.which("ptxas", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"):
        # Once more with code from another assembler than the one that Triton brings.
        another = tuple((name, ptxas) for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"))
        found += [Stage("compile (ptxas of this machine)", 150, another)]
        found += [Stage("full size (ptxas of this machine)", 120, another)]
    return [*found, Stage("peers", 300)]


class Run:
    """The stages that still fit, one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.deadline = options, time.time() + 60 * options.minutes
        self.lines = options.output / LINES
        self.start = self.lines.stat().st_size if self.lines.exists() else 0
        self.device, self.memory = "unknown device", 0.0
        self.overhead = 0.0  # seconds from the start of a process to its first number, as measured
        self.environment = dict(os.environ)
        if options.smoke:
            self.environment["TRITON_INTERPRET"] = "1"
        if options.jit_cache is not None:
            self.environment["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="kappa_fast-jit-")

    def all(self, chosen: Sequence[Stage]) -> int:
        for stage in chosen:
            reason = self.reason_to_skip(stage)
            if reason:
                write_line(self.lines, {"stage": stage.name, "key": "all of it", "skipped": reason})
                continue
            code = self.one(stage)
            if stage.name == "describe" and code == NO_GPU:
                return NO_GPU
            write_document(self.options.output, self.device, self.new_lines())
        for name, steps in floors(self.new_lines()).items():
            write_line(self.lines, {"stage": "floors", "key": name, "value": steps})
        write_document(self.options.output, self.device, self.new_lines())
        print(table(self.new_lines()))
        return int(any("error" in line for line in self.new_lines()))

    def reason_to_skip(self, stage: Stage) -> str:
        left = self.deadline - time.time()
        if left < 2 * self.overhead:
            return f"{max(left, 0):.0f} s are left, and a process takes {self.overhead:.0f} s to start"
        need = ROOM * SIZES.get(stage.name, 0)
        if self.memory and need > self.memory:
            return f"{need / 1e9:.0f} GB do not fit into the {self.memory / 1e9:.0f} GB of this device"
        return ""

    def one(self, stage: Stage) -> int:
        """Run a stage in a process of its own; its exit code."""
        started, size = time.time(), self.lines.stat().st_size if self.lines.exists() else 0
        limit = min(stage.limit * (20 if self.options.smoke else 1), self.deadline - started)
        print(f"{stage.name} ({self.deadline - started:.0f} s are left)", flush=True)
        command = [sys.executable, str(HERE / "gpu.py"), "--stage", stage.name, "--until", repr(started + limit)]
        with (self.options.output / LOG).open("a") as log:
            log.write(f"--- {stage.name}\n")
            log.flush()
            child = subprocess.Popen(
                [*command, *self.options.given],
                env={**self.environment, **dict(stage.environment)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = _waited(child, limit + self.overhead)
        found = read_lines(self.lines, size)
        explained = code == 0 or (code == 1 and any("error" in line for line in found))
        if not explained and code != NO_GPU:
            reason = f"hung, and was ended after {limit:.0f} s" if code == -signal.SIGKILL else f"ended with {code}"
            write_line(
                self.lines, {"stage": stage.name, "key": "all of it", "error": f"{reason}: {self._last_words()}"}
            )
        elif code != NO_GPU:
            write_line(
                self.lines,
                {"stage": stage.name, "key": "with its process", "value": {"seconds": time.time() - started}},
            )
        if stage.name == "describe":
            self._learn(found, started)
        for line in (line for line in found if "value" not in line):
            print(f"  {table([line])}", flush=True)
        return code

    def _learn(self, found: list[dict[str, Any]], started: float) -> None:
        if found:
            self.overhead = found[0]["at"] - started
        for line in found:
            if line["key"] == "hardware" and "value" in line:
                self.device, self.memory = line["value"]["name"], line["value"].get("free", line["value"]["memory"])

    def _last_words(self) -> str:
        return " | ".join((self.options.output / LOG).read_text(errors="replace").splitlines()[-3:])[-500:]

    def new_lines(self) -> list[dict[str, Any]]:
        return read_lines(self.lines, self.start)


def _waited(child: subprocess.Popen[bytes], limit: float) -> int:
    """The exit code; a child that takes longer is ended, and all that it started, as it is when this process is."""
    try:
        return child.wait(limit)
    except BaseException as error:
        os.killpg(child.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep it
        child.wait(10)
    return -signal.SIGKILL


def run_stage(options: argparse.Namespace) -> int:
    """What the process of one stage does."""
    import torch

    if not options.smoke and not torch.cuda.is_available():
        print("this benchmark needs a GPU that torch can use (or --smoke, to see that it runs)", file=sys.stderr)
        return NO_GPU
    import gpu_kernels
    import gpu_stages
    import gpu_timing

    if options.smoke:
        gpu_timing.mend_interpreter()
    device = torch.device("cpu") if options.smoke else torch.device("cuda", torch.cuda.current_device())
    bench = gpu_timing.Bench(
        options.stage, device, options.smoke, options.until, options.output / LINES, 1 if options.smoke else 5
    )
    name = options.stage.partition(" (")[0]
    works: dict[str, Any] = {
        "describe": gpu_stages.describe,
        "compile": lambda b: gpu_stages.compiling(b, None if "ptxas" in b.stage else options.jit_cache),
        "canaries": gpu_stages.canaries,
        "full size": gpu_stages.full_size,
        "ceilings": gpu_kernels.ceilings,
        "gram": gpu_kernels.gram,
        "cholesky": gpu_kernels.cholesky,
        "krylov": gpu_kernels.krylov,
        "other canaries": lambda b: gpu_stages.canaries(b, everything=True),
        "peers": lambda b: gpu_stages.peers(b, options.models),
    }
    try:
        work = works[name] if name in works else lambda b: gpu_stages.model(b, name)
        bench.attempt("took", lambda: {"seconds": bench.clock(lambda: work(bench))[0]})
    except gpu_timing.DeviceLost as error:
        print(error, file=sys.stderr)
        return LOST
    return int(bench.failed)


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The options, or an end with what is wrong with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which it ends, whatever is done")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--jit-cache", type=Path, metavar="FILE")
    parser.add_argument("--only", help="stages, with commas between")
    parser.add_argument("--models", default="Llama-3.1-8B,Mixtral-8x7B,OLMoE-1B-7B,Qwen3-30B-A3B")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # in the process of a stage
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.given, options.models = list(given), options.models.split(",")
    names = [stage.name for stage in stages(options.models)]
    options.only = options.only.split(",") if options.only else names
    unknown = [*(set(options.only) - set(names)), *(set(options.models) - set(SIZES))]
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; stages {', '.join(names)}; models {', '.join(SIZES)}")
    if options.jit_cache is not None and not options.jit_cache.is_file():
        parser.error(f"--jit-cache: there is no file {options.jit_cache}")
    return options


def main(given: Sequence[str]) -> int:
    """The command, or one stage of it."""
    options = arguments(given)
    if options.stage is not None:
        return run_stage(options)
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in stages(options.models) if s.name in options.only or s.name == "describe"]
    code = Run(options).all(chosen)
    if code == NO_GPU:
        print((options.output / LOG).read_text().splitlines()[-1], file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
