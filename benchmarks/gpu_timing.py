"""Timing on a device, and a file of results that is whole after every section."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, commit, versions

FLUSH = 256 << 20  # bytes written between two runs: more than any second-level cache


@dataclass(frozen=True)
class Spread:
    """Seconds of repeated runs."""

    median: float
    low: float
    high: float
    runs: int

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "min": self.low, "max": self.high, "runs": self.runs}


@dataclass
class Bench:
    """A device, how often things are repeated there, and what was found so far."""

    device: torch.device
    repeats: int
    smoke: bool
    target: Path | None
    document: dict[str, Any] = field(default_factory=dict)

    def time(self, work: Callable[[], Any], repeats: int | None = None) -> Spread:
        """Median of runs after one that compiles and warms up; device events where there is a device."""
        work()
        seconds = [self._once(work) for _ in range(repeats or self.repeats)]
        return Spread(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def _once(self, work: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        torch.empty(FLUSH, dtype=torch.int8, device=self.device).zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        before.record()
        work()
        after.record()
        torch.cuda.synchronize(self.device)
        return before.elapsed_time(after) / 1e3

    def wall(self, work: Callable[[], Any], repeats: int) -> Spread:
        """The same by the clock on the wall, for what the host takes part in."""
        work()
        seconds = []
        for _ in range(repeats):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - started)
        return Spread(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> int:
        """Bytes that may be used."""
        if self.device.type != "cuda":
            return 1 << 30
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def peak(self, work: Callable[[], Any]) -> int:
        """Bytes that the work allocates beyond what was there; 0 where nobody counts."""
        if self.device.type != "cuda":
            work()
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        return int(torch.cuda.max_memory_allocated(self.device)) - before

    def keep(self, section: str, found: Any) -> None:
        """Note what a section found, and write everything so far, all at once."""
        self.document[section] = found
        if self.target is None:
            return
        self.target.parent.mkdir(parents=True, exist_ok=True)
        partial = self.target.with_suffix(".partial")
        partial.write_text(json.dumps(self.document, indent=1) + "\n")
        os.replace(partial, self.target)


def describe(device: torch.device, smoke: bool) -> dict[str, Any]:
    """Hardware, versions, commit and date."""
    import triton

    hardware: dict[str, Any] = {"name": "Triton's interpreter on a CPU: timings mean nothing"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
    built = {"triton": triton.__version__, "cuda": str(torch.version.cuda), "hip": str(torch.version.hip)}
    date = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
    return {"interpreted": smoke, "hardware": hardware, "versions": versions() | built, **commit(), "date": date}


def default_target(device: torch.device) -> Path:
    """benchmarks/results/<device>.json"""
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return RESULTS / f"{slug}.json"


def ceilings(bench: Bench) -> dict[str, float]:
    """What the libraries reach on this device: bytes per second of a copy, operations per second of square products."""
    side = 64 if bench.smoke else 8192
    bytes_moved = 1 << (16 if bench.smoke else 30)
    source = torch.zeros(bytes_moved, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    found = {"bandwidth": 2 * bytes_moved / bench.time(lambda: target.copy_(source)).median}
    for name, dtype, n in (("bf16", torch.bfloat16, side), ("float64", torch.float64, side // 2)):
        a = torch.randn(n, n, device=bench.device).to(dtype)
        found[name] = 2 * n**3 / bench.time(lambda a=a: a @ a).median  # type: ignore[misc]
    q = torch.randint(-64, 64, (side, side), dtype=torch.int8, device=bench.device)
    found["int8"] = 2 * side**3 / bench.time(lambda: torch._int_mm(q.T, q)).median
    return found
