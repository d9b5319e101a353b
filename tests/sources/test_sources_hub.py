"""Ids of models on a hub: the local cache first, then a download of what is needed and nothing else."""

from __future__ import annotations

import builtins
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import COMMIT, FIRST, INDEX, MODEL, NAMES, SECOND, SHARDED, SINGLE, store_in_cache
from packed_codes import GROUP, gptq, in_turn
from safetensors.torch import save

import kappa_fast
from kappa_fast.errors import MissingExtraError, SourceError, SourceNotFoundError
from kappa_fast.sources import Filters, open_source
from kappa_fast.sources.hub import HubId, hub_id

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = importlib.import_module("huggingface_hub.constants")


def opened(source: str) -> Any:
    return open_source(source, Filters(), quiet=True)


def refused(source: str, error: type[Exception] = SourceError) -> str:
    with pytest.raises(error) as raised:
        opened(source)
    assert type(raised.value) is error
    return str(raised.value)


def is_the_model(source: str) -> bool:
    found = {m.key: m.load() for m in opened(source).matrices}
    return found.keys() == MODEL.keys() and all(torch.equal(found[name], MODEL[name]) for name in MODEL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name", None)),
        ("mistralai/Mixtral-8x7B-v0.1", HubId("mistralai/Mixtral-8x7B-v0.1", None)),
        ("org/name@v1", HubId("org/name", "v1")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        *((text, None) for text in ("name", "/org/name", "./org/name", "org/name/", "a/b/c", "org/model.safetensors")),
        *(
            (text, None)
            for text in ("org/m.gguf", "org/a b", "org/../name", "~/name", "org/name@", "", "C:\\a", "a//b")
        ),
        *((text, None) for text in ("org/pytorch_model.bin", "org/name@../../x", "org/a--b", "org/index.json")),
    ],
)
def test_an_id_has_two_words_and_does_not_end_like_a_file(text, expected):
    assert hub_id(text) == expected


@pytest.mark.parametrize("files", [SINGLE, SHARDED])
def test_what_is_complete_in_the_cache_is_used_offline(files, hub_cache):
    snapshot = store_in_cache(hub_cache, "org/name", files)
    assert is_the_model("org/name")
    assert is_the_model(f"org/name@{COMMIT}")
    metadata = opened("org/name").metadata
    assert (metadata["id"], metadata["revision"], metadata["model_type"]) == ("org/name", COMMIT, "tiny")
    assert metadata["path"] == str(snapshot.resolve())


def test_what_is_complete_in_the_cache_is_used_without_a_word_to_the_network(hub, hub_cache):
    store_in_cache(hub_cache, "org/name", SHARDED)
    assert is_the_model("org/name")
    assert hub.requests == []


def test_a_revision_is_one_of_its_own(hub_cache):
    store_in_cache(hub_cache, "org/name", SINGLE, commit="b" * 40, ref="v1")
    assert is_the_model("org/name@v1")
    assert opened("org/name@v1").metadata["revision"] == "b" * 40
    assert "org/name is neither a path nor a model in the cache" in refused("org/name", SourceNotFoundError)


def test_a_path_wins_over_an_id(hub_cache, tmp_path, monkeypatch):
    store_in_cache(hub_cache, "org/name", SINGLE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert refused("org/name") == "org/name has no .safetensors file: give the directory of a model"
    assert refused(Path("org/other"), SourceNotFoundError).startswith("org/other: no such file or directory")


@pytest.mark.parametrize("source", ["org/name", "org/name@main", "org/name@v1"])
def test_only_what_is_ranked_is_downloaded_and_then_found_in_the_cache(source, hub):
    useless = ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "tokenizer.json", "consolidated.safetensors")
    hub.repositories["org/name"] = SHARDED | dict.fromkeys((*useless, "original/extra.safetensors"), b"no")
    assert is_the_model(source)
    assert hub.downloaded() == sorted(SHARDED)
    hub.requests.clear()
    assert is_the_model(source)
    assert hub.requests == []


@pytest.mark.parametrize("names", [("model.safetensors",), ("model.fp16.safetensors",), ("a[1].safetensors",)])
def test_weights_without_an_index_are_downloaded_whatever_they_are_called(names, hub):
    hub.repositories["org/name"] = dict.fromkeys(names, SINGLE["model.safetensors"]) | {"a1.bin": b"no"}
    assert is_the_model("org/name")
    assert hub.downloaded() == sorted(names)


def test_an_interrupted_download_goes_on_with_what_is_missing(hub, hub_cache):
    hub.repositories["org/name"] = SHARDED
    store_in_cache(hub_cache, "org/name", {name: SHARDED[name] for name in ("config.json", INDEX, FIRST)})
    assert is_the_model("org/name")
    assert hub.downloaded() == [SECOND]


LOOSE = {f"{part}.safetensors": save({name: MODEL[name]}) for part, name in zip("ab", NAMES, strict=True)}


def test_a_download_that_stopped_between_files_without_an_index_goes_on(hub):
    hub.repositories["org/name"] = LOOSE
    hub.errors["b.safetensors"] = (403, "")
    refused("org/name", SourceNotFoundError)
    hub.errors.clear()
    assert is_the_model("org/name")


def test_files_without_an_index_are_compared_with_the_commit_in_the_cache(hub, hub_cache):
    hub.repositories["org/name"] = LOOSE
    store_in_cache(hub_cache, "org/name", LOOSE)
    assert is_the_model("org/name")
    assert hub.downloaded() == []
    assert any(COMMIT in line for line in hub.requests)
    assert not any("main" in line for line in hub.requests)


def test_files_without_an_index_are_ranked_with_a_warning_where_the_hub_cannot_be_asked(hub_cache):
    store_in_cache(hub_cache, "org/name", LOOSE)
    with pytest.warns(UserWarning, match="only the hub can say whether a file is missing"):
        assert is_the_model("org/name")


@pytest.mark.parametrize("progress", [False, None])
def test_the_ranking_is_that_of_the_files_and_quiet_where_no_bar_is_wanted(progress, hub, capsys):
    hub.repositories["org/name"] = SHARDED
    found = kappa_fast.rank("org/name", progress=progress)
    assert list(found) == list(kappa_fast.rank(MODEL))
    assert found.metadata["source"]["id"] == "org/name"
    assert capsys.readouterr().err == ""


def test_the_bars_of_the_download_are_shown_where_one_is_wanted(hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.tqdm.is_tqdm_disabled", lambda _: False, raising=False)
    hub.repositories["org/name"] = SINGLE
    kappa_fast.rank("org/name", progress=True)
    assert "Fetching" in capsys.readouterr().err


def test_the_command_line_takes_ids_too(hub_cache, capsys):
    from typer.testing import CliRunner

    from kappa_fast.cli import app

    store_in_cache(hub_cache, "org/name", SINGLE)
    done = CliRunner().invoke(app, ["rank", "org/name"])
    assert done.exit_code == 0, done.output
    assert NAMES[0] in done.output


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_what_says_how_the_weights_were_quantized_comes_with_them(file, hub, tmp_path):
    """Without it the codes of version 2 would be read as nothing or as those of version 1."""
    stored, values = gptq(torch.randn(64, 128), 4, in_turn(GROUP, 128), symmetric=False, offset=0)
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "checkpoint_format": "gptq_v2"}
    files = {"model.safetensors": save(stored), file: json.dumps(config).encode()}
    hub.repositories["org/name"] = files
    (found,) = opened("org/name").matrices
    assert np.array_equal(found.load().numpy(), values)
    assert hub.downloaded() == sorted(files)


# What cannot be had


def test_offline_and_not_in_the_cache(hub_cache):
    message = refused("org/name", SourceNotFoundError)
    assert message == (
        "org/name is neither a path nor a model in the cache of the hub, and HF_HUB_OFFLINE is set: unset it, or "
        "download the model elsewhere and give its directory"
    )


def test_offline_and_incomplete_names_the_missing_shard(hub_cache):
    snapshot = store_in_cache(hub_cache, "org/name", {name: SHARDED[name] for name in (INDEX, FIRST)})
    message = refused("org/name")
    assert (
        f"org/name is not complete in the cache ({snapshot.resolve() / INDEX} names files that are missing, {SECOND}"
        in message
    )
    assert "HF_HUB_OFFLINE is set" in message
    (snapshot / INDEX).unlink()
    (snapshot / FIRST).unlink()
    assert "has no .safetensors file" in refused("org/name")


def test_a_blob_that_is_gone_is_a_missing_shard(hub_cache):
    snapshot = store_in_cache(hub_cache, "org/name", SHARDED)
    (snapshot / SECOND).resolve().unlink()
    assert f"names files that are missing, {SECOND}" in refused("org/name")


def test_no_such_model(hub):
    message = refused("org/nmae", SourceNotFoundError)
    assert message == (
        f"there is neither a file or directory 'org/nmae' nor a model of that name at {hub.url}: check the name; if it "
        "is private, log in with `hf auth login`"
    )


def test_no_such_revision(hub):
    hub.repositories["org/name"] = SINGLE
    assert refused("org/name@v9", SourceNotFoundError) == (
        f"org/name has no revision 'v9': {hub.url}/org/name lists them"
    )


def test_a_gated_model(hub):
    hub.repositories["org/name"] = SINGLE
    hub.errors["org/name"] = (403, "GatedRepo")
    assert refused("org/name") == (
        f"org/name is gated: accept its conditions at {hub.url}/org/name, then log in with `hf auth login`"
    )


def test_a_hub_that_fails_says_so_and_what_has_arrived_is_kept(hub, hub_cache):
    hub.repositories["org/name"] = SHARDED
    hub.errors[SECOND] = (403, "")
    message = refused("org/name", SourceNotFoundError)
    assert message.startswith("org/name is neither a path nor a model in the cache of the hub, and http://127.0.0.1")
    assert message.endswith("try again later; downloaded files are kept")
    assert f"names files that are missing, {SECOND}" in refused("org/name")
    hub.errors.clear()
    assert is_the_model("org/name")


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between several attempts
    assert "http://127.0.0.1:9 did not send it (" in refused("org/name", SourceNotFoundError)


def test_a_disk_that_is_full(hub, monkeypatch):
    hub.repositories["org/name"] = SINGLE

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    message = refused("org/name", SourceNotFoundError)
    assert "could not be written to" in message
    assert "(No space left on device): free disk space there" in message


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("pytorch_model.bin", "README.md"), "only pickled weights (pytorch_model.bin), which can run code"),
        (("m-Q4_K_M.gguf",), "has GGUF files (m-Q4_K_M.gguf): download the one you want and give its path"),
        (("unet/model.safetensors",), "has no .safetensors file itself, but unet has"),
        (("README.md",), "has no .safetensors file: is it a model?"),
        (
            ("a" + INDEX[5:], "b" + INDEX[5:]),
            "has several indices (a.safetensors.index.json, b.safetensors.index.json)",
        ),
    ],
)
def test_a_repository_without_safetensors_is_refused_before_anything_is_downloaded(files, expected, hub):
    hub.repositories["org/name"] = dict.fromkeys(files, b"content")
    assert expected in refused("org/name")
    assert hub.downloaded() == []


@pytest.mark.parametrize("document", [b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"w": []}}'])
def test_an_index_on_the_hub_that_is_none(document, hub):
    hub.repositories["org/name"] = {INDEX: document, FIRST: SHARDED[FIRST]}
    assert "is not an index of a sharded checkpoint" in refused("org/name")


def test_an_index_on_the_hub_cannot_reach_outside_of_the_snapshot(hub, hub_cache):
    hub.repositories["org/name"] = {INDEX: json.dumps({"weight_map": {"w": "../../../x.safetensors"}}).encode()}
    assert "which is not a .safetensors file inside its directory" in refused("org/name")
    assert hub.downloaded() == [INDEX]


def test_without_huggingface_hub_the_message_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"no file or directory 'org/name', .* pip install 'kappa_fast\[hub\]'"):
        opened("org/name")


def test_paths_do_not_import_huggingface_hub(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(SINGLE["model.safetensors"])
    original = builtins.__import__

    def refusing(name: str, *arguments: Any) -> Any:
        assert not name.startswith("huggingface_hub")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refusing)
    assert is_the_model(str(tmp_path))
