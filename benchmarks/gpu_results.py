"""What a run of gpu.py leaves behind: a line for every number, and one document made of all lines. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

LINES = "gpu.jsonl"  # every number, the moment it exists
LOG = "gpu.log"  # what the stages print
RATES = ("bandwidth", "bf16", "int8", "float64", "float32", "tf32")
LONGEST = 300  # characters of a value in the table


def write_line(file: Path, content: dict[str, Any]) -> None:
    """Append one line of JSON, on the disk when this returns."""
    with file.open("a") as lines:
        lines.write(json.dumps({**content, "at": round(time.time(), 2)}) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def read_lines(file: Path, start: int = 0) -> list[dict[str, Any]]:
    """All whole lines from byte ``start`` on; the last may be cut where a process was ended while it wrote."""
    found = []
    if file.exists():
        with file.open("rb") as content:
            content.seek(start)
            for line in content.read().splitlines():
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
    return found


def merge(document: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The document with what the lines add: {stage: {key: value}}, beside "failed" and "skipped" with the reasons.

    A value replaces an earlier one and the reason why there was none; an error or a skip replaces no value. A stage
    keeps the digest of the sources that its values were measured with. What all files of results say of hardware,
    versions and commit is that of the last run.
    """
    for name in ("stages", "failed", "skipped"):
        document.setdefault(name, {})
    source = None
    for line in lines:
        stage, key = line["stage"], line["key"]
        place = f"{stage}: {key}"
        if "value" in line:
            if key == "hardware":
                document.setdefault("hardware", {})["processor"] = line["value"]["name"]
            if key == "software":
                source = line["value"].get("source")
                document.setdefault("hardware", {})["cores"] = line["value"]["processors"]
                document |= {
                    k: line["value"][k] for k in ("versions", "source", "commit", "clean") if k in line["value"]
                }
            found = document["stages"].setdefault(stage, {})
            found[key] = line["value"]
            if source is not None:
                found["source"] = source
            document["failed"].pop(place, None)
            document["skipped"].pop(place, None)
        elif "error" in line:
            document["failed"][place] = line["error"]
        elif key not in (known := document["stages"].get(stage, {})) and not (key == "all of it" and known):
            document["skipped"][place] = line["skipped"]
    return document


def write_document(folder: Path, device: str, lines: list[dict[str, Any]]) -> Path:
    """Merge into <device>.json in the folder, all at once; what an earlier run found there stays."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    target = folder / f"{slug}.json"
    try:
        document = json.loads(target.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        document = {}
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(merge(document, lines), indent=1) + "\n")
    os.replace(partial, target)
    return target


def table(lines: list[dict[str, Any]]) -> str:
    """Lines as text, one for every key; long ones are cut, the file has all of them."""
    rows = []
    for line in lines:
        if "value" in line:
            text = _text(line["value"])
        else:
            text = f"FAILED: {line['error']}" if "error" in line else f"skipped: {line['skipped']}"
        rows.append((f"{line['stage']}: {line['key']}", text))
    width = min(60, max((len(name) for name, _ in rows), default=0))
    return "\n".join(
        f"{name:<{width}}  {text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}" for name, text in rows
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def floors(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For every model that was ranked: seconds by step that the measured ceilings do not allow to go below.

    Nothing where a ceiling is missing.
    """
    values = merge({}, lines)["stages"]
    rates = values.get("ceilings", {})
    if not set(RATES) <= set(rates):
        return {}
    found = {}
    for name, of_model in values.items():
        if "shapes" not in of_model:
            continue
        steps: dict[str, float] = {}
        for shape, count in of_model["shapes"].items():
            m, n = (int(size) for size in shape.split("x"))
            for step, seconds in floor((m, n), rates).items():
                steps[step] = steps.get(step, 0.0) + count * seconds
        steps["together"] = sum(steps.values())
        if "median" in of_model:
            steps["time over floor"] = of_model["median"]["seconds"] / steps["together"]
        found[name] = steps
    return found


def floor(shape: tuple[int, int], rates: dict[str, float]) -> dict[str, float]:
    """Seconds by step for a 16-bit matrix (m, n) without proofs, at these rates per second.

    Gram matrix: the lower triangle, m n^2 operations in 16 bits, or in int8 four times that for two slices. Factor:
    n^3 / 3 operations in float64, in float32, or in TF32 three times. Krylov: six steps at each end, each reading the
    lower triangle twice, in float32 (in float64 it would be twice the bytes). Weights: read six times beside the
    Gram matrix (peaks, digest, departure twice, polish, sensitivity), four of them with 32 m n float64 operations.
    """
    m, n = max(shape), min(shape)
    bandwidth = rates["bandwidth"]
    read, applied = 2 * m * n / bandwidth, 32 * m * n / rates["float64"]
    return {
        "Gram matrix": max(read, min(m * n * n / rates["bf16"], 4 * m * n * n / rates["int8"])),
        "factor": n**3 / 3 / max(rates["float64"], rates["float32"], rates["tf32"] / 3),
        "Krylov steps": 12 * 2 * 2 * n * n / bandwidth,
        "weights": 2 * read + 4 * max(read, applied),
    }
