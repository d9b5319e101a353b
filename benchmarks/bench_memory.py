"""Peak memory of rank() beyond the weights, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")

# Two layers of TinyLlama-1.1B in bfloat16. A small matrix first, so that libraries are loaded; then the peak is reset.
CHILD = """
import json, re, sys, torch
sys.path.insert(0, sys.argv[1])
import workloads, kappa_fast
model = workloads.tinyllama("trained").bfloat16()
kappa_fast.rank({"w": torch.randn(600, 300)}, progress=False)
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
kappa_fast.rank(model, memory_budget=sys.argv[2], progress=False)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"beyond": status("VmHWM") - before, "weights": weights}))
"""


def test_peak_memory_beyond_the_weights(benchmark: Any) -> None:
    """At most the budget, or the largest matrix where that needs more; never a float32 copy of the model."""
    here = Path(__file__).parent

    def run() -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(here), "250MB"],
            cwd=here.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))

    benchmark.group = "memory, TinyLlama-1.1B, 2 layers, bfloat16, memory_budget=250MB"
    found = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(found)
    print(f"\npeak beyond the weights: {found['beyond'] / 1e6:.0f} MB; weights {found['weights'] / 1e6:.0f} MB")
    assert found["beyond"] < 300e6
