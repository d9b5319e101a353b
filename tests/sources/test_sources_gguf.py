"""GGUF files: names, shapes, every quantization that the package gguf knows, and files that are none."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_files import MODEL, gguf, key, split, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import EVERYTHING, matrices, reasons

import kappa_fast
from kappa_fast.errors import MissingExtraError, SourceError, SourceNotFoundError
from kappa_fast.sources import Filters, files, open_source
from kappa_fast.sources.gguf_header import read_header

Kind = GGMLQuantizationType
CODED = sorted(
    (kind for kind in Kind if kind.name[:2] in ("Q2", "Q3", "Q4", "Q5", "Q6", "Q8", "IQ", "TQ", "MX")), key=int
)
UNKNOWN = {Kind.Q8_1, Kind.Q8_K}  # what products are computed in, and nothing is stored in


def codes_of(kind: Kind, *shape: int) -> np.ndarray:
    """Random codes with scales near 1: bytes of any value, but halves that are no NaN where scales may be."""
    block, size = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(int(kind))
    codes = generator.integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
    halves = codes.view(np.uint16)
    halves &= 0xBBFF  # an exponent that is not all ones, whichever two bytes turn out to be a scale
    if kind is Kind.MXFP4:
        codes.reshape(-1, size)[:, 0] = generator.integers(120, 136, codes.size // size)  # powers of two near 1
    return codes


def refused(source: Path, error: type[Exception] = SourceError) -> str:
    with pytest.raises(error) as raised:
        open_source(source, Filters())
    assert type(raised.value) is error
    return str(raised.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_floats_are_ranked_as_they_are_stored_under_the_names_of_llama_cpp(dtype, tmp_path):
    stored = {name: array.astype(dtype) for name, array in MODEL.items()}
    path = write(tmp_path / "model.gguf", stored)
    found = matrices(path)
    assert found.keys() == MODEL.keys()
    assert found["blk.1.attn_q.weight"].layer == 1
    assert all(np.array_equal(found[name].load().numpy(), stored[name]) for name in MODEL)
    assert all(m.quantization is None and str(m.dtype) == f"torch.{np.dtype(dtype)}" for m in found.values())
    metadata = open_source(tmp_path, Filters()).metadata
    assert (metadata["format"], metadata["kind"], metadata["model_type"]) == ("gguf", "directory", "llama")
    assert metadata["files"] == ["model.gguf"]
    in_memory = {name: torch.from_numpy(array) for name, array in stored.items()}
    assert [(e.key, e.kappa, e.upper) for e in kappa_fast.rank(path)] == [
        (e.key, e.kappa, e.upper) for e in kappa_fast.rank(in_memory)
    ]


def test_bfloat16_is_read_as_it_is(tmp_path):
    weight = torch.randn(32, 64).bfloat16()
    path = write(tmp_path / "m.gguf", {"w": (weight.view(torch.uint8).numpy().reshape(32, 128), Kind.BF16)})
    (found,) = matrices(path).values()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.load(), weight)


@pytest.mark.parametrize("kind", [k for k in CODED if k not in UNKNOWN], ids=lambda kind: kind.name)
def test_codes_are_dequantized_a_few_rows_at_a_time_to_what_the_package_makes_of_them(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROWS", 4 * 512 * 7)
    codes = codes_of(kind, 30, 512)
    path = write(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (codes, kind), "after": np.ones((2, 2), np.float32)})
    found = matrices(path)["blk.0.ffn_up.weight"]
    assert (found.shape, found.dtype, found.quantization) == ((30, 512), torch.float32, f"gguf {kind.name}")
    weight = found.load()
    assert torch.isfinite(weight).all()
    assert weight.unique().numel() > 2
    assert np.array_equal(weight.numpy(), dequantize(codes, kind))


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_K, Kind.MXFP4], ids=lambda kind: kind.name)
def test_kappa_is_that_of_the_dequantized_weights(kind, tmp_path):
    codes = (
        codes_of(kind, 96, 256) if kind is Kind.Q4_K else quantize(np.random.randn(96, 256).astype(np.float32), kind)
    )
    (entry,) = kappa_fast.rank(write(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (codes, kind)}))
    sigma = np.linalg.svd(dequantize(codes, kind).astype(np.float64), compute_uv=False)
    kappa = sigma[0] / sigma[-1]
    assert entry.lower <= kappa <= entry.upper
    assert entry.upper <= 1.05 * entry.lower


def half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def q4_0(block: bytes) -> list[float]:
    """16 bytes hold the low nibbles of entries 0 to 15 and the high ones of 16 to 31; 8 is zero."""
    codes = [b & 15 for b in block[2:]] + [b >> 4 for b in block[2:]]
    return [half(block, 0) * (code - 8) for code in codes]


def q8_0(block: bytes) -> list[float]:
    return [half(block, 0) * code for code in struct.unpack_from("<32b", block, 2)]


def q4_k(block: bytes) -> list[float]:
    """Eight runs of 32 with scales and minima of six bits, as ggml's get_scale_min_k4 unpacks them."""
    d, dmin, packed, nibbles = half(block, 0), half(block, 2), block[4:16], block[16:]
    values = []
    for j in range(8):
        if j < 4:
            scale, low = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4
            low = (packed[j + 4] >> 4) | (packed[j] >> 6) << 4
        run = nibbles[j // 2 * 32 : j // 2 * 32 + 32]
        values += [d * scale * (b >> 4 if j % 2 else b & 15) - dmin * low for b in run]
    return values


def q6_k(block: bytes) -> list[float]:
    """Low four bits in 128 bytes, high two in 64, sixteen scales of eight bits; 32 is zero."""
    low, high = block[:128], block[128:192]
    scales, d = struct.unpack_from("<16b", block, 192), half(block, 208)
    values = [0.0] * 256
    for n in (0, 1):
        for i in range(32):
            bits = high[32 * n + i]
            first, second = low[64 * n + i], low[64 * n + i + 32]
            for k, nibble in enumerate((first & 15, second & 15, first >> 4, second >> 4)):
                position = 128 * n + 32 * k + i
                code = (nibble | (bits >> 2 * k & 3) << 4) - 32
                values[position] = d * scales[position // 16] * code
    return values


@pytest.mark.parametrize(
    ("kind", "unpack"),
    [(Kind.Q4_0, q4_0), (Kind.Q8_0, q8_0), (Kind.Q4_K, q4_k), (Kind.Q6_K, q6_k)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_common_quantizations_are_what_ggml_defines(kind, unpack, tmp_path):
    codes = codes_of(kind, 16, 256)
    (found,) = matrices(write(tmp_path / "m.gguf", {"w": (codes, kind)})).values()
    size = GGML_QUANT_SIZES[kind][1]
    rows = codes.tobytes()
    expected = [v for start in range(0, len(rows), size) for v in unpack(rows[start : start + size])]
    expected = np.array(expected).reshape(16, 256)
    assert np.abs(found.load().numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
def test_experts_are_matrices_of_their_own_and_gate_and_up_in_one_tensor_are_halves(kind, tmp_path):
    gate_up = torch.randn(3, 64, 96).numpy()
    down = torch.randn(3, 96, 32).numpy()
    tensors = {"blk.0.ffn_gate_up_exps.weight": gate_up, "blk.0.ffn_down_exps.weight": down}
    values = tensors
    if kind is Kind.Q8_0:
        coded = {name: (quantize(array, kind), kind) for name, array in tensors.items()}
        values, tensors = {name: dequantize(*pair) for name, pair in coded.items()}, coded
    path = write(tmp_path / "m.gguf", tensors)
    found = {key: matrix.load().numpy() for key, matrix in matrices(path).items()}
    fused = values["blk.0.ffn_gate_up_exps.weight"]
    expected = {f"blk.0.ffn_down_exps.weight[{e}]": values["blk.0.ffn_down_exps.weight"][e] for e in range(3)}
    expected |= {f"blk.0.ffn_gate_up_exps.weight[{e}].gate": fused[e, :32] for e in range(3)}
    expected |= {f"blk.0.ffn_gate_up_exps.weight[{e}].up": fused[e, 32:] for e in range(3)}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_embeddings_head_and_routers_are_known_by_their_names_in_gguf(tmp_path):
    embedding, head = torch.randn(100, 64).numpy(), torch.randn(100, 64).numpy()
    router = torch.randn(16, 64).numpy()
    stored = {
        "token_embd.weight": embedding,
        "output.weight": head,
        "position_embd.weight": torch.randn(20, 64).numpy(),
        "token_types.weight": torch.randn(16, 64).numpy(),
        "blk.0.ffn_gate_inp.weight": router,
        "blk.0.attn_output.weight": torch.randn(64, 64).numpy(),
    }
    path = write(tmp_path / "m.gguf", stored)
    found = open_source(path, Filters())
    assert [m.key for m in found.matrices] == ["blk.0.attn_output.weight"]
    assert {s.name: s.reason for s in found.skipped} == {
        **dict.fromkeys(
            ("token_embd.weight", "output.weight", "position_embd.weight", "token_types.weight"),
            "embedding or output head (embeddings=True ranks it)",
        ),
        "blk.0.ffn_gate_inp.weight": "router (routers=True ranks it)",
    }
    assert len(open_source(path, EVERYTHING).matrices) == 6


def test_codes_that_the_package_cannot_dequantize_are_skipped_by_name(tmp_path):
    codes = codes_of(Kind.Q8_1, 32, 64)
    path = write(tmp_path / "m.gguf", {"a": (codes, Kind.Q8_1), **MODEL, "i": np.ones((20, 20), np.int32)})
    assert matrices(path).keys() == MODEL.keys()
    assert reasons(path) == {
        "a": "quantized codes (Q8_1), which the package gguf does not dequantize",
        "i": "int32 values: codes, indices or a mask, not weights",
    }


def test_codes_with_a_scale_beside_them_are_skipped(tmp_path):
    codes = quantize(torch.randn(32, 64).numpy(), Kind.Q8_0)
    path = write(tmp_path / "m.gguf", {"w.weight": (codes, Kind.Q8_0), "w.scale": np.ones(1, np.float32), **MODEL})
    assert reasons(path) == {"w.weight": "quantized codes (Q8_0) with a separate scale, which is not supported yet"}


def test_a_scale_that_is_nan_makes_the_matrix_non_finite_without_a_warning(tmp_path):
    codes = quantize(torch.randn(32, 64).numpy(), Kind.Q8_0)
    codes[3, :2] = np.frombuffer(struct.pack("<e", float("nan")), np.uint8)
    (entry,) = kappa_fast.rank(write(tmp_path / "m.gguf", {"w": (codes, Kind.Q8_0)}))
    assert entry.status == "non_finite"


def test_headers_are_read_as_the_package_reads_them(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_custom_alignment(128)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "größe", "", "x" * 70000])
    writer.add_token_scores([0.5, -1.0, 0.0, 2.0])
    writer.add_token_types([1, 2, 3, 1])
    writer.add_bool("a.flag", True)
    writer.add_uint64("a.count", 1 << 40)
    writer.add_float64("a.share", 0.25)
    writer.add_int8("a.small", -3)
    writer.add_array("a.empty", [])
    shapes = {"one": (7,), "two": (3, 5), "three": (2, 3, 5), "four": (2, 2, 3, 5)}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.add_tensor("coded", codes_of(Kind.Q4_K, 4, 256), raw_dtype=Kind.Q4_K)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    expected = gguf.GGUFReader(path)
    with open(path, "rb") as stream:
        found = read_header(stream, path.stat().st_size)
    assert found.architecture == "qwen3moe"
    assert [(t.name, t.shape, t.kind, t.offset) for t in found.tensors] == [
        (t.name, tuple(map(int, reversed(t.shape))), int(t.tensor_type), int(t.data_offset)) for t in expected.tensors
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_header_with_a_wrong_byte_is_refused_or_gives_tensors_of_the_shapes_it_states(position, byte, tmp_path):
    path = write(tmp_path / "m.gguf", MODEL | {"w": (codes_of(Kind.Q4_K, 20, 256), Kind.Q4_K)})
    whole = bytearray(path.read_bytes())
    whole[position] = byte
    path.write_bytes(whole)
    try:
        found = open_source(path, EVERYTHING)
    except SourceError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert all(tuple(m.load().shape) == m.shape for m in found.matrices)


def test_the_parts_of_a_split_model_are_one_model(tmp_path):
    parts = split(tmp_path)
    for path in (*parts, tmp_path):
        assert matrices(path).keys() == MODEL.keys()
        assert open_source(path, Filters()).metadata["files"] == [part.name for part in parts]


def test_a_part_that_is_missing_or_has_the_same_tensor_is_named(tmp_path):
    first, second = split(tmp_path)
    second.unlink()
    assert refused(first, SourceNotFoundError) == (
        f"{first} is one of 2 parts, and {second.name} is missing: finish the download"
    )
    second.write_bytes(first.read_bytes())
    assert f"is in both {first} and {second}: remove the stale file" in refused(tmp_path)


def test_of_several_models_in_a_directory_one_must_be_chosen(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, MODEL)
    assert refused(tmp_path) == (f"{tmp_path} has several GGUF models (a.gguf, b.gguf): give the path of one of them")
    assert matrices(tmp_path / "b.gguf").keys() == MODEL.keys()


def test_safetensors_are_preferred_to_gguf_in_the_same_directory(tmp_path):
    from safetensors.torch import save_file

    write(tmp_path / "m.gguf", {"other": MODEL["blk.0.attn_q.weight"]})
    save_file({"w": torch.randn(32, 32)}, tmp_path / "model.safetensors")
    assert set(matrices(tmp_path)) == {"w"}


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.02, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_named(share, tmp_path):
    whole = write(tmp_path / "m.gguf", MODEL).read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: int(share * len(whole))])
    message = refused(tmp_path / "m.gguf")
    assert message.startswith(f"{tmp_path / 'm.gguf'} is not a readable GGUF file (")
    assert message.endswith("or newer than the installed package gguf")


def header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def info(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"text", b"GGUF", header(1 << 60, 0), header(0, 1 << 60), header(1, 0), header(1, 0, version=99)),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),  # the byte order of other machines
        header(1, 0, struct.pack("<Q", 1 << 62) + b"name"),
        *(header(0, 1, key("k") + struct.pack("<IIQ", 9, inner, 1 << 60) + bytes(99)) for inner in (0, 8, 9, 77)),
        header(0, 1, key("k") + struct.pack("<IQ", 8, 1 << 63) + bytes(99)),  # a text without end
        header(0, 1, key("k") + struct.pack("<I", 77) + bytes(99)),
        header(0, 1, key("general.alignment") + struct.pack("<II", 4, 48)),
        header(0, 1, struct.pack("<Q", 1 << 20) + bytes(1 << 20)),  # a name of a megabyte
        header(1, 0, info(b"w", (2,) * 5, 0, 0)) + bytes(8192),
        header(1, 0, info(b"w", (32, 32), 0, 0)),
        header(1, 0, info(b"w", (1 << 40, 1 << 40), 0, 0)) + bytes(4096),
        header(1, 0, info(b"w", (32, 32), 999, 0)) + bytes(8192),
        header(1, 0, info(b"w", (33, 32), 8, 0)) + bytes(8192),  # rows that are no multiple of a block
        header(1, 0, info(b"\xff\xfe", (32, 32), 0, 0)) + bytes(8192),
        header(1, 0, info(b"w", (32, 32), 0, (1 << 64) - 4096)) + bytes(8192),
        header(2, 0, info(b"w", (32, 32), 0, 0) + info(b"w", (32, 32), 0, 4096)) + bytes(16384),
    ],
)
def test_a_file_that_is_no_gguf_is_named(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    assert refused(tmp_path / "m.gguf").startswith(f"{tmp_path / 'm.gguf'} is not a readable GGUF file (")


def test_tensors_that_overlap_are_refused(tmp_path):
    content = header(2, 0, info(b"v", (32, 32), 0, 0) + info(b"w", (32, 32), 0, 2048)) + bytes(16384)
    (tmp_path / "m.gguf").write_bytes(content)
    assert "('v' and 'w' overlap)" in refused(tmp_path / "m.gguf")


def test_a_pipe_or_a_directory_that_is_called_like_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "p.gguf")
    assert "p.gguf cannot be read (it is not a regular file)" in refused(tmp_path / "p.gguf")
    (tmp_path / "d.gguf").mkdir()
    assert "has no .safetensors file" in refused(tmp_path / "d.gguf")


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_that_names_the_tensor(tmp_path):
    path = write(tmp_path / "m.gguf", {"w": (quantize(torch.randn(32, 64).numpy(), Kind.Q8_0), Kind.Q8_0)})
    (found,) = matrices(path).values()
    os.truncate(path, 500)
    with pytest.raises(SourceError, match=r"'w' cannot be read from .*m.gguf \(it has changed"):
        found.load()


def test_without_the_package_the_message_says_what_is_missing(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", MODEL)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        MissingExtraError, match=r"reading .*m.gguf needs the package 'gguf': pip install 'kappa_fast\[g"
    ):
        open_source(path, Filters())
