"""ComfyUI's markers, and scales in tiles of 128 x 4, laid out here one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fp4_codes import nvfp4
from models import matrices, reasons
from packing import at_blocks, check, check_complete, from_nibbles, numbers, powers, trained
from safetensors.torch import save_file

from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source

E4M3 = torch.float8_e4m3fn


def marker(**said: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def in_tiles(scale: torch.Tensor) -> torch.Tensor:
    """By the formula of cuBLAS: within a tile, the scale of row r, column c is at (r % 32) * 16 + (r // 32) * 4 + c."""
    rows, columns = -(-scale.shape[0] // 128) * 128, -(-scale.shape[1] // 4) * 4
    bytes_of, out = scale.view(torch.uint8), np.zeros(rows * columns, np.uint8)
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            tile = (r // 128) * (columns // 4) + c // 4
            out[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] = bytes_of[r, c]
    return torch.from_numpy(out.reshape(rows, columns)).view(scale.dtype)


def as_nvfp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    codes, scale, by = nvfp4(weight)
    second = np.float32(1) / np.float32(by)
    values = from_nibbles(codes).astype(np.float32) * at_blocks(numbers(scale) * second, codes.shape, (1, 16))
    upper_first = torch.from_numpy((codes[:, 0::2] << 4) | codes[:, 1::2])
    return {"weight": upper_first, "weight_scale": in_tiles(scale), "weight_scale_2": torch.tensor(second)}, values


def as_mxfp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    blocks = weight.reshape(weight.shape[0], -1, 32)
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1) / 448)) + 1
    codes = (blocks / 2 ** exponent[..., None]).to(E4M3).view(weight.shape)
    scale = (exponent + 127).to(torch.uint8)
    return {"weight": codes, "weight_scale": in_tiles(scale)}, numbers(codes) * at_blocks(
        powers(scale), codes.shape, (1, 32)
    )


def as_fp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(E4M3)
    return {"weight": codes, "weight_scale": scale}, numbers(codes) * np.float32(scale)


def as_int8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.numpy().astype(np.float32) * scale.numpy()


def as_int8_blocks(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    scale = torch.rand(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128)) / 100 + 0.001
    grid = at_blocks(scale.numpy(), tuple(weight.shape), (128, 128))
    codes = torch.from_numpy(np.clip(np.rint(weight.numpy() / grid), -127, 127).astype(np.int8))
    return {"weight": codes, "weight_scale": scale}, codes.numpy().astype(np.float32) * grid


FORMATS = {
    "nvfp4": as_nvfp4,
    "mxfp8": as_mxfp8,
    "float8_e4m3fn": as_fp8,
    "int8_tensorwise": as_int8,
    "int8_blockwise": as_int8_blocks,
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [256, 208])
@pytest.mark.parametrize("where", ["beside", "header"])
def test_what_is_marked_is_read_as_marked(kind, rows, where, tmp_path):
    stored, values = FORMATS[kind](trained(rows, 384))
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()} | {"m.input_scale": torch.ones(())}
    tensors["n.weight"] = torch.randn(32, 20)
    layers = {"format_version": "1.0", "layers": {"m": {"format": kind}}}
    if where == "beside":
        tensors["m.comfy_quant"] = marker(format=kind, full_precision_matrix_mult=True)
    save_file(
        tensors,
        tmp_path / "m.safetensors",
        metadata={"_quantization_metadata": json.dumps(layers)} if where == "header" else None,
    )
    ranking = check(tmp_path / "m.safetensors", {"m.weight": values})
    assert ranking["m.weight"].quantization == f"comfyui {kind}"
    assert ranking.metadata["num_parameters"] == rows * 384 + 640  # a scale of activations is no parameter
    check_complete(tensors, ranking)


def test_fp8_in_bytes_is_fp8():
    stored, values = as_fp8(trained(64, 96))
    stored |= {"weight": stored["weight"].view(torch.uint8), "comfy_quant": marker(format="float8_e4m3fn")}
    check({f"m.{name}": tensor for name, tensor in stored.items()}, {"m.weight": values})


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_without_marker_and_config_scales_that_may_lie_in_tiles_are_refused(kind):
    stored, _ = FORMATS[kind](trained(256, 384))
    with pytest.raises(SourceError, match=r"may be in rows .* or in tiles of 128 x 4 .*exclude='m.weight'"):
        open_source({f"m.{name}": tensor for name, tensor in stored.items()}, Filters())


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"format": "int8_tensorwise", "convrot": True}, r"int8_tensorwise with convrot"),
        ({"format": "asym_w4a8_int8"}, "asym_w4a8_int8"),
        ({"format": "svdquant_w4a4"}, "svdquant_w4a4"),
    ],
)
def test_what_no_reader_knows_is_skipped_whole(said, why):
    stored, _ = as_int8(trained(64, 64))
    source = {f"m.{name}": tensor for name, tensor in stored.items()} | {"m.comfy_quant": marker(**said)}
    source |= {"m.weight_proj_down": torch.randn(64, 32), "m.weight_proj_up": torch.randn(64, 32)}
    assert matrices(source) == {}
    assert why in reasons(source)["m.weight"]
    assert "part of a quantized layer" in reasons(source)["m.weight_proj_up"]


def test_markers_that_contradict_tensors_or_the_header_are_refused(tmp_path):
    stored, _ = as_int8(trained(64, 64))
    source = {f"m.{name}": tensor for name, tensor in stored.items()} | {"m.comfy_quant": marker(format="nvfp4")}
    with pytest.raises(
        SourceError, match=r"the marker of 'm.weight' says 'nvfp4', but the codes have dtype int8: correct"
    ):
        open_source(source, Filters())
    layers = {"layers": {"m": {"format": "int8_tensorwise"}}}
    save_file(source, tmp_path / "m.safetensors", metadata={"_quantization_metadata": json.dumps(layers)})
    with pytest.raises(SourceError, match=r"'m.comfy_quant' says 'nvfp4', and .* the header of the file 'int8_tensorw"):
        open_source(tmp_path / "m.safetensors", Filters())
    source["m.comfy_quant"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    with pytest.raises(
        SourceError, match=r"'m.comfy_quant' should describe how weights were quantized, but is damaged"
    ):
        open_source(source, Filters())


def test_every_shard_may_speak_of_its_own_layers(tmp_path):
    truth = {}
    for i, kind in enumerate(("nvfp4", "mxfp8"), 1):
        stored, truth[f"l{i}.weight"] = FORMATS[kind](trained(256, 384))
        said = {"_quantization_metadata": json.dumps({"layers": {f"l{i}": {"format": kind}}})}
        tensors = {f"l{i}.{name}": tensor for name, tensor in stored.items()}
        save_file(tensors, tmp_path / f"m-0000{i}-of-00002.safetensors", metadata=said)
    check(tmp_path, truth)
