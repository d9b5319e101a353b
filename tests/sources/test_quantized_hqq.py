"""HQQ from files: the small tensors beside the codes say how they are packed. Packed here field by field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import matrices, reasons
from packing import check, check_complete, saved, trained

from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source

# By bits: the name of the packing, codes in an element, bits between them, the type of the element.
PACKINGS = {
    8: ("8bit_u8", 1, 8, np.uint8),
    6: ("8bit_u8", 1, 8, np.uint8),
    4: ("4bit_u8", 2, 4, np.uint8),
    3: ("3bit_32", 10, 3, np.int32),
    2: ("2bit_u8", 4, 2, np.uint8),
    1: ("1bit_u8", 8, 1, np.uint8),
}


def text(value: str) -> torch.Tensor:
    return torch.tensor([ord(letter) for letter in value], dtype=torch.uint8)


def number(value: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def hqq(
    weight: torch.Tensor, bits: int, group: int, axis: int, dtype: str = "float16"
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """``HQQLinear.state_dict()`` of a weight, and what it stands for, rounded as the layer rounds."""
    rows, columns = weight.shape
    grouped = weight.double().reshape((-1, group) if axis == 1 else (group, -1)).numpy()
    low, high = grouped.min(axis, keepdims=True), grouped.max(axis, keepdims=True)
    kind = getattr(torch, dtype)
    scale = torch.from_numpy((high - low) / (2**bits - 1)).to(kind)
    zero = torch.from_numpy(-low / ((high - low) / (2**bits - 1))).to(kind)
    codes = np.clip(np.rint(grouped / scale.double().numpy() + zero.double().numpy()), 0, 2**bits - 1).astype(np.int64)
    packing, each, width, word = PACKINGS[bits]
    step = -(-codes.shape[0] // each)
    padded = np.zeros((step * each, codes.shape[1]), np.int64)
    padded[: codes.shape[0]] = codes
    packed = np.zeros((step, codes.shape[1]), np.int64)
    for place in range(each):
        packed |= padded[place * step : (place + 1) * step] << (width * (each - 1 - place))
    differences = (torch.from_numpy(codes).double() - zero.double()).to(kind)  # two roundings
    values = (differences.double() * scale.double()).to(kind).reshape(rows, columns)
    settings = {"nbits": number(bits), "group_size": number(group), "axis": number(axis), "packing": text(packing)}
    settings |= {"shape": torch.tensor([rows, columns]), "view_as_float": number(0, torch.uint8)}
    settings |= {"unpack_view_dtype": text("torch.uint8"), "compute_dtype": text(f"torch.{dtype}")}
    settings |= {"quant_scale": number(0, torch.uint8), "encoded_state_dict": number(1, torch.uint8)}
    return {
        "W_q": torch.from_numpy(packed.astype(word)),
        "scale": scale,
        "zero": zero,
    } | settings, values.double().numpy()


def under(owner: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{owner}.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("bits", PACKINGS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_codes_of_every_width_along_both_axes(bits, axis, dtype, tmp_path):
    stored, values = hqq(trained(64, 128), bits, 64, axis, dtype)
    tensors = under("a", stored) | {"a.bias": torch.ones(64), "b.weight": torch.randn(32, 20)}
    path = saved(tmp_path, tensors, quantization_config={"quant_method": "hqq"})
    for source in (path, tensors):
        if bits == 1:
            assert torch.equal(matrices(source)["a.weight"].load().double(), torch.from_numpy(values))
            continue
        ranking = check(source, {"a.weight": values})
        assert ranking["a.weight"].quantization.startswith(f"hqq {PACKINGS[bits][2]} bits, groups of 64")
        check_complete(tensors, ranking)


def test_codes_that_are_viewed_as_floats_and_packings_that_are_not_known_are_skipped():
    stored, _ = hqq(trained(64, 128), 4, 64, 1)
    floats = stored | {"W_q": stored["W_q"].view(torch.float16), "view_as_float": number(1, torch.uint8)}
    for changed in (floats, stored | {"packing": text("5bit_u8")}, {k: t for k, t in stored.items() if k != "zero"}):
        source = under("a", changed) | {"b.weight": torch.randn(32, 20)}
        assert set(matrices(source)) == {"b.weight"}
        assert "HQQ" in reasons(source)["a.W_q"]


@pytest.mark.parametrize("change", [{"group_size": number(48)}, {"shape": torch.tensor([64, 64])}, {"axis": number(0)}])
def test_settings_that_the_tensors_contradict_are_refused(change):
    stored, _ = hqq(trained(64, 128), 4, 64, 1)
    with pytest.raises(SourceError, match=r"a.W_q.*exclude='a.weight'"):
        open_source(under("a", stored | change), Filters())
