"""Weights for recordings: matrices, modules and checkpoints made of seeds, nothing of which is downloaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from recording_plain import Place
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

Call = Callable[[], Any]
Cases = Iterator[tuple[str, Call]]
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Stored:
    """Checkpoints in the folder of a recording, each made when it is asked for first."""

    place: Place

    def folder(self, name: str, tensors: Mapping[str, Tensor], **config: object) -> Path:
        """A directory with these tensors in one file, and a config.json where there is something to say."""
        path = self.place.folder / name
        if not path.exists():
            path.mkdir()
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "model.safetensors")
            if config:
                (path / "config.json").write_text(json.dumps(config))
        return path

    def single(self) -> Path:
        """The model in one file."""
        return self.folder("single", model_tensors()) / "model.safetensors"

    def sharded(self, name: str = "sharded") -> Path:
        """The model in two files with an index."""
        path = self.place.folder / name
        if not path.exists():
            path.mkdir()
            names = sorted(model_tensors())
            halves = dict(zip(SHARDS, (names[: len(names) // 2], names[len(names) // 2 :]), strict=True))
            for file, members in halves.items():
                save_file({name: model_tensors()[name] for name in members}, path / file)
            listed = {name: file for file, members in halves.items() for name in members}
            (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
            (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
        return path

    def new(self, name: str) -> Path:
        """An empty directory."""
        path = self.place.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def seeded(seed: int) -> torch.Generator:
    """Random numbers that depend on the seed alone."""
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent standard normal entries."""
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def integers(*shape: int, seed: int = 0, low: int = 0, high: int = 256, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Random integers from low to below high, such as codes."""
    return torch.randint(low, high, shape, generator=seeded(seed)).to(dtype)


def with_kappa(m: int, n: int, kappa: float, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A dense matrix whose singular values fall geometrically from 1 to 1 / kappa."""
    k = min(m, n)
    left, right = (
        torch.linalg.qr(gaussian(size, k, seed=seed + i, dtype=torch.float64)).Q for i, size in ((1, m), (2, n))
    )
    return ((left * kappa ** -torch.linspace(0, 1, k, dtype=torch.float64)) @ right.T).to(dtype)


def trained_like(m: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random weights with a few directions of larger singular values, as training leaves them."""
    return (0.02 * gaussian(m, n, seed=seed, dtype=torch.float64) + with_kappa(m, n, 1e4, seed=seed + 1)).to(dtype)


@cache
def model_tensors() -> dict[str, Tensor]:
    """A small mixture of experts under the usual names: three dtypes, ladder and SVD sizes, what is skipped, too."""
    found: dict[str, Tensor] = {
        "model.embed_tokens.weight": gaussian(96, 48, seed=1),
        "lm_head.weight": gaussian(96, 48),
    }
    for layer in range(3):
        at, seed = f"model.layers.{layer}", 100 * layer
        for i, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            shape = (24, 48) if name in ("k_proj", "v_proj") else (48, 48)
            found[f"{at}.self_attn.{name}.weight"] = trained_like(*shape, seed=seed + 2 + i)
        found[f"{at}.self_attn.q_proj.bias"] = gaussian(48, seed=seed + 9)
        found[f"{at}.input_layernorm.weight"] = torch.ones(48)
        found[f"{at}.mlp.gate.weight"] = gaussian(4, 48, seed=seed + 10)
        found[f"{at}.mlp.experts.gate_up_proj"] = gaussian(4, 64, 48, seed=seed + 11).bfloat16()
        found[f"{at}.mlp.experts.down_proj"] = gaussian(4, 48, 32, seed=seed + 12).bfloat16()
    found["model.layers.1.mlp.shared.up_proj.weight"] = trained_like(220, 168, seed=900)
    found["model.layers.2.mlp.shared.up_proj.weight"] = trained_like(168, 220, seed=910).half()
    found["model.vision.conv.weight"] = gaussian(24, 8, 3, 3, seed=920)
    return found


class Attention(nn.Module):
    """Projections of their own, or fused."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv_proj = nn.Linear(width, 3 * width)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return self.o_proj(torch.tanh(q * k) + v)


class Experts(nn.Module):
    """Fused experts as transformers keeps them, every one of which is used."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden) / 8)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) / 8)
        self.is_transposed, self.is_concatenated = False, True

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("bh,ewh->ebw", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ebw,ehw->bh", torch.sigmoid(gate) * up, self.down_proj)


class Block(nn.Module):
    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.self_attn, self.router, self.experts = Attention(width, fused), nn.Linear(width, 4), Experts(4, width, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        return x + self.experts(x) * torch.sigmoid(self.router(x)).mean(-1, keepdim=True)


class Model(nn.Module):
    """Two layers between tied embeddings, a convolution and a buffer; it trains on tokens."""

    def __init__(self, width: int = 32, *, fused: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, width)
        self.layers = nn.ModuleList(Block(width, fused) for _ in range(2))
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.lm_head = nn.Linear(width, 64, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("mask", torch.ones(20, 20))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x + self.conv(x.T[None])[0].T)


def model(seed: int = 0, **options: Any) -> Model:
    """The module with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    return Model(**options).eval()


def loss_of(made: nn.Module, step: int) -> Tensor:
    """Of a batch that depends on the number of the step alone."""
    tokens = torch.randint(0, 64, (8,), generator=seeded(step))
    return nn.functional.cross_entropy(made(tokens), tokens.roll(1))


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def _pruned(layer: nn.Module) -> nn.Module:
    return cast(nn.Module, prune.l1_unstructured(layer, "weight", amount=0.4))  # type: ignore[no-untyped-call]


class Doubled(nn.Module):
    """A parametrization that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + 1


class Masked(nn.Linear):
    """A layer that computes another weight from the one that it holds."""

    def __init__(self) -> None:
        super().__init__(40, 30)
        self.register_buffer("kept", (torch.arange(1200).view(30, 40) % 3 > 0).float())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.kept, self.bias)  # type: ignore[operator]


class Twice(nn.Linear):
    """A layer that uses rows, or columns, of its weight twice, and others not at all."""

    def __init__(self, of_rows: bool) -> None:
        super().__init__(40, 30)
        self.of_rows = of_rows

    def forward(self, x: Tensor) -> Tensor:
        if self.of_rows:
            return nn.functional.linear(x, self.weight[:20]) + nn.functional.linear(x, self.weight[5:25])
        return x[..., :20] @ self.weight[:, :20].T + x[..., 10:30] @ self.weight[:, 10:30].T


class Half(nn.Linear):
    """A layer that uses a part of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x[..., :20], self.weight[:, :20], self.bias)


def reparametrized() -> dict[str, nn.Module]:
    """Layers whose weight is computed from what they hold, each beside a plain one."""
    torch.manual_seed(3)

    def parametrized(layer: nn.Module, how: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", how)
        return layer

    made: dict[str, nn.Module] = {
        "weight_norm": _old_weight_norm(nn.Linear(40, 30)),
        "weight_norm of a convolution": _old_weight_norm(nn.Conv1d(20, 30, 3)),
        "weight_norm, parametrized": parametrizations.weight_norm(nn.Linear(40, 30)),
        "spectral_norm, parametrized": parametrizations.spectral_norm(nn.Linear(40, 30)).eval(),
        "orthogonal": parametrizations.orthogonal(nn.Linear(40, 30)),
        "pruned": _pruned(nn.Linear(40, 30)),
        "a parametrization of one's own": parametrized(nn.Linear(40, 30), Doubled()),
        "masked in forward()": Masked(),
        "used in part": Half(40, 30),
        "used in rows that overlap": Twice(True),
        "used in columns that overlap": Twice(False),
    }
    return {name: nn.ModuleDict({"layer": layer, "other": nn.Linear(30, 24)}) for name, layer in made.items()}


def seen_through() -> dict[str, nn.Module]:
    """The same layers behind a compiler, a wrapper or a graph."""

    def net() -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), Masked())

    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(24, 20)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "torch.compile": cast(nn.Module, torch.compile(net())),
            "data parallel": nn.DataParallel(net()),
            "torch.fx": torch.fx.symbolic_trace(net()),
            "torch.fx, weight norm": torch.fx.symbolic_trace(normed),
            "torch.fx, pruned": torch.fx.symbolic_trace(nn.Sequential(_pruned(nn.Linear(24, 20)))),
            "torch.jit.script": torch.jit.script(net()),
            "torch.jit.trace": torch.jit.trace(net(), torch.ones(2, 24)),  # type: ignore[no-untyped-call]
        }
