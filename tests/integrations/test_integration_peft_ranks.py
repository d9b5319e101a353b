"""LoRA ranks by a statistic: in proportion, within the budget, and as PEFT builds them."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from families import batch, build
from make_entries import make_entry

import kappa_fast
from kappa_fast import OptionError
from kappa_fast.integrations.peft import lora_config

peft = pytest.importorskip("peft")
LoraLayer = pytest.importorskip("peft.tuners.lora").LoraLayer
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def selection(model):
    return kappa_fast.rank(model, progress=False).select(top_p=0.7)


def ranks_of(config, selection):
    keys = {entry.name: f"^{re.escape(entry.name.removesuffix('.weight'))}" for entry in selection}
    return {name: config.rank_pattern[key] for name, key in keys.items()}


def parameters_of(lora):
    return sum(p.numel() for n, p in lora.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("budget", [None, 2500, 4000])
def test_adapters_have_ranks_in_proportion_within_the_budget_and_train(selection, budget):
    config = lora_config(selection, rank="stable_rank", r=4, lora_alpha=8, budget=budget)
    ranks = ranks_of(config, selection)
    limit = 4 * sum(sum(e.shape) for e in selection) if budget is None else budget
    lora = peft.get_peft_model(build("llama"), config)
    built = {n.partition(".lora_A")[0]: len(p) for n, p in lora.named_parameters() if ".lora_A" in n}
    assert built == {f"base_model.model.{name.removesuffix('.weight')}": rank for name, rank in ranks.items()}
    total = parameters_of(lora)
    assert limit - max(sum(e.shape) for e in selection) < total <= limit
    free = [(ranks[e.name] / e.stable_rank, e) for e in selection if 1 < ranks[e.name] < min(e.shape)]
    for share, entry in free:  # all within one rank of one factor
        assert all(abs(share - other) <= 1.0 / entry.stable_rank + 1.0 / one.stable_rank for other, one in free)
    scales = [module.scaling["default"] for module in lora.modules() if isinstance(module, LoraLayer)]
    assert scales == pytest.approx([2.0] * len(selection))
    lora(**batch()).loss.backward()
    assert all(p.grad is not None for n, p in lora.named_parameters() if "lora_A" in n)


def test_a_callable_decides_and_the_model_may_have_other_names(model, selection):
    config = lora_config(selection, rank=lambda entry: 1.0, model=model, r=3)
    assert set(config.rank_pattern.values()) == {3}
    assert set(config.alpha_pattern.values()) == {8.0}
    wide = lora_config(selection, rank=lambda entry: 1.0, budget=10**9)
    assert ranks_of(wide, selection) == {entry.name: min(entry.shape) for entry in selection}


def test_alphas_follow_the_root_of_the_rank_with_rslora(selection):
    config = lora_config(selection, rank="stable_rank", r=4, lora_alpha=8, use_rslora=True)
    for key, rank in config.rank_pattern.items():
        assert config.alpha_pattern[key] / rank**0.5 == pytest.approx(8 / 4**0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank="stable_rang"), "rank='stable_rang': give .*did you mean 'stable_rank'"),
        (dict(rank="flatness"), "'flatness' gives -.* and a rank needs a positive finite number"),
        (dict(rank=lambda entry: float("nan")), "the callable of rank= gives nan"),
        (dict(rank=lambda entry: 1e-320), "the callable of rank= gives 1e-320 .*from 1e-100 to 1e"),
        (dict(rank=lambda entry: 10**400), "the callable of rank= gives 10+ "),
        (dict(rank=lambda entry: {}[entry.key]), r"rank= raised KeyError for '\S+weight'"),
        (dict(rank="stable_rank", r=0), "r=0: give a count from 1 on"),
        (dict(rank="stable_rank", budget=10), "budget=10: adapters of rank 1 for all of the selection take"),
        (dict(budget=10**6), r"budget= is shared out by rank="),
        (dict(rank="stable_rank", rank_pattern={"q": 3}), "rank= decides rank_pattern: leave this option out"),
    ],
)
def test_what_cannot_work_is_refused(selection, options, message):
    with pytest.raises(OptionError, match=message):
        lora_config(selection, **options)


def test_convolutions_with_groups_have_larger_adapters_and_are_refused():
    net = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, groups=4), torch.nn.Conv2d(32, 16, 3))
    found = kappa_fast.rank(net, progress=False).select(top_p=1.0)
    assert len(found) == 2
    with pytest.raises(OptionError, match=r"'0' is a convolution with groups.*leave it out with excluding\(\)"):
        lora_config(found, model=net, rank="stable_rank", budget=20000)
    config = lora_config(found.excluding("0.weight"), model=net, rank="stable_rank", budget=6000)
    lora = peft.get_peft_model(net, config)
    assert parameters_of(lora) <= 6000


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
@pytest.mark.parametrize("budget", [None, 3000])
def test_what_adapters_have_for_each_output_counts(option, budget):
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(32, 96), torch.nn.Linear(96, 32)

    found = kappa_fast.rank(Square(), progress=False).select(num_tensors=2)
    config = lora_config(found, rank="stable_rank", r=3, budget=budget, **{option: True})
    total = parameters_of(peft.get_peft_model(Square(), config))
    limit = 3 * 2 * (32 + 96) + 2 * 96 if budget is None else budget
    assert limit - 2 * (32 + 96) < total <= limit


def test_a_part_of_a_fused_weight_is_refused_since_all_of_it_is_adapted():
    part = dataclasses.replace(
        make_entry("layers.0.qkv_proj.weight", stable_rank=3.0), part="[q]", index=(slice(0, 32, None),)
    )
    chosen = kappa_fast.Ranking([part]).select(num_tensors=1)
    with pytest.raises(OptionError, match=r"'layers.0.qkv_proj' is .* selected in part: rank with fused='stored'"):
        lora_config(chosen, partial="widen", rank="stable_rank")


def test_statistics_of_any_size_give_ranks(selection):
    first, *_ = selection

    def far_apart(entry):
        return np.float32(1e-30) if entry.key == first.key else 1e100

    config = lora_config(selection, rank=far_apart, budget=10**9)
    assert ranks_of(config, selection) == {entry.name: min(entry.shape) for entry in selection}
    ranks = ranks_of(lora_config(selection, rank=far_apart, budget=4000), selection)
    assert ranks[first.name] == 1
    assert min(rank for name, rank in ranks.items() if name != first.name) > 1


def test_stacks_of_experts_are_refused_by_name():
    found = kappa_fast.rank(build("mixtral"), include="experts", progress=False)
    with pytest.raises(OptionError, match=r"rank= gives a module the rank .* and .*experts.* is a stack"):
        lora_config(found.select(num_tensors=2, unit="parameter"), rank="stable_rank")
