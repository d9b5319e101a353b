"""Prints the ratios after a run, and keeps them with hardware, versions and commit in benchmarks/results/."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
OURS = "kappa_fast"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Ratios to kappa_fast.rank within each group, from the medians of this run."""
    session = getattr(config, "_benchmarksession", None)
    rows = [
        {
            "group": bench.group,
            "name": bench.name.partition("[")[0].removeprefix("test_"),
            "seconds": {"min": bench.stats.min, "median": bench.stats.median, "max": bench.stats.max},
            "rounds": bench.stats.rounds,
            **bench.extra_info,
        }
        for bench in (session.benchmarks if session else [])
        if not bench.has_error
    ]
    if not rows:
        return
    groups = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    terminalreporter.write_sep("=", "times and ratios (medians of this run)")
    for group, members in groups.items():
        ours = next((r["seconds"]["median"] for r in members if r["name"] == OURS), None)
        terminalreporter.write_line(f"\n{group}")
        for row in members:
            row["ratio"] = row["seconds"]["median"] / ours if ours else None
            ratio = f"{row['ratio']:8.2f} x kappa_fast" if ours else ""
            terminalreporter.write_line(f"  {row['name']:<28}{row['seconds']['median']:9.3f} s {ratio}")
    _keep(rows, config)


def _keep(rows: list[dict[str, Any]], config: pytest.Config) -> None:
    target = os.environ.get("KAPPA_FAST_RESULTS")
    if not target:
        return
    document = {
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **_versions()},
        "commit": _git("rev-parse", "HEAD"),
        "clean": not _git("status", "--porcelain", "--untracked-files=no"),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / target).write_text(json.dumps(document, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return f"{name}, {', '.join(f for f in ('avx2', 'avx512f', 'amx_int8') if f in flags)}"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("kappa-fast", "numpy", "peft", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()
