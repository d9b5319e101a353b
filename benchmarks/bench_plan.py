"""How good is the time that plan() predicts? Predicted and real times of the same models in the same run.

    python benchmarks/bench_plan.py [--rounds N] [--only REGEX] [--output FILE]

For every model the prediction is made anew, and rank() is run right after it, ``rounds`` times. On a machine with
other work to do both are disturbed, differently: so the seconds of the processor are compared as well, those that
plan() would predict if it looked at them and those that rank() took, which other work changes less.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
import workloads

import kappa_fast
from kappa_fast.planning import calibration, plan


def moe(experts: int = 16) -> dict[str, torch.Tensor]:
    """One layer with fused experts: 16 of 1024 x 512 gates, ups and downs, and attention of 512 x 512."""
    torch.manual_seed(0)
    up = torch.stack([workloads.weights(1024, 512, "trained", i) for i in range(experts)])
    down = torch.stack([workloads.weights(512, 512, "trained", experts + i) for i in range(experts)])
    attention = {
        f"model.layers.0.self_attn.{k}_proj.weight": workloads.weights(512, 512, "trained", 99) for k in "qkvo"
    }
    return {
        "model.layers.0.mlp.experts.gate_up_proj": up.bfloat16(),
        "model.layers.0.mlp.experts.down_proj": down.bfloat16(),
        **attention,
    }


MODELS: dict[str, Callable[[], Any]] = {
    "MiniLM": workloads.minilm,
    "mixture of 16 experts, one layer": moe,
    "TinyLlama-1.1B, 2 layers, trained-like": lambda: workloads.tinyllama("trained"),
    "TinyLlama-1.1B, 2 layers, random": lambda: workloads.tinyllama("random"),
}
OPTIONS: dict[str, dict[str, Any]] = {"": {}, "certify=True": {"certify": True}, "top=0.2": {"top": 0.2}}


def compare(source: Any, options: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """One row for each round."""
    rows = []
    for _ in range(rounds):
        by_wall = plan(source, **options).prediction
        calibration.clock = time.thread_time
        by_processor = plan(source, **options).prediction
        calibration.clock = time.perf_counter
        assert by_wall is not None
        assert by_processor is not None
        busy = time.process_time()
        started = time.perf_counter()
        kappa_fast.rank(source, progress=False, **options)
        wall, busy = time.perf_counter() - started, time.process_time() - busy
        rows.append(
            {
                "predicted": by_wall.seconds,
                "low": by_wall.low,
                "high": by_wall.high,
                "real": wall,
                "processor_predicted": by_processor.seconds,
                "processor_low": by_processor.low,
                "processor_high": by_processor.high,
                "processor_real": busy / torch.get_num_threads(),
                "measuring": by_wall.measured,
                "share_of_shapes_measured": by_wall.exact,
            }
        )
    return rows


def main() -> None:
    """Print a line for each model and option, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="models and options, such as 'TinyLlama.*certify'")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    found: list[dict[str, Any]] = []
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start; medians of {chosen.rounds}")
    for name, make in MODELS.items():
        wanted = {o: OPTIONS[o] for o in OPTIONS if re.search(chosen.only, f"{name} {o}".strip())}
        source = make() if wanted else None
        for label, options in wanted.items():
            rows = compare(source, options, chosen.rounds)
            found.append({"model": name, "options": label, "load": os.getloadavg()[0], "rows": rows})
            print(f"{name:<40}{label:<14}{_words(rows, '')};  processor: {_words(rows, 'processor_')}", flush=True)
    if chosen.output:
        record.write(chosen.output, found)


def _words(rows: list[dict[str, Any]], prefix: str) -> str:
    def median(key: str) -> float:
        return statistics.median(row[prefix + key] for row in rows)

    real = f"{median('real'):.2f} s"
    inside = sum(row[prefix + "low"] <= row[prefix + "real"] <= row[prefix + "high"] for row in rows)
    span = f"{median('low'):.2f} to {median('high'):.2f} s, {inside} of {len(rows)} inside"
    if rows[0]["predicted"] is None:
        return f"{span}, real {real}"
    ratio = statistics.median(row[prefix + "predicted"] / row[prefix + "real"] for row in rows)
    return f"predicted {median('predicted'):.2f} s ({span}), real {real}, ratio {ratio:.2f}"


if __name__ == "__main__":
    sys.exit(main())
