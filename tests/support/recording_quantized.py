"""Quantized weights for recordings: random codes and scales, under the names that the formats give them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from recording_sources import gaussian, integers, trained_like
from torch import Tensor, nn

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
Tensors = dict[str, Tensor]


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _number(value: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def _scales(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return (gaussian(*shape, seed=seed).abs() / 100 + 0.01).to(dtype)


def _words(*shape: int, seed: int = 0) -> Tensor:
    """Words of 32 bits, all of them random."""
    return integers(*shape, seed=seed, low=-(1 << 31), high=1 << 31, dtype=torch.int32)


def _float8(weight: Tensor) -> Tensor:
    return (100 * weight).clamp(-440, 440).to(torch.float8_e4m3fn)


def nf4() -> Tensors:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 128]}
    return {
        "q.weight": integers(96 * 64, 1),
        "q.weight.absmax": _scales(192),
        "q.weight.quant_map": torch.tensor(NF4),
        "q.weight.quant_state.bitsandbytes__nf4": _bytes(json.dumps(state)),
        "norm.weight": torch.ones(128),
    }


def int8() -> Tensors:
    codes = integers(64, 96, low=-127, high=128, dtype=torch.int8)
    return {"q.weight": codes, "q.SCB": _scales(64), "q.weight_format": _number(0, torch.uint8)}


def gptq(bits: int = 4) -> Tensors:
    return {
        "a.qweight": _words(128 * bits // 32, 96),
        "a.qzeros": _words(4, 96 * bits // 32, seed=1),
        "a.scales": _scales(4, 96, dtype=torch.float16),
        "a.g_idx": (torch.arange(128) // 32).int(),
    }


def awq() -> Tensors:
    return {
        "a.qweight": _words(128, 12),
        "a.qzeros": _words(4, 12, seed=1),
        "a.scales": _scales(4, 96, dtype=torch.float16),
    }


def fp8() -> Tensors:
    codes = _float8(trained_like(300, 200, seed=5))
    return {"q.weight": codes, "q.weight_scale_inv": _scales(3, 2), "norm.weight": torch.ones(200)}


def fp8_experts() -> Tensors:
    codes = torch.stack([_float8(trained_like(272, 96, seed=e)) for e in range(2)])
    return {"mlp.experts.down_proj": codes, "mlp.experts.down_proj_scale": _scales(2, 272)}


def mxfp4() -> Tensors:
    at = "model.layers.0.mlp.experts"
    return {
        f"{at}.gate_up_proj_blocks": integers(2, 128, 3, 16),
        f"{at}.gate_up_proj_scales": integers(2, 128, 3, seed=1, low=120, high=130),
        f"{at}.down_proj_blocks": integers(2, 96, 2, 16, seed=2),
        f"{at}.down_proj_scales": integers(2, 96, 2, seed=3, low=120, high=130),
        f"{at}.gate_up_proj_bias": gaussian(2, 128).bfloat16(),
    }


def nvfp4() -> Tensors:
    return {
        "a.weight_packed": integers(96, 64),
        "a.weight_scale": (1 + 40 * gaussian(96, 8).abs()).to(torch.float8_e4m3fn),
        "a.weight_global_scale": torch.tensor([1000.0]),
    }


def compressed() -> Tensors:
    return {
        "a.weight_packed": _words(72, 16),
        "a.weight_scale": _scales(72, 4, dtype=torch.bfloat16),
        "a.weight_shape": torch.tensor([72, 128]),
    }


def hqq() -> Tensors:
    settings = {"nbits": _number(4), "group_size": _number(64), "axis": _number(1), "packing": _bytes("4bit_u8")}
    settings |= {"shape": torch.tensor([64, 128]), "view_as_float": _number(0, torch.uint8)}
    settings |= {"unpack_view_dtype": _bytes("torch.uint8"), "compute_dtype": _bytes("torch.float16")}
    settings |= {"quant_scale": _number(0, torch.uint8), "encoded_state_dict": _number(1, torch.uint8)}
    codes = {"W_q": integers(64, 64), "scale": _scales(128, 1, dtype=torch.float16)}
    stored = codes | {"zero": (8 + gaussian(128, 1)).half()} | settings
    return {f"a.{name}": tensor for name, tensor in stored.items()}


def mlx() -> Tensors:
    codes = {"a.weight": _words(64, 16).view(torch.uint32), "a.scales": _scales(64, 2, dtype=torch.bfloat16)}
    return codes | {"a.biases": (-8 * _scales(64, 2)).bfloat16()}


def quanto() -> Tensors:
    codes = integers(48, 64, low=-127, high=128, dtype=torch.int8)
    return {"a.weight._data": codes, "a.weight._scale": _scales(48, 1), "a.input_scale": torch.ones(())}


def comfy() -> Tensors:
    marker = _bytes(json.dumps({"format": "float8_e4m3fn"}))
    weight = _float8(trained_like(96, 64, seed=6))
    return {"a.weight": weight, "a.weight_scale": torch.tensor(0.01), "a.comfy_quant": marker}


FORMATS: Mapping[str, tuple[Tensors, dict[str, Any]]] = {
    "bitsandbytes nf4": (nf4(), {}),
    "bitsandbytes int8": (int8(), {}),
    "gptq": (gptq(), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}),
    "gptq 8 bits": (gptq(8), {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False, "desc_act": False}),
    "awq": (awq(), {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "fp8 blocks": (fp8(), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8 experts": (fp8_experts(), {"quant_method": "fbgemm_fp8"}),
    "mxfp4": (mxfp4(), {"quant_method": "mxfp4"}),
    "nvfp4": (nvfp4(), {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
    "compressed-tensors": (
        compressed(),
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"type": "int", "symmetric": True, "num_bits": 4, "strategy": "group", "group_size": 32},
                }
            },
        },
    ),
    "hqq": (hqq(), {"quant_method": "hqq"}),
    "mlx": (mlx(), {"bits": 4, "group_size": 64}),
    "quanto": (quanto(), {}),
    "comfy": (comfy(), {}),
}


def config_of(kind: str) -> dict[str, Any]:
    """What config.json beside the weights says."""
    said = FORMATS[kind][1]
    named = {"model_type": "gpt_oss"} if kind == "mxfp4" else {}
    return named | ({"quantization" if kind == "mlx" else "quantization_config": said} if said else {})


def torchao_model() -> nn.Module:
    """A layer that torchao has quantized beside a plain one."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(5)
    made = nn.ModuleDict({"q": nn.Linear(128, 96, bias=False), "k": nn.Linear(128, 64)}).bfloat16()
    quantize_(made, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "q")
    return made


def write_gguf(path: Path) -> Path:
    """A file with floats and codes, as llama.cpp writes them."""
    import gguf
    from gguf.quants import quantize

    writer = gguf.GGUFWriter(path, "llama")
    for name, seed in (("blk.0.attn_q.weight", 1), ("blk.1.attn_q.weight", 2)):
        writer.add_tensor(name, trained_like(64, 96, seed=seed).numpy())
    writer.add_tensor("blk.0.ffn_up.weight", trained_like(64, 96, seed=3).half().numpy())
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.1.ffn_up.weight", quantize(trained_like(96, 64, seed=4).numpy(), kind), raw_dtype=kind)
    writer.add_tensor("token_embd.weight", gaussian(40, 32).numpy())
    writer.add_tensor("blk.0.attn_norm.weight", torch.ones(64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def adapted(kind: str = "lora") -> nn.Module:
    """A model with adapters of PEFT that have learned something."""
    import peft

    torch.manual_seed(6)
    base = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 24))
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=["0", "2"], r=4, lora_alpha=8),
        "dora": lambda: peft.LoraConfig(target_modules=["0"], r=4, use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    }[kind]()
    made: nn.Module = peft.get_peft_model(base, config)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(made.named_parameters()):
            if "lora_B" in name or "ia3" in name:
                parameter.copy_(gaussian(*parameter.shape, seed=20 + i) / 4 + ("ia3" in name))
    return made
