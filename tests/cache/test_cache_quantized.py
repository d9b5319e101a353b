"""Quantized weights are kept under what they are dequantized to, and remembered by all files that takes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kappa_fast.cache import memos
from kappa_fast.pipeline import rank
from kappa_fast.sources.files import Region

NAME = "model.layers.0.mlp.up_proj.weight"
CODES = "model-00001-of-00002.safetensors"
SCALES = "model-00002-of-00002.safetensors"


@pytest.fixture
def settled(monkeypatch) -> None:
    """Files of weights count as old, though the test has just written them."""
    monkeypatch.setattr(memos, "RACY_NS", -(10**12))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """FP8 with scales for blocks of 128 x 128, which lie in another file."""
    path = tmp_path / "model"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    save_file({NAME: torch.randn(200, 150, generator=generator).to(torch.float8_e4m3fn)}, path / CODES)
    write_scales(path, 1.0)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_scales(path: Path, last: float) -> None:
    scales = torch.tensor([[0.5, 2.0], [0.25, last]])
    save_file({f"{NAME}_scale_inv": scales}, path / SCALES)


def dequantized(path: Path, last: float) -> torch.Tensor:
    from safetensors.torch import load_file

    scales = torch.tensor([[0.5, 2.0], [0.25, last]]).repeat_interleave(128, 0).repeat_interleave(128, 1)
    return load_file(path / CODES)[NAME].float() * scales[:200, :150]


def exact(weight: torch.Tensor) -> float:
    sigma = torch.linalg.svdvals(weight.double())
    return float(sigma[0] / sigma[-1])


def test_a_second_run_reads_neither_codes_nor_scales(checkpoint, tmp_path, settled, monkeypatch):
    (first,) = rank(checkpoint, cache=tmp_path / "cache")
    assert first.quantization
    assert first.lower * (1 - 1e-9) <= exact(dequantized(checkpoint, 1.0)) <= first.upper * (1 + 1e-9)
    monkeypatch.setattr(Region, "take", lambda *_: pytest.fail("something was read"))
    assert list(rank(checkpoint, cache=tmp_path / "cache")) == [first]


def test_other_scales_in_a_file_of_their_own_are_noticed(checkpoint, tmp_path, settled):
    (first,) = rank(checkpoint, cache=tmp_path / "cache")
    time.sleep(0.05)
    write_scales(checkpoint, 64.0)
    ranking = rank(checkpoint, cache=tmp_path / "cache")
    assert ranking.metadata["cache"] == {"hits": 0, "computed": 1}
    truth = exact(dequantized(checkpoint, 64.0))
    assert truth > 1.5 * first.upper
    assert ranking[0].lower * (1 - 1e-9) <= truth <= ranking[0].upper * (1 + 1e-9)


def test_other_scales_in_the_same_state_dict_are_noticed(tmp_path):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(200, 150, generator=generator).to(torch.float8_e4m3fn)
    kappas = []
    for last in (1.0, 64.0):
        scales = torch.tensor([[0.5, 2.0], [0.25, last]])
        ranking = rank({NAME: codes, f"{NAME}_scale_inv": scales}, cache=tmp_path)
        assert ranking.metadata["cache"] == {"hits": 0, "computed": 1}
        kappas.append(ranking[0].kappa)
    assert kappas[1] > 1.5 * kappas[0]


def test_the_dequantized_weights_find_what_the_codes_have_left(checkpoint, tmp_path):
    (quantized,) = rank(checkpoint, cache=tmp_path / "cache")
    dense = dequantized(checkpoint, 1.0).to(getattr(torch, quantized.dtype))
    ranking = rank({"dense": dense}, cache=tmp_path / "cache")
    assert ranking.metadata["cache"] == {"hits": 1, "computed": 0}
    assert ranking[0].kappa == quantized.kappa
    assert ranking[0].quantization is None
