"""A small checkpoint, and the command line in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kappa_fast.cli import app


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Five matrices in two groups, and one that is too small."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.up.weight": torch.randn(48, 24, generator=generator) for i in range(3)}
    weights |= {f"layers.{i}.square.weight": torch.randn(32, 32, generator=generator) for i in range(2)}
    weights["tiny.weight"] = torch.randn(4, 32, generator=generator)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture
def cli(capsys):
    """Run the command line in this process: ``cli("rank", path)`` returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            app([str(argument) for argument in arguments], prog_name="kappa-fast")
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run
