"""Builds small models of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

SMALL = dict(
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
EXPERTS = dict(moe_intermediate_size=32, num_experts_per_tok=2)
DEEPSEEK = dict(EXPERTS, n_routed_experts=4, first_k_dense_replace=1, n_group=1, topk_group=1, kv_lora_rank=32)
DEEPSEEK |= dict(num_key_value_heads=4, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=1)


@dataclass(frozen=True)
class Family:
    """A causal language model: its config, the groups that must come out, and what must be skipped as a router."""

    config: str
    options: dict[str, Any]
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    routers: int = 0
    stored: tuple[str, ...] = ()


GATE_UP = {"gate_up_proj.gate": (48, 64), "gate_up_proj.up": (48, 64), "experts.down_proj": (64, 48)}
NARROW = {"gate_up_proj.gate": (32, 64), "gate_up_proj.up": (32, 64), "experts.down_proj": (64, 32)}
COLUMNS = {"gate_up_proj.gate": (64, 48), "gate_up_proj.up": (64, 48), "experts.down_proj": (48, 64)}
QKV = {"qkv_proj.weight.q": (64, 64), "qkv_proj.weight.k": (32, 64), "qkv_proj.weight.v": (32, 64)}
C_ATTN = {f"c_attn.weight.{piece}": (64, 64) for piece in "qkv"}
THIRDS = {f"Wqkv.weight.{piece}": (64, 64) for piece in "qkv"}
FAMILIES = {
    "mixtral": Family("MixtralConfig", dict(num_local_experts=4), GATE_UP, routers=2),
    "qwen2_moe": Family("Qwen2MoeConfig", dict(EXPERTS, num_experts=4), NARROW, routers=4),
    "qwen3_moe": Family("Qwen3MoeConfig", dict(EXPERTS, num_experts=4, head_dim=16), NARROW, routers=2),
    "olmoe": Family("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=2), GATE_UP, routers=2),
    "deepseek_v2": Family("DeepseekV2Config", dict(DEEPSEEK), NARROW, routers=1),
    "deepseek_v3": Family("DeepseekV3Config", dict(DEEPSEEK), NARROW, routers=1),
    "glm4_moe": Family("Glm4MoeConfig", dict(DEEPSEEK, head_dim=16), NARROW, routers=1),
    "granitemoe": Family("GraniteMoeConfig", dict(num_local_experts=4, num_experts_per_tok=2), GATE_UP, routers=2),
    "gpt_oss": Family("GptOssConfig", dict(num_local_experts=4, head_dim=16), COLUMNS, routers=2),
    "llama4_text": Family(
        "Llama4TextConfig", dict(num_local_experts=4, head_dim=16, intermediate_size_mlp=96), COLUMNS, routers=2
    ),
    "jetmoe": Family(
        "JetMoeConfig",
        dict(num_local_experts=4, kv_channels=16),
        {
            "mlp.input_linear.weight.gate": (48, 64),
            "mlp.input_linear.weight.up": (48, 64),
            "mlp.output_linear.weight": (64, 48),
            "experts.input_linear.weight": (32, 64),
            "kv_proj.weight.k": (32, 64),
            "kv_proj.weight.v": (32, 64),
        },
        routers=4,
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        dict(
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32
        )
        | dict(mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=1, head_dim=16),
        {"experts.up_proj": (32, 64), "experts.down_proj": (64, 32)},
        routers=1,
    ),
    "phi3": Family("Phi3Config", {}, QKV | {"gate_up_proj.weight.gate": (48, 64), "gate_up_proj.weight.up": (48, 64)}),
    "glm": Family("GlmConfig", dict(head_dim=16), {"gate_up_proj.weight.gate": (48, 64)}),
    "gpt2": Family("GPT2Config", GPT2, C_ATTN),
    "openai-gpt": Family("OpenAIGPTConfig", GPT2, C_ATTN),
    "mpt": Family("MptConfig", dict(d_model=64, n_heads=4, n_layers=2), THIRDS),
    "gpt_neox": Family("GPTNeoXConfig", {}, {"query_key_value.weight": (192, 64)}, stored=("query_key_value",)),
    "bloom": Family("BloomConfig", dict(n_head=4), {"query_key_value.weight": (192, 64)}, stored=("query_key_value",)),
    "falcon": Family("FalconConfig", {}, {"query_key_value.weight": (96, 64)}, stored=("query_key_value",)),
    "llama": Family("LlamaConfig", {}, {"mlp.gate_proj.weight": (48, 64), "self_attn.k_proj.weight": (32, 64)}),
}


def build(name: str) -> torch.nn.Module:
    """A tiny model with random weights, biases off zero only where the initialization leaves them so."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**{**SMALL, **family.options})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
