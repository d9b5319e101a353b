"""A part of a model that is missing is an error, however its files are called; so is what only stands for a file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from models import matrices, weights
from safetensors.torch import save_file

from kappa_fast.errors import SourceError, SourceNotFoundError
from kappa_fast.sources import Filters, open_source

SPELLINGS = [
    "model-{:05d}-of-{:05d}.safetensors",
    "model-{:05d}-of-{:05d}.fp16.safetensors",
    "model.fp16-{:05d}-of-{:05d}.safetensors",
    "model-{:05d}-of-{:05d}-bf16.safetensors",
    "model_{:05d}_of_{:05d}.safetensors",
    "model.{:05d}-of-{:05d}.safetensors",
    "model_part_{}_of_{}.safetensors",
    "model-{}of{}.safetensors",
    "model-{:05d}-OF-{:05d}.safetensors",
    "{:05d}-of-{:05d}.safetensors",
]


def shards(directory: Path, spelling: str, first: int = 1, count: int = 3) -> list[Path]:
    files = [directory / spelling.format(first + i, count) for i in range(count)]
    for i, file in enumerate(files):
        save_file(weights(**{f"layers__{i}__weight": (20, 30)}), file)
    return files


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("first", [0, 1])
def test_a_missing_number_is_an_error_in_every_spelling(spelling, first, tmp_path):
    files = shards(tmp_path, spelling, first)
    assert set(matrices(tmp_path)) == {f"layers.{i}.weight" for i in range(3)}
    for lost in (files[1], files[2]):
        content = lost.read_bytes()
        lost.unlink()
        with pytest.raises(SourceNotFoundError, match=r"has 2 of 3 shards .*is missing: finish the download"):
            open_source(tmp_path, Filters())
        lost.write_bytes(content)


def test_a_gap_shows_where_names_do_not_say_how_many_there_are(tmp_path):
    files = shards(tmp_path, "model-{:05d}.safetensors")
    assert len(matrices(tmp_path)) == 3
    files[1].unlink()
    with pytest.raises(SourceNotFoundError, match="number 2 is missing"):
        open_source(tmp_path, Filters())


@pytest.mark.parametrize(
    "index",
    ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json", "unet.safetensors.index.json"],
)
def test_an_index_under_another_name_counts(index, tmp_path):
    save_file(weights(a__weight=(20, 30)), tmp_path / "x.safetensors")
    mapping = {"a.weight": "x.safetensors"}
    (tmp_path / index).write_text(json.dumps({"weight_map": mapping}))
    for path in (tmp_path, tmp_path / index):
        assert set(matrices(path)) == {"a.weight"}
    (tmp_path / index).write_text(json.dumps({"weight_map": mapping | {"b.weight": "y.safetensors"}}))
    with pytest.raises(SourceNotFoundError, match=r"names files that are missing, y\.safetensors"):
        open_source(tmp_path, Filters())


@pytest.mark.parametrize("index", ["model.index.json", "index.json", "MODEL.SAFETENSORS.INDEX.JSON"])
def test_an_index_is_one_by_what_it_lists(index, tmp_path):
    save_file(weights(a__weight=(20, 30)), tmp_path / "x.safetensors")
    (tmp_path / "model_index.json").write_text(json.dumps({"weight_map": {"of": "something else"}}))
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a.weight": "x.safetensors"}}))
    assert set(matrices(tmp_path)) == {"a.weight"}
    (tmp_path / index).write_text(
        json.dumps({"weight_map": {"a.weight": "x.safetensors", "b.weight": "y.safetensors"}})
    )
    with pytest.raises(SourceNotFoundError, match=r"names files that are missing, y\.safetensors"):
        open_source(tmp_path, Filters())


@pytest.mark.parametrize("spelling", ["model-{}", "model_part_{}", "part{}", "rank{}"])
def test_a_gap_shows_with_single_digits_too(spelling, tmp_path):
    files = shards(tmp_path, spelling + ".safetensors")
    assert len(matrices(tmp_path)) == 3
    files[1].unlink()
    with pytest.raises(SourceNotFoundError, match="number 2 is missing"):
        open_source(tmp_path, Filters())
    assert len(matrices(files[0])) == 1  # the advice: the path of one file


@pytest.mark.parametrize("ending", [".incomplete", ".part", ".crdownload", ".aria2"])
def test_a_file_that_a_program_has_not_finished_is_missing(ending, tmp_path):
    save_file(weights(a__weight=(20, 30)), tmp_path / "a.safetensors")
    name = "a.safetensors" if ending == ".aria2" else "b.safetensors"
    (tmp_path / (name + ending)).write_bytes(b"...")
    with pytest.raises(SourceNotFoundError, match=rf"so {name} is not complete: finish the download, or remove"):
        open_source(tmp_path, Filters())
    (tmp_path / (name + ending)).unlink()
    assert set(matrices(tmp_path)) == {"a.weight"}


POINTERS = {
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n": "a pointer of Git LFS.*git lfs pull",
    "/annex/objects/SHA256E-s5--0.safetensors\n": "a pointer of git-annex",
    "<!DOCTYPE html><html><body>Sign in</body></html>": "a web page",
}


@pytest.mark.parametrize("content", POINTERS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json", "model.gguf"])
def test_what_stands_in_place_of_a_file_is_named(content, name, tmp_path):
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    elif name != "model.safetensors":
        save_file(weights(a__weight=(20, 30)), tmp_path / "model.safetensors")
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=POINTERS[content]):
        open_source(tmp_path / name if name.endswith(".gguf") else tmp_path, Filters())


def test_a_header_above_the_limit_is_not_called_damaged(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 100_000_008) + b'{"a":{')
        file.truncate(100_000_032)
    with pytest.raises(SourceError, match=r"header of 100000008 bytes, and .* reads headers of up to 100000000: save"):
        open_source(tmp_path, Filters())


def parts(directory: Path, names: list[str], total: int = 2) -> list[Path]:
    """GGUF files that say in their headers which part of ``total`` they are."""
    gguf = pytest.importorskip("gguf")
    files = []
    for i, name in enumerate(names):
        writer = gguf.GGUFWriter(directory / name, "llama")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", total)
        writer.add_int32("split.tensors.count", total)
        writer.add_tensor(f"blk.{i}.ffn_up.weight", torch.randn(20, 32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(directory / name)
    return files


def test_the_header_of_gguf_tells_what_its_name_does_not(tmp_path):
    (renamed,) = parts(tmp_path, ["model.gguf"])
    with pytest.raises(SourceNotFoundError, match=r"it is part 1 of 2, but only 1 of the parts were found: put all"):
        open_source(renamed, Filters())
    renamed.unlink()
    first, second = parts(tmp_path, ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])
    assert set(matrices(tmp_path)) == {"blk.0.ffn_up.weight", "blk.1.ffn_up.weight"}
    swapped = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(swapped)
    with pytest.raises(
        SourceError, match=r"say that they are parts \[2, 1\], which differs from the order of their names"
    ):
        open_source(tmp_path, Filters())


def test_parts_of_gguf_that_hold_fewer_tensors_than_their_header_says(tmp_path):
    parts(tmp_path, ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    parts(tmp_path, ["m-00001-of-00001.gguf"], 1)
    with pytest.raises(SourceNotFoundError, match="is one of 2 parts"):
        open_source(tmp_path / "m-00001-of-00002.gguf", Filters())
