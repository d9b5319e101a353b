"""Small files that ask for a lot of work or memory are refused with the field, and what is large but real is not."""

import json
import struct
import time

import pytest
import torch
from models import EVERYTHING, matrices
from safetensors.torch import save_file

import kappa_fast
from kappa_fast import sources
from kappa_fast.errors import SourceError
from kappa_fast.io import documents
from kappa_fast.io.documents import parse_json, read_document
from kappa_fast.sources import Filters, checkpoint, gguf_header, open_source

GIB = 1 << 30


def gguf(path, pairs=0, tensors=0, body=b"", size=0):
    """A GGUF file of these counts, its end a hole."""
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + body)
        file.truncate(max(size, file.tell()))
    return path


def array_of_texts(count):
    key = b"tokens"
    return struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, count)


@pytest.mark.parametrize(
    ("made", "field"),
    [
        (dict(pairs=10**9, size=64 * GIB), "the number of keys is 1,000,000,000"),
        (dict(tensors=10**9, size=64 * GIB), "the number of tensors is 1,000,000,000"),
        (dict(pairs=1, body=array_of_texts(10**9), size=64 * GIB), "the number of texts in arrays is 1,000,000,000"),
        (dict(pairs=2**63, size=GIB), "the number of keys"),
        (dict(pairs=1, body=array_of_texts(2**63), size=GIB), "the number of texts in arrays"),
    ],
)
def test_a_sparse_gguf_header_is_refused_with_its_field(made, field, tmp_path):
    pytest.importorskip("gguf")
    started = time.process_time()
    with pytest.raises(SourceError, match=f"{field}.* is treated as damage or an attack"):
        open_source(gguf(tmp_path / "m.gguf", **made), Filters())
    assert time.process_time() - started < 5


def test_a_header_of_zeros_ends_soon(tmp_path, monkeypatch):
    """A hole reads as keys without a letter."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(gguf_header, "MOST_PAIRS", 2000)
    with pytest.raises(SourceError):
        open_source(gguf(tmp_path / "m.gguf", pairs=2000, tensors=10, size=GIB), Filters())


def test_a_large_vocabulary_is_passed_over(tmp_path):
    words = b"".join(struct.pack("<Q", 3) + b"abc" for _ in range(50_000)) + struct.pack("<Q", 70_000) + b"x" * 70_000
    path = gguf(tmp_path / "m.gguf", pairs=1, body=array_of_texts(50_001) + words)
    with open(path, "rb") as stream:
        assert gguf_header.read_header(stream, path.stat().st_size).tensors == ()
    cut = path.stat().st_size - 10
    with open(path, "rb") as stream, pytest.raises(ValueError, match="it ends within its header"):
        gguf_header.read_header(stream, cut)


@pytest.fixture
def folder(tmp_path):
    save_file({f"l.{i}.q.weight": torch.randn(20, 20) for i in range(3)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "quant_config.json", "model.safetensors.index.json"])
def test_json_without_end_is_refused_before_it_is_read(name, folder, monkeypatch):
    with open(folder / name, "wb") as file:
        file.truncate(GIB)
    with pytest.raises(SourceError, match=rf"{name}: the number of bytes is 1,073,741,824, and more than"):
        kappa_fast.rank(folder, progress=False)


@pytest.mark.parametrize(
    "text", [b"[" + b"[]," * 99 + b"1]", b'{"a":1' + b',"a":1' * 99 + b"}", b"[1" + b",1" * 99 + b"]"]
)
def test_json_of_more_values_than_any_real_one_is_refused_before_it_takes_memory(text, tmp_path):
    with pytest.raises(SourceError, match=r"the number of values is .*, and more than 50 is"):
        parse_json(text, tmp_path / "x.json", 50)
    assert parse_json(text, tmp_path / "x.json", 1000)


def test_deep_json_and_long_numbers_are_no_json(tmp_path):
    for text in (b"[" * 200_000, b"9" * 5000, b"\xff\xfe", b"\xed\xa0\x80"):
        with pytest.raises(ValueError, match=r".*"):
            parse_json(text, tmp_path / "x.json")


def test_a_document_has_a_mark_of_its_encoding_or_none(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_document(tmp_path / "x.json", 100) == [1]
    assert documents.parse_json(b"[1]", tmp_path) == [1]


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MOST_TENSORS", 2, "the number of tensors is 3, and more than 2"),
        ("LONGEST_NAME", 5, r"the length of the name 'l\.0\.q\.weight'\.\.\. is 12, and more than 5"),
        ("MOST_DIMENSIONS", 1, r"the number of dimensions of 'l\.0\.q\.weight' is 2, and more than 1"),
    ],
)
def test_tensors_beyond_any_real_model_are_refused_with_the_field(limit, value, message, folder, monkeypatch):
    monkeypatch.setattr(sources, limit, value)
    with pytest.raises(SourceError, match=message):
        open_source(folder, Filters())


def test_an_index_has_a_limit_of_shards(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "MOST_SHARDS", 2)
    document = {"weight_map": {f"l.{i}.w": f"s{i}.safetensors" for i in range(3)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    with pytest.raises(SourceError, match="the number of shards is 3, and more than 2"):
        open_source(folder, Filters())


def test_the_header_of_safetensors_has_a_limit_of_values(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "MOST_VALUES_OF_HEADER", 10)
    with pytest.raises(SourceError, match="the number of values is"):
        open_source(folder, Filters())


@pytest.mark.parametrize("digits", [7, 5000, 200_000])
def test_numbers_in_names_may_have_any_length(digits):
    name = f"layers.{'9' * digits}.w"
    (entry,) = kappa_fast.rank({name: torch.randn(20, 20)}, progress=False)
    assert (entry.name, entry.layer) == (name, None)
    assert [m.layer for m in matrices({"layers.12.w": torch.randn(20, 20)}).values()] == [12]


def test_names_are_ordered_by_their_numbers_whatever_their_length():
    names = ["l.10.w", "l.9.w", f"l.{'1' * 5000}.w", f"l.{'2' * 4999}.w", "l.010.w", "l.x.w"]
    found = [m.name for m in open_source({n: torch.randn(20, 20) for n in names}, EVERYTHING).matrices]
    assert sorted(found, key=names.index) == names


def test_time_is_linear_in_the_number_of_tensors(tmp_path):
    """Names of gates, scales and copies were compared with all others."""

    def seconds(count):
        names = [f"l.{i}.{kind}" for i in range(count) for kind in ("gate.weight", "weight_scale", "ema.w")]
        header = {
            name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)
        }
        text = json.dumps(header).encode()
        path = tmp_path / f"{count}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * len(names)))
        started = time.process_time()
        open_source(path, EVERYTHING)
        return time.process_time() - started

    seconds(50)
    few, many = seconds(250), seconds(2000)
    assert many < 24 * few  # eight times as many; squared it would be 64
