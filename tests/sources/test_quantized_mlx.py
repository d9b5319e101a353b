"""MLX, packed here by its documentation: codes one after the other from the lowest bit on, as one long number."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from models import matrices, reasons
from packing import at_blocks, check, check_complete, float8, nibbles, packed, powers, saved, trained

from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source

ROWS, COLUMNS = 64, 128


def affine(weight: torch.Tensor, bits: int, group: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """What is stored for a weight, and the float32 it stands for: scale x code + bias, each rounded to bfloat16."""
    most = (1 << bits) - 1
    blocks = weight.double().numpy().reshape(weight.shape[0], -1, group)
    low, high = blocks.min(-1), blocks.max(-1)
    scales = torch.from_numpy(np.maximum((high - low) / most, 1e-6)).bfloat16()
    biases = torch.from_numpy(low).bfloat16()
    step, bias = scales.double().numpy()[..., None], biases.double().numpy()[..., None]
    codes = np.clip(np.rint((blocks - bias) / step), 0, most).astype(np.int64)
    values = (codes * step + bias).astype(np.float32).reshape(tuple(weight.shape))
    words = packed(codes.reshape(tuple(weight.shape)), bits).view(torch.uint32)
    return {"weight": words, "scales": scales, "biases": biases}, values


def under(owner: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{owner}.{name}": tensor for name, tensor in tensors.items()}


def settings(bits: int = 4, group_size: int = 64, **more: object) -> dict[str, object]:
    return {"quantization": {"bits": bits, "group_size": group_size, **more}}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_affine_codes_of_every_width_and_group(bits, group, tmp_path):
    stored, values = affine(trained(ROWS, COLUMNS), bits, group)
    plain = {"b.weight": torch.randn(32, 20)}
    path = saved(tmp_path, under("a", stored) | plain, **settings(bits, group, mode="affine"))
    ranking = check(path, {"a.weight": values, "b.weight": plain["b.weight"].numpy()})
    assert ranking["a.weight"].quantization == f"mlx affine {bits} bits, groups of {group}"
    assert {s.name for s in ranking.skipped} == {"a.scales", "a.biases"}
    assert ranking.metadata["num_parameters"] == ROWS * COLUMNS + 640


def test_a_stack_of_experts_and_a_layer_with_settings_of_its_own(tmp_path):
    parts = [affine(trained(ROWS, COLUMNS, layer), 4, 64) for layer in range(2)]
    stack = {
        name: torch.stack([part[name].view(torch.int32) for part, _ in parts]).view(torch.uint32) for name in ["weight"]
    }
    stack |= {name: torch.stack([part[name] for part, _ in parts]) for name in ("scales", "biases")}
    six, values = affine(trained(ROWS, COLUMNS), 6, 64)
    tensors = under("mlp.switch_mlp.up_proj", stack) | under("head", six)
    path = saved(tmp_path, tensors, **settings(head={"bits": 6, "group_size": 64}))
    truth = {f"mlp.switch_mlp.up_proj.weight[{e}]": part[1] for e, part in enumerate(parts)}
    check_complete(tensors, check(path, truth | {"head.weight": values}))


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("said", [True, False])
def test_microscaled_modes(mode, said, tmp_path):
    weight = trained(ROWS, COLUMNS).numpy()
    group = 16 if mode == "nvfp4" else 32
    scales = torch.full((ROWS, COLUMNS // group), 117, dtype=torch.uint8)  # 2**-10
    spread = powers(scales)
    if mode == "nvfp4":
        scales = torch.full(scales.shape, 0x10, dtype=torch.uint8)
        spread = np.full(scales.shape, float8(0x10, 4, 3, finite=True, unsigned_zero=False))
    grid = at_blocks(spread, weight.shape, (1, group))
    if mode == "mxfp8":
        codes = torch.from_numpy(weight / grid).float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        table = [float8(b, 4, 3, finite=True, unsigned_zero=False) for b in range(256)]
        numbers, bits = np.array(table)[codes.numpy()], 8
    else:
        codes = torch.from_numpy(nibbles(weight / grid))
        numbers, bits = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6] + [-x for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])[codes], 4
    stored = {"a.weight": packed(codes.numpy().astype(int), bits).view(torch.uint32), "a.scales": scales}
    config = settings(bits, group, mode=mode) if said else {}
    (entry,) = check(saved(tmp_path, stored, **config), {"a.weight": (numbers * grid).astype(np.float32)})
    assert entry.quantization == f"mlx {mode}"


def test_without_a_config_shapes_decide_where_they_can():
    stored, values = affine(trained(ROWS, COLUMNS), 5, 64)
    check(under("a", stored), {"a.weight": values})
    open_to_doubt, _ = affine(trained(ROWS, COLUMNS), 4, 64)
    with pytest.raises(SourceError, match="4 bits in groups of 64 or 8 bits in groups of 32; give the checkpoint"):
        open_source(under("a", open_to_doubt), Filters())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (settings(8, 64), r"the config says 8 bits in groups of 64.*: correct 'quantization' in config.json"),
        (settings(4, 64, mode="mxfp4"), "the config says mode 'mxfp4', whose scales are bytes"),
    ],
)
def test_a_config_that_the_shapes_contradict_is_refused(config, why, tmp_path):
    stored, _ = affine(trained(ROWS, COLUMNS), 4, 64)
    with pytest.raises(SourceError, match=why):
        open_source(saved(tmp_path, under("a", stored), **config), Filters())


def test_a_companion_that_is_missing_is_named(tmp_path):
    stored, _ = affine(trained(ROWS, COLUMNS), 4, 64)
    for name in ("scales", "biases"):
        less = {key: tensor for key, tensor in stored.items() if key != name}
        with pytest.raises(SourceError, match=f"{name!r} beside it is missing"):
            open_source(saved(tmp_path, under("a", less), **settings()), Filters())


def test_a_rotation_beside_the_codes_is_no_weight_and_they_are_not_read(tmp_path):
    stored, _ = affine(trained(ROWS, COLUMNS), 4, 64)
    path = saved(tmp_path, under("a", stored | {"rotation": torch.eye(64)}), **settings())
    assert matrices(path) == {}
    assert reasons(path)["a.weight"].endswith("but the layer also has rotation, which is not part of that format")


def test_both_spellings_of_the_config_say_the_same(tmp_path):
    stored, values = affine(trained(ROWS, COLUMNS), 4, 64)
    said = settings()["quantization"]
    path = saved(tmp_path, under("a", stored), quantization=said, quantization_config=said)
    check(path, {"a.weight": values})
    assert json.loads((path / "config.json").read_text())["quantization"] == said
