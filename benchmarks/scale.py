"""What ranking DeepSeek-V3 would take on one GPU, on many, and on a cluster of CPUs: the tables of docs/scale.md.

    python benchmarks/scale.py              # the tables, from benchmarks/results/scale.json
    python benchmarks/scale.py --measure    # times of single matrices on a core of this machine, into that file

Nothing here has run on a GPU. Times on CPUs are measured times of single matrices, added up; those of H200 come from
the sums that docs/kernels.md predicts with. Both are put on ranks as rank() divides the work (distributed/shares.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
import workloads

from kappa_fast.distributed.shares import Shares
from kappa_fast.execution.cost import operations, relative_cost
from kappa_fast.planning import Plan, plan
from kappa_fast.planning.division import simulate

Shape = tuple[int, int]

RESULTS = record.RESULTS / "scale.json"
MODEL = "DeepSeek-V3"
ROUNDS = 3  # of a measurement; one for what takes more than LONG seconds
LONG = 2.0

# Not measured, and no property of this library: what a machine is taken to read from its disks or its network.
READING = 5e9  # bytes a second
GPUS, CORES = 8, 64  # of a machine
PCIE = (
    64e9  # bytes a second to a GPU, PCIe 5.0 x16 each way: NVIDIA H200 Tensor Core GPU, data sheet (128 GB/s both ways)
)
FP8_BLOCK = 128  # DeepSeek-V3 has one float32 scale for so many rows and columns

# Predicted, not measured: what docs/kernels.md takes an H200 to reach, operations or bytes a second.
MEMORY, TENSOR16, INT8, PRODUCTS64, CHOLESKY64, INTEGER = 4.0e12, 620e12, 1286e12, 41e12, 30e12, 15e12
# Read off the table there: the factors of n columns take n^3 / 3 operations at this rate, since columns and diagonal
# tiles are slower than what lies behind super-panels (103 T/s).
CHOLESKY32 = 103e12
CHOLESKY32_COLUMNS = 13.3  # of n: where half of that rate is reached is 13.3 * 103 = 1370 columns
STEPS = 8  # of the search, at each end
LOOK, LOOKS, WAVE = 1e-3, 6, 30e9  # seconds for Ritz values, so many times a wave; bytes of a wave
FACTORS = 10.7  # bytes for n^2 entries in a wave, of Gram matrix and factor
SLENDER = 0.8  # n of m from which on a matrix counts as nearly square


@dataclass(frozen=True)
class Weights:
    """A form of the weights: bytes of an entry when it is ranked, and products of int8 that a Gram matrix takes."""

    name: str
    itemsize: int
    products: int  # 0: one of 16 bits


BFLOAT16 = Weights("bfloat16", 2, 0)
FLOAT32 = Weights("float32", 4, 4)  # what FP8 with scales becomes (docs/quantized.md); two slices


def h200_stages(counts: Mapping[Shape, float], weights: Weights, waves: float | None = None) -> dict[str, float]:
    """Seconds of one H200 for so many matrices of each shape, by stage, as docs/kernels.md predicts them.

    waves: how many waves they make; None: as many as their factors fill.
    """
    found = dict.fromkeys(
        ("peaks", "digests", "Gram", "Cholesky", "steps", "orthogonalization", "departure", "Ritz"), 0.0
    )
    size = 0.0
    for shape, count in counts.items():
        m, n = max(shape), min(shape)
        entries, wide = count * m * n, n < SLENDER * m
        gram = entries * (n + 128)
        read = weights.itemsize * entries
        found["peaks"] += read / MEMORY
        found["digests"] += 17 * read / 4 / INTEGER
        found["Gram"] += _gram(gram, entries, wide, weights)
        found["Cholesky"] += count * n**3 / 3 / (_cholesky32(n) if wide else CHOLESKY64)
        # Two passes over the half of a factor, at both ends.
        found["steps"] += count * 2 * STEPS * 2 * n**2 / 2 * (4 if wide else 8) / MEMORY
        found["orthogonalization"] += count * 2 * 12 * STEPS**2 / 2 * 16 * 8 * n / MEMORY
        found["departure"] += 3 * max(read / MEMORY, 32 * entries / PRODUCTS64)
        size += FACTORS * count * n**2
    found["Ritz"] = (-(-size // WAVE) if waves is None else waves) * LOOKS * LOOK
    return found


def _gram(operations: float, entries: float, wide: bool, weights: Weights) -> float:
    if not wide:
        return 9 * operations / INT8 + 7 * entries / MEMORY
    if weights.products:
        return weights.products * operations / INT8 + 4.4 * entries / MEMORY
    return operations / TENSOR16


def _cholesky32(n: int) -> float:
    return 1 / (1 / CHOLESKY32 + CHOLESKY32_COLUMNS / n / 1e12)


def h200_seconds(shape: Shape, weights: Weights) -> float:
    """Of one matrix among many, looks left out."""
    return sum(h200_stages({shape: 1}, weights, waves=0).values())


def busiest(counts: Mapping[Shape, int], seconds: Mapping[Shape, float], ranks: int) -> tuple[float, float, int]:
    """What the rank that is done last has computed, in seconds, the mean of all, and the most matrices of one."""
    shapes = [shape for shape, count in counts.items() for _ in range(count)]
    costs = {shape: relative_cost(shape, False) for shape in counts}
    predicted = {i: costs[shape] for i, shape in enumerate(shapes)}
    real = {i: seconds[shape] for i, shape in enumerate(shapes)}
    parts = simulate(Shares.of(predicted, ranks), real, [1.0] * ranks)
    times = [sum(real[i] for i in part) for part in parts]
    return max(times), sum(times) / ranks, max(map(len, parts))


def deepseek() -> Plan:
    """What rank() would do with a model of that config, whose weights are nowhere."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(), dtype=torch.bfloat16)
    return plan(model, measure=False, device_model="h200")


def measure() -> list[dict[str, Any]]:
    """A row for every shape of the model: how many there are, and seconds of a core. Then what finding them takes."""
    import kappa_fast

    torch.set_num_threads(1)
    found = deepseek()
    counts: dict[Shape, int] = {}
    for group in found.groups:
        m, n = max(group.shape), min(group.shape)
        counts[m, n] = counts.get((m, n), 0) + group.count
    rows: list[dict[str, Any]] = []
    kappa_fast.rank({"warm": torch.randn(256, 128)})
    for shape in sorted(counts, key=operations):
        weight = {"weight": workloads.weights(*shape, "trained", 0).bfloat16()}
        times = list[float]()
        while len(times) < ROUNDS and not (times and times[0] > LONG):
            started = time.process_time()
            kappa_fast.rank(weight)
            times.append(time.process_time() - started)
        rows.append({"shape": shape, "count": counts[shape], "seconds": statistics.median(times), "rounds": len(times)})
        print(rows[-1], flush=True)
    rows += [measure_finding(), {"wave": found.peak}]
    return rows


def measure_finding() -> dict[str, Any]:
    """Seconds of a core to find the matrices in a checkpoint with the names of the model, whose files are all holes."""
    import transformers

    config = transformers.DeepseekV3Config()
    with tempfile.TemporaryDirectory() as folder:
        tensors = list(_tensors(config))
        for number in range(0, len(tensors), 600):
            _write_holes(Path(folder, f"model-{number // 600:05}.safetensors"), tensors[number : number + 600])
        config.save_pretrained(folder)
        started = time.process_time()
        found = plan(folder, measure=False)
        seconds = time.process_time() - started
    return {"tensors": len(tensors), "matrices": found.count, "bytes": found.to_read, "finding": seconds}


def _tensors(config: Any) -> Sequence[tuple[str, Shape]]:
    """Names and shapes of the weights that are ranked, as the checkpoint has them."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    heads, rope = config.num_attention_heads, config.qk_rope_head_dim
    attention = {
        "q_a_proj": (config.q_lora_rank, hidden),
        "q_b_proj": (heads * (config.qk_nope_head_dim + rope), config.q_lora_rank),
        "kv_a_proj_with_mqa": (config.kv_lora_rank + rope, hidden),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj": (hidden, heads * config.v_head_dim),
    }
    found: list[tuple[str, Shape]] = []
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        found += [(f"{at}.self_attn.{name}.weight", shape) for name, shape in attention.items()]
        sparse = layer >= config.first_k_dense_replace
        size = inner if sparse else config.intermediate_size
        blocks = [f"mlp.experts.{i}" for i in range(config.n_routed_experts)] + ["mlp.shared_experts"]
        for block in blocks if sparse else ["mlp"]:
            found += [(f"{at}.{block}.{name}_proj.weight", (size, hidden)) for name in ("gate", "up")]
            found.append((f"{at}.{block}.down_proj.weight", (hidden, size)))
    return found


def _write_holes(file: Path, tensors: Sequence[tuple[str, Shape]]) -> None:
    header, end = dict[str, Any](), 0
    for name, shape in tensors:
        start, end = end, end + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as content:
        content.write(len(text).to_bytes(8, "little") + text)
        content.truncate(8 + len(text) + end)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounded(seconds: float) -> str:
    """With two digits that count, in the unit that people read."""
    if seconds >= 5400:
        return f"{seconds / 3600:.2g} h"
    return f"{seconds / 60:.2g} min" if seconds >= 100 else f"{float(f'{seconds:.2g}'):g} s"


def size_of(nbytes: float) -> str:
    """With three digits."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6)):
        if nbytes >= 10**power:
            return f"{float(f'{nbytes / 10**power:.3g}'):g} {unit}"
    return f"{nbytes:.0f} bytes"


def tables(rows: Sequence[Mapping[str, Any]], result: float) -> list[str]:
    """The tables of docs/scale.md.

    result: bytes of what every rank is told of a matrix.
    """
    measured = {tuple(row["shape"]): row for row in rows if "shape" in row}
    counts = {(shape[0], shape[1]): int(row["count"]) for shape, row in measured.items()}
    cores = {(shape[0], shape[1]): float(row["seconds"]) for shape, row in measured.items()}
    return [_costs(counts, cores), _times(counts, cores), _bytes(counts, result)]


def _costs(counts: Mapping[Shape, int], cores: Mapping[Shape, float]) -> str:
    lines = [
        [
            f"{m} x {n}",
            f"{counts[m, n]:,}",
            f"{float(f'{cores[m, n]:.2g}'):g} s",
            f"{1e3 * h200_seconds((m, n), BFLOAT16):.2g} ms",
            f"{100 * counts[m, n] * cores[m, n] / sum(counts[s] * cores[s] for s in counts):.2g}%",
        ]
        for m, n in sorted(counts, key=lambda s: -counts[s] * cores[s])
    ]
    return table(["shape", "matrices", "one core, measured", "one H200, predicted", "of the work of cores"], lines)


def _times(counts: Mapping[Shape, int], cores: Mapping[Shape, float]) -> str:
    entries = sum(count * m * n for (m, n), count in counts.items())
    gpus: dict[Shape, float] = {shape: h200_seconds(shape, BFLOAT16) for shape in counts}
    fp8 = {shape: h200_seconds(shape, FLOAT32) for shape in counts}
    looks = h200_stages(counts, BFLOAT16)["Ritz"]
    lines = []
    for ranks in (1, 8, 64):
        last, mean, most = busiest(counts, gpus, ranks)
        last8, _, _ = busiest(counts, fp8, ranks)
        machines = max(1, ranks // GPUS)
        lines.append(
            [
                f"{ranks} H200, {machines} machine{'s' * (machines > 1)}",
                f"{most:,}",
                rounded(last + looks / ranks),
                rounded(last8 + looks / ranks),
                f"{last / mean:.2f}",
                rounded(2 * entries / ranks / PCIE),
                rounded(2 * entries / machines / READING),
                rounded(entries * (1 + 4 / FP8_BLOCK**2) / machines / READING),
            ]
        )
    for ranks in (1, CORES, 16 * CORES):
        last, mean, most = busiest(counts, cores, ranks)
        machines = max(1, ranks // CORES)
        lines.append(
            [
                f"{ranks:,} core{'s' * (ranks > 1)}, {machines} machine{'s' * (machines > 1)}",
                f"{most:,}",
                rounded(last),
                "-",
                f"{last / mean:.2f}",
                "-",
                rounded(2 * entries / machines / READING),
                rounded(entries * (1 + 4 / FP8_BLOCK**2) / machines / READING),
            ]
        )
    head = ["ranks", "matrices of one, at most", "computing, bfloat16", "computing, from FP8", "longest over mean"]
    return table([*head, "copying to the GPU", "reading bfloat16", "reading FP8"], lines)


def _bytes(counts: Mapping[Shape, int], result: float) -> str:
    entries, matrices = sum(count * m * n for (m, n), count in counts.items()), sum(counts.values())
    lines = []
    for ranks in (1, 8, 16, 64, 1024):
        told = matrices * result if ranks > 1 else 0.0
        lines.append(
            [
                f"{ranks:,}",
                size_of(2 * entries / ranks),
                size_of(told) if told else "nothing",
                size_of(told * ranks) if told else "nothing",
                size_of(2 * entries / ranks),
                size_of(2 * entries / ranks * (1 - 1 / ranks)) if ranks > 1 else "nothing",
            ]
        )
    head = ["ranks", "a rank reads of a checkpoint", "a rank is told of results", "the store gives to all"]
    return table([*head, "a rank holds of a sharded model", "and gets from others, and gives to them"], lines)


def bytes_of_a_result(rows: Sequence[Mapping[str, Any]]) -> float:
    """What a rank is told of each matrix, as bench_ranks.py has counted it."""
    found = [(each["received"], row["matrices"]) for row in rows if "ranks" in row for each in row["ranks"]]
    return sum(received for received, _ in found) / sum(matrices for _, matrices in found)


def from_files(scale: Path = RESULTS, ranks: Path = record.RESULTS / "ranks.json") -> list[str]:
    """The tables, from the results that are kept."""
    rows: Callable[[Path], Any] = lambda file: json.loads(file.read_text())["rows"]  # noqa: E731
    return tables(rows(scale), bytes_of_a_result(rows(ranks)))


def main() -> None:
    """Print the tables, or measure what they are made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file of times")
    chosen = parser.parse_args()
    if chosen.measure:
        record.write(chosen.output, measure())
    print("\n\n".join(from_files(chosen.output)))


if __name__ == "__main__":
    sys.exit(main())
