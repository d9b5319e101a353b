"""What every file of results says beside its rows: hardware, versions, commit."""

from __future__ import annotations

import contextlib
import hashlib
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
    """Which one, and whether anything differs from it; without git the digest of the sources has to tell."""
    found: dict[str, Any] = {"source": source_digest()}
    if head := _git("rev-parse", "HEAD"):
        found |= {"commit": head, "clean": not _git("status", "--porcelain", "--untracked-files=no")}
    return found


def source_digest() -> str:
    """Of the files of kappa_fast and its kernels, by their names and contents."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted([*root.glob("kappa_fast/**/*.py"), *root.glob("kernels/*.py")]):
        digest.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    """What git says; nothing where there is none, as on a machine that is lent for a few minutes."""
    with contextlib.suppress(OSError):
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()
    return ""
