"""Figures of README.md and docs/, made from the files of results/: what stands between two marks is written here.

Every block has a name, a page and a function that makes its text. ``python -m benchmarks figures`` writes all of them,
and tests/project/test_benchmarks.py holds the pages to them.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gpu_report
import record
import scale
import sweep_report
from sweep_report import filled, table

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- made by python -m benchmarks figures: {} -->", "<!-- end of what is made -->"
Rows = list[dict[str, Any]]


def results(name: str) -> dict[str, Any]:
    """A file of results."""
    document: dict[str, Any] = json.loads((record.RESULTS / name).read_text())
    return document


def _rows(name: str) -> Rows:
    rows: Rows = results(name)["rows"]
    return rows


# The names in cpu.json, by the rows of the README's table; two names share a cell.
_CPU = {
    "PEFT's `KappaTuneSelector`": ["peft_selector"],
    "`svdvals` of every matrix, float32 / float64": ["svdvals_float32", "svdvals_float64"],
    "`eigvalsh` of every Gram matrix, float64": ["eigvalsh_of_gram_float64"],
    "Gram products and Cholesky factors by torch alone": ["gram_and_cholesky_alone"],
    "`rank(model, certify=True)`": ["kappa_fast_certified"],
    "`rank(model, top=0.2)`, cut between types of matrices": ["kappa_fast_top_0.2"],
    "`rank(model, top=0.5)`, cut inside a type": ["kappa_fast_top_0.5"],
}
_MODELS = {
    "two layers of TinyLlama-1.1B, trained-like": "TinyLlama-1.1B, 2 layers, trained-like",
    "the same, random": "TinyLlama-1.1B, 2 layers, random",
    "all-MiniLM-L6-v2": "MiniLM",
}


def cpu() -> str:
    """The README's table of times, and what memory rank() took."""
    document = results("cpu.json")
    found = {(row["group"], row["name"]): row for row in document["rows"]}
    hardware = document["hardware"]
    head = (
        f"{hardware['processor'].partition(',')[0]} with {hardware['cores']} cores, {hardware['threads']} threads, "
        "medians of one run, as multiples of the time of `rank`:"
    )
    seconds = (found[group, "kappa_fast"]["seconds"]["median"] for group in _MODELS.values())
    lines = [["`rank(model)`", *(f"{each:.2f} s" for each in seconds)]]
    for label, names in _CPU.items():
        cells = [
            " / ".join(_ratio(found[group, name]["ratio"]) for name in names if (group, name) in found)
            for group in _MODELS.values()
        ]
        lines.append([label, *cells])
    memory = next(row for row in document["rows"] if row["name"] == "peak_memory_beyond_the_weights")
    budget = memory["group"].rpartition("memory_budget=")[2]
    said = (
        f"Beside the weights of the first ({memory['weights'] / 1e6:.0f} MB in bfloat16) `rank` took "
        f'{memory["beyond"] / 1e6:.0f} MB with `memory_budget="{budget}"`.'
    )
    return f"{filled(head)}\n{table(['', *_MODELS], lines)}\n{filled(said)}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1 else f"{ratio:.1f}"


_CACHED = {
    "all-MiniLM-L6-v2": "cache, MiniLM",
    "20 layers of TinyLlama-1.1B, bfloat16, 1.8 GB": "cache, TinyLlama-1.1B, 20 layers, bfloat16",
    "2000 experts of 96 x 48": "cache, 2000 experts of 96 x 48",
}


def cache() -> str:
    """The table of docs/caching.md."""
    found = {row["group"]: row for row in _rows("cache.json")}
    head = ["", "first run", "second run", "ratio", "share of fingerprints in the first"]
    lines = []
    for label, group in _CACHED.items():
        row = found[group]
        first, again = row["seconds_first"], row["seconds"]["median"]
        of_three = float(f"{row['speedup']:.3g}")
        lines.append([label, _seconds(first), _seconds(again), f"{of_three:.0f}", f"{row['hashing_share']:.1%}"])
    return table(head, lines)


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value:.2g} s" if value > 0.1 else f"{1e3 * value:.2g} ms"
    return f"{value:.1f} s"


def stream() -> str:
    """The table of docs/checkpoints.md."""
    found = {row["name"]: row for row in _rows("stream.json")}
    ours = found["kappa_fast"]
    names = {
        "reading the files, not cached": "reading",
        "ranking their matrices from memory, shard by shard": "computing",
        "`rank(path)`, not cached": "kappa_fast",
    }
    lines = []
    for label, name in names.items():
        row = found[name]
        peak = f"{row['peak'] / 1e6:.0f} MB" if "peak" in row else ""
        lines.append([label, f"{row['took']:.1f}", f"{row['cpu']:.1f}" if "cpu" in row else "", peak])
    model, _, budget = ours["group"].removeprefix("stream, ").partition(", memory_budget=")
    size, _, rest = model.partition(" of ")
    said = (
        f"`benchmarks/bench_stream.py` measured, for {size} of the layers of {rest.partition(chr(39))[0]} "
        f'({ours["matrices"]} matrices in bfloat16) and `memory_budget="{budget}"`, on two cores with nothing else to '
        "do ([stream.json](../benchmarks/results/stream.json)):"
    )
    return f"{filled(said)}\n{table(['', 'seconds', 'of the processors', 'peak resident memory'], lines)}"


def plan() -> str:
    """What docs/planning.md says of predictions."""
    found: dict[str, list[float]] = {}
    for row in _rows("plan.json"):
        if row["rows"][0]["predicted"] is not None:
            ratios = [each["predicted"] / each["real"] for each in row["rows"]]
            found.setdefault(row["options"], []).append(statistics.median(ratios))
    spans = {options: f"{min(ratios):.2f} to {max(ratios):.2f}" for options, ratios in found.items()}
    return filled(
        "`python -m benchmarks plan` compares predictions with real times. On two idle cores the predicted time was "
        f"{spans['']} times the real one without proofs, and {spans['certify=True']} with them, for MiniLM, a layer of "
        "16 experts and two layers of TinyLlama ([plan.json](../benchmarks/results/plan.json)). On a machine with "
        "other work to do they part by up to 2."
    )


def report() -> str:
    """What docs/reports.md says of a large page."""
    found = {row["name"]: row for row in _rows("report.json")}
    steps = {name: statistics.median(each) / 1e3 for name, each in found["use"]["milliseconds"].items()}
    opened = statistics.median(found["open"]["milliseconds"]) / 1e3
    sorting = max(seconds for name, seconds in steps.items() if name.startswith("sort"))
    finding, writing = steps["search"], found["write"]["seconds"]["median"]
    return filled(
        f"44,544 matrices (the experts of DeepSeek-V3) make {found['write']['bytes'] / 1e6:.0f} MB. On two busy cores "
        f"such a page opens in {opened:.1f} s, sorts in {1e3 * sorting:.0f} ms and finds in {1e3 * finding:.0f} ms; "
        f"writing it takes {writing:.0f} s (medians, Chromium 156, `python -m benchmarks report`; all figures "
        "are in [report.json](../benchmarks/results/report.json))."
    )


def scores() -> str:
    """What docs/scores.md says of the cost of statistics."""
    named = "share of rank()"
    found = {row["group"] or str(i): row[named] for i, row in enumerate(_rows("scores.json")) if named in row}
    minilm, tinyllama = found.values()
    return filled(
        f"**What they cost.** Nothing is done twice: together they take {minilm:.1%} of rank() on MiniLM and "
        f"{tinyllama:.1%} on TinyLlama's shapes (`python -m benchmarks scores`, which holds them to 2%; "
        "[scores.json](../benchmarks/results/scores.json))."
    )


def ranks() -> str:
    """What docs/scale.md says of two processes."""
    rows = [row for row in _rows("ranks.json") if row.get("queued", 1e9) <= 0.1 * row.get("together", 0.0)]
    ratios = [row["ratio"] for row in rows]
    return filled(
        "Two processes with one thread each rank a checkpoint of 200 matrices faster than one process with one thread "
        f"({statistics.median(ratios):.2f} times as fast; `benchmarks/bench_ranks.py`, two cores, the file in memory, "
        f"the median of {len(ratios)} rounds in which no thread waited long for a processor, {min(ratios):.2f} to "
        f"{max(ratios):.2f}; [ranks.json](../benchmarks/results/ranks.json))."
    )


def _sweep(make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    return lambda: make(results("sweep.json"))


@functools.cache
def _scale_tables(*contents: str) -> list[str]:
    """Once for the same contents: three blocks are made of them, and dividing 44,544 matrices takes a second."""
    return scale.from_files()


def _scale(number: int) -> Callable[[], str]:
    files = [record.RESULTS / name for name in ("scale.json", "ranks.json")]
    return lambda: _scale_tables(*(file.read_text() for file in files))[number] + "\n"


def _forgetting(name: str) -> Callable[[], str]:
    """Text of benchmarks/forgetting/kept.py, in lines."""

    def made() -> str:
        from benchmarks.forgetting import kept

        text: str = getattr(kept, name)()
        if name in ("tables", "further"):  # a paragraph, if any, and tables
            said, rest = ("", text) if text.startswith("#") else text.partition("\n\n")[::2]
            return "\n\n".join([*([filled(said).rstrip()] if said else []), *([rest] if rest else [])])
        return filled(text)

    return made


# By name: the page, and what makes the text.
BLOCKS: dict[str, tuple[str, Callable[[], str]]] = {
    "cpu": ("README.md", cpu),
    "worst and best": ("README.md", _sweep(sweep_report.quotes)),
    "forgetting, a sentence": ("README.md", _forgetting("sentence")),
    "forgetting, the answer": ("docs/evidence.md", _forgetting("answer")),
    "forgetting, tables": ("docs/evidence.md", _forgetting("tables")),
    "forgetting, the further question": ("docs/evidence.md", _forgetting("further")),
    "GPU": ("README.md", lambda: gpu_report.times(results(gpu_report.FILE))),
    "stages on an H200": ("docs/kernels.md", lambda: gpu_report.stages(results(gpu_report.FILE))),
    "sweep": ("docs/performance.md", _sweep(sweep_report.tables)),
    "cache": ("docs/caching.md", cache),
    "stream": ("docs/checkpoints.md", stream),
    "plan": ("docs/planning.md", plan),
    "report": ("docs/reports.md", report),
    "scores": ("docs/scores.md", scores),
    "ranks": ("docs/scale.md", ranks),
    "shapes of DeepSeek-V3": ("docs/scale.md", _scale(0)),
    "times of DeepSeek-V3": ("docs/scale.md", _scale(1)),
    "bytes of DeepSeek-V3": ("docs/scale.md", _scale(2)),
}


def pages() -> dict[str, str]:
    """By page its whole text, with every block made anew.

    Raises:
        ValueError: a page lacks the marks of a block, or has them twice.
    """
    found: dict[str, str] = {}
    for name, (page, make) in BLOCKS.items():
        found[page] = replaced(found.get(page) or (ROOT / page).read_text(), name, make(), page)
    return found


def replaced(text: str, name: str, made: str, page: str = "the page") -> str:
    """The text with what was made between the marks of a block."""
    begin = BEGIN.format(name)
    if text.count(begin) != 1 or END not in text.partition(begin)[2]:
        raise ValueError(f"{page} needs the line {begin!r} once, and {END!r} after it")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{made}\n{END}{rest.partition(END)[2]}"


def stale() -> list[str]:
    """The pages that differ from what would be written."""
    return [page for page, text in pages().items() if (ROOT / page).read_text() != text]


def write() -> None:
    """Writes all pages. The picture of the sweep is drawn when sweep.py makes its document."""
    for page, text in pages().items():
        (ROOT / page).write_text(text)


def table_of(file: Path) -> str:
    """What a file of results holds, as text: times and ratios where it has rows for them, else what pages say of it."""
    document = json.loads(file.read_text())
    rows = document.get("rows", [])
    if all("seconds" in row and "group" in row for row in rows) and rows:
        return _grouped(rows)
    if "cells" in document:
        return sweep_report.tables(document)
    if "stages" in document:
        return f"{gpu_report.times(document)}\n\n{gpu_report.stages(document)}"
    if file.name.startswith("forgetting"):
        return "\n".join(f"{row['name']}: place - 1/2 {row['effect']:.3f}, {row['gain']:.4f} nats" for row in rows)
    if file.name == "scale.json":
        return "\n\n".join(scale.from_files(file))
    made = {"plan.json": plan, "ranks.json": ranks}.get(file.name)
    if made is not None and file.parent == record.RESULTS:
        return made()
    return json.dumps(rows or document, indent=1)


def _grouped(rows: Iterable[Mapping[str, Any]]) -> str:
    lines: list[str] = []
    last = None
    for row in sorted(rows, key=lambda row: str(row["group"])):
        if row["group"] != last:
            lines.append(str(row["group"] or "together"))
            last = row["group"]
        more = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float) and key != "ratio"]
        ratio = f"{row['ratio']:8.2f} x kappa_fast" if row.get("ratio") else ""
        lines.append(f"  {row['name']:<32}{row['seconds']['median']:11.4f} s {ratio:<22}{', '.join(more)}".rstrip())
    return "\n".join(lines)
