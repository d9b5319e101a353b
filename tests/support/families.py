"""Tiny models of the families that people train, with weights that depend on nothing but the family."""

from __future__ import annotations

from typing import Any

import torch

SMALL: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_EXPERTS = dict(moe_intermediate_size=24, num_experts_per_tok=2)
_DEEPSEEK = dict(
    _EXPERTS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=0, n_group=1, topk_group=1
) | dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=2)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4)),
    "olmoe": ("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(_EXPERTS, num_experts=4, head_dim=16)),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "gpt_oss": ("GptOssConfig", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16)),
    "phi3": ("Phi3Config", {}),
    "bert": ("BertConfig", {}),
}
MOE = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss")


def build(family: str, **options: Any) -> torch.nn.Module:
    """The model with its language-modelling head, float32, in eval mode."""
    import transformers

    config_class, own = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**SMALL, **own, **options})
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(sorted(FAMILIES).index(family))
    model: torch.nn.Module = auto.from_config(config, dtype=torch.float32).eval()
    return model


def batch(seed: int = 0, rows: int = 3, length: int = 8) -> dict[str, torch.Tensor]:
    """Tokens and labels."""
    tokens = torch.randint(1, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}
