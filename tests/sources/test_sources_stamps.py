"""Stamps tell matrices apart without reading them, and change with every file that their values come from."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from models import EVERYTHING, matrices
from safetensors.torch import save_file

from kappa_fast.sources import base
from kappa_fast.sources.base import FileState, Stamp, Stored, release_of
from kappa_fast.sources.quantized.recipe import Recipe, compose


def stamps(path: Path) -> dict[str, Stamp]:
    return {key: matrix.stamp for key, matrix in matrices(path).items()}


def test_every_matrix_of_a_checkpoint_has_a_stamp_of_its_own(tmp_path):
    tensors = {
        "layers.0.mlp.experts.gate_up_proj": torch.randn(3, 64, 16),
        "layers.0.mlp.experts.down_proj": torch.randn(3, 16, 32),
        "layers.0.conv.weight": torch.randn(8, 4, 3, 3),
        "layers.0.q.weight": torch.randn(16, 16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    split = stamps(tmp_path)
    assert len(split) == 6 + 3 + 2
    stored = {m.key: m.stamp for m in matrices(tmp_path, replace(EVERYTHING, fused="stored")).values()}
    every = [*split.values(), *(stored[key] for key in stored if key not in split)]
    assert len(set(every)) == len(every)
    assert all(split[key] == stored[key] for key in split.keys() & stored.keys())
    assert stamps(tmp_path / "model.safetensors") == split


def test_a_stamp_says_the_shape_and_the_real_path_of_the_file(tmp_path):
    save_file({"a": torch.randn(8, 6)}, tmp_path / "model.safetensors")
    before = stamps(tmp_path)["a"]
    assert "8x6" in before.what
    assert before.files[0].path == str((tmp_path / "model.safetensors").resolve())


def test_a_stamp_changes_with_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(8, 6)}, path)
    first = stamps(tmp_path)["a"]
    assert stamps(tmp_path)["a"] == first
    time.sleep(0.05)
    os.utime(path, ns=(1, 1))
    second = stamps(tmp_path)["a"]
    time.sleep(0.05)
    os.utime(path, ns=(1, 1))  # the same time once more: ctime tells
    assert len({first, second, stamps(tmp_path)["a"]}) == 3


def test_the_link_of_a_snapshot_and_its_blob_are_one_file(tmp_path):
    save_file({"a": torch.randn(8, 6)}, tmp_path / "blob.safetensors")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob.safetensors")
    assert stamps(tmp_path / "snapshot") == stamps(tmp_path / "blob.safetensors")


@pytest.fixture(params=["gguf", "torchao"])
def read_by_package(request, tmp_path) -> tuple[str, Path]:
    """A package, and a file with weights that it dequantizes and others."""
    package = pytest.importorskip(request.param)
    if request.param == "gguf":
        path = tmp_path / "model.gguf"
        writer = package.GGUFWriter(path, "llama")
        codes = np.zeros((32, 34), dtype=np.uint8)
        writer.add_tensor("codes.weight", codes, raw_dtype=package.GGMLQuantizationType.Q8_0)
        writer.add_tensor("plain.weight", np.zeros((32, 32), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return request.param, path
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    path, layer = tmp_path / "model.safetensors", torch.nn.Linear(32, 32, bias=False)
    quantize_(layer, Int8WeightOnlyConfig())
    flat, header = flatten_tensor_state_dict({"codes.weight": layer.weight.detach()})
    save_file({**flat, "plain.weight": torch.zeros(32, 32)}, path, metadata=header)
    return request.param, path


def test_another_version_of_what_dequantizes_gives_another_stamp(read_by_package, monkeypatch):
    package, path = read_by_package
    before = stamps(path)
    release_of.cache_clear()
    monkeypatch.setattr(base, "version", lambda name: "99.0")
    after = stamps(path)
    release_of.cache_clear()
    assert f"{package} 99.0" in after["codes.weight"].what
    assert after["codes.weight"] != before["codes.weight"]
    assert after["plain.weight"] == before["plain.weight"]


def test_tensors_in_memory_have_none():
    assert set(stamps({"a": torch.randn(8, 6)}).values()) == {None}
    assert set(stamps(torch.nn.Linear(8, 6)).values()) == {None}


def test_values_of_several_files_carry_the_state_of_all(tmp_path):
    states = []
    for name in ("codes", "scales"):
        (tmp_path / name).write_text(name)
        states.append(FileState.of(tmp_path / name))
    codes, scales = Stamp((states[0],), "w"), Stamp((states[1],), "w_scale")
    assert Stamp.joined([codes, scales], "fp8") == Stamp(tuple(states), "fp8(w, w_scale)")
    assert Stamp.joined([codes, replace(scales, files=(states[0],))], "fp8").files == (states[0],)
    assert Stamp.joined([codes, scales], "awq") != Stamp.joined([codes, scales], "fp8")
    assert Stamp.joined([codes, None], "fp8") is None
    assert Stamp.joined([], "fp8") is None


def composed(dequantize, **settings):
    """The stamp of a weight made of one tensor whose values are known by a stamp."""
    file = FileState("model.safetensors", 1, 2, 3, 4, 5)
    codes = Stored(("q.weight",), (8, 6), torch.int8, torch.device("cpu"), lambda *_: None, stamp=Stamp((file,), "q"))
    recipe = Recipe("some format", (8, 6), torch.float32, {"codes": codes}, dequantize, **settings)
    return compose(codes, recipe).stamp


def dequantized(inputs, *, offset=0):
    return inputs["codes"].float() + offset


def test_what_is_made_of_codes_is_part_of_what_identifies_them():
    stamps = [
        composed(dequantized),
        composed(partial(dequantized, offset=1)),
        composed(partial(dequantized, offset=2)),
        composed(dequantized, detail="offset 3"),
    ]
    assert None not in stamps
    assert len(set(stamps)) == 4
    assert composed(partial(dequantized, offset=1)) == stamps[1]


def test_a_weight_that_is_made_in_a_way_that_nothing_tells_has_no_stamp():
    offset = 1

    def closed_over(inputs):
        return inputs["codes"].float() + offset

    assert composed(closed_over) is None
    assert composed(partial(closed_over)) is None
    assert composed(closed_over, detail="offset 1") is not None
