"""The examples run as a user runs them, learn something, and leave the rest alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
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
    assert re.search(r"selected: Selection\(17 matrices .* did not fit; boundary", said)
    assert re.search(r"step 120: kappa of what trains moved by \d", said)
    same, frozen = re.findall(r"as before: (\d+) of (\d+) that are frozen", said)[0]
    assert same == frozen != "0"
    if name == "finetune_trainer":
        assert "kappa_fast goes on with what was selected at step 60" in said


def test_the_checkpoints_of_a_run_are_ranked_followed_and_judged(tmp_path):
    said = output_of("checkpoints", tmp_path)
    assert "28 matrices over 3 rankings" in said
    assert re.search(r"certainly moved by more than 1000: \d+", said)
    for name in ("run.svg", "run.csv", "change.html", "checkpoint-60.json"):
        assert (tmp_path / name).stat().st_size > 500, name
