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
