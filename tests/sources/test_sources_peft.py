"""Models that PEFT has wrapped give the matrices of the model inside, under its names behind PEFT's prefix."""

from __future__ import annotations

import pytest
import torch
from models import EVERYTHING, matrices, reasons

from kappa_fast.sources import open_source

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "base_model.model."
Q = dict(target_modules=["q_proj"])
METHODS = {
    "LoraConfig": dict(target_modules=["q_proj", "embed_tokens"], r=4, modules_to_save=["lm_head"]),
    "AdaLoraConfig": dict(Q, total_step=10),
    "LoHaConfig": Q,
    "LoKrConfig": Q,
    "OFTConfig": dict(Q, oft_block_size=8),
    "BOFTConfig": dict(Q, boft_block_size=8),
    "VeraConfig": Q,
    "HRAConfig": Q,
    "IA3Config": dict(Q, feedforward_modules=[]),
    "FourierFTConfig": Q,
    "ShiraConfig": dict(Q, r=4),
    "MissConfig": dict(Q, r=4),
    "RandLoraConfig": Q,
    "VBLoRAConfig": dict(Q, vector_length=8, num_vectors=4, topk=2),
    "C3AConfig": dict(Q, block_size=8),
    "LNTuningConfig": dict(target_modules=["input_layernorm"]),
}


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_the_matrices_of_the_model_and_adds_only_adapters(method):
    model = llama()
    expected = {PREFIX + key: m.load().clone() for key, m in matrices(model).items()}
    wrapped = peft.get_peft_model(model, getattr(peft, method)(**METHODS[method]))
    for source in (wrapped, wrapped.state_dict()):
        found = matrices(source)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key].load(), expected[key]) for key in expected)
        assert set(reasons(source).values()) <= {"adapter weight"}


def test_experts_whose_parameters_are_adapted_keep_name_and_layout():
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        num_local_experts=3,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.MixtralForCausalLM(config)
    expected = {PREFIX + key: m.index for key, m in matrices(model).items()}
    lora = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=4)
    wrapped = peft.get_peft_model(model, lora)
    assert {key: m.index for key, m in matrices(wrapped).items()} == expected


def test_new_tokens_and_prompts_are_adapters_and_the_embedding_keeps_its_name():
    tokens = peft.get_peft_model(llama(), peft.LoraConfig(trainable_token_indices=[1, 2], r=4, **Q))
    assert PREFIX + "model.embed_tokens.weight" in matrices(tokens)
    assert "adapter weight" in reasons(tokens).values()
    prompts = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16))
    assert reasons(prompts) == {"prompt_encoder.default.embedding.weight": "adapter weight"}


def test_a_saved_adapter_has_nothing_to_rank(tmp_path):
    peft.get_peft_model(llama(), peft.LoraConfig(r=4, **Q)).save_pretrained(tmp_path)
    source = open_source(tmp_path, EVERYTHING)
    assert source.matrices == ()
    assert {skipped.reason for skipped in source.skipped} == {"adapter weight"}
