"""What every file of results says beside its rows: hardware, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of figures with where they come from, as JSON."""
    document = {
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions(),
        **commit(),
        "rows": rows,
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return f"{name}, {', '.join(f for f in ('avx2', 'avx512f', 'amx_int8') if f in flags)}"


def versions() -> dict[str, str]:
    """Of Python, torch and what is compared."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("kappa-fast", "numpy", "peft", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """Which one, and whether anything differs from it."""
    return {"commit": _git("rev-parse", "HEAD"), "clean": not _git("status", "--porcelain", "--untracked-files=no")}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()
