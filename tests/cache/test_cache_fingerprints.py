"""Fingerprints depend on the values, the shape and the dtype, and on nothing else."""

from __future__ import annotations

import pytest
import torch
import xxhash

from kappa_fast.cache import fingerprints
from kappa_fast.cache.fingerprints import fingerprint, is_fingerprint

DTYPES = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def values(dtype: str = "float32") -> torch.Tensor:
    return torch.randn(60, 44, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))


def test_it_is_xxh3_of_the_rows_after_dtype_and_shape():
    weight = values()
    data = b"float32-60x44-" + weight.numpy().tobytes()
    assert fingerprint(weight) == "float32-60x44-" + xxhash.xxh3_128_hexdigest(data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [1, 100, 1000, 1 << 20])
def test_strides_and_the_size_of_pieces_make_no_difference(dtype, piece, monkeypatch):
    monkeypatch.setattr(fingerprints, "PIECE_BYTES", piece)
    weight = values(dtype)
    wide = torch.zeros(60, 90).to(weight.dtype)
    wide[:, 1:89:2] = weight
    columns = weight.T.contiguous().T
    assert columns.stride() == (1, 60)
    expected = fingerprint(weight)
    assert fingerprint(wide[:, 1:89:2]) == expected
    assert fingerprint(columns) == expected
    assert fingerprint(weight.clone().requires_grad_()) == expected
    with torch.inference_mode():
        assert fingerprint(values(dtype)) == expected


def test_equal_rows_by_a_stride_of_zero_are_hashed_as_they_are_seen():
    row = torch.randn(1, 44)
    assert fingerprint(row.expand(60, 44)) == fingerprint(row.repeat(60, 1))


def test_any_bit_the_shape_and_the_dtype_make_a_difference():
    weight = values()
    codes = {fingerprint(weight), fingerprint(weight.T), fingerprint(weight.reshape(44, 60))}
    codes |= {fingerprint(weight.view(torch.int32)), fingerprint(weight[:30])}
    for row, column, bit in ((0, 0, 0), (59, 43, 31), (30, 20, 12)):
        other = weight.clone()
        other.view(torch.int32)[row, column] ^= (1 << bit) if bit < 31 else -(1 << 31)
        codes.add(fingerprint(other))
    assert len(codes) == 8


def test_weights_are_not_changed():
    weight = values()
    before = (weight.clone(), weight._version)
    fingerprint(weight.T)
    assert torch.equal(weight, before[0])
    assert weight._version == before[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("float32-60x44-" + 32 * "a", True),
        ("float8_e4m3fn-1x1-" + 32 * "0", True),
        ("float32-60x44-" + 31 * "a", False),
        ("../float32-60x44-" + 32 * "a", False),
        ("float32-60x44-" + 32 * "a" + "\n", False),
        ("float32-60x44-" + 32 * "A", False),
        (None, False),
        (7, False),
    ],
)
def test_only_a_fingerprint_becomes_the_name_of_a_file(text, expected):
    assert is_fingerprint(text) is expected
