"""adapters="merged" ranks what a model with adapters computes, to the bit what merging it gives."""

from __future__ import annotations

import copy

import pytest
import torch
from trainers import make

import kappa_fast
from kappa_fast import OptionError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::FutureWarning", "ignore::UserWarning:torch"
)

Q = dict(target_modules=r".*\.q_proj")
METHODS = {
    "LoRA": (peft.LoraConfig, dict(Q, r=4)),
    "LoRA with a saved head": (peft.LoraConfig, dict(Q, r=4, modules_to_save=["lm_head"])),
    "DoRA": (peft.LoraConfig, dict(Q, r=4, use_dora=True)),
    "PiSSA": (peft.LoraConfig, dict(Q, r=4, init_lora_weights="pissa")),
    "LoHa": (peft.LoHaConfig, dict(Q, r=4)),
    "LoKr": (peft.LoKrConfig, dict(Q, r=4)),
    "OFT": (peft.OFTConfig, dict(Q, oft_block_size=8)),
    "IA3": (peft.IA3Config, dict(Q, feedforward_modules=[])),
    "VeRA": (peft.VeraConfig, Q),
    "AdaLoRA": (peft.AdaLoraConfig, dict(Q, total_step=10)),
}
FAST = ("LoRA", "LoRA with a saved head", "DoRA")


def trained(model):
    """As if some steps had been taken: every weight that trains is another."""
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=drawn), alpha=0.1)
    return model


def numbers(ranking):
    return {e.key.removeprefix("base_model.model."): (e.kappa, e.lower, e.upper) for e in ranking}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_what_is_measured_is_what_merging_gives(name):
    kind, options = METHODS[name]
    model = trained(peft.get_peft_model(make("llama"), kind(**options)))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"adapters='merged' ranks what the model computes"):
        beside = kappa_fast.rank(model, embeddings=True, progress=False)
    found = kappa_fast.rank(model, adapters="merged", embeddings=True, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert numbers(kappa_fast.rank(model, adapters="base", embeddings=True, progress=False)) == numbers(beside)
    expected = kappa_fast.rank(model.merge_and_unload(), embeddings=True, progress=False)
    assert numbers(found) == numbers(expected)
    changed = {key for key, value in numbers(found).items() if value != numbers(beside)[key]}
    assert {key for key in changed if "q_proj" in key}
    assert all("q_proj" in key or ("saved" in name and "lm_head" in key) for key in changed)


def test_experts_are_measured_with_what_lora_adds_to_their_tensors():
    config = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2)
    model = trained(peft.get_peft_model(make("mixtral"), config))
    found = kappa_fast.rank(model, adapters="merged", progress=False)
    beside = kappa_fast.rank(model, adapters="base", progress=False)
    assert numbers(found) == numbers(kappa_fast.rank(model.merge_and_unload(), progress=False))
    changed = {key for key, value in numbers(found).items() if value != numbers(beside)[key]}
    assert len(changed) == 2 * 4 * 3


def test_adapters_that_do_nothing_yet_or_any_more_do_not_count():
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(**Q, r=4))
    fresh = kappa_fast.rank(model, progress=False)  # a warning would be an error
    trained(model)
    with model.disable_adapter():
        kappa_fast.rank(model, progress=False)
        assert numbers(kappa_fast.rank(model, adapters="merged", progress=False)) == numbers(fresh)
    learned = kappa_fast.rank(model, adapters="merged", progress=False)
    model.merge_adapter()
    assert numbers(kappa_fast.rank(model, progress=False)) == numbers(learned)
    assert numbers(kappa_fast.rank(model, adapters="merged", progress=False)) == numbers(learned)


def test_only_the_adapters_in_use_are_added():
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(**Q, r=4))
    model.add_adapter("other", peft.LoraConfig(**Q, r=2))
    model.set_adapter("other")
    trained(model)
    other = kappa_fast.rank(model, adapters="merged", progress=False)
    model.set_adapter("default")
    default = kappa_fast.rank(model, progress=False)  # which has learned nothing
    assert numbers(other) != numbers(default)


def test_lora_beside_codes_is_added_to_what_they_stand_for():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False))
    layer = bitsandbytes.nn.Linear4bit(64, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bitsandbytes.nn.Params4bit(model[0].weight.data, requires_grad=False, quant_type="nf4")
    model[0] = layer.to("cpu")
    adapted = trained(peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=4)))
    (found,) = kappa_fast.rank(adapted, adapters="merged", progress=False)
    wrapper = adapted.base_model.model[0]
    codes = wrapper.base_layer.weight
    weight = bitsandbytes.functional.dequantize_4bit(codes.data, codes.quant_state)
    truth = torch.linalg.svdvals((weight + wrapper.get_delta_weight("default").detach()).double())
    assert found.lower <= truth[0] / truth[-1] <= found.upper
    assert found.quantization


def test_an_option_that_cannot_be_is_named():
    with pytest.raises(OptionError, match=r"adapters='both': give 'base' or 'merged'"):
        kappa_fast.rank(torch.nn.Linear(20, 20), adapters="both")
