"""Prints the ratios after a run, and keeps them with hardware, versions and commit in benchmarks/results/."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest
import record

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
    if target := os.environ.get("KAPPA_FAST_RESULTS"):
        record.write(record.RESULTS / target, rows)
