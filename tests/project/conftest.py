"""What the tests of benchmarks/ share."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Modules of the benchmarks by name, with their folder in front of the path, as for the command."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield importlib.import_module
    for name in {file.stem for file in BENCHMARKS.glob("*.py")} - {"__init__", "__main__", "conftest"}:
        sys.modules.pop(name, None)
