"""The suites of benchmarks: what each answers, what runs it, and which files of results/ it makes. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Part:
    """One program of a suite.

    Attributes:
        command: arguments of Python, from the root of the clone.
        file: the name of the file of results that it makes; "" for none.
        given: how the program is told where that file goes: "environment" (conftest.py), "--output" with the file,
            "folder" (``--output`` with the folder), or "fixed" (it knows).
    """

    command: tuple[str, ...]
    file: str = ""
    given: str = "fixed"

    def arguments(self, more: Sequence[str], folder: Path = RESULTS) -> tuple[list[str], dict[str, str]]:
        """The command line and what it adds to the environment."""
        command, environment = [sys.executable, *self.command, *more], {}
        if self.given == "environment":
            environment["KAPPA_FAST_RESULTS"] = str(folder / self.file)
        elif self.given == "--output":
            command += ["--output", str(folder / self.file)]
        elif self.given == "folder":
            command += ["--output", str(folder)]
        return command, environment


@dataclass(frozen=True)
class Suite:
    """What is run under one name."""

    name: str
    about: str
    takes: str
    parts: tuple[Part, ...]
    needs: tuple[str, ...] = field(default=())

    @property
    def files(self) -> list[Path]:
        """Its files of results, whether they are there or not; of those with a pattern for a name, the ones there."""
        named = [part.file for part in self.parts if part.file]
        return [file for name in named for file in (sorted(RESULTS.glob(name)) if "*" in name else [RESULTS / name])]


def _pytest(file: str, *files: str) -> Part:
    """Of pytest-benchmark, in one process."""
    chosen = [f"benchmarks/{name}.py" for name in files]
    return Part(("-m", "pytest", *chosen, "-s", "-q", "-p", "no:xdist", "-m", ""), file, "environment")


def _script(name: str, *arguments: str, file: str = "", given: str = "fixed") -> Part:
    return Part((f"benchmarks/{name}.py", *arguments), file, given)


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "cpu",
            "rank() against PEFT's selector, SVDs, Gram matrices; its peak memory",
            "10 minutes",
            (_pytest("cpu.json", "bench_rank", "bench_memory"),),
        ),
        Suite(
            "sweep",
            "rank() against the best plain way in 594 cells of shapes, dtypes and spectra",
            "an hour for each number of threads; goes on where it stopped",
            (_script("sweep", given="folder"), _script("sweep", "--report", file="sweep.json", given="folder")),
        ),
        Suite(
            "gpu",
            "kernels and rank() on a GPU, checked and timed",
            "8 minutes",
            (_script("gpu", file="nvidia-*.json", given="folder"),),
            ("a GPU with CUDA or ROCm",),
        ),
        Suite(
            "io",
            "a checkpoint larger than memory; second runs from the cache",
            "10 minutes",
            (_pytest("stream.json", "bench_stream"), _pytest("cache.json", "bench_cache")),
            ("KAPPA_FAST_STREAM_GB=12 for the figures of the documents (0.5 by default)",),
        ),
        Suite(
            "scale",
            "two processes against one; what DeepSeek-V3 would take, from times of single matrices",
            "10 minutes",
            (
                _script("bench_ranks", file="ranks.json", given="--output"),
                _script("scale", "--measure", file="scale.json", given="--output"),
            ),
            ("two idle cores",),
        ),
        Suite(
            "plan",
            "times that plan() predicts against real ones",
            "3 minutes",
            (_script("bench_plan", file="plan.json", given="--output"),),
        ),
        Suite(
            "scores",
            "what the statistics beside kappa take",
            "2 minutes",
            (_pytest("scores.json", "bench_scores"),),
        ),
        Suite(
            "report",
            "writing and opening the page of 44,544 matrices",
            "a minute",
            (_pytest("report.json", "bench_report"),),
            ("Chromium",),
        ),
        Suite(
            "forgetting",
            "does the choice protect what a model knew? The study of docs/evidence.md",
            "days of a core; --smoke takes a minute",
            (Part(("-m", "benchmarks.forgetting"), file="forgetting.json"),),
            ("--folder DIR, or --smoke",),
        ),
        Suite(
            "margins",
            "the same of dense models beside draws of the same types and layers; goes on in the folder of forgetting",
            "an hour of two cores",
            (
                Part(
                    ("-m", "benchmarks.forgetting", "--plan", "benchmarks/forgetting/plans/margins.json"),
                    file="forgetting-margins.json",
                ),
            ),
            ("--folder DIR",),
        ),
    )
}


def environment(more: dict[str, str]) -> dict[str, str]:
    """The caller's, with this clone in front of what is installed."""
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}
