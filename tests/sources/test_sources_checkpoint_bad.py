"""Files and directories that are no checkpoints, or damaged ones: a clear error for each."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import FIRST, INDEX, MODEL, SECOND, index, refused, same_as_in_memory, save_sharded, save_single
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import EVERYTHING, matrices, reasons
from safetensors.torch import save_file

from kappa_fast.errors import OptionError, SourceError, SourceNotFoundError
from kappa_fast.sources import Filters, files, open_source


@pytest.fixture
def single(tmp_path) -> Path:
    return save_single(tmp_path)


@pytest.fixture
def sharded(tmp_path) -> Path:
    return save_sharded(tmp_path)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    assert refused(missing, SourceNotFoundError).startswith(f"{missing}: no such file or directory")
    with pytest.raises(FileNotFoundError):
        open_source(missing, Filters())


def test_a_word_that_is_neither_path_nor_id_says_what_ids_look_like():
    message = refused("model-7B", SourceNotFoundError)
    assert message.startswith("model-7B: no such file or directory; a model on the hub has an id such as org/name")


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
    assert message.startswith(f"{file} is not a readable safetensors file (")
    assert message.endswith("truncated or damaged, download it again")
    assert str(file) in refused(tmp_path)


def written(file: Path, header: bytes, values: bytes = b"", length: int | None = None) -> Path:
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + values)
    return file


@pytest.mark.parametrize("length", [1 << 60, (1 << 63) - 1, (1 << 64) - 1, 100_000_001])
def test_a_header_that_claims_to_be_enormous_is_not_believed(length, tmp_path):
    file = written(tmp_path / "bomb.safetensors", b"{}", bytes(100), length)
    assert refused(file).startswith(f"{file} is not a readable safetensors file (")


def test_a_header_of_a_hundred_megabytes_of_brackets_is_refused_at_once(tmp_path):
    file = written(tmp_path / "bomb.safetensors", b"[" * 99_000_000)
    assert refused(file).startswith(f"{file} is not a readable safetensors file (")


@pytest.mark.parametrize(
    ("second", "size"),
    [((8, 24), 32), ((0, 16), 16), ((20, 36), 36), ((16, 31), 31), ((32, 16), 32), ((16, 1 << 62), 32)],
    ids=["overlap", "same", "gap", "short", "backwards", "beyond"],
)
def test_ranges_that_overlap_leave_gaps_or_do_not_fit_are_refused(second, size, tmp_path):
    entry = '"%s": {"dtype": "F32", "shape": [2, 2], "data_offsets": [%d, %d]}'
    header = "{" + entry % ("v", 0, 16) + "," + entry % ("w", *second) + "}"
    file = written(tmp_path / "ranges.safetensors", header.encode(), bytes(size))
    assert refused(file).startswith(f"{file} is not a readable safetensors file (")


def test_a_name_that_is_no_text_is_refused(tmp_path):
    header = b'{"\xff\xfe": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}'
    file = written(tmp_path / "name.safetensors", header, bytes(16))
    assert refused(file).startswith(f"{file} is not a readable safetensors file (")


def test_names_may_be_any_text(tmp_path):
    names = ["größe", "重み.0", "a b\n", "\U0001f600", "'\"", "__metadata", "x" * 1000]
    save_file({name: torch.full((2, 2), float(i)) for i, name in enumerate(names)}, tmp_path / "m.safetensors")
    found = matrices(tmp_path)
    assert {name: float(found[name].load()[0, 0]) for name in names} == {name: float(i) for i, name in enumerate(names)}


def test_tensors_without_values_are_skipped(tmp_path):
    stored = {"none": torch.zeros(0, 16), "flat": torch.zeros(16, 0), "point": torch.ones(()), "w": torch.randn(16, 16)}
    save_file(stored, tmp_path / "m.safetensors")
    assert set(matrices(tmp_path)) == {"w"}
    assert reasons(tmp_path) == {"none": "empty", "flat": "empty"}


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path):
    entry = b'"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [%d, %d]}'
    header = b"{" + entry % (0, 16) + b"," + entry % (16, 32) + b"}"
    file = tmp_path / "twice.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    assert refused(file).startswith(f"{file} is not a readable safetensors file")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_named_wherever_it_ends(share, single):
    whole = (single / "model.safetensors").read_bytes()
    file = single / "cut.safetensors"
    file.write_bytes(whole[: int(share * len(whole))])
    assert refused(file).startswith(f"{file} is not a readable safetensors file")


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
    assert refused(sharded).startswith(f"{sharded / INDEX} is not an index of a sharded checkpoint")


def test_an_index_that_lists_nothing_is_refused(tmp_path):
    assert refused(index(tmp_path, {})) == f"{tmp_path / INDEX} lists no tensors: download it again"


def test_missing_shards_are_named(sharded):
    (sharded / SECOND).unlink()
    message = refused(sharded, SourceNotFoundError)
    assert message == f"{sharded / INDEX} names files that are missing, {SECOND}: finish the download"
    (sharded / FIRST).unlink()
    assert f"names files that are missing, {FIRST} and 1 more:" in refused(sharded, SourceNotFoundError)


def test_a_missing_shard_is_noticed_without_an_index_too(sharded):
    (sharded / INDEX).unlink()
    (sharded / FIRST).unlink()
    message = refused(sharded, SourceNotFoundError)
    assert message.startswith(f"{sharded} has 1 of 2 shards model-*.safetensors, number 1 is missing")


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
    assert message.startswith(f"{folder / INDEX} names the shard {shard!r}, which is not a .safetensors file inside")


def test_nor_by_a_link(tmp_path):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    save_file(MODEL, elsewhere / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(elsewhere / "outside.safetensors")
    (folder / "sub").symlink_to(elsewhere)
    for shard in ("link.safetensors", "sub/outside.safetensors"):
        assert f"names the shard {shard!r}" in refused(index(folder, dict.fromkeys(MODEL, shard)))


def test_links_that_lead_nowhere_or_in_circles_are_refused(sharded, tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    assert refused(tmp_path / "circle", SourceNotFoundError) == (
        f"{tmp_path / 'circle'} is a broken link: give the directory of the model itself"
    )
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(SECOND)
    message = refused(sharded) if sys.version_info < (3, 13) else refused(sharded, SourceNotFoundError)
    assert message.startswith(f"{sharded / INDEX} names ")
    assert SECOND in message


def test_pipes_and_directories_that_are_called_like_files_are_no_weights(single):
    os.mkfifo(single / "pipe.safetensors")
    message = refused(single / "pipe.safetensors")
    assert message == f"{single / 'pipe.safetensors'} is not a .safetensors file: give one, or the directory of a model"
    os.mkfifo(single / INDEX)
    assert "is not a .safetensors file" in refused(single / INDEX)
    (single / "folder.safetensors").mkdir()
    assert same_as_in_memory(single)
    (single / INDEX).unlink()
    message = refused(index(single, {"w": "folder.safetensors"}), SourceNotFoundError)
    assert "names files that are missing, folder.safetensors" in message
    assert "names files that are missing, pipe.safetensors" in refused(
        index(single, {"w": "pipe.safetensors"}), SourceNotFoundError
    )


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
    expected = (
        f"{name!r} is in both {sharded / FIRST} and {sharded / SECOND}: remove the stale file; or, if several processes"
    )
    assert refused(sharded).startswith(expected)
    (sharded / INDEX).unlink()
    assert refused(sharded).startswith(expected)


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
    assert message.startswith(f"{file} is pickled and is not read, because a pickle can run code. Convert it: ")
    assert refused(tmp_path) == message
    assert "\n" not in message
    command = shlex.split(message.partition("Convert it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=120)
    found = matrices(tmp_path)
    assert torch.equal(found["model.layers.0.up.weight"].load(), MODEL["model.layers.0.up.weight"].t())


def test_an_index_that_names_pickles_is_refused_in_the_same_way(tmp_path):
    message = refused(index(tmp_path, {"w": "pytorch_model.bin"}))
    assert message.startswith(f"{tmp_path / 'pytorch_model.bin'} is pickled")


@pytest.mark.parametrize("name", ["notes.txt", "safetensors"])
def test_a_file_of_another_kind_is_no_model(name, tmp_path):
    (tmp_path / name).write_bytes(b"text")
    assert (
        refused(tmp_path / name)
        == f"{tmp_path / name} is not a .safetensors file: give one, or the directory of a model"
    )


@pytest.mark.parametrize("name", ["MODEL.GGUF", "model.Q4_K.gguf.part1of2"])
def test_a_gguf_file_under_another_name_is_told_which(name, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / name):
        assert "does not end with .gguf: rename the file, or if it was split into parts, join these" in refused(path)


def test_a_directory_without_weights_is_no_model_and_one_below_it_is_pointed_at(tmp_path):
    assert refused(tmp_path) == f"{tmp_path} has no .safetensors file: give the directory of a model"
    (tmp_path / "unet").mkdir()
    save_file(MODEL, tmp_path / "unet" / "diffusion.safetensors")
    assert refused(tmp_path) == f"{tmp_path} has no .safetensors file itself, but unet has: give that directory"


def test_a_directory_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def forbid(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbid)
    assert refused(tmp_path) == f"{tmp_path} cannot be read (Permission denied): change its permissions, or copy it"


def test_a_directory_called_like_a_file_is_searched_as_a_directory(tmp_path):
    folder = tmp_path / "model.safetensors"
    folder.mkdir()
    assert refused(folder) == f"{folder} has no .safetensors file: give the directory of a model"
    assert refused(tmp_path) == f"{tmp_path} has no .safetensors file: give the directory of a model"


def test_a_model_without_matrices_is_refused_by_its_path(tmp_path):
    save_file({"norm": torch.ones(4)}, tmp_path / "m.safetensors")
    assert refused(tmp_path).startswith(f"{tmp_path} has no parameter with two or more dimensions")


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


@pytest.mark.parametrize(("code", "words"), [(13, "Permission denied"), (116, "Stale file handle"), (5, "I/O error")])
def test_a_file_that_the_system_does_not_give_is_named_with_its_words(code, words, single, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(code, words)

    found = matrices(single)["model.layers.0.up.weight"]
    monkeypatch.setattr(files, "_without_waiting", refuse)
    file = single / "model.safetensors"
    message = refused(single)
    assert message.startswith(f"{file} cannot be read ([Errno {code}] {words}): check the disk and the permissions")
    with pytest.raises(SourceError, match=rf"'{found.name}' cannot be read from .*\({words}|\[Errno {code}\] {words}"):
        found.load()


class Failing(io.FileIO):
    """A file on a network that is gone after the first bytes."""

    def readinto(self, buffer: memoryview) -> int:
        if self.tell() > 1000:
            raise OSError(116, "Stale file handle")
        return super().readinto(buffer[:100])


def test_a_network_that_goes_away_while_a_tensor_is_read_is_an_error_that_names_it(single, monkeypatch):
    found = matrices(single)["model.embed_tokens.weight"]
    monkeypatch.setattr(files.io, "FileIO", Failing)
    with pytest.raises(SourceError, match=r"'model.embed_tokens.weight' cannot be read .*Stale file handle\): check"):
        found.load()


def test_reads_that_come_back_short_go_on(single, monkeypatch):
    class Slow(io.FileIO):
        def readinto(self, buffer: memoryview) -> int:
            return super().readinto(buffer[:100])

    monkeypatch.setattr(files.io, "FileIO", Slow)
    assert same_as_in_memory(single)


@pytest.mark.parametrize("change", ["shorter", "written"])
def test_a_file_that_changes_during_the_read_itself_is_an_error(change, single, monkeypatch):
    file = single / "model.safetensors"
    found = matrices(single)["model.layers.2.up.weight"]

    class Changing(io.FileIO):
        def readinto(self, buffer: memoryview) -> int:
            if change == "shorter":
                os.truncate(file, min(self.tell() + 100, file.stat().st_size))
                return super().readinto(buffer)
            count = super().readinto(buffer)
            os.utime(file, ns=(1, 1))  # as after a write
            return count

    monkeypatch.setattr(files.io, "FileIO", Changing)
    words = "it ends 1180 bytes too early" if change == "shorter" else "it has changed since it was opened"
    with pytest.raises(SourceError, match=rf"'model.layers.2.up.weight' cannot be read from .* \({words}\)"):
        found.load()
