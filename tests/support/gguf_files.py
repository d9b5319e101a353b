"""Writes GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from models import weights

MODEL = {
    name: t.numpy() for name, t in weights(blk__0__attn_q__weight=(64, 96), blk__1__attn_q__weight=(96, 64)).items()
}


def write(path: Path, tensors: Mapping[str, Any], architecture: str = "llama", split: tuple[int, ...] = ()) -> Path:
    """A file with arrays, or pairs of codes and their kind; ``split``: which of how many parts it says it is."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, number in zip(("split.no", "split.count"), split, strict=False):
        writer.add_uint16(key, number)
    for name, value in tensors.items():
        codes, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(folder: Path) -> list[Path]:
    parts = [folder / f"m-{i + 1:05d}-of-00002.gguf" for i in range(2)]
    for i, (part, (name, array)) in enumerate(zip(parts, MODEL.items(), strict=True)):
        write(part, {name: array}, split=(i, 2))
    return parts


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()
