"""Checkpoints on disk: the order in which they are read, and how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import one_thread, weights
from safetensors.torch import save_file

from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.pipeline import rank
from kappa_fast.sources import Filters, open_source
from kappa_fast.sources.base import Place
from kappa_fast.sources.files import DataFile, Region

SHARDS = {
    "model-00001-of-00002.safetensors": ("layers.1.a.weight", "layers.10.a.weight", "layers.3.a.weight"),
    "model-00002-of-00002.safetensors": ("layers.0.a.weight", "layers.2.a.weight", "layers.2.experts.down_proj"),
}
MODEL = weights(
    **{
        name.replace(".", "__"): (3, 40, 24) if "experts" in name else (60, 40)
        for shard in SHARDS.values()
        for name in shard
    }
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for file, names in SHARDS.items():
        save_file({name: MODEL[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in SHARDS.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """What is prefetched and read, in order: ("prefetch" or "read", file, offset)."""
    found: list[tuple[str, str, int]] = []

    def noting(kind: str, inner: Any) -> Any:
        def call(self: DataFile, offset: int, *rest: Any) -> None:
            found.append((kind, self.path.name, offset))
            inner(self, offset, *rest)

        return call

    monkeypatch.setattr(DataFile, "read", noting("read", DataFile.read))
    monkeypatch.setattr(DataFile, "prefetch", noting("prefetch", DataFile.prefetch))
    return found


def values_of(calls: Sequence[tuple[str, str, int]], kind: str) -> list[tuple[str, int]]:
    """Without the headers, which are read first."""
    return [(file, offset) for found, file, offset in calls if found == kind and offset > 8]


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("budget", [1, "1GB"])
def test_the_weights_are_read_once_in_the_order_of_the_disk_and_prefetched(
    device, budget, checkpoint, calls, monkeypatch
):
    expected = list(rank(MODEL))
    if device == "accelerator":  # whole waves go to the backend at once
        monkeypatch.setattr(TorchBackend, "side_by_side", False)
    with one_thread():
        found = rank(checkpoint, memory_budget=budget)
    reads, prefetched = values_of(calls, "read"), values_of(calls, "prefetch")
    assert len(set(reads)) == len(reads) == len(found) == 8
    assert prefetched  # as far as the thread came: what is worked on is not waited for
    assert prefetched == sorted(reads)[: len(prefetched)]
    if budget == 1 or device == "accelerator":  # on a CPU the largest of a wave come first
        assert reads == sorted(reads)
    assert [(e.key, e.kappa, e.lower, e.upper) for e in found] == [(e.key, e.kappa, e.lower, e.upper) for e in expected]


def test_what_is_ranked_for_the_top_is_the_same_from_disk_and_from_memory(checkpoint):
    expected = rank(MODEL, top=2)
    for budget in (1, "1GB"):
        assert list(rank(checkpoint, top=2, memory_budget=budget)) == list(expected)


def test_a_file_that_shrinks_while_it_is_ranked_is_an_error_and_not_the_end_of_the_process(checkpoint, monkeypatch):
    last = checkpoint / "model-00002-of-00002.safetensors"
    read, lock, done = Region.take, threading.Lock(), []

    def take(self: Region, index: Any, device: torch.device | None = None) -> torch.Tensor:
        with lock:
            done.append(self.name)
            if len(done) == 5:
                os.truncate(last, 4000)
        return read(self, index, device)

    monkeypatch.setattr(Region, "take", take)
    with pytest.raises(ValueError, match=r"cannot be read from .*00002.safetensors \(it has changed since"):
        rank(checkpoint, memory_budget=1)
    assert len(done) >= 5


def test_a_checkpoint_that_turns_out_damaged_leaves_an_earlier_ranking_as_it_was(checkpoint, tmp_path, capsys):
    from kappa_fast.cli import app

    target = tmp_path / "ranking.json"
    with pytest.raises(SystemExit) as done:
        app(["rank", str(checkpoint), "--json", str(target)])
    assert not done.value.code
    before = target.read_bytes()
    (checkpoint / "model-00002-of-00002.safetensors").write_bytes(b"damaged")
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        app(["rank", str(checkpoint), "--json", str(target)])
    assert done.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "model-00002-of-00002.safetensors is not a readable safetensors file" in err
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if "json" in path.name) == [
        "model.safetensors.index.json",
        "ranking.json",
    ]


# In a process of its own: Python and torch count.
CHILD = """
import json, re, sys
from pathlib import Path
import torch
import kappa_fast
torch.set_num_threads(2)
ranking = kappa_fast.rank(sys.argv[1], memory_budget=sys.argv[2], progress=False)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps([peak, len(ranking), sum(entry.status == "ok" for entry in ranking)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_is_set_by_the_budget_and_not_by_the_size_of_the_checkpoint(tmp_path, root):
    """A gigabyte of small experts, squares and one matrix that needs more than the budget."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(768, 2048)] * 60 + [(1024, 1024)] * 8 + [(2048, 2048)]
    base = {shape: torch.randn(shape, generator=generator).bfloat16() for shape in dict.fromkeys(shapes)}
    number = 0
    for shard in range(5):
        weights = (
            {f"large.{shard}.weight": torch.randn((8192, 1024), generator=generator).bfloat16()} if shard == 2 else {}
        )
        for shape in shapes:
            order = torch.randperm(shape[0], generator=generator)
            weights[f"layers.{number}.weight"] = base[shape][order]
            number += 1
        save_file(weights, tmp_path / f"model-{shard + 1:05d}-of-00005.safetensors")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 1e9
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), "250MB"], cwd=root, capture_output=True, text=True, check=True
    )
    peak, ranked, sound = json.loads(done.stdout)
    assert ranked == sound == number + 1
    assert peak <= 250e6 + 2 * 8192 * 1024 + 500e6


def test_what_is_a_part_of_a_parameter_in_the_model_is_prefetched_as_it_lies_on_the_disk(checkpoint, calls):
    """One file holds an expert on its own, which the model fuses: the index is that of the model."""
    place = Place("layers.experts.gate_up_proj", (3, slice(0, 60), slice(None)), "[3].gate")
    found = open_source(checkpoint, Filters(), lambda _: {"layers.0.a.weight": place})
    (matrix,) = (m for m in found.matrices if m.name == place.name)
    calls.clear()
    matrix.prefetch()
    assert torch.equal(matrix.load(), MODEL["layers.0.a.weight"])
    (advised, read) = calls
    assert advised[1:] == read[1:]
