"""Whole models on disk, quantized: entries are those of the model, and numbers those of its rounded weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build
from fp4_codes import as_in_gpt_oss
from fp8_codes import dequantized, quantized
from matched import everything, on_disk
from models import one_thread
from packed_codes import gptq
from packing import check_complete
from safetensors.torch import save_file

import kappa_fast
from kappa_fast.matching.names import match


def saved_as(model: torch.nn.Module, tensors: dict[str, torch.Tensor], folder: Path, **quantization: object) -> None:
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def check_same(folder: Path, rounded: Path, quantized_names: int) -> None:
    """The quantized model, and the same model with the values that the codes stand for, stored as floats."""
    with one_thread():
        found, plain = (kappa_fast.rank(path, min_dim=8, progress=False) for path in (folder, rounded))
    assert {e.key for e in found} == {e.key for e in plain}
    for entry in found:
        twin = plain[entry.key]
        assert (entry.index, entry.group, entry.shape, entry.layer) == (twin.index, twin.group, twin.shape, twin.layer)
        assert entry.lower <= twin.upper
        assert twin.lower <= entry.upper
    assert sum(e.quantization is not None for e in found) == quantized_names
    assert found.metadata["num_parameters"] == plain.metadata["num_parameters"]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_moe"])
def test_experts_in_fp8_with_a_tensor_each_are_those_of_the_fused_model(family, tmp_path):
    model = build(family)
    plain_folder, folder = tmp_path / "plain", tmp_path / "fp8"
    plain_folder.mkdir()
    folder.mkdir()
    tensors = on_disk(model, family, plain_folder)
    stored, rounded, count = {}, {}, 0
    for name, tensor in tensors.items():
        stored[name], rounded[name] = tensor, tensor  # what is left as it is
        if re.search(r"(?:_proj\w*|\.w[123])\.weight$", name):
            stored[name], scale = quantized(tensor, (16, 16))
            stored[f"{name}_scale_inv"], count = scale, count + (min(tensor.shape) >= 8)
            rounded[name] = torch.from_numpy(dequantized(stored[name], scale.numpy(), (16, 16)))
    saved_as(model, stored, folder, quant_method="fp8", weight_block_size=[16, 16], modules_to_not_convert=["lm_head"])
    saved_as(model, rounded, plain_folder)
    check_same(folder, plain_folder, count)
    with one_thread():
        found = kappa_fast.rank(folder, progress=False)
    # A router is skipped under its name in the model.
    check_complete({name: tensor for name, tensor in stored.items() if not name.endswith(".gate.weight")}, found)
    experts = [entry for entry in found if ".experts." in entry.name and entry.part]
    assert len(experts) == 2 * 4 * 3
    assert all(target.whole for target in match(everything(found), model) if target.name.endswith("experts.down_proj"))


def test_gpt_oss_in_mxfp4_is_the_model(tmp_path):
    model = build("gpt_oss", intermediate_size=32)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    plain_folder, folder = tmp_path / "plain", tmp_path / "mxfp4"
    plain_folder.mkdir()
    folder.mkdir()
    stored, rounded = {}, {}
    for name, tensor in tensors.items():
        stored[name], rounded[name] = tensor, tensor
        if name.endswith(("gate_up_proj", "down_proj")):
            codes, values = as_in_gpt_oss(name, stored.pop(name))
            stored |= codes
            rounded[name] = torch.from_numpy(values.astype(np.float32).copy()).bfloat16()
    saved_as(model, stored, folder, quant_method="mxfp4")
    saved_as(model, rounded, plain_folder)
    check_same(folder, plain_folder, 2 * 4 * 3)


def test_llama_in_gptq_is_the_model(tmp_path):
    model = build("llama", num_key_value_heads=2, intermediate_size=64)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    plain_folder, folder = tmp_path / "plain", tmp_path / "gptq"
    plain_folder.mkdir()
    folder.mkdir()
    stored, rounded = {}, {}
    for name, tensor in tensors.items():
        stored[name], rounded[name] = tensor, tensor
        if "_proj" in name:
            del stored[name]
            codes, values = gptq(tensor, 4, np.arange(tensor.shape[1]) // 16, symmetric=False)
            stored |= {name.removesuffix("weight") + key.removeprefix("a."): value for key, value in codes.items()}
            rounded[name] = torch.from_numpy(values)
    saved_as(model, stored, folder, quant_method="gptq", bits=4, group_size=16, desc_act=False, sym=False)
    saved_as(model, rounded, plain_folder)
    check_same(folder, plain_folder, 2 * 7)
