"""Plans of models on a hub: headers are all that is downloaded, and the plan is that of the files."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, FIRST, INDEX, MODEL, NAMES, SECOND, SHARDED, SINGLE, store_in_cache
from safetensors.torch import save

from kappa_fast.errors import SourceError, SourceNotFoundError
from kappa_fast.planning import plan

huggingface_hub = pytest.importorskip("huggingface_hub")

LARGE = {"model.up.weight": torch.zeros(2000, 600), "model.down.weight": torch.zeros(600, 2000)}
MANY = {f"model.layers.{i}.mlp.experts.{i}.down_proj.weight": torch.zeros(2, 2) for i in range(2000)}


def planned(source, **options):
    return plan(source, measure=False, **options)


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where stand-ins lie, to see that they go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("source", ["org/name", "org/name@v1"])
@pytest.mark.parametrize("files", [SINGLE, SHARDED, {"a.safetensors": save(LARGE)}], ids=["single", "sharded", "large"])
def test_the_plan_is_that_of_the_files_and_only_headers_are_downloaded(files, source, hub, hub_cache, tmp_path):
    hub.repositories["org/name"] = files | {"pytorch_model.bin": b"no"}
    found = planned(source, memory_budget="1GB")  # the default is a share of what is free
    expected = planned(written(tmp_path / "files", files), memory_budget="1GB")
    weights = {name: content for name, content in files.items() if name.endswith(".safetensors")}
    size = sum(map(len, weights.values()))
    assert (found.to_download, expected.to_download) == (size, 0)
    assert (found.source["id"], found.source["revision"], found.source["path"]) == ("org/name", COMMIT, source)
    same = replace(found, to_download=0, source=expected.source)
    assert same.document() == expected.document()
    assert all(hub.sent[name] <= 100_000 for name in weights)
    assert not list(hub_cache.rglob("*.safetensors"))
    assert "pytorch_model.bin" not in hub.sent


def test_a_header_that_is_longer_than_most_is_read_to_its_end(hub):
    hub.repositories["org/name"] = {"model.safetensors": save(MANY)}
    found = planned("org/name", min_dim=2)
    assert found.count == len(MANY)
    header = 8 + int.from_bytes(save(MANY)[:8], "little")
    assert hub.sent["model.safetensors"] == header > 100_000


def test_what_is_complete_in_the_cache_is_planned_from_there_without_a_word_to_the_network(hub, hub_cache):
    snapshot = store_in_cache(hub_cache, "org/name", SHARDED)
    found = planned("org/name")
    assert (hub.requests, found.to_download, found.source["path"]) == ([], 0, str(snapshot.resolve()))


def test_of_an_interrupted_download_what_is_missing_counts(hub, hub_cache):
    hub.repositories["org/name"] = SHARDED
    store_in_cache(hub_cache, "org/name", {name: SHARDED[name] for name in ("config.json", INDEX, FIRST)})
    found = planned("org/name")
    assert found.to_download == len(SHARDED[SECOND])
    assert found.count == len(MODEL)


def test_ranking_after_planning_downloads_the_rest(hub):
    import kappa_fast

    hub.repositories["org/name"] = SHARDED
    planned("org/name")
    assert list(kappa_fast.rank("org/name", progress=False)) == list(kappa_fast.rank(MODEL))
    assert planned("org/name").to_download == 0


def test_files_that_only_the_hub_can_call_complete(hub, hub_cache, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    files = {f"{part}.safetensors": save({name: MODEL[name]}) for part, name in zip("ab", NAMES, strict=True)}
    hub.repositories["org/name"] = files
    store_in_cache(hub_cache, "org/name", files)
    assert planned("org/name").to_download == 0
    assert hub.downloaded() == []
    hub.errors["org/name"] = (503, "")
    with pytest.warns(UserWarning, match="only the hub can say whether a file is missing"):
        assert planned("org/name").count == len(MODEL)


def test_planning_leaves_to_ranking_what_a_branch_points_to(hub, hub_cache):
    """The hub has moved on: files that only it can call complete stay those of their commit, as ranking has it."""
    loose = {f"{part}.safetensors": save({name: MODEL[name]}) for part, name in zip("ab", NAMES, strict=True)}
    store_in_cache(hub_cache, "org/name", loose)
    branch = hub_cache / "models--org--name" / "refs" / "main"
    hub.commit = "b" * 40
    hub.repositories["org/name"] = loose | SHARDED
    found = planned("org/name")
    assert (found.source["revision"], branch.read_text()) == (COMMIT, COMMIT)
    assert found.to_download == len(SHARDED[FIRST]) + len(SHARDED[SECOND])


def test_planning_an_incomplete_model_leaves_its_branch_alone_too(hub, hub_cache):
    store_in_cache(hub_cache, "org/name", {name: SHARDED[name] for name in (INDEX, FIRST)})
    branch = hub_cache / "models--org--name" / "refs" / "main"
    hub.commit = "b" * 40
    hub.repositories["org/name"] = SHARDED
    found = planned("org/name")
    assert (found.source["revision"], branch.read_text()) == (hub.commit, COMMIT)


def test_a_hub_that_is_busy_is_asked_again(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.repositories["org/name"] = SHARDED
    hub.busy = 3
    assert planned("org/name").count == len(MODEL)


def test_values_that_say_what_the_codes_are_come_from_the_hub(hub, tmp_path):
    """4-bit bitsandbytes keeps the shape of a weight in a tensor of bytes: a hole in its place would be no JSON."""
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [192, 64], "dtype": "bfloat16"}
    encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {
        name: torch.zeros(192 * 32, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.ones(192),
        f"{name}.quant_map": torch.linspace(-1, 1, 16),
        f"{name}.quant_state.bitsandbytes__nf4": encoded,
        "model.embed_tokens.weight": torch.zeros(4000, 64),
    }
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    files = {
        "model.safetensors": save(tensors),
        "config.json": json.dumps({"quantization_config": quantization}).encode(),
    }
    hub.repositories["org/name"] = files
    found = planned("org/name")
    assert [(group.shape, group.count) for group in found.groups] == [((192, 64), 1)]
    assert found.groups == planned(written(tmp_path / "files", files)).groups
    assert hub.sent["model.safetensors"] == 100_000 + len(encoded)


def test_the_text_says_what_is_to_be_downloaded_and_the_time_is_without(hub):
    hub.repositories["org/name"] = {"model.safetensors": save(LARGE)}
    found = plan("org/name")
    assert "to download  9.60 MB, whose time is not predicted" in found.to_text()
    assert found.reading is None
    assert found.seconds is not None


@pytest.mark.parametrize("source", [MODEL, "directory"])
def test_nothing_is_to_be_downloaded_of_what_is_here(source, tmp_path):
    source = written(tmp_path / "files", SINGLE) if source == "directory" else source
    assert "to download" not in planned(source).to_text()


# What cannot be had


def refused(source: str = "org/name", error: type[Exception] = SourceError) -> str:
    with pytest.raises(error) as raised:
        planned(source)
    assert type(raised.value) is error
    return str(raised.value)


def test_a_hub_that_sends_whole_files_is_asked_for_one_and_not_listened_to(hub):
    hub.ranges = False
    hub.repositories["org/name"] = SHARDED | {FIRST: bytes(100 << 20)}
    assert refused() == (
        f"org/name cannot be planned from its headers: the hub does not send parts of {FIRST}; download the model, and "
        "give its directory"
    )
    assert SECOND not in hub.sent
    assert hub.sent[FIRST] < 50 << 20


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (SHARDED[FIRST][:-1], "is not a readable safetensors file"),
        (b"\xff" * 4000, "is not a readable safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b"{" * 300_000, "is not a readable safetensors file"),
        (b"{}", "is not a readable safetensors file"),
        (b"", "is not a readable safetensors file"),
    ],
    ids=["truncated", "noise", "bomb", "short", "empty"],
)
def test_damaged_files_are_refused_by_the_name_on_the_hub(content, expected, hub):
    hub.repositories["org/name"] = SHARDED | {FIRST: content}
    message = refused()
    assert message.startswith(f"org/name/{FIRST} {expected}")
    assert message.endswith("look for another revision of the model")
    assert hub.sent[FIRST] <= 100_000


def test_an_index_on_the_hub_cannot_reach_outside_of_the_directory(hub, temporary):
    outside = "../../evil.safetensors"
    index = json.dumps({"weight_map": {"w": outside}}).encode()
    hub.repositories["org/name"] = {INDEX: index, outside: SINGLE["model.safetensors"]}
    assert "which is not a .safetensors file inside its directory" in refused()
    assert not list(temporary.parent.rglob("evil*"))


def test_an_index_that_lists_what_is_not_there(hub):
    hub.repositories["org/name"] = {name: SHARDED[name] for name in (INDEX, FIRST)}
    message = refused(error=SourceNotFoundError)
    assert message == f"org/name/{INDEX} names files that are missing, {SECOND}: look for another revision of the model"


@pytest.mark.parametrize(("name", "words"), [(INDEX, "is not an index"), ("config.json", "cannot be read")])
def test_what_is_damaged_beside_the_weights_is_named_as_the_hub_has_it(name, words, hub):
    hub.repositories["org/name"] = SHARDED | {name: b"{"}
    message = refused()
    assert message.startswith(f"org/name/{name} {words}")
    assert message.endswith("look for another revision of the model")


def test_a_place_for_headers_that_is_none_is_named(hub, temporary, monkeypatch):
    hub.repositories["org/name"] = SHARDED
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    message = refused()
    assert message.startswith(f"the headers of the model could not be written to {temporary / 'gone'} (No such file")
    assert message.endswith("set TMPDIR to a directory on a file system with sparse files")


def test_what_the_hub_refuses(hub):
    assert "nor a model of that name" in refused("org/nmae", SourceNotFoundError)
    hub.repositories["org/name"] = SHARDED
    assert "org/name has no revision 'v9'" in refused("org/name@v9", SourceNotFoundError)
    hub.errors[SECOND] = (403, "")
    assert "did not send it" in refused(error=SourceNotFoundError)
    hub.errors["org/name"] = (403, "GatedRepo")
    assert "org/name is gated" in refused()


def test_offline_what_is_not_complete_is_refused(hub_cache):
    assert "HF_HUB_OFFLINE is set" in refused(error=SourceNotFoundError)
    store_in_cache(hub_cache, "org/name", {name: SHARDED[name] for name in (INDEX, FIRST)})
    assert "is not complete in the cache" in refused()
