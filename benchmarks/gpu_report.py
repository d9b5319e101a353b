"""What README.md and docs/kernels.md say of a GPU, from the file of results that gpu.py wrote there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import scale
from sweep_report import filled, table

FILE = "nvidia-h200.json"
MODELS = ("Mixtral-8x7B", "Llama-3.1-8B", "OLMoE-1B-7B", "Qwen3-30B-A3B")
PEERS = {
    "`eigvalsh` of Gram matrices, float64": "eigvalsh of the float64 Gram matrix",
    "`svdvals`, float64": "svdvals, float64",
    "PEFT's `KappaTuneSelector`": "PEFT's KappaTuneSelector, svdvals in float32",
}
# The stages of scale.h200_stages, their names in docs/kernels.md, and how the names of their kernels begin.
STAGES = {
    "peaks": ("peaks", ("_peaks",)),
    "digests": ("digests", ("_chain", "_fold")),
    "Gram": ("Gram matrices", ("_weights", "_slices", "_digits", "_add_parts")),
    "Cholesky": ("Cholesky", ("_trailing", "_column", "_diagonal")),
    "steps": ("products and solves with the factor", ("_solve", "_product")),
    "orthogonalization": ("orthogonalization", ("_inner", "_combine", "_pass", "_add_chunks", "_gaussian")),
    "departure": ("departure, polish, sensitivity", ("_times", "_transposed", "_add_rows", "_sum")),
    "Ritz": ("Ritz values", ("_largest", "_reach", "_shifted_solve", "_apply")),
}
Stages = Mapping[str, Mapping[str, Any]]


def times(document: Mapping[str, Any]) -> str:
    """The README's table: whole models, and other ways to the same numbers."""
    stages: Stages = document["stages"]
    hardware, versions = stages["describe"]["hardware"]["name"], stages["describe"]["software"]["versions"]
    lines = []
    for model in MODELS:
        found = stages[model]
        row = [model, f"{found['what was found']['matrices']:,}", _time(found.get("median"))]
        row += [_time(found.get("first run")), _time(found.get("certify"))]
        lines.append([*row, *(_of_peer(stages["peers"], model, peer) for peer in PEERS.values())])
    head = ["", "matrices", "`rank(model)`", "first of a process", "`certify=True`", *PEERS]
    said = (
        f"One {hardware}, PyTorch {versions['torch'].partition('+')[0]}, Triton {versions['triton']}, weights of these "
        "shapes in bfloat16 in its memory, trained-like; the median of three runs after the first one of a process, "
        "which loads the kernels, and one run with proofs. Others were timed with one matrix of each shape, times how "
        f"many there are ([{FILE}](benchmarks/results/{FILE})):"
    )
    return f"{filled(said)}\n{table(head, lines)}"


def _time(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else _seconds(found["seconds"])


def _seconds(value: float) -> str:
    return f"{value / 60:.0f} min" if value > 300 else f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def _of_peer(peers: Mapping[str, Any], model: str, name: str) -> str:
    counts = peers["matrices of each shape"].get(model)
    if counts is None:
        return "-"
    return _seconds(sum(count * peers[f"{name}, {shape}"]["seconds"] for shape, count in counts.items()))


def stages(document: Mapping[str, Any]) -> str:
    """The table of docs/kernels.md: what was predicted for every stage, and what the profiler saw."""
    found: Stages = document["stages"]
    profiled = [model for model in MODELS if "profile" in found[model]]
    predicted = {model: scale.h200_stages(_counts(found[model]["shapes"]), scale.BFLOAT16) for model in profiled}
    measured = {model: by_stage(found[model]["profile"]["kernels"]) for model in profiled}
    lines = []
    for stage, (label, _) in STAGES.items():
        lines.append([label, *(f"{predicted[m][stage]:.3f} / {measured[m][stage]:.3f}" for m in profiled)])
    whole = {model: found[model]["profile"]["seconds in kernels"] for model in profiled}
    torch = {model: whole[model] - sum(measured[model].values()) for model in profiled}
    lines.append(["kernels of torch", *(f"0 / {torch[m]:.3f}" for m in profiled)])
    lines.append(["**all kernels**", *(f"{sum(predicted[m].values()):.2f} / {whole[m]:.2f}" for m in profiled)])
    lines.append(["a run, median", *(f"{found[m]['median']['seconds']:.2f}" for m in profiled)])
    lines.append(["launches, reads, waves", *(_work(found[m]["run 1"]) for m in profiled)])
    return table(["predicted / measured, seconds", *profiled], lines)


def _counts(shapes: Mapping[str, int]) -> dict[tuple[int, int], float]:
    return {(int(m), int(n)): count for shape, count in shapes.items() for m, n in [shape.split("x")]}


def by_stage(kernels: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Seconds of the kernels of each stage in a profile."""
    found = dict.fromkeys(STAGES, 0.0)
    for stage, (_, names) in STAGES.items():
        found[stage] = sum(row["seconds"] for name, row in kernels.items() if name.startswith(names))
    return found


def _work(run: Mapping[str, Any]) -> str:
    work = run["metadata"]["work"]
    return f"{work['launches']}, {work['reads']}, {work['waves']}"
