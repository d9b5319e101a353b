"""How much experts are used, counted against the routers themselves, and their kappas against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.forgetting import bases, texts, usage
from benchmarks.forgetting.plan import PLANS, Plan

KIND = "mixture-tiny"


@pytest.fixture(scope="module")
def model():
    return bases.build(KIND, 0).eval()


def test_shares_are_those_of_the_routers_own_choices(model):
    windows = texts.make("made-a").windows("test", 20, 32)
    chosen: dict[str, torch.Tensor] = {}
    routers = {name: module for name, module in model.named_modules() if name.endswith(".mlp.gate")}
    hooks = [
        module.register_forward_hook(lambda _, given, __, name=name: chosen.update({name: given[0].detach()}))
        for name, module in routers.items()
    ]
    shares = usage.routed(model, windows)
    for hook in hooks:
        hook.remove()
    assert len(shares) == len(routers) == 2
    for share, (name, module) in zip(shares, routers.items(), strict=True):
        logits = chosen[name].reshape(-1, 32).numpy() @ module.weight.detach().numpy().T
        two = np.argsort(-logits, axis=1)[:, :2]
        counts = np.bincount(two.ravel(), minlength=4)
        assert np.allclose(share, counts / counts.sum(), atol=1e-3)


def test_kappas_are_those_of_each_expert_in_order(model):
    logs = usage.log_kappas(model)
    fused = model.model.layers[1].mlp.experts.gate_up_proj.detach()
    wanted = [math.log(np.linalg.cond(expert[:32].double().numpy())) for expert in fused]
    assert logs[1, "experts.gate"] == pytest.approx(wanted, rel=0.01)
    assert {kind for _, kind in logs} == {"experts.gate", "experts.up", "experts.down"}


def test_a_base_counts_once_with_the_mean_over_its_layers(model, monkeypatch, tmp_path):
    save_file(model.state_dict(), tmp_path / f"{KIND}-0.safetensors")
    save_file(model.state_dict(), tmp_path / f"{KIND}-1.safetensors")
    shares = [[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]]
    logs = {(0, "experts.up"): [1.0, 2.0, 3.0, 4.0], (1, "experts.up"): [1.0, 2.0, 4.0, 3.0]}
    monkeypatch.setattr(usage, "routed", lambda *_: shares)
    monkeypatch.setattr(usage, "log_kappas", lambda *_: logs)
    found = usage.usage(Plan.read(PLANS / "smoke.json"), tmp_path, KIND)
    assert [(each["text"], each["type"]) for each in found] == [("made-a", "experts.up"), ("made-b", "experts.up")]
    assert all(each["mean"] == pytest.approx((-1.0 - 0.8) / 2) for each in found)
    assert all(each["interval"] == pytest.approx((-0.9, -0.9)) for each in found)
