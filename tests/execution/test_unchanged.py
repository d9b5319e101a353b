"""What rank() leaves as it was, however it ends, and the caller's modes that must not change a result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import EVERYTHING, Experts, one_thread, weights
from safetensors.torch import save_file
from torch import nn
from undisturbed import (
    MODES,
    after,
    nothing_changes,
    of_process,
    older_switch,
)

import kappa_fast
import kappa_fast.execution.run
from kappa_fast.execution import executor as execution
from kappa_fast.machine import torch_state as undisturbed
from kappa_fast.machine.torch_state import flushes
from kappa_fast.pipeline import rank
from kappa_fast.sources import open_source
from kappa_fast.spectrum import ladder


class Busy(nn.Module):
    """A model in the middle of its training: hooks, gradients, frozen and tied weights, several dtypes and layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(32, 200), nn.Linear(200, 170).bfloat16()
        self.square = nn.Linear(180, 180)
        self.square.weight.requires_grad_(False)
        self.conv = nn.Conv2d(16, 20, 3).to(memory_format=torch.channels_last)
        self.experts = Experts(2, 32, 24)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.register_buffer("mask", torch.ones(20, 20))
        self.up.weight.grad, self.up.bias.grad = torch.ones(200, 32), torch.ones(200)
        self.up.register_forward_hook(lambda *_: None)
        self.up.register_full_backward_hook(lambda *_: None)
        self.up.weight.register_hook(lambda gradient: gradient)
        self.conv.eval()


@pytest.fixture(params=["side by side", "one by one"])
def way(request, monkeypatch) -> Iterator[str]:
    """Small matrices go to threads of their own, large ones to the thread of the caller: here by decree."""
    if request.param == "side by side":
        yield request.param
        return
    monkeypatch.setattr(execution, "fits_one_thread", lambda _: False)
    with one_thread():
        yield request.param


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"certify": True, "rtol": 1e-4},
        {"top": 2},
        {"top": 0.5, "top_per_group": True, "certify": "selection"},
        {"embeddings": True, "routers": True, "min_dim": 1, "fused": "stored"},
        {"memory_budget": 1},
        {"score": lambda entry: -entry.kappa},
    ],
    ids=lambda options: ",".join(options) or "none",
)
def test_a_model_in_training_is_left_as_it_was(options, way):
    model = Busy()
    with nothing_changes(model):
        assert len(rank(model, **options)) > 5


def broken(*_: object, **__: object) -> list[Any]:
    raise RuntimeError("the library is broken")


def stopped(*_: object, **__: object) -> list[Any]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize(("failure", "error"), [(broken, RuntimeError), (stopped, kappa_fast.Interrupted)])
@pytest.mark.parametrize("options", [{}, {"top": 1}, {"certify": True}], ids=lambda o: ",".join(o) or "none")
def test_nothing_is_left_behind_by_a_failure_or_an_interruption(calls, failure, error, options, way, monkeypatch):
    monkeypatch.setattr("kappa_fast.execution.run.resolve", after(calls, failure, kappa_fast.execution.run.resolve))
    model = Busy()
    torch.set_float32_matmul_precision("medium")
    try:
        with nothing_changes(model), pytest.raises(error):
            rank(model, **options)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_nothing_is_left_behind_by_a_failing_probe(way, monkeypatch):
    monkeypatch.setattr("kappa_fast.execution.run.lower_bounds", broken)
    model = Busy()
    with nothing_changes(model), pytest.raises(RuntimeError, match="the library is broken"):
        rank(model, top=1)


@pytest.mark.parametrize(("option", "error"), [("progress", RuntimeError), ("score", kappa_fast.OptionError)])
def test_nor_by_a_callable_that_fails(option, error, way):
    model = Busy()
    with nothing_changes(model), pytest.raises(error, match="the library is broken"):
        rank(model, **{option: broken})


@pytest.mark.parametrize("options", [{"rtol": 3}, {"device": "nowhere"}, {"progress": 7}, {"memory_budget": "x"}])
def test_nor_by_options_that_are_refused(options):
    model = Busy()
    with nothing_changes(model), pytest.raises(kappa_fast.OptionError):
        rank(model, **options)


def test_a_mapping_is_neither_changed_nor_written_to():
    base = torch.randn(40, 60, requires_grad=True)
    source = {"leaf": base, "grown": base * 2, "view": base.detach()[::2, 1::2], "turned": base.detach().T}
    source |= {"one row": torch.randn(1, 40).expand(30, 40), "half": torch.randn(40, 40).half()}
    copies = {name: tensor.detach().clone() for name, tensor in source.items()}
    identities = {name: (id(t), t._version, t.grad_fn, t.requires_grad) for name, t in source.items()}
    rank(source)
    assert {name: (id(t), t._version, t.grad_fn, t.requires_grad) for name, t in source.items()} == identities
    assert all(torch.equal(source[name], copies[name]) for name in source)


GIVEN = weights(tall=(300, 165), square=(180, 180), near=(200, 170), small=(48, 40))


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("mode", MODES)
def test_no_mode_of_the_caller_changes_a_bit_of_the_result_nor_is_changed(mode, top, way):
    # Two matrices of the hardest kinds, one in bfloat16, whose products a shortcut would spoil.
    source = GIVEN | {"tall16": GIVEN["tall"].bfloat16()}
    expected = rank(source, top=top)
    with MODES[mode]():
        before = of_process()
        found = rank(source, top=top)
        assert of_process() == before
    assert list(found) == list(expected)


def test_the_older_switch_can_be_read_during_the_work(monkeypatch):
    # torch refuses to while the newer switches say something else, and a library it calls may want to know.
    original, seen = kappa_fast.execution.run.resolve, set[str]()

    def resolve(*arguments: Any, **options: Any) -> Any:
        seen.add(torch.get_float32_matmul_precision())
        return original(*arguments, **options)

    monkeypatch.setattr("kappa_fast.execution.run.resolve", resolve)
    with older_switch("medium"):
        rank(GIVEN)
    assert seen == {"highest"}


def test_the_products_that_a_mode_makes_coarse_are_seen_by_this_test():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (GIVEN["square"] @ GIVEN["square"]).dtype == torch.bfloat16


def test_looking_for_matrices_reads_no_weight():
    model = Busy().to("meta")
    assert {s.reason for s in open_source(model, EVERYTHING).skipped} >= {
        "on the meta device, without values: rank from the checkpoint"
    }
    assert not open_source(model, EVERYTHING).matrices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_subnormal_weights_are_not_taken_for_zero_and_the_mode_is_kept(dtype):
    generator = torch.Generator().manual_seed(1)
    whole = torch.round(torch.randn(80, 40, generator=generator, dtype=torch.float64) * 50)
    info = torch.finfo(dtype)
    small = (whole * float(info.smallest_normal) * float(info.eps)).to(dtype)
    plain = rank({"w": small}, certify=True)[0]
    for flushing in (True, False):
        torch.set_flush_denormal(flushing)
        try:
            found = rank({"w": small}, certify=True)[0]
            assert flushes() == flushing
        finally:
            torch.set_flush_denormal(False)
        assert found == plain
    assert plain.status == "ok"


def test_where_subnormal_numbers_stay_lost_nothing_is_proven(monkeypatch):
    monkeypatch.setattr(ladder, "flushes", lambda: True)
    with pytest.warns(UserWarning, match="cannot prove"):
        zero, whole = sorted(
            rank({"a": torch.zeros(40, 40), "b": torch.randn(60, 40)}, certify=True), key=lambda e: e.key
        )
    assert (zero.status, zero.certified, zero.lower) == ("rank_deficient", False, 1.0)
    assert (whole.status, whole.certified) == ("ok", False)


def test_where_cublas_emulates_float64_nothing_is_proven(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv("CUBLAS_EMULATE_DOUBLE_PRECISION", raising=False)
    assert not undisturbed.emulates_float64(gpu)
    for value, asked in (("1", True), ("0", False), ("", False), (" 2 ", True)):
        monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", value)
        assert undisturbed.emulates_float64(gpu) == asked
        assert not undisturbed.emulates_float64(cpu)
    weights = {"b": torch.randn(60, 40, generator=torch.Generator().manual_seed(2))}
    assert rank(weights, certify=True)[0].certified
    monkeypatch.setattr(ladder, "emulates_float64", lambda device: True)
    with pytest.warns(UserWarning, match="cannot prove"):
        assert not rank(weights, certify=True)[0].certified


def test_threads_that_lose_subnormal_numbers_are_not_used(monkeypatch):
    seen = []
    monkeypatch.setattr(undisturbed, "_workers_flush", lambda threads: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    with undisturbed._THREADS.changed():
        assert seen == [1]
    assert seen == [1, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_read_whatever_the_default_device_is(dtype, tmp_path):
    """An empty tensor without values is all that a file would be read into."""
    save_file({f"w{i}": torch.randn(40, 30 + i).to(dtype) for i in range(2)}, tmp_path / "model.safetensors")
    expected = list(rank(tmp_path))
    with torch.device("meta"):
        assert list(rank(tmp_path)) == expected
        assert torch.empty(1).is_meta
