"""The sums of benchmarks/scale.py, which adds up what was measured and what is predicted."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SUMS = {"Mixtral-8x7B": "Mixtral-8x7B", "Llama-3.1-8B": "Llama-3.1-8B", "OLMoE-1B-7B": "OLMoE"}
SUMS |= {"Qwen3-30B-A3B": "Qwen3-30B-A3B"}  # what the page calls them


@pytest.fixture
def scale(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale

    return scale


@pytest.mark.parametrize("model", SUMS)
def test_its_sums_are_those_that_the_page_about_kernels_predicts(scale, root, model):
    pytest.importorskip("transformers")
    import gpu_models

    page = (root / "docs" / "kernels.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| stage |") and SUMS[model] in line)
    row = next(line for line in page.splitlines() if line.startswith("| **all, uncertified**"))
    said = float(row.split("|")[head.split("|").index(f" {SUMS[model]} ")])
    found = sum(scale.h200_stages(gpu_models.shapes_of(model), scale.BFLOAT16).values())
    assert found == pytest.approx(said, rel=0.06)


@pytest.mark.long
def test_it_counts_the_matrices_that_would_be_ranked(scale):
    pytest.importorskip("transformers")
    counts: dict[tuple[int, int], int] = {}
    for group in scale.deepseek().groups:
        shape = (max(group.shape), min(group.shape))
        counts[shape] = counts.get(shape, 0) + group.count
    rows = json.loads(scale.RESULTS.read_text())["rows"]
    assert {tuple(row["shape"]): row["count"] for row in rows if "shape" in row} == counts
