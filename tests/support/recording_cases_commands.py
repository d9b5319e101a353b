"""Cases of a recording: the command line. Exit codes, files, what goes to stdout and what to stderr."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from recording_cases_results import by_hand
from recording_cases_runs import LONGEST, environment, settle
from recording_cases_views import moved
from recording_plain import Lines, Text, without_volatile
from recording_sources import Cases, Stored, gaussian, model_tensors
from typer.testing import CliRunner

from kappa_fast.cli import app

# Each in the folder of the files that the ones before it have written.
COMMANDS = """
--version
--help
rank --help
plan --help
select --help
export --help
compare --help
report --help
demo --help
rank model.safetensors --no-cache --json ranking.json --csv ranking.csv
rank model.safetensors --no-cache --json -
rank model.safetensors --no-cache --csv -
rank model.safetensors --no-cache --quiet --json quiet.json
rank model.safetensors --no-cache --top 3 --certify selection --limit 5 --json top.json
rank model.safetensors --no-cache --top 0.2 --top-per-group --rtol 1e-4 --json group.json
rank model.safetensors --no-cache --certify all --include q_proj --include o_proj --exclude layers.2 --all
rank model.safetensors --no-cache --embeddings --routers --min-dim 1 --fused stored --summary group
rank model.safetensors --no-cache --max-dim 64 --memory-budget 1 --backend torch --device cpu --threads 1
rank model.safetensors --no-cache --json relative.json --relative --summary layer --limit 0
rank model.safetensors --cache-dir kept --json cold.json
rank model.safetensors --cache-dir kept --json warm.json
rank model.safetensors -v --no-cache --limit 1
rank small.safetensors -v -v --no-cache --min-dim 1
rank model.safetensors --no-cache --progress --limit 1
rank sharded --no-cache --limit 3
rank broken.safetensors --no-cache
rank vectors.safetensors --no-cache
rank small.safetensors --no-cache
rank nowhere.safetensors
rank model.safetensors --rtol 3
rank model.safetensors --top x
rank model.safetensors --certify selection
rank model.safetensors --json nowhere/x.json
rank model.safetensors --json x.json --csv x.json
rank model.safetensors --json - --csv -
rank model.safetensors --relative
rank model.safetensors --cache-dir model.safetensors
rank model.safetensors --include (
rank model.safetensors --nonsense
rank
nonsense
plan model.safetensors --no-measure --memory-budget 64MB --json plan.json
plan model.safetensors --no-measure --memory-budget 64MB --json -
plan sharded --no-measure --memory-budget 64MB --top 3 --certify selection --ranks 3 --device-model h100
plan sharded --memory-budget 64MB --include q_proj --quiet --json measured.json
plan model.safetensors --no-measure --device-model abacus
select ranking.json --max-params 0.2 --json selection.json --csv selection.csv
select ranking.json --max-params 0.2 --fill --summary group --limit 5
select ranking.json --num-tensors 3 --per-group --json -
select ranking.json --top-p 0.3 --unit expert --max-kappa 9 --including norm --excluding down
select ranking.json --num-tensors 3 --include q_proj --exclude layers.0 --csv -
select hand.json --num-tensors 3 --quiet
select top.json --num-tensors 9
select ranking.json
select ranking.json --max-params x
select nowhere.json --num-tensors 1
select ranking.json --num-tensors 1 --json ranking.json
export ranking.json --format axolotl --max-params 0.2 --unit expert
export ranking.json --format ms-swift --num-tensors 3 --exclude experts
export ranking.json --format spectrum --num-tensors 3 --exclude experts
export ranking.json --format esft --num-tensors 2 --unit expert --include experts
export ranking.json --format names --top-p 0.2 --unit parameter --output names.txt
export ranking.json --format regex --max-kappa 8 --unit parameter
export selection.json --format names
export selection.json --format names --num-tensors 3
export ranking.json --format names
export ranking.json --format llama-factory --num-tensors 1
export ranking.json --format names --num-tensors 3 --exclude experts --including norm
export ranking.json --format other --num-tensors 1
compare ranking.json moved.json --json comparison.json --csv comparison.csv
compare ranking.json moved.json --json - --max-params 0.2
compare ranking.json moved.json --csv - --limit 3
compare ranking.json moved.json --fail-above 1.01
compare ranking.json moved.json --fail-above 100 --quiet
compare ranking.json broke.json --fail-above 1.5
compare ranking.json moved.json --num-tensors 4 --per-group --all
compare ranking.json moved.json broke.json --json series.json --csv series.csv
compare ranking.json moved.json broke.json --label a --label b --label c --limit 4
compare ranking.json moved.json --html comparison.html --plot comparison.svg
compare ranking.json
compare ranking.json hand.json
compare ranking.json moved.json --fail-above 0.5
compare ranking.json moved.json --per-group
report hand.json --output page.html --plot page.svg
report hand.json --output page.html --num-tensors 4 --per-group --quiet
report hand.json --output hand.json
report nowhere.json
report hand.json --per-group
"""


def cases(stored: Stored) -> Cases:
    folder = _prepared(stored)
    for line in COMMANDS.strip().splitlines():
        yield f"kappa-fast {line}", partial(_invoked, folder, line)
    yield "python -m kappa_fast", partial(_by_module, folder, "rank small.safetensors --no-cache --min-dim 1")
    yield "python -m kappa_fast, wrong use", partial(_by_module, folder, "rank small.safetensors --rtol 3")


def _prepared(stored: Stored) -> Path:
    folder = stored.new("commands")
    tensors = {
        "model": model_tensors(),
        "small": {"w.weight": gaussian(8, 6)},
        "broken": {"w.weight": float("nan") * gaussian(20, 18), "v.weight": gaussian(20, 18)},
        "vectors": {"w.weight": gaussian(20)},
    }
    for name, some in tensors.items():
        (stored.folder(f"commands of {name}", some) / "model.safetensors").rename(folder / f"{name}.safetensors")
    stored.sharded("commands/sharded")
    by_hand().to_json(folder / "hand.json")
    moved().to_json(folder / "moved.json")
    moved(2.0, True).to_json(folder / "broke.json")
    settle(folder / "model.safetensors")
    return folder


def _invoked(folder: Path, line: str) -> dict[str, Any]:
    """A command in this process."""
    before = _states(folder)
    with contextlib.chdir(folder):
        done = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}).invoke(app, shlex.split(line, posix=False))
    written = [path for path, state in _states(folder).items() if before.get(path) != state]
    found: dict[str, Any] = {"exit": done.exit_code, "stdout": _content(done.stdout, line), "stderr": Text(done.stderr)}
    return found | {"files": {path.name: _of_file(path) for path in sorted(written)}}


def _states(folder: Path) -> dict[Path, tuple[int, int]]:
    """What tells whether a file was written anew."""
    found = {path: path.stat() for path in folder.iterdir() if path.is_file()}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in found.items()}


def _by_module(folder: Path, line: str) -> dict[str, Any]:
    """A command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "kappa_fast", *line.split()],
        cwd=folder,
        env={**os.environ, **environment()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    return {"exit": done.returncode, "stdout": Text(done.stdout), "stderr": Text(done.stderr)}


def _content(text: str, line: str) -> Any:
    """Of stdout: what another program reads, or words."""
    if "--json -" in line and text.startswith("{"):
        return without_volatile(json.loads(text))
    if "--csv -" in line:
        return list(_rows(text))
    return Lines(text) if line.startswith("export") else Text(text)


def _of_file(path: Path) -> Any:
    if path.suffix == ".json":
        return without_volatile(json.loads(path.read_text()))
    if path.suffix == ".csv":
        return list(_rows(path.read_text()))
    if path.suffix == ".txt":
        return Lines(path.read_text())
    text = "\n".join(line for line in path.read_text().splitlines() if "Computed in" not in line)
    return Text(hashlib.sha256(text.encode()).hexdigest())


def _rows(text: str) -> Iterator[list[str]]:
    yield from csv.reader(io.StringIO(text))
