"""Models with the shapes of public ones and trained-like weights, made on the device where they are ranked."""

from __future__ import annotations

import math
from typing import Any

import torch
from workloads import OUTLIERS, STRENGTH

# name: (class of its config, what differs from the class's defaults)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "TinyLlama-1.1B": (
        "LlamaConfig",
        dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32)
        | dict(num_key_value_heads=4, vocab_size=32000),
    ),
    "Llama-3.1-8B": (
        "LlamaConfig",
        dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
        | dict(num_key_value_heads=8, vocab_size=128256),
    ),
    "OLMoE-1B-7B": (
        "OlmoeConfig",
        dict(hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16)
        | dict(num_key_value_heads=16, vocab_size=50304, num_experts=64, num_experts_per_tok=8),
    ),
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, head_dim=128)
        | dict(num_attention_heads=32, num_key_value_heads=4, vocab_size=151936)
        | dict(num_experts=128, num_experts_per_tok=8),
    ),
    "Mixtral-8x7B": (
        "MixtralConfig",
        dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
        | dict(num_key_value_heads=8, vocab_size=32000, num_local_experts=8),
    ),
}
SMOKE = dict(hidden_size=64, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2, vocab_size=80)
SMOKE |= dict(moe_intermediate_size=24, head_dim=32)


def layers_of(name: str) -> int:
    """The layers of the whole model."""
    return int(MODELS[name][1]["num_hidden_layers"])


def size_of(name: str) -> int:
    """Bytes of its weights in bfloat16."""
    with torch.device("meta"):
        return 2 * sum(p.numel() for p in _bare(name, layers_of(name), smoke=False).parameters())


def build(name: str, device: torch.device, *, layers: int | None = None, smoke: bool = False) -> torch.nn.Module:
    """The model in bfloat16, with ``layers`` of its layers (all by default)."""
    with torch.device("meta"):
        model = _bare(name, 1 if smoke else layers or layers_of(name), smoke)
    model = model.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _fill(parameter_name, parameter, generator)
    return model.eval()


def _bare(name: str, layers: int, smoke: bool) -> torch.nn.Module:
    import transformers

    config_class, options = MODELS[name]
    options = {**options, "num_hidden_layers": layers}
    if smoke:
        options |= {key: value for key, value in SMOKE.items() if key in options}
        options |= {key: 2 for key in ("num_experts", "num_experts_per_tok", "num_local_experts") if key in options}
    config = getattr(transformers, config_class)(**options)
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def shapes_of(name: str) -> dict[tuple[int, int], int]:
    """How many matrices (m, n), m >= n, of each shape rank() takes from it by default."""
    with torch.device("meta"):
        parameters = dict(_bare(name, 1, smoke=False).named_parameters())
    found: dict[tuple[int, int], int] = {}
    for parameter_name, p in parameters.items():
        if p.ndim < 2 or any(word in parameter_name for word in ("embed", "lm_head", ".gate.")):
            continue
        rows, columns = p.shape[-2:]
        parts = 2 if "gate_up" in parameter_name else 1
        shape = (max(rows // parts, columns), min(rows // parts, columns))
        found[shape] = found.get(shape, 0) + layers_of(name) * parts * p[..., 0, 0].numel()
    return found


def _fill(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Gaussian entries and, on projections, a decaying spectrum of outliers as in workloads.py."""
    if parameter.ndim < 2:
        parameter.fill_(1.0)
        return
    strength = next((s for key, s in STRENGTH.items() if key in name), 3.0 if parameter.ndim == 3 else None)
    for matrix in parameter if parameter.ndim == 3 else parameter[None]:
        filled(matrix, strength, generator)


def filled(matrix: torch.Tensor, strength: float | None, generator: torch.Generator) -> torch.Tensor:
    """The matrix itself, with a Gaussian part and, unless ``strength`` is None, outliers in place of its values."""
    rows, columns = matrix.shape
    values = torch.randn(rows, columns, generator=generator, device=matrix.device)
    if strength is not None and min(rows, columns) > OUTLIERS:
        edge = math.sqrt(rows) + math.sqrt(columns)
        scale = edge * torch.logspace(math.log10(strength), math.log10(0.5), OUTLIERS, device=matrix.device)
        left = torch.randn(rows, OUTLIERS, generator=generator, device=matrix.device) / math.sqrt(rows)
        right = torch.randn(columns, OUTLIERS, generator=generator, device=matrix.device) / math.sqrt(columns)
        values.addmm_(left * scale, right.T)
    return matrix.copy_(values.mul_(0.02))
