"""Cases of a recording: what weights come from. Files, modules, adapters, quantized formats, odd names and layouts."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import recording_quantized as quantized
import torch
from recording_sources import (
    Cases,
    Experts,
    Stored,
    gaussian,
    integers,
    model,
    reparametrized,
    seen_through,
    trained_like,
)
from torch import nn

import kappa_fast
from kappa_fast.planning import plan

OFFERED: dict[str, Any] = {"min_dim": 1, "progress": False}


def cases(stored: Stored) -> Cases:
    """Each source as it is, and where it matters with what decides how it is read."""
    yield from _files(stored)
    yield from _modules()
    yield from _layouts(stored)
    yield from _quantized(stored)
    yield from _adapters()


def _files(stored: Stored) -> Cases:
    sharded, single = stored.sharded(), stored.single()
    listed = sharded / "model.safetensors.index.json"
    for name, source in {
        "a file": single,
        "a directory": sharded,
        "an index": listed,
        "a shard": sharded / SHARD,
    }.items():
        yield name, partial(kappa_fast.rank, source, progress=False)
    yield "a path as a text", partial(kappa_fast.rank, str(single), progress=False)
    without = stored.sharded("without an index")
    (without / "model.safetensors.index.json").unlink(missing_ok=True)
    yield "shards without an index", partial(kappa_fast.rank, without, progress=False)
    plain = {"layers.0.w.weight": gaussian(40, 30), "layers.0.w.bias": gaussian(40), "n": torch.ones(())}
    odd = plain | {
        "größe": gaussian(20, 20),
        "a b": gaussian(20, 18),
        "empty": torch.zeros(0, 16),
        "ids": integers(20, 20),
    }
    yield "odd names and tensors", partial(kappa_fast.rank, stored.folder("odd", odd), **OFFERED)
    many = {f"layers.{i}.w.weight": gaussian(18, 17, seed=i) for i in range(30)}
    yield "many layers", partial(kappa_fast.rank, stored.folder("many", many), progress=False)
    gguf = quantized.write_gguf(stored.place.folder / "model.gguf")
    yield "gguf", partial(kappa_fast.rank, gguf, progress=False)
    yield "gguf, everything, proven", partial(kappa_fast.rank, gguf, embeddings=True, certify=True, **OFFERED)
    yield "gguf, plan", partial(plan, gguf, measure=False, memory_budget="64MB")
    only = stored.new("gguf")
    shutil.copy(gguf, only / "model.gguf")
    yield "a directory with gguf", partial(kappa_fast.rank, only, progress=False)


SHARD = "model-00001-of-00002.safetensors"


def _modules() -> Cases:
    for name, options in {"tied": {}, "untied": {"tied": False}, "fused attention": {"fused": True}}.items():
        made = model(**options)
        for how in ({}, {"embeddings": True, "routers": True, "min_dim": 1}, {"fused": "stored"}):
            yield f"module, {name}, {how}", partial(kappa_fast.rank, made, progress=False, **how)
        yield f"state dict, {name}", partial(kappa_fast.rank, made.state_dict(), progress=False)
    for name, layer in reparametrized().items():
        yield f"module, {name}", partial(kappa_fast.rank, layer, **OFFERED)
        yield f"module, {name}, plan", partial(plan, layer, measure=False, memory_budget="64MB")
        state = {key: value for key, value in layer.state_dict().items()}
        yield f"state dict, {name}", partial(kappa_fast.rank, state, **OFFERED)
    for name, layer in seen_through().items():
        yield f"module, {name}", partial(kappa_fast.rank, layer, **OFFERED)
    torch.manual_seed(8)
    layers = {
        "convolutions": nn.ModuleDict(
            {str(d): kind(20, 24, 3) for d, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d))}
        ),
        "transposed convolutions": nn.Sequential(nn.ConvTranspose1d(20, 24, 3), nn.ConvTranspose2d(20, 24, 3)),
        "grouped convolutions": nn.Sequential(nn.Conv2d(24, 24, 3, groups=4), nn.Conv1d(20, 20, 5, groups=20)),
        "recurrent": nn.ModuleDict({"lstm": nn.LSTM(20, 24, 2), "gru": nn.GRU(20, 24, bidirectional=True)}),
        "attention": nn.ModuleDict(
            {"a": nn.MultiheadAttention(32, 4), "b": nn.MultiheadAttention(32, 4, kdim=20, vdim=24)}
        ),
        "bilinear": nn.Bilinear(20, 18, 16),
        "encoder layer": nn.TransformerEncoderLayer(32, 4, 48),
        "parameter list": nn.ParameterList([gaussian(20, 20), gaussian(3, 20, 18), gaussian(20)]),
        "a layer alone": nn.Linear(40, 30),
        "in bfloat16": nn.Linear(40, 30).bfloat16(),
        "frozen": nn.Linear(40, 30).requires_grad_(False),
        "on the meta device": nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20, device="meta")),
        "embedding bag": nn.Sequential(nn.EmbeddingBag(40, 20), nn.Linear(20, 18)),
    }
    for name, layer in layers.items():
        yield f"module, {name}", partial(kappa_fast.rank, layer, **OFFERED)


def _layouts(stored: Stored) -> Cases:
    """Fused tensors of several families, which the config, the class or the shape tells apart."""
    torch.manual_seed(9)
    experts = nn.ModuleDict({"experts": Experts(3, 40, 24), "down": nn.Linear(40, 30)})
    yield "module, fused experts", partial(kappa_fast.rank, experts, **OFFERED)
    tensors = {
        "phi3": {
            "model.layers.0.self_attn.qkv_proj.weight": gaussian(96, 32),
            "model.layers.0.mlp.gate_up_proj.weight": gaussian(96, 32),
        },
        "gpt2": {"h.0.attn.c_attn.weight": gaussian(32, 96), "h.0.mlp.c_fc.weight": gaussian(32, 64)},
        "gpt_neox": {"gpt_neox.layers.0.attention.query_key_value.weight": gaussian(96, 32)},
        "mixtral": {
            f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight": gaussian(*shape, seed=e)
            for e in range(2)
            for w, shape in (("w1", (24, 32)), ("w2", (32, 24)), ("w3", (24, 32)))
        },
        "qwen3_moe": {
            "model.layers.0.mlp.experts.gate_up_proj": gaussian(2, 48, 32),
            "model.layers.0.mlp.experts.down_proj": gaussian(2, 32, 24),
        },
        "gpt_oss": {
            "model.layers.0.mlp.experts.gate_up_proj": gaussian(2, 32, 48),
            "model.layers.0.mlp.experts.down_proj": gaussian(2, 24, 32),
        },
        "": {
            "x.experts.gate_up_proj": gaussian(2, 48, 32),
            "x.stack": gaussian(3, 20, 18),
            "x.conv.weight": gaussian(20, 18, 3),
        },
    }
    for kind, found in tensors.items():
        folder = stored.folder(f"layout {kind}", found, **({"model_type": kind} if kind else {}))
        for how in ("split", "stored"):
            yield f"layout {kind or 'unknown'}, {how}", partial(kappa_fast.rank, folder, fused=how, **OFFERED)
    yield from _described(stored)
    weight = {"a.weight": trained_like(40, 30), "a.bias": gaussian(40)}
    for name, extra in {
        "an optimizer's state": {"exp_avg": gaussian(40, 30), "optimizer.state.0.exp_avg_sq": gaussian(40, 30)},
        "an adapter": {"a.lora_A.weight": gaussian(4, 30), "a.lora_B.weight": gaussian(40, 4)},
        "masks and tables": {
            "attn.mask": gaussian(20, 20),
            "pos_embed": gaussian(1, 20, 30),
            "rotary.inv_freq": gaussian(20, 20),
        },
        "weight norm": {"b.weight_g": gaussian(30, 1).abs(), "b.weight_v": gaussian(30, 40)},
        "tied": {"tied.weight": gaussian(36, 30)},
        "complex and bool": {"c": torch.complex(gaussian(20, 20), gaussian(20, 20)), "d": gaussian(20, 20) > 0},
    }.items():
        state = weight | extra
        if name == "tied":
            state |= {"also.weight": state["tied.weight"], "turned.weight": state["tied.weight"].T}
        yield f"mapping with {name}", partial(kappa_fast.rank, state, **OFFERED)


def _described(stored: Stored) -> Cases:
    """Checkpoints whose config.json describes a model, whose names the entries then have."""
    small = dict(
        hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    config = dict(small, vocab_size=64, num_local_experts=2, num_experts_per_tok=1, model_type="mixtral")
    at = "model.layers.0.block_sparse_moe.experts"
    names = {f"{at}.{e}.{w}.weight": (32, 24) if w == "w2" else (24, 32) for e in range(2) for w in ("w1", "w2", "w3")}
    found = {name: gaussian(*shape, seed=i) for i, (name, shape) in enumerate(names.items())}
    found |= {f"model.layers.0.self_attn.{p}_proj.weight": gaussian(16 if p in "kv" else 32, 32) for p in "qkvo"}
    path = stored.folder("described", found, architectures=["MixtralForCausalLM"], **config)
    yield "described by its config", partial(kappa_fast.rank, path, progress=False)
    yield "described by its config, plan", partial(plan, path, measure=False, memory_budget="64MB", ranks=2)
    yield "described by its config, stored", partial(kappa_fast.rank, path, progress=False, fused="stored")


def _quantized(stored: Stored) -> Cases:
    for kind, (tensors, _) in quantized.FORMATS.items():
        folder = stored.folder(f"quantized {kind}", tensors, **quantized.config_of(kind))
        yield f"quantized {kind}", partial(kappa_fast.rank, folder, **OFFERED)
        yield f"quantized {kind}, proven", partial(kappa_fast.rank, folder, certify=True, **OFFERED)
        yield f"quantized {kind}, plan", partial(plan, folder, measure=False, memory_budget="64MB", ranks=2)
        yield f"quantized {kind}, state dict", partial(kappa_fast.rank, tensors, **OFFERED)
    damaged = quantized.nf4()
    del damaged["q.weight.absmax"]
    yield "quantized, damaged", partial(kappa_fast.rank, damaged, **OFFERED)
    for kind in ("exl2", "marlin"):
        said = quantized.FORMATS["gptq"][1] | {"checkpoint_format": kind}
        folder = stored.folder(f"quantized {kind}", quantized.gptq(), quantization_config=said)
        yield f"quantized {kind}", partial(kappa_fast.rank, folder, **OFFERED)
    made = quantized.torchao_model()
    yield "quantized torchao, module", partial(kappa_fast.rank, made, **OFFERED)
    yield "quantized torchao, state dict", partial(kappa_fast.rank, made.state_dict(), **OFFERED)


def _adapters() -> Cases:
    for kind in ("lora", "dora", "ia3"):
        made = quantized.adapted(kind)
        for how in (None, "base", "merged"):
            yield f"adapters {kind}, {how}", partial(kappa_fast.rank, made, adapters=how, **OFFERED)
        yield f"adapters {kind}, plan", partial(plan, made, measure=False, memory_budget="64MB")
        yield f"adapters {kind}, state dict", partial(kappa_fast.rank, made.state_dict(), **OFFERED)
