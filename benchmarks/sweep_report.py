"""What sweep.py found, as one document, the tables and the picture of docs/performance.md, and lines of the README."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpu_results import read_lines

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/performance.png"
RATES = {
    "product float32": "product of two 2048 x 2048 matrices, float32",
    "product float64": "the same, float64",
    "product bfloat16": "the same, bfloat16",
    "scipy syrk float32": "scipy's rank-k update, float32",
    "scipy syrk float64": "the same, float64",
    "Cholesky float32": "Cholesky factor, 2048 x 2048, float32",
    "Cholesky float64": "the same, float64",
    "LU float64": "LU factors, 2048 x 2048, float64",
    "read": "reading memory",
    "copy": "copying memory",
}


def write(lines: Path, target: Path) -> None:
    """Make the document of the journal's lines of the newest code, and its picture; figures.py writes the pages."""
    document = collected(read_lines(lines))
    rows = [json.dumps(cell) for cell in document.pop("cells")]
    head = json.dumps(document, indent=1)
    partial = target.with_suffix(".partial")
    partial.write_text(head[:-2] + ',\n "cells": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n")
    os.replace(partial, target)
    if target.parent == ROOT / "benchmarks" / "results":
        draw(json.loads(target.read_text()), PICTURE)


def collected(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The document: where it was measured, {threads: rates}, {threads: {claim: value}}, and a row for every cell."""
    import record
    from sweep_cells import cells as all_cells

    source = lines[-1]["source"]
    found = {(x["threads"], x["stage"], x["key"]): x["value"] for x in lines if x["source"] == source}
    machine, claims, cells = {}, {}, []
    for (threads, stage, key), value in found.items():
        if stage == "machine":
            machine[str(threads)] = {name: _short(rate) for name, rate in value.items()}
        elif stage == "claims":
            claims.setdefault(str(threads), {})[key] = _claim(key, value)
        else:
            cells.append(_row(key, threads, value, found.get((threads, "machine", "rates"))))
    hardware = {"processor": record._processor(), "cores": os.cpu_count()}
    origin = {"hardware": hardware, "versions": record.versions(), **record.commit(), "source": source}
    origin["planned"] = len(list(all_cells())) * len(machine or {""})
    return {**origin, "machine": machine, "claims": claims, "cells": cells}


def _claim(name: str, value: dict[str, Any]) -> dict[str, Any]:
    from sweep_claims import CLAIMS

    claim = CLAIMS[name]
    seconds = {way: _short(times[value["clock"]]) for way, times in value["times"].items()}
    goal = {"reach": claim.reach, "at most": claim.at_most}
    return {"text": claim.text, "figure": _short(value["figure"]), **goal, "clock": value["clock"], "seconds": seconds}


def _row(key: str, threads: int, value: dict[str, Any], rates: dict[str, float] | None) -> dict[str, Any]:
    from sweep_cells import Cell
    from sweep_machine import floor

    cell = Cell.parse(key)
    seconds = {way: _short(times[value["clock"]]) for way, times in value["times"].items()}
    wrong = {way: _short(t["error"]) for way, t in value["times"].items() if not t.get("error", 0.0) <= 0.01}
    row = {
        "cell": key,
        **vars(cell),
        "threads": threads,
        "ratio": _short(value.get("ratio")),
        "best": value.get("best"),
    }
    row |= {"floor": _short(floor(cell, rates)) if rates else None, "methods": value["methods"]}
    return row | {"seconds": seconds, "wrong": wrong, "too long": value["too long"]}


def _short(value: float | None) -> float | None:
    """Four digits; None for what JSON has no number for."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


def rated(document: dict[str, Any], threads: int | None = None) -> list[dict[str, Any]]:
    """The cells with a ratio, the lowest first."""
    cells = [cell for cell in document["cells"] if cell["ratio"] is not None]
    return sorted((c for c in cells if threads in (None, c["threads"])), key=lambda c: (c["ratio"], c["cell"]))


def quotes(document: dict[str, Any]) -> str:
    """The README's lines about the worst and the best cell."""
    cells = rated(document)
    return filled(
        f"Over {len(cells)} cells of shapes, numbers, dtypes and spectra "
        "([docs/performance.md](docs/performance.md)) the fastest plain way that is right takes between "
        f"{_times(cells[0]['ratio'])} and {_times(cells[-1]['ratio'])} times as long as `rank`: the least for "
        f"{_words(cells[0])}, the most for {_words(cells[-1])}."
    )


def filled(text: str) -> str:
    """A paragraph in lines of 120."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _times(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"


def _words(cell: dict[str, Any]) -> str:
    number = "one matrix" if cell["count"] == 1 else f"{cell['count']} matrices"
    threads = "one thread" if cell["threads"] == 1 else f"{cell['threads']} threads"
    kind = {"trained": "trained-like", "gaussian": "Gaussian"}.get(cell["spectrum"], cell["spectrum"])
    return f"{number} of {cell['rows']} x {cell['columns']} ({cell['dtype']}, {kind}, {threads})"


def tables(document: dict[str, Any]) -> str:
    """The part of docs/performance.md that is made of the document."""
    parts = [_where(document), "## The machine\n", _machine(document["machine"])]
    parts += ["## Comparisons with a goal\n", _claims(document["claims"])] if document["claims"] else []
    parts += ["## The sweep\n", _summary(document)]
    parts += ["![The lowest ratio of every shape](performance.png)\n"]
    for threads in sorted({cell["threads"] for cell in document["cells"]}):
        for count in sorted({cell["count"] for cell in document["cells"]}):
            parts += [_grid(document, count, threads)]
    parts += [_shares(document)]
    return "\n".join(parts)


def _where(document: dict[str, Any]) -> str:
    hardware, versions = document["hardware"], document["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "numpy", "peft") if name in versions)
    return f"Measured on {hardware['processor']}, {hardware['cores']} cores, with {named}.\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Of Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (tuple(head), *(tuple(row) for row in rows))]
    return "\n".join([lines[0], f"|{' --- |' * (lines[0].count('|') - 1)}", *lines[1:]]) + "\n"


def _machine(machine: dict[str, dict[str, float]]) -> str:
    threads = sorted(machine, key=int)
    head = ["", *(_threads(t) for t in threads)]
    unit = {"read": "GB/s", "copy": "GB/s"}
    rows = [
        [text, *(f"{machine[t][name] / 1e9:.0f} {unit.get(name, 'Gflop/s')}" for t in threads)]
        for name, text in RATES.items()
        if all(name in machine[t] for t in threads)
    ]
    return table(head, rows)


def _claims(claims: dict[str, dict[str, Any]]) -> str:
    threads = sorted(claims, key=int)
    names = list(dict.fromkeys(name for t in threads for name in claims[t]))
    rows = []
    for name in names:
        any_of = next(claims[t][name] for t in threads if name in claims[t])
        goal = f"{'at most' if any_of['at most'] else 'at least'} {any_of['reach']:g}"
        figures = [f"{claims[t][name]['figure']:.2f}" if name in claims[t] else "" for t in threads]
        rows.append([any_of["text"], *figures, goal])
    return table(["", *(_threads(t) for t in threads), "goal"], rows)


def _summary(document: dict[str, Any]) -> str:
    cells = rated(document)
    below = sum(cell["ratio"] < 1 for cell in cells)
    return filled(
        f"{len(cells)} of {document['planned']} cells were measured in the time given. In {len(cells) - below} of them "
        "no plain way that is right takes less time than `rank()`. The lowest ratio is "
        f"{_times(cells[0]['ratio'])}, for {_words(cells[0])}, where {cells[0]['best']} is the fastest; the highest is "
        f"{_times(cells[-1]['ratio'])}, for {_words(cells[-1])}."
    )


def _shares(document: dict[str, Any]) -> str:
    """Which share of the time of rank() the floor is, for every number of columns."""
    threads = sorted({cell["threads"] for cell in document["cells"]})
    found: dict[int, dict[int, list[float]]] = {}
    for cell in document["cells"]:
        if cell["floor"] is not None:
            share = cell["floor"] / cell["seconds"]["rank"]
            found.setdefault(cell["columns"], {}).setdefault(cell["threads"], []).append(share)
    rows = []
    for n in sorted(found):
        spans = [(min(shares), max(shares)) if (shares := found[n].get(t)) else None for t in threads]
        rows.append([f"**{n}**", *(f"{_times(span[0])} to {_times(span[1])}" if span else "" for span in spans)])
    title = "The floor as a share of the time of `rank()`, lowest to highest of all cells with so many columns\n"
    return f"{title}\n{table(['columns', *(_threads(t) for t in threads)], rows)}"


def _threads(number: int | str) -> str:
    return f"{number} thread{'s' * (str(number) != '1')}"


def _lowest(document: dict[str, Any], count: int, threads: int) -> dict[tuple[int, int], float]:
    """The lowest ratio over dtypes and spectra of every (columns, rows per column)."""
    found: dict[tuple[int, int], float] = {}
    for cell in rated(document, threads):
        if cell["count"] == count:
            place = (cell["columns"], cell["rows"] // cell["columns"])
            found[place] = min(found.get(place, cell["ratio"]), cell["ratio"])
    return found


def _grid(document: dict[str, Any], count: int, threads: int) -> str:
    lowest = _lowest(document, count, threads)
    aspects = sorted({aspect for _, aspect in lowest})
    number = "One matrix" if count == 1 else f"{count} matrices"
    title = f"{number}, {_threads(threads)}: the lowest ratio over dtypes and spectra\n"
    rows = [
        [f"**{n}**", *(_times(lowest[n, a]) if (n, a) in lowest else "" for a in aspects)]
        for n in sorted({n for n, _ in lowest})
    ]
    return f"{title}\n{table(['columns', *(f'{a} rows per column' for a in aspects)], rows)}" if rows else ""


def _panels(document: dict[str, Any]) -> Iterator[tuple[int, int, dict[tuple[int, int], float]]]:
    for threads in sorted({cell["threads"] for cell in document["cells"]}):
        for count in sorted({cell["count"] for cell in document["cells"]}):
            if lowest := _lowest(document, count, threads):
                yield threads, count, lowest


def draw(document: dict[str, Any], file: Path) -> None:
    """A heat map for every number of matrices and of threads: red where a plain way is faster, blue where rank() is."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    panels = list(_panels(document))
    figure = Figure(figsize=(3.6 * len(panels) + 0.6, 5.2), dpi=110, facecolor="white", layout="constrained")
    sizes = sorted({n for _, _, lowest in panels for n, _ in lowest})
    aspects = sorted({a for _, _, lowest in panels for _, a in lowest})
    norm = LogNorm(1 / 16, 16, clip=True)
    for axes, (threads, count, lowest) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        grid = [[lowest.get((n, a), float("nan")) for a in aspects] for n in sizes]
        axes.imshow(grid, norm=norm, cmap="RdBu", aspect="auto")
        for (n, a), ratio in lowest.items():
            color = "white" if ratio > 6 or ratio < 1 / 6 else "black"
            place = aspects.index(a), sizes.index(n)
            axes.text(*place, _times(ratio), ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(aspects)), aspects, fontsize=8)
        axes.set_yticks(range(len(sizes)), sizes, fontsize=8)
        axes.set_xlabel("rows per column", fontsize=9)
        number = "one matrix" if count == 1 else f"{count} matrices"
        axes.set_title(f"{number}, {_threads(threads)}", fontsize=10)
    figure.axes[0].set_ylabel("columns", fontsize=9)
    figure.suptitle("best plain way / rank(), the lowest over dtypes and spectra", fontsize=11)
    figure.savefig(file, metadata={"Software": None})
