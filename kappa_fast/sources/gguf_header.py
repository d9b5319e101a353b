"""Reads the header of a GGUF file: alignment, architecture, and the name, shape, type and offset of every tensor.

The layout is that of ggml's docs/gguf.md. The reader of the package gguf is not used: it maps the file, keeps every
string of the vocabulary, and may loop forever on a wrong length of an array. This reader compares every length with the
size of the file.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import BinaryIO

from ..io.limits import MOST_PAIRS, MOST_STRINGS, MOST_TENSORS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
LONGEST_NAME = 1 << 16  # bytes; ggml itself allows 64
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS

# Sizes of the types of values in bytes; strings and arrays have a variable size.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_INTEGERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
_TEXTS = {"general.architecture", "general.type"}
_COUNTS = {"split.count", "split.no", "split.tensors.count"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a GGUF file.

    shape: in row-major order, the reverse of the stored order.  kind: ggml's number of the type.
    offset: in bytes from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The contents of a header."""

    architecture: str | None
    tensors: tuple[TensorInfo, ...]
    kind: str | None = None  # general.type: "model", "adapter", "mmproj", "imatrix", ...
    parts: int = 0  # split.count: 0 or 1 for a model in one file
    part: int = 0  # split.no, from 0 on
    of_all_parts: int | None = None  # split.tensors.count


def read_header(stream: BinaryIO, size: int) -> Header:
    """Read the header of a file of ``size`` bytes, without the values of tensors.

    Raises:
        ValueError: the file is not a GGUF file, has another version or byte order, ends within its header, or has two
            tensors with one name.
        OSError: the file cannot be read.
    """
    reader = _Reader(stream, size)
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version & 0xFFFF == 0:
        raise ValueError("its numbers are big-endian, which is not supported")
    if version not in VERSIONS:
        raise ValueError(f"it has version {version}, and only versions 2 and 3 are supported")
    tensors, pairs = reader.number("Q"), reader.number("Q")
    alignment = ALIGNMENT
    texts: dict[str, str] = {}
    counts: dict[str, int] = {}
    _limit("the number of keys", pairs, MOST_PAIRS)
    _limit("the number of tensors", tensors, MOST_TENSORS)
    reader.expect(pairs, 8 + 4 + 1)
    for _ in range(pairs):
        key, kind = reader.text(), reader.number("I")
        if key == "general.alignment" and kind == _UINT32:
            alignment = reader.number("I")
        elif key in _TEXTS and kind == _STRING:
            texts[key] = reader.text()
        elif key in _COUNTS and kind in _INTEGERS:
            counts[key] = reader.number(_INTEGERS[kind])
        else:
            reader.skip_value(kind)
    if alignment == 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}, which is not a power of two")
    reader.expect(tensors, 8 + 4 + 4 + 8)
    found = [reader.tensor() for _ in range(tensors)]
    start = -(-reader.position // alignment) * alignment
    names = {info.name for info in found}
    if len(names) < len(found):
        raise ValueError("two tensors have the same name")
    placed = (TensorInfo(info.name, info.shape, info.kind, start + info.offset) for info in found)
    return Header(
        texts.get("general.architecture"),
        tuple(placed),
        texts.get("general.type"),
        counts.get("split.count", 0),
        counts.get("split.no", 0),
        counts.get("split.tensors.count"),
    )


def _limit(field: str, found: int, limit: int) -> None:
    if found > limit:
        raise ValueError(f"{field} is {found:,}, and more than {limit:,} is treated as damage or an attack")


class _Reader:
    """Reads little-endian numbers and strings, one after the other."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size, self.position = stream, size, 0
        self._texts = 0  # the number of skipped strings

    def expect(self, count: int, least: int) -> None:
        """Raise ValueError if the rest of the file cannot hold ``count`` items of at least ``least`` bytes."""
        if count * least > self._size - self.position:
            raise ValueError("it ends within its header")

    def take(self, count: int) -> bytes:
        self.expect(count, 1)
        data = self._stream.read(count)
        if len(data) < count:
            raise ValueError("it ends within its header")
        self.position += count
        return data

    def number(self, code: str) -> int:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return int(value)

    def text(self) -> str:
        length = self.number("Q")
        if length > LONGEST_NAME:
            raise ValueError(f"a name has {length} bytes")
        return self.take(length).decode()

    def skip(self, count: int) -> None:
        self.expect(count, 1)
        self._stream.seek(count, io.SEEK_CUR)
        self.position += count

    def skip_texts(self, count: int) -> None:
        """Skip an array of strings; a vocabulary has hundreds of thousands, so the loop is kept short."""
        self._texts += count
        _limit("the number of texts in arrays", self._texts, MOST_STRINGS)
        self.expect(count, 8)
        read, unpack, position = self._stream.read, struct.Struct("<Q").unpack, self.position
        for _ in range(count):
            (length,) = unpack(read(8).ljust(8, b"\xff"))  # beyond the end of the file: an impossible length
            position += 8 + length
            if position > self._size:
                raise ValueError("it ends within its header")
            if length < LONGEST_NAME:
                read(length)
            else:
                self._stream.seek(length, io.SEEK_CUR)
        self.position = position

    def skip_value(self, kind: int) -> None:
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == _STRING:
                self.skip_texts(count)
                return
            self.skip(count * self._size_of(inner))
        elif kind == _STRING:
            self.skip(self.number("Q"))
        else:
            self.skip(self._size_of(kind))

    def _size_of(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"a value has the unknown type {kind}")
        return _SIZES[kind]

    def tensor(self) -> TensorInfo:
        name, dimensions = self.text(), self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return TensorInfo(name, shape[::-1], self.number("I"), self.number("Q"))
