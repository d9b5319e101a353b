"""Checkpoints: what is read and when, and a clear error for everything that is not one."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import EVERYTHING, matrices, reasons, weights
from safetensors.torch import save_file

from kappa_fast.errors import OptionError, SourceError, SourceNotFoundError
from kappa_fast.sources import Filters, open_source
from kappa_fast.sources.checkpoint import DTYPES, Shard

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MODEL = weights(
    model__layers__0__mlp__experts__down_proj=(3, 18, 16),
    model__layers__0__up__weight=(20, 16),
    model__layers__10__up__weight=(20, 16),
    model__layers__2__up__weight=(20, 16),
    model__embed_tokens__weight=(24, 16),
    model__norm__weight=(16,),
)


def index(folder: Path, weight_map: object, name: str = INDEX) -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def single(tmp_path) -> Path:
    save_file(MODEL, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path) -> Path:
    """MODEL in two shards and an index."""
    names = sorted(MODEL)
    halves = {FIRST: names[:3], SECOND: names[3:]}
    for file, members in halves.items():
        save_file({name: MODEL[name] for name in members}, tmp_path / file)
    return index(tmp_path, {name: file for file, members in halves.items() for name in members})


def refused(source: object, error: type[Exception] = SourceError) -> str:
    """The message of the error that opening the source raises."""
    with pytest.raises(error) as raised:
        open_source(source, Filters())
    assert type(raised.value) is error
    return str(raised.value)


def same_as_in_memory(source: object) -> bool:
    live, stored = open_source(MODEL, Filters()), open_source(source, Filters())
    values = {m.key: m.load() for m in live.matrices}
    return (
        {(m.key, str(m.index), m.shape, m.dtype) for m in live.matrices}
        == {(m.key, str(m.index), m.shape, m.dtype) for m in stored.matrices}
        and all(torch.equal(values[m.key], m.load()) for m in stored.matrices)
        and set(live.skipped) == set(stored.skipped)
        and live.num_parameters == stored.num_parameters
    )


def test_a_file_a_directory_a_sharded_directory_and_its_index_are_all_the_model(single, sharded, tmp_path):
    assert same_as_in_memory(single)  # model.safetensors, then the index
    (tmp_path / "model.safetensors").unlink()
    assert same_as_in_memory(sharded)
    assert same_as_in_memory(str(sharded))
    assert same_as_in_memory(sharded / INDEX)
    (tmp_path / INDEX).unlink()
    assert same_as_in_memory(sharded)
    assert matrices(sharded / SECOND).keys() < matrices(sharded).keys()


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


class Recorder:
    """An open file that notes which parts of its tensors are asked for."""

    def __init__(self, handle: object, asked: list[object]) -> None:
        self._handle, self._asked = handle, asked

    def keys(self) -> list[str]:
        return list(self._handle.keys())

    def get_slice(self, name: str) -> Recorder:
        return Recorder(self._handle.get_slice(name), self._asked)

    def __getattr__(self, name: str) -> object:
        return getattr(self._handle, name)

    def __getitem__(self, part: object) -> torch.Tensor:
        self._asked.append(part)
        return self._handle[part]


def test_opening_reads_headers_only_and_loading_one_expert_only_that_expert(single, monkeypatch):
    asked: list[object] = []
    monkeypatch.setattr(Shard, "_open", lambda self, inner=Shard._open: Recorder(inner(self), asked))
    found = matrices(single)
    assert asked == []
    expert = found["model.layers.0.mlp.experts.down_proj[2]"].load()
    assert asked == [slice(2, 3)]
    assert torch.equal(expert, MODEL["model.layers.0.mlp.experts.down_proj"][2])


def test_the_map_is_made_anew_after_so_many_bytes(single, monkeypatch):
    shard = Shard(single / "model.safetensors")
    (stored,) = [t for t in shard.tensors(None) if "layers.2" in t.name]
    assert shard._handle is None
    monkeypatch.setattr(Shard, "MAPPED", 2000)
    first = stored.take(())
    assert shard._handle is not None
    second = stored.take(())
    assert shard._handle is None
    assert torch.equal(first, second)
    assert torch.equal(first, stored.take(()))


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


# Bad input


def test_a_path_that_does_not_exist_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    assert refused(missing, SourceNotFoundError).startswith(f"{missing}: no such file or directory")
    with pytest.raises(FileNotFoundError):
        open_source(missing, Filters())


def test_a_hub_id_is_told_from_a_typing_error():
    message = refused("org/model-7B", SourceNotFoundError)
    assert "org/model-7B" in message
    assert "ids are not resolved yet, download the model and give its directory" in message


def test_an_empty_path_is_not_the_current_directory():
    with pytest.raises(OptionError, match="the path of the checkpoint is empty"):
        open_source("", Filters())


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 8, b"\x10" + b"\0" * 7 + b"{}", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_a_file_that_is_no_safetensors_is_named(content, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    message = refused(file)
    assert message.startswith(f"{file} is no readable safetensors file (")
    assert message.endswith("truncated or damaged, download it again")
    assert str(file) in refused(tmp_path)


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path):
    entry = b'"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [%d, %d]}'
    header = b"{" + entry % (0, 16) + b"," + entry % (16, 32) + b"}"
    file = tmp_path / "twice.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    assert refused(file).startswith(f"{file} is no readable safetensors file")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_named_wherever_it_ends(share, single):
    whole = (single / "model.safetensors").read_bytes()
    file = single / "cut.safetensors"
    file.write_bytes(whole[: int(share * len(whole))])
    assert refused(file).startswith(f"{file} is no readable safetensors file")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 700), byte=st.integers(0, 255))
def test_a_header_with_a_wrong_byte_is_refused_or_gives_tensors_of_the_shapes_it_states(position, byte, single):
    whole = bytearray((single / "model.safetensors").read_bytes())
    whole[position] = byte
    file = single / "wrong.safetensors"
    file.write_bytes(whole)
    try:
        found = open_source(file, EVERYTHING)
    except SourceError as error:
        assert str(file) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert all(tuple(m.load().shape) == m.shape for m in found.matrices)


@pytest.mark.parametrize(
    "document",
    [
        b"{",
        b"[]",
        b"{}",
        b"null",
        b'{"weight_map": 3}',
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"w": 3}}',
        b'{"weight_map": {"w": null}}',
        b"\xff\xfe",
        b"[" * 100000,
    ],
)
def test_an_index_that_is_none_is_named(document, sharded):
    (sharded / INDEX).write_bytes(document)
    assert refused(sharded).startswith(f"{sharded / INDEX} is no index of a sharded checkpoint")


def test_an_index_that_lists_nothing_is_refused(tmp_path):
    assert refused(index(tmp_path, {})) == f"{tmp_path / INDEX} lists no tensors: download it again"


def test_missing_shards_are_named(sharded):
    (sharded / SECOND).unlink()
    message = refused(sharded, SourceNotFoundError)
    assert message == f"{sharded / INDEX} names {SECOND}, which is not there: finish the download"
    (sharded / FIRST).unlink()
    assert f"names {FIRST} and 1 more, which" in refused(sharded, SourceNotFoundError)


def test_a_missing_shard_is_noticed_without_an_index_too(sharded):
    (sharded / INDEX).unlink()
    (sharded / FIRST).unlink()
    message = refused(sharded, SourceNotFoundError)
    assert message.startswith(f"{sharded} has 1 of 2 shards model-*.safetensors, number 1 is not there")


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "/elsewhere/outside.safetensors",
        "C:\\outside.safetensors",
        "C:outside.safetensors",
        "\\\\host\\outside.safetensors",
        "..\\outside.safetensors",
        "",
        ".",
        "model.txt",
        "a\0.safetensors",
        "\ud800.safetensors",
    ],
)
def test_an_index_cannot_reach_outside_of_its_directory(shard, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(MODEL, tmp_path / "outside.safetensors")
    message = refused(index(folder, dict.fromkeys(MODEL, shard)))
    assert message.startswith(f"{folder / INDEX} names the shard {shard!r}, which is no .safetensors file inside")


def test_nor_by_a_link(tmp_path):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    save_file(MODEL, elsewhere / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(elsewhere / "outside.safetensors")
    (folder / "sub").symlink_to(elsewhere)
    for shard in ("link.safetensors", "sub/outside.safetensors"):
        assert f"names the shard {shard!r}" in refused(index(folder, dict.fromkeys(MODEL, shard)))


def test_links_inside_of_the_directory_and_to_the_directory_itself_are_fine(sharded, tmp_path):
    (sharded / FIRST).rename(sharded / "first.safetensors")
    (sharded / FIRST).symlink_to("first.safetensors")
    (tmp_path / "linked").symlink_to(sharded)
    assert same_as_in_memory(tmp_path / "linked")


@pytest.mark.parametrize("shared", [False, True])
def test_the_snapshot_of_a_hub_cache_links_to_its_blobs(shared, tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(MODEL, tmp_path / "whole.safetensors")
    blob = blobs / "1234"
    if shared:  # files that several repositories have are kept once for the whole cache
        blob = tmp_path / "hub" / "blobs" / "12" / "1234"
        blob.parent.mkdir(parents=True)
        (blobs / "1234").symlink_to("../../blobs/12/1234")
    (tmp_path / "whole.safetensors").rename(blob)
    (snapshot / FIRST).symlink_to("../../blobs/1234")
    assert same_as_in_memory(index(snapshot, dict.fromkeys(MODEL, FIRST)))


def test_an_index_that_lists_a_tensor_its_shard_lacks_is_refused(sharded):
    listed = json.loads((sharded / INDEX).read_text())["weight_map"]
    message = refused(index(sharded, listed | {"extra.weight": SECOND}))
    assert (
        message == f"the index of {sharded} says that 'extra.weight' is in {SECOND}, but it is not: download it again"
    )


def test_a_tensor_in_two_shards_is_refused(sharded):
    name = sorted(MODEL)[0]
    save_file({n: MODEL[n] for n in [name, *sorted(MODEL)[3:]]}, sharded / SECOND)
    expected = f"{name!r} is in both {sharded / FIRST} and {sharded / SECOND}: remove the stale file"
    assert refused(sharded) == expected
    (sharded / INDEX).unlink()
    assert refused(sharded) == expected


def test_a_tensor_that_the_index_does_not_list_is_skipped_with_the_reason(sharded):
    listed = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = "model.layers.10.up.weight"
    file = listed.pop(name)
    assert reasons(index(sharded, listed)) == {name: f"in {file}, but not listed in the index"}


def test_of_several_indices_one_must_be_chosen(sharded):
    listed = json.loads((sharded / INDEX).read_text())["weight_map"]
    (sharded / INDEX).unlink()
    for name in ("a.safetensors.index.json", "b.safetensors.index.json"):
        index(sharded, listed, name)
    assert "several indices (a.safetensors.index.json, b.safetensors.index.json)" in refused(sharded)
    assert same_as_in_memory(sharded / "b.safetensors.index.json")
    (sharded / "a.safetensors.index.json").unlink()
    assert same_as_in_memory(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "it's $(a) model.pth"])
def test_pickles_are_refused_with_a_command_that_converts_them(name, tmp_path):
    file = tmp_path / name
    torch.save({name: t.t() if t.ndim == 2 else t for name, t in MODEL.items()}, file)
    message = refused(file)
    assert message.startswith(f"{file} is pickled, which can run code when it is read; it is refused. Convert it: ")
    assert refused(tmp_path) == message
    assert "\n" not in message
    command = shlex.split(message.partition("Convert it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=120)
    found = matrices(tmp_path)
    assert torch.equal(found["model.layers.0.up.weight"].load(), MODEL["model.layers.0.up.weight"].t())


def test_an_index_that_names_pickles_is_refused_in_the_same_way(tmp_path):
    message = refused(index(tmp_path, {"w": "pytorch_model.bin"}))
    assert message.startswith(f"{tmp_path / 'pytorch_model.bin'} is pickled")


@pytest.mark.parametrize("name", ["model.gguf", "notes.txt", "safetensors"])
def test_a_file_of_another_kind_is_no_model(name, tmp_path):
    (tmp_path / name).write_bytes(b"text")
    assert (
        refused(tmp_path / name) == f"{tmp_path / name} is no .safetensors file: give one, or the directory of a model"
    )


def test_a_directory_without_weights_is_no_model_and_one_below_it_is_pointed_at(tmp_path):
    assert refused(tmp_path) == f"{tmp_path} holds no .safetensors file: give the directory of a model"
    (tmp_path / "unet").mkdir()
    save_file(MODEL, tmp_path / "unet" / "diffusion.safetensors")
    assert refused(tmp_path) == f"{tmp_path} holds no .safetensors file itself, but unet does: give that directory"


def test_a_directory_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def forbid(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbid)
    assert refused(tmp_path) == f"{tmp_path} cannot be read (Permission denied): ask for the right to, or copy it"


def test_a_directory_called_like_a_file_is_searched_as_a_directory(tmp_path):
    folder = tmp_path / "model.safetensors"
    folder.mkdir()
    assert refused(folder) == f"{folder} holds no .safetensors file: give the directory of a model"
    assert refused(tmp_path) == f"{tmp_path} holds no .safetensors file: give the directory of a model"


def test_a_model_without_matrices_is_refused_by_its_path(tmp_path):
    save_file({"norm": torch.ones(4)}, tmp_path / "m.safetensors")
    assert refused(tmp_path).startswith(f"{tmp_path} holds no parameter with two or more dimensions")


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_a_config_that_cannot_be_read_is_named(content, single):
    (single / "config.json").write_bytes(content)
    assert refused(single).startswith(f"{single / 'config.json'} cannot be read (")


@pytest.mark.parametrize("content", [b"[]", b"3", b'{"model_type": 3}', b'{"text_config": 3}', b"{}"])
def test_a_config_that_says_nothing_is_no_error(content, single):
    (single / "config.json").write_bytes(content)
    assert same_as_in_memory(single)


@pytest.mark.parametrize("change", ["shorter", "gone", "replaced"])
def test_a_file_that_changes_after_it_was_opened_is_an_error_that_names_the_tensor(change, single):
    file = single / "model.safetensors"
    found = matrices(single)["model.layers.0.up.weight"]
    assert torch.equal(found.load(), MODEL[found.name])
    if change == "shorter":
        os.truncate(file, 200)
    elif change == "gone":
        file.unlink()
    else:
        save_file({"other": torch.ones(2, 2)}, file)
    with pytest.raises(
        SourceError, match=f"'{found.name}' cannot be read from .*model.safetensors \\(.*\\): check the file"
    ):
        found.load()
