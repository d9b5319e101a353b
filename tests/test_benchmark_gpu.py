"""benchmarks/gpu.py works line by line before a GPU sees it: at toy sizes, under the interpreter."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The module, with the folder of the benchmarks in front of the path, as for the command."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu")
    yield module
    for name in ("gpu", "gpu_timing", "gpu_models", "record", "workloads"):
        sys.modules.pop(name, None)


@pytest.fixture
def sound(gpu, monkeypatch):
    """Kernels pass: what the canaries find has tests of its own."""
    monkeypatch.setattr(gpu, "check", lambda bench: {"device": "passed"})
    return gpu


def test_without_a_gpu_it_says_so(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_a_section_that_is_unknown_is_named(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--smoke", "--only", "grams"])
    assert "unknown: grams; sections ceilings, gram" in capsys.readouterr().err


def test_sections_are_written_with_hardware_versions_and_commit(sound, tmp_path):
    target = tmp_path / "found.json"
    assert sound.main(["--smoke", "--only", "ceilings,gram,cholesky", "--output", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["interpreted"] is True
    assert found["hardware"]["name"].startswith("Triton's interpreter")
    assert {"python", "torch", "triton"} <= set(found["versions"])
    assert found["gram"]["operations"] == 2 * 160 * 64 * 65
    for name in ("gram of 2 slices", "gram of 16-bit weights", "torch: what two slices do"):
        row = found["gram"][name]
        assert row["useful_per_second"] == pytest.approx(found["gram"]["operations"] / row["median"])
    assert found["cholesky"]["order"] == 96
    assert set(found["ceilings"]) == {"bandwidth", "bf16", "float64", "int8"}


def test_a_kernel_that_is_wrong_ends_it_before_anything_is_timed(gpu, tmp_path, capsys, monkeypatch):
    from kappa_fast.kernels import canary

    def wrong(device):
        raise canary.CanaryError("cholesky is off by 1e-3 on cpu")

    monkeypatch.setattr(canary, "check_device", wrong)
    target = tmp_path / "found.json"
    assert gpu.main(["--smoke", "--output", str(target)]) == 1
    assert "nothing is timed: cholesky is off by 1e-3" in capsys.readouterr().err
    assert json.loads(target.read_text())["check"] == "failed: cholesky is off by 1e-3 on cpu"


def test_a_section_that_fails_leaves_the_others(sound, tmp_path, monkeypatch, capsys):
    def full(bench):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(sound.SECTIONS, "gram", full)
    target = tmp_path / "found.json"
    assert sound.main(["--smoke", "--only", "gram,ceilings", "--output", str(target)]) == 1
    found = json.loads(target.read_text())
    assert found["gram"] == "failed: OutOfMemoryError: no room"
    assert found["ceilings"]["bandwidth"] > 0
    assert "no room" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["TinyLlama-1.1B", "Mixtral-8x7B"])
def test_models_are_ranked_beside_their_peers(sound, name, tmp_path):
    target = tmp_path / "found.json"
    assert sound.main(["--smoke", "--only", "ceilings,rank", "--models", name, "--output", str(target)]) == 0
    row = json.loads(target.read_text())["rank"][name]
    assert row["matrices"] == {"TinyLlama-1.1B": 7, "Mixtral-8x7B": 4 + 2 * 3}[name]
    assert row["backend"] == "triton"
    assert row["over_floor"] == pytest.approx(row["kappa_fast"]["median"] / row["floor"])
    assert "PEFT's KappaTuneSelector" in row["peers, one layer times the number of layers"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("TinyLlama-1.1B", 1.1), ("Llama-3.1-8B", 8.03), ("OLMoE-1B-7B", 6.92), ("Mixtral-8x7B", 46.7)],
)
def test_models_have_the_sizes_of_the_public_ones(gpu, name, billions):
    assert gpu.size_of(name) / 2e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.slow
def test_the_krylov_section_and_the_real_checks_run(gpu, tmp_path):
    target = tmp_path / "found.json"
    assert gpu.main(["--smoke", "--only", "krylov", "--output", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["check"] == {"device": "passed", "storage_classes": 2}
    assert found["krylov"]["both ends to 1.2%"]["median"] > 0
