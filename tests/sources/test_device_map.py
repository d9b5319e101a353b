"""Models that accelerate has spread over places of one process: what is in memory is ranked, the rest is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kappa_fast

accelerate = pytest.importorskip("accelerate")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 48), nn.Linear(48, 32))


def state_of(model: nn.Module) -> list[object]:
    return [(name, id(p), p.device, id(vars(m))) for m in model.modules() for name, p in m.named_parameters()]


def test_a_model_with_hooks_of_accelerate_is_ranked_where_it_lies():
    model = accelerate.dispatch_model(net(), {"": "cpu"}, force_hooks=True)
    assert all("_hf_hook" in vars(model[i]) for i in (0, 2, 3))
    before = state_of(model)
    assert list(map(repr, kappa_fast.rank(model))) == list(map(repr, kappa_fast.rank(net())))
    assert state_of(model) == before


@pytest.mark.filterwarnings("ignore:.*without values:UserWarning")
def test_what_is_offloaded_to_a_disk_is_named(tmp_path):
    places = {"0": "cpu", "1": "cpu", "2": "disk", "3": "cpu"}
    model = accelerate.dispatch_model(net(), places, offload_dir=tmp_path, main_device="cpu")
    expected = [repr(entry) for entry in kappa_fast.rank(net()) if entry.name != "2.weight"]
    found = kappa_fast.rank(model)
    assert list(map(repr, found)) == expected
    reasons = {skipped.name: skipped.reason for skipped in found.skipped}
    assert reasons["2.weight"] == "on the meta device, without values: rank from the checkpoint"


@pytest.mark.filterwarnings("ignore:.*without values:UserWarning")
def test_what_is_offloaded_to_the_host_is_named_and_nothing_is_loaded():
    model = accelerate.cpu_offload(net(), "cpu")
    before = state_of(model)
    found = kappa_fast.rank(model)
    assert not len(found)
    assert {skipped.name for skipped in found.skipped} >= {"0.weight", "2.weight", "3.weight"}
    assert state_of(model) == before
