"""Training around quantized weights: codes are refused, and adapters beside them land where the selection says."""

from __future__ import annotations

import logging

import pytest
import torch
from models import Experts
from torch import nn

import kappa_fast
from kappa_fast.errors import OptionError
from kappa_fast.integrations.peft import KappaTuneSelector, lora_config

bnb = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

FOUR = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
QUANTIZED = {
    "4 bits": FOUR,
    "4 bits in bfloat16": dict(FOUR, bnb_4bit_quant_storage=torch.bfloat16),
    "8 bits": dict(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    config = transformers.LlamaConfig(
        **dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=80),
        **dict(num_key_value_heads=2, bos_token_id=0, eos_token_id=1),
    )
    path = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(params=QUANTIZED)
def model(request, plain) -> nn.Module:
    how = transformers.BitsAndBytesConfig(**QUANTIZED[request.param])
    return transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, dtype=torch.float32)


def test_codes_are_refused_and_the_model_is_left_as_it_was(model):
    selection = kappa_fast.rank(model).select(num_tensors=3)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    message = r"is stored as (torch\.u?int8|Params4bit), which cannot be trained: train adapters beside it"
    with pytest.raises(OptionError, match=message):
        selection.apply(model)
    with pytest.raises(OptionError, match=message):
        kappa_fast.wrap(torch.optim.AdamW, model, selection, lr=1e-3)
    with pytest.raises(OptionError, match=r"is quantized \(.*\), which only rank\(\) can read: use lora_config"):
        KappaTuneSelector(model, show_progress=False).get_best_targets()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_adapters_land_on_the_selected_modules_and_train(model):
    ranking = kappa_fast.rank(model)
    assert len(ranking) == 14
    selection = ranking.select(num_tensors=5)
    config = lora_config(selection, r=4, lora_alpha=8)
    assert set(lora_config(selection, model=model).target_modules) == set(config.target_modules)
    codes = {n: p.data.clone().view(torch.uint8) for n, p in model.named_parameters() if n in selection.names}
    wrapped = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), config)
    adapted = {name.partition(".lora_")[0] for name, _ in wrapped.named_parameters() if ".lora_" in name}
    assert adapted == {"base_model.model." + name.removesuffix(".weight") for name in selection.names}
    tokens = torch.tensor([[3, 14, 15, 9, 2, 6]])
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    # The codes are as they were, and the model around them is ranked by the same numbers under its own names.
    later = dict(wrapped.named_parameters())
    for name, before in codes.items():
        base = later[f"base_model.model.{name.removesuffix('weight')}base_layer.weight"]
        assert torch.equal(base.data.view(torch.uint8), before)
    again = kappa_fast.rank(wrapped)
    assert {(e.name.removeprefix("base_model.model."), e.kappa) for e in again} == {(e.name, e.kappa) for e in ranking}


def test_experts_in_four_bits_are_refused_part_by_part():
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = nn.Module()
    model.experts = Experts(3, 64, 64)
    replace_parameter_4bit(model.experts, "gate_up_proj")
    selection = kappa_fast.rank(model).select(num_tensors=9)
    message = r"'experts\.gate_up_proj\[\d\]\.\w+' is a part of .*, which holds codes \(torch\.uint8\) that cannot be"
    with pytest.raises(OptionError, match=message):
        selection.apply(model)
    selection.excluding("gate_up_proj").apply(model).restore()


def test_tensors_that_dequantize_themselves_are_refused():
    logging.disable(logging.WARNING)
    quantization = pytest.importorskip("torchao.quantization")
    logging.disable(logging.NOTSET)
    model = nn.ModuleDict({"q": nn.Linear(64, 64), "k": nn.Linear(64, 48)}).bfloat16()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "q")
    selection = kappa_fast.rank(model).select(num_tensors=2)
    with pytest.raises(OptionError, match=r"'q\.weight' is stored as Int8Tensor, which cannot be trained"):
        selection.apply(model)
    selection.excluding("^q").apply(model).restore()


@pytest.mark.parametrize("model", ["4 bits"], indirect=True)
def test_a_ranking_of_the_quantized_model_selects_in_the_plain_one(model, plain):
    selection = kappa_fast.rank(model).select(num_tensors=3)
    assert all(entry.quantization for entry in selection.entries)
    whole = transformers.AutoModelForCausalLM.from_pretrained(plain)
    with selection.apply(whole):
        assert {n for n, p in whole.named_parameters() if p.requires_grad} == set(selection.names)
