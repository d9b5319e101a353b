"""rank() as a whole: an unchanged model, the same result in every way, top=, memory, interruptions, wrong options."""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import one_thread
from safetensors.torch import save_file

import kappa_fast
import kappa_fast.execution.run
from kappa_fast.pipeline import rank


def weights(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(200, 170), (180, 180), (64, 32), (40, 90), (300, 165), (48, 48)]
    return {f"layers.{i}.w": torch.randn(*shapes[i % 6], generator=generator) for i in range(count)}


def exact(weight: torch.Tensor) -> float:
    sigma = torch.linalg.svdvals(weight.double())
    return float(sigma[0] / sigma[-1])


def model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(170, 200), torch.nn.Linear(180, 180), torch.nn.Conv2d(32, 48, 3))


def state(net: torch.nn.Module) -> list[object]:
    parts = [(p.detach().clone(), p.requires_grad, p.dtype, p.device, p._version) for p in net.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()]
    return [
        parts,
        hooks,
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
        random.getstate(),
        torch.get_num_threads(),
    ]


def assert_same(before: list[object], after: list[object]) -> None:
    for (a, *rest), (b, *others) in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b)
        assert rest == others
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert np.array_equal(before[3], after[3])
    assert before[4:] == after[4:]


def test_every_interval_holds_the_exact_value_and_the_order_follows():
    tensors = weights()
    ranking = rank(tensors)
    for entry in ranking:
        kappa = exact(tensors[entry.name])
        assert entry.lower * (1 - 1e-9) <= kappa <= entry.upper * (1 + 1e-9)
    assert [e.kappa for e in ranking] == sorted(e.kappa for e in ranking)


@pytest.mark.parametrize("options", [{}, {"certify": True}, {"top": 1}, {"rtol": 1e-4}])
def test_the_model_and_all_random_states_are_what_they_were(options):
    net = model()
    net[0].weight.requires_grad_(False)
    before = state(net)
    rank(net, **options)
    assert_same(before, state(net))


def test_the_model_is_what_it_was_after_a_failure_too(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("broken")

    net = model()
    before = state(net)
    monkeypatch.setattr("kappa_fast.execution.run.resolve", fail)
    with pytest.raises(RuntimeError, match="broken"):
        rank(net)
    assert_same(before, state(net))


def test_order_memory_and_the_callers_modes_change_no_bit():
    tensors = weights()
    plain = list(rank(tensors))
    assert list(rank(dict(reversed(tensors.items())), memory_budget=1)) == plain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert list(rank(tensors)) == plain
    with torch.inference_mode():
        assert list(rank(tensors)) == plain
    with torch.device("meta"):
        assert list(rank(tensors)) == plain
    torch.set_float32_matmul_precision("medium")
    try:
        assert list(rank(tensors)) == plain
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("top", [1, 3, 0.5, 100])
def test_top_finds_the_first_of_the_full_ranking_and_proves_bounds_of_the_rest(top):
    tensors = weights(18)
    count = min(18, top if isinstance(top, int) else int(18 * top))
    full, ranking = rank(tensors), rank(tensors, top=top)
    assert [e.key for e in ranking[:count]] == [e.key for e in full[:count]]
    for entry in ranking:
        if entry.status == "bounded":
            assert entry.lower <= exact(tensors[entry.name]) * (1 + 1e-9)
            assert entry.kappa != entry.kappa


def test_certify_selection_proves_the_top_alone():
    ranking = rank(weights(), top=2, certify="selection")
    assert [e.certified for e in ranking[:2]] == [True, True]


def test_singular_and_broken_matrices_stand_last():
    tensors = weights(2) | {"zero": torch.zeros(20, 20), "nan": torch.full((20, 20), float("nan"))}
    ranking = rank(tensors, top=3)
    assert [e.status for e in ranking] == ["ok", "ok", "rank_deficient", "non_finite"]


def test_a_score_of_ones_own_orders_the_entries():
    ranking = rank(weights(), score=lambda entry: -entry.kappa)
    assert [e.kappa for e in ranking] == sorted((e.kappa for e in ranking), reverse=True)


def test_a_matrix_that_does_not_fit_into_memory_is_named(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr("kappa_fast.execution.run.resolve", fail)
    with pytest.raises(kappa_fast.ComputeError, match=r"not enough memory for 'layers\.0\.w' of shape \(200, 170\)"):
        rank(weights(1))


@pytest.mark.parametrize("options", [{}, {"top": 2}])
def test_few_calls_lead_from_rank_to_the_ladder(options, tmp_path, monkeypatch):
    """Every function on the way is one that a reader has to follow."""
    resolve, ways = kappa_fast.execution.run.resolve, set[tuple[str, ...]]()

    def watched(*arguments, **options):
        frames = traceback.extract_stack()
        ways.add(tuple(frame.name for frame in frames if frame.filename.startswith(kappa_fast.__path__[0])))
        return resolve(*arguments, **options)

    monkeypatch.setattr("kappa_fast.execution.executor.fits_one_thread", lambda _: False)  # all in this thread
    monkeypatch.setattr("kappa_fast.execution.run.resolve", watched)
    rank(model(), cache=tmp_path, **options)
    assert ways == {("rank", "resolve", "results", "_attempt", "on_wave")}


def test_an_interruption_carries_what_is_done(monkeypatch):
    resolve, calls = kappa_fast.execution.run.resolve, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return resolve(*arguments, **options)

    monkeypatch.setattr("kappa_fast.execution.run.resolve", interrupted)
    with pytest.raises(kappa_fast.Interrupted, match="2 of 6 matrices are done") as stop:
        rank(weights(), memory_budget=1)
    assert len(stop.value.partial) == 2
    assert stop.value.partial.metadata["partial"] is True


def test_progress_counts_every_matrix():
    seen = []
    rank(weights(), progress=seen.append)
    assert [p.matrices_done for p in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1].operations_done == pytest.approx(seen[-1].operations_total)


def test_what_cannot_be_proven_is_counted_in_one_warning():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q for _ in "ab")
    hard = left * torch.logspace(0, -17, 60, dtype=torch.float64) @ right.T  # mpmath: kappa = 1.09e17
    with pytest.warns(UserWarning, match="cannot prove the interval of 1 of the entries, 'hard' among them"):
        (entry,) = rank({"hard": hard}, certify=True)
    assert (entry.status, entry.certified) == ("rank_deficient", False)
    assert (entry.kappa, entry.upper) == (math.inf, math.inf)
    assert 1e13 < entry.lower < 1e17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top=0"),
        ({"top": 1.5}, "top=1.5"),
        ({"top": True}, "top=True"),
        ({"top": -1}, "top=-1"),
        ({"top": 0.0}, r"top=0\.0"),
        ({"top": float("nan")}, "top=nan"),
        ({"top": "3"}, "top='3'"),
        ({"top": 1, "top_per_group": "no"}, "top_per_group='no'"),
        ({"certify": 1}, "certify=1"),
        ({"certify": np.ones(2)}, r"certify=array\(\[1\., 1\.\]\)"),
        ({"score": None}, "score=None"),
        ({"score": lambda entry: "low"}, r"score\(\) returned 'low' for 'layers\.0\.w'"),
        ({"score": lambda entry: float("nan")}, r"score\(\) returned nan for 'layers\.0\.w'"),
        ({"rtol": 1}, "rtol=1:"),
        ({"rtol": True}, "rtol=True"),
        ({"rtol": float("nan")}, "rtol=nan"),
        ({"device": "hpu"}, "device='hpu' cannot be used here"),
        ({"device": 2.5}, r"device=2\.5 cannot be used here"),
        ({"min_dim": 0}, "min_dim=0"),
        ({"include": "("}, r"include='\('"),
        ({"fused": "no"}, "fused='no'"),
        ({"rtol": 0}, "rtol=0"),
        ({"rtol": "1"}, "rtol='1'"),
        ({"certify": "all"}, "certify='all'"),
        ({"certify": "selection"}, "give top= as well"),
        ({"score": "size"}, "score='size'"),
        ({"memory_budget": "much"}, "memory_budget='much'"),
        ({"memory_budget": 0}, "memory_budget=0"),
        ({"device": "meta"}, "device='meta'"),
        ({"device": "nowhere"}, "device='nowhere'"),
        ({"progress": 3}, "progress=3"),
        ({"cache": 3}, "cache=3: give True, False, None or the path"),
        ({"cache": ""}, "cache=''"),
        ({"cache": object}, "cache=<class 'object'>"),
        ({"cache": __file__}, r"test_pipeline\.py is no directory"),
    ],
)
def test_an_option_that_cannot_work_is_named(options, message):
    with pytest.raises(kappa_fast.OptionError, match=message):
        rank(weights(1), **options)


def test_an_unknown_backend_is_named():
    with pytest.raises(kappa_fast.BackendError, match="'cuda' is unknown"):
        rank(weights(1), backend="cuda")


def test_a_backend_is_asked_for_where_the_weights_will_be(monkeypatch):
    asked = []

    def refuse(name, device):
        asked.append((name, device))
        raise kappa_fast.BackendError("none here")

    monkeypatch.setattr("kappa_fast.execution.executor.get_backend", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(kappa_fast.BackendError, match="none here"):
        rank(weights(1), backend="triton")
    assert asked == [("triton", torch.device("cuda", 0))]


def test_the_settings_are_kept_with_patterns_in_any_iterable():
    found = rank(weights(2), include={"layers"}, exclude=(p for p in ["1$", "9"]), top=1, score=abs_kappa).metadata
    assert found["settings"] == {
        **dict(top=1, top_per_group=False, rtol=1e-2, certify=False, score="abs_kappa", include=("layers",)),
        **dict(exclude=("1$", "9"), embeddings=False, routers=False, fused="split"),
        **dict(adapters="base", min_dim=16, max_dim=None, statistics=None),
    }
    assert rank(weights(2), include="layers").metadata["settings"]["include"] == "layers"


def abs_kappa(entry: kappa_fast.TensorKappa) -> float:
    return abs(entry.kappa)


def test_the_metadata_tell_what_was_ranked_with_what_and_can_be_written(tmp_path):
    ranking = rank(model(), certify="selection", top=2)
    found = ranking.metadata
    assert found["versions"]["torch"] == torch.__version__
    assert (found["backend"], tuple(found["device"]), found["threads"]) == ("torch", ("cpu",), torch.get_num_threads())
    assert (found["source"]["kind"], found["partial"]) == ("module", False)
    assert found["num_parameters"] == sum(p.numel() for p in model().parameters())
    assert 0 < found["seconds"] < 60
    ranking.to_json(tmp_path / "ranking.json")
    assert kappa_fast.Ranking.from_json(tmp_path / "ranking.json") == ranking


def test_the_metadata_tell_how_many_waves_launches_and_reads_a_run_took():
    """On the CPU small matrices of one shape are shared out, and none of our kernels is launched."""
    given = weights(3) | {"large": torch.randn(700, 650)}
    first = rank(given, backend="torch", cache=None).metadata["work"]
    assert 1 < first["waves"] <= len(rank(given))
    assert first["launches"] == 0
    assert first["reads"] > 0
    assert rank(given, backend="torch", cache=None).metadata["work"] == first


def test_a_module_its_state_dict_and_its_checkpoint_have_one_ranking(tmp_path):
    save_file(model().state_dict(), tmp_path / "model.safetensors")
    expected = list(rank(model()))
    assert list(rank(model().state_dict())) == expected
    assert list(rank(tmp_path)) == expected
    assert list(rank(str(tmp_path / "model.safetensors"))) == expected


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t[:180, :170].contiguous(),
    "transposed": lambda t: t[:170, :180].T,
    "every other": lambda t: t[::2, 1::3],
    "overlapping rows": lambda t: torch.as_strided(t, (180, 170), (169, 1)),
    "column-major square": lambda t: torch.as_strided(t, (180, 180), (1, 180)),
    "convolution": lambda t: t[:180, :180].reshape(180, 20, 3, 3).contiguous(memory_format=torch.channels_last),
    "small": lambda t: t[:40:2, :90:3],
    "in training": lambda t: t[:180, :170].requires_grad_() * 1,
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_any_strides_and_any_float_format_are_ranked_by_their_values(dtype):
    base = torch.randn(400, 600, dtype=torch.float64).to(getattr(torch, dtype))
    source = {}
    for name, view in LAYOUTS.items():
        narrow = base.dtype.itemsize == 1  # float8 can be looked at in few ways
        source[name] = (
            view(base.float()).to(base.dtype) if narrow and name in ("convolution", "in training") else view(base)
        )
    ranking = rank(source, certify=True)
    assert {entry.name for entry in ranking} == set(LAYOUTS)
    for entry in ranking:
        with one_thread():
            kappa = exact(source[entry.name].detach().flatten(1))
        assert entry.certified
        assert entry.lower * (1 - 1e-9) <= kappa <= entry.upper * (1 + 1e-9)
        assert entry.kappa == pytest.approx(kappa, rel=1e-2)
        assert entry.dtype == dtype


def test_all_equal_rows_by_a_stride_of_zero_are_rank_deficient():
    (entry,) = rank({"w": torch.randn(1, 40).expand(30, 40)})
    assert (entry.status, entry.kappa, entry.upper) == ("rank_deficient", float("inf"), float("inf"))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (None, kappa_fast.OptionError, "source is of type NoneType"),
        (torch.randn(4, 4), kappa_fast.OptionError, "source is of type Tensor"),
        (torch.nn.Linear, kappa_fast.OptionError, "source is of type type"),
        ({}, kappa_fast.SourceError, "the mapping has no parameter with two or more dimensions"),
        ({"w": 3}, kappa_fast.SourceError, "the mapping has 'w': int"),
        (torch.nn.ReLU(), kappa_fast.SourceError, "ReLU has no parameter"),
        (
            "some-org/some-model",
            kappa_fast.SourceNotFoundError,
            "some-org/some-model is neither a path nor a model in the cache",
        ),
        ("", kappa_fast.OptionError, "the path of the checkpoint is empty"),
    ],
)
def test_what_is_no_model_is_named(source, error, message):
    with pytest.raises(error, match=message):
        rank(source)


def test_what_is_no_process_group_is_refused():
    with pytest.raises(kappa_fast.OptionError, match=r"is no process group of torch\.distributed"):
        rank(weights(1), process_group=object())
