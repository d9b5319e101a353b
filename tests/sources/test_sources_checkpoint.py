"""Checkpoints: what is read and when."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import FIRST, INDEX, MODEL, SECOND, same_as_in_memory, save_sharded, save_single
from models import EVERYTHING, matrices, reasons, weights
from safetensors.torch import save_file

import kappa_fast
from kappa_fast.sources import Filters, files, open_source
from kappa_fast.sources.checkpoint import DTYPES
from kappa_fast.sources.files import DataFile, Region


@pytest.fixture
def single(tmp_path) -> Path:
    return save_single(tmp_path)


@pytest.fixture
def sharded(tmp_path) -> Path:
    return save_sharded(tmp_path)


def test_a_file_a_directory_a_sharded_directory_and_its_index_are_all_the_model(single, sharded, tmp_path):
    assert same_as_in_memory(single)  # model.safetensors, then the index
    (tmp_path / "model.safetensors").unlink()
    assert same_as_in_memory(sharded)
    assert same_as_in_memory(str(sharded))
    assert same_as_in_memory(sharded / INDEX)
    (tmp_path / INDEX).unlink()
    assert same_as_in_memory(sharded)
    with pytest.warns(UserWarning, match=r"is shard 2 of 2: only its tensors are ranked.*give the directory"):
        assert matrices(sharded / SECOND).keys() < matrices(sharded).keys()


def test_the_warning_of_a_single_shard_points_to_who_asked_for_it(sharded):
    with pytest.warns(UserWarning, match="is shard 2 of 2") as caught:
        kappa_fast.rank(sharded / SECOND, min_dim=2, progress=False)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="is shard 2 of 2") as caught:
        kappa_fast.plan(sharded / SECOND, min_dim=2, measure=False)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_file_may_have_any_name_that_ends_in_safetensors(tmp_path):
    save_file(MODEL, tmp_path / "weights.safetensors")
    assert same_as_in_memory(tmp_path / "weights.safetensors")
    assert same_as_in_memory(tmp_path)


def test_layers_come_by_number(single):
    names = [m.name for m in open_source(single, Filters(include="up")).matrices]
    assert names == [f"model.layers.{i}.up.weight" for i in (0, 2, 10)]


def test_a_checkpoint_says_what_it_is(single, sharded):
    (single / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    found = open_source(single / "model.safetensors", Filters())
    assert not found.in_memory
    assert {m.device for m in found.matrices} == {torch.device("cpu")}
    metadata = dict(found.metadata)
    assert (metadata["kind"], metadata["model_type"]) == ("file", "tiny")
    assert (metadata["path"], metadata["files"]) == (str(single / "model.safetensors"), ["model.safetensors"])
    (single / "model.safetensors").unlink()
    again = open_source(sharded, Filters()).metadata
    assert (again["kind"], again["files"]) == ("directory", [FIRST, SECOND])
    assert again["fingerprint"] == metadata["fingerprint"]


@pytest.fixture
def ranges(monkeypatch) -> list[tuple[int, int]]:
    """Offset and length of everything that is read from files of weights."""
    found: list[tuple[int, int]] = []

    def read(self: DataFile, offset: int, out: torch.Tensor, inner=DataFile.read) -> None:
        found.append((offset, out.nbytes))
        inner(self, offset, out)

    monkeypatch.setattr(DataFile, "read", read)
    return found


def test_opening_reads_headers_only_and_loading_one_expert_only_that_expert(single, ranges):
    found = matrices(single)
    length = int.from_bytes((single / "model.safetensors").read_bytes()[:8], "little")
    assert ranges == [(0, 8), (8, length)]
    ranges.clear()
    expert = found["model.layers.0.mlp.experts.down_proj[2]"].load()
    assert torch.equal(expert, MODEL["model.layers.0.mlp.experts.down_proj"][2])
    ((_, size),) = ranges
    assert size == expert.nbytes


FUSED = weights(
    model__layers__0__mlp__experts__gate_up_proj=(3, 32, 36),
    model__layers__0__mlp__experts__down_proj=(3, 18, 32),
)


@pytest.mark.parametrize(
    ("model_type", "part", "columns"),
    [("llama4", "gate", slice(0, 18)), ("llama4", "up", slice(18, 36)), ("gpt_oss", "up", slice(1, 36, 2))],
)
def test_some_columns_of_an_expert_are_read_a_few_rows_at_a_time(
    model_type, part, columns, tmp_path, ranges, monkeypatch
):
    monkeypatch.setattr(files, "ROWS", 4 * 36 * 5)  # five rows
    save_file(FUSED, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    found = matrices(tmp_path)[f"model.layers.0.mlp.experts.gate_up_proj[1].{part}"]
    ranges.clear()
    weight = found.load()
    assert weight.is_contiguous()
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert torch.equal(weight, FUSED["model.layers.0.mlp.experts.gate_up_proj"][1][:, columns])
    assert [size for _, size in ranges] == [720] * 6 + [288]


@pytest.mark.parametrize(
    "index",
    [
        *((), (2,), (0, slice(1, 4)), (1, slice(None), slice(2, 5)), (slice(None), 1), (slice(1, 3),)),
        *((slice(0, 4, 2),), (slice(1, 4, 2), slice(None), slice(0, 5, 3)), (3, 2), (3, slice(1, 5, 3))),
        *((slice(None), slice(None)), (slice(2, 2),), (1, slice(4, 4), slice(None))),
    ],
)
@pytest.mark.parametrize("rows", [1, 100, 1 << 20])
def test_every_index_reads_what_it_takes_from_the_tensor(index, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROWS", rows)
    tensor = torch.arange(4 * 5 * 6, dtype=torch.int16).reshape(4, 5, 6)
    (tmp_path / "raw").write_bytes(b"before" + tensor.numpy().tobytes() + b"after")
    region = Region(DataFile(tmp_path / "raw"), "raw", 6, tensor.shape, tensor.dtype)
    taken = region.take(index)
    assert taken.dtype == tensor.dtype
    assert torch.equal(taken, tensor[index])
    offset, size = region.span(index)
    assert offset >= 6
    assert taken.nbytes <= size
    assert offset + size <= 6 + tensor.nbytes


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_prefetching_advises_the_bytes_of_a_matrix_in_steps_and_reads_none(single, ranges, monkeypatch):
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, size, advice: advised.append((offset, size)))
    monkeypatch.setattr(files, "ADVICE", 500)
    found = matrices(single)["model.layers.0.mlp.experts.down_proj[1]"]
    ranges.clear()
    found.prefetch()
    assert ranges == []
    found.load()
    ((start, size),) = ranges
    assert advised == [(start, 500), (start + 500, 500), (start + 1000, size - 1000)]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_prefetching_quantized_weights_advises_codes_and_scales(single, ranges, monkeypatch):
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, size, advice: advised.append((offset, size)))
    codes, scale = torch.randn(3, 32, 32).to(torch.float8_e4m3fn), torch.rand(3, 1, 1)
    save_file({"experts.w.weight": codes, "experts.w.weight_scale_inv": scale}, single / "model.safetensors")
    found = matrices(single)["experts.w.weight[2]"]
    ranges.clear()
    found.load()
    found.prefetch()
    assert advised == ranges
    assert sorted(size for _, size in advised) == [4, 32 * 32]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_prefetching_never_fails(single, monkeypatch):
    found = matrices(single)["model.layers.0.up.weight"]

    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    found.prefetch()
    monkeypatch.delattr(os, "posix_fadvise")  # as on macOS
    found.prefetch()
    (single / "model.safetensors").unlink()
    found.prefetch()


def test_matrices_know_their_order_on_the_disk(single, sharded):
    assert all(m.prefetch is None and m.location is None for m in open_source(MODEL, EVERYTHING).matrices)
    (single / "model.safetensors").unlink()
    found = open_source(sharded, EVERYTHING).matrices
    order = sorted(found, key=lambda m: m.location)
    assert [m.location[0] for m in order] == sorted(m.location[0] for m in found)
    # as the library safetensors lays them out, by name
    assert [m.name for m in order if m.name.endswith("up.weight")] == [
        f"model.layers.{i}.up.weight" for i in (0, 10, 2)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_dtype_is_loaded_as_stored(dtype, tmp_path):
    weight = torch.randn(16, 16).to(dtype)
    save_file({"w": weight}, tmp_path / "m.safetensors")
    (found,) = matrices(tmp_path).values()
    assert found.dtype == found.load().dtype == dtype
    assert torch.equal(found.load().view(torch.uint8), weight.view(torch.uint8))


def test_codes_and_scales_of_a_checkpoint_are_skipped(tmp_path):
    stored = {"w.qweight": torch.zeros(16, 16, dtype=torch.int32), "w.scales": torch.ones(16, 16)}
    save_file(stored | {"v.weight": torch.randn(16, 16)}, tmp_path / "m.safetensors")
    assert set(matrices(tmp_path)) == {"v.weight"}
    assert set(reasons(tmp_path)) == set(stored)
    assert open_source(tmp_path, Filters()).num_parameters == 512


def test_a_dtype_that_torch_lacks_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setitem(DTYPES, "F16", "float4_of_tomorrow")
    save_file({"w": torch.ones(16, 16).half()}, tmp_path / "m.safetensors")
    assert reasons(tmp_path) == {"w": "stored in a dtype that torch does not have"}
