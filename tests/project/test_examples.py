"""The examples run as a user runs them, learn something, and leave the rest alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["finetune_wrap", "lora_trainer", "reference_loop"])
def test_an_example_learns_and_leaves_the_rest_alone(name):
    command = [sys.executable, EXAMPLES / f"{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    accuracies = [float(found) for found in re.findall(r"accuracy(?: before: | after: | )(\d\.\d+)", done.stdout)]
    assert accuracies[0] < 0.4
    assert accuracies[-1] > 0.75
    assert "selected: " in done.stdout
    same, total = (int(n.replace(",", "")) for n in re.findall(r"as before: ([\d,]+) of ([\d,]+)", done.stdout)[0])
    assert 0.5 * total < same <= total


def output_of(name: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["finetune_trainer", "finetune_sft"])
def test_a_language_model_learns_with_a_trainer_and_the_rest_stays(name):
    if name == "finetune_sft":
        pytest.importorskip("trl")
    said = output_of(name)
    before, after = (float(found) for found in re.findall(r"loss (?:before|after): (\d\.\d+)", said))
    assert after < before - 0.3
    assert re.search(r"selected: Selection\(17 matrices .* did not fit; (including .*; )?boundary certain", said)
    assert re.search(r"step 120: kappa of what trains moved by \d", said)
    same, frozen = re.findall(r"as before: (\d+) of (\d+) that are frozen", said)[0]
    assert same == frozen != "0"
    if name == "finetune_trainer":
        assert "kappa_fast continues with the selection of step 60" in said


def test_the_checkpoints_of_a_run_are_ranked_followed_and_judged(tmp_path):
    said = output_of("checkpoints", tmp_path)
    assert "28 matrices over 3 rankings" in said
    assert re.search(r"certainly moved by more than 1000: \d+", said)
    for name in ("run.svg", "run.csv", "change.html", "checkpoint-60.json"):
        assert (tmp_path / name).stat().st_size > 500, name


def cells_of(name: str) -> dict[str, list[Any]]:
    """What each cell of code gives, by its last line, in a kernel of its own."""
    import nbclient
    import nbformat

    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # as it is committed
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    return {cell.source.splitlines()[-1]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def shown(outputs: list[Any], kind: str) -> str:
    """The result of a cell in one of its forms."""
    (result,) = (output for output in outputs if output.output_type == "execute_result")
    return str(result.data[kind])


def test_the_notebook_that_looks_at_a_ranking_runs_from_start_to_end():
    cells = cells_of("rank_and_look")
    assert "intermediate.dense" in shown(cells["ranking"], "text/html")
    assert shown(cells["ranking.plot()"], "image/png").startswith("iVBOR")
    assert "did not fit" in shown(cells["selection"], "text/html")
    assert "<td" in shown(cells["filled - selection"], "text/html")
    proven = shown(cells["[(entry.name, entry.certified) for entry in proven]"], "text/plain")
    assert proven.count("True") == 6
    assert "False" not in proven


def test_the_notebook_that_trains_and_compares_runs_from_start_to_end():
    cells = cells_of("train_and_compare")
    said = "".join(o.text for outputs in cells.values() for o in outputs if o.output_type == "stream")
    before, after = re.findall(r"held-out text: (\d\.\d+) before, (\d\.\d+) after", said)[0]
    assert float(after) < float(before) - 0.2
    assert "17," in shown(cells["sorted(moved)[:3], len(moved), len(start)"], "text/plain")
    assert "<td" in shown(cells["change"], "text/html")
    for drawn in ("change.plot()", "course.plot()"):
        assert shown(cells[drawn], "image/png").startswith("iVBOR")
