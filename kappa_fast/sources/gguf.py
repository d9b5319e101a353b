"""Reads weights from GGUF, the format of llama.cpp; its package gguf dequantizes them, a few rows at a time.

Names are those of llama.cpp (blk.3.attn_q.weight). Shapes are (out, in); GGUF lists the dimensions in reverse order.
llama.cpp permutes the rows of some q and k projections, which does not change singular values.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import SourceError, SourceNotFoundError, missing_extra
from ..results.names import in_model_order
from . import files
from .base import Inventory, Stamp, Stored, release_of
from .files import DataFile, Region
from .gguf_header import Header, TensorInfo, read_header
from .names import has_adapters
from .ownership import without_ingredients
from .pointers import pointer_kind
from .shards import check_finished
from .tensors import count_weights, digest_of_headers, own_names

ENDING = ".gguf"

# The types of GGUF that are not quantized.
PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def is_gguf(path: Path) -> bool:
    """Return True for a .gguf file, and for a directory that has .gguf files and no safetensors."""
    if not path.is_dir():
        return path.name.endswith(ENDING) and path.exists()
    with contextlib.suppress(OSError):
        names = [inner.name for inner in path.iterdir()]
        return any(n.endswith(ENDING) for n in names) and not any(".safetensors" in n for n in names)
    return False


def read_gguf(path: Path) -> Inventory:
    """Return the tensors of a .gguf file and of the other parts of a split model, or of the only model in a directory.

    Raises:
        MissingExtraError: the package gguf is not installed.
        SourceNotFoundError: a part of a split model is missing.
        SourceError: a file is damaged, or the directory has several models.
    """
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("gguf", "gguf", f"reading {path}") from error
    found: dict[str, Stored] = {}
    paths: dict[str, Path] = {}
    architecture = None
    parts = _parts_of(path)
    headers: list[Header] = []
    for part in parts:
        tensors, header = _read_part(gguf, part)
        headers.append(header)
        architecture = architecture or header.architecture
        for item in tensors:
            if item.name in found:
                raise SourceError(f"{item.name!r} is in both {paths[item.name]} and {part}: remove the stale file")
            found[item.name], paths[item.name] = item, part
    _check_parts(parts, headers)
    in_peft = has_adapters(found)
    own = own_names([name] for name in found)
    ordered = without_ingredients([replace(found[name], names=own[name]) for name in in_model_order(found)])
    metadata = {
        "kind": "directory" if path.is_dir() else "file",
        "format": "gguf",
        "path": str(path),
        "files": [part.name for part in parts],
        "model_type": architecture,
        "fingerprint": digest_of_headers(ordered),
    }
    return Inventory(ordered, count_weights(ordered), metadata, in_memory=False, in_peft=in_peft)


class Coded(Region):
    """An array of quantized rows: shape and dtype are those of the weights, offsets and sizes those of the codes."""

    def __init__(self, file: DataFile, name: str, offset: int, shape: Sequence[int], kind: Any) -> None:
        super().__init__(file, name, offset, shape, torch.float32)
        self._kind = kind

    @property
    def stamp(self) -> Stamp:
        return Stamp((self.file.state,), f"{self.name} by {release_of('gguf')}")

    def _bytes(self, shape: Sequence[int]) -> int:
        block, size = _block_of(self._kind)
        return math.prod(shape) // block * size

    def _whole(self, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        out = torch.empty(shape, dtype=self.dtype)
        columns = shape[-1]
        rows = out.view(-1, columns)
        row = self._bytes((columns,))
        chunk = max(1, files.ROWS // (columns * self.dtype.itemsize))
        for start in range(0, rows.shape[0], chunk):
            codes = torch.empty((min(chunk, rows.shape[0] - start), row), dtype=torch.uint8)
            self.file.read(offset + start * row, codes)
            rows[start : start + chunk] = _dequantized(codes, self._kind)
        return out


def _dequantized(codes: torch.Tensor, kind: Any) -> torch.Tensor:
    """Return rows of codes (r, bytes) as float32 (r, columns); a scale that is NaN gives NaN."""
    import numpy as np
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        return torch.from_numpy(dequantize(codes.numpy(), kind))


def _block_of(kind: Any) -> tuple[int, int]:
    """Return the number of weights in a block, and the size of the block in bytes."""
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return int(block), int(size)


def _problem(kind: Any) -> str | None:
    """Return why codes of this kind cannot be dequantized, or None; a block of zeros is dequantized to find out."""
    try:
        _dequantized(torch.zeros((1, _block_of(kind)[1]), dtype=torch.uint8), kind)
    except NotImplementedError:
        return f"quantized codes ({kind.name}), which the package gguf does not dequantize"
    return None


def _check_parts(parts: Sequence[Path], headers: Sequence[Header]) -> None:
    """Refuse files that by their headers are not a model, or not all parts of one, whatever their names are.

    Raises:
        SourceNotFoundError: parts are missing.
        SourceError: a file is not a model, or the parts are out of order.
    """
    for part, header in zip(parts, headers, strict=True):
        if "imatrix" in (header.kind, header.architecture):
            raise SourceError(f"{part} has an importance matrix (statistics of a model): give the model itself")
    first, count = headers[0], max(header.parts for header in headers)
    if count > len(parts):
        raise SourceNotFoundError(
            f"the header of {parts[0]} says that it is part {first.part + 1} of {count}, but only {len(parts)} of the "
            "parts were found: put all of them into one directory, under names that end with "
            f"-00001-of-{count:05d}{ENDING} and so on"
        )
    if len(parts) == 1 and first.part == 0:
        return
    for part, header in zip(parts, headers, strict=True):
        if header.parts != len(parts):
            raise SourceError(
                f"by its name, {part} is one of {len(parts)} parts, but its header says {header.parts}: rename the "
                "file if it is a complete model, or download all parts of one model again"
            )
    numbers = [header.part for header in headers]
    if numbers != list(range(len(parts))):
        raise SourceError(
            f"the headers of {parts[0]} and the other parts say that they are parts {[n + 1 for n in numbers]}, which "
            "differs from the order of their names: restore the original names, or download them again"
        )
    _check_one_model(parts, headers)


def _check_one_model(parts: Sequence[Path], headers: Sequence[Header]) -> None:
    """Refuse parts of different models: the headers must not contradict each other; later parts may omit fields.

    Raises:
        SourceError: the headers contradict each other or the number of tensors.
    """
    said: dict[str, list[object]] = {
        "architecture": [header.architecture for header in headers],
        "kind of file": [header.kind for header in headers],
        "number of tensors": [header.of_all_parts for header in headers],
    }
    for what, values in said.items():
        known = list(dict.fromkeys(value for value in values if value is not None))
        if len(known) > 1:
            at = [parts[values.index(value)].name for value in known[:2]]
            raise SourceError(
                f"{parts[0]} and the other parts belong to different models: the {what} is {known[0]!r} in {at[0]} and "
                f"{known[1]!r} in {at[1]}: put the parts of one model into one directory"
            )
    expected = next((header.of_all_parts for header in headers if header.of_all_parts is not None), None)
    total = sum(len(header.tensors) for header in headers)
    if expected is not None and total != expected:
        raise SourceError(
            f"the {len(parts)} parts of {parts[0]} have {total} tensors, but the header says {expected}: download them "
            "again"
        )


def _read_part(gguf: Any, path: Path) -> tuple[list[Stored], Header]:
    """Return the tensors of one file, and its header."""
    file = DataFile(path)
    try:
        with file.opened() as opened, io.BufferedReader(opened) as stream:
            header = read_header(stream, file.size)
        kinds = {info.name: gguf.GGMLQuantizationType(info.kind) for info in header.tensors}
        regions = [_region(file, info, kinds[info.name]) for info in header.tensors]
        _check_ranges(regions, file.size)
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read ({error}): check the disk and the permissions of the file, or copy it"
        ) from error
    except ValueError as error:
        if (pointer := pointer_kind(path)) is not None:
            raise SourceError(f"{path} is {pointer}") from error
        raise SourceError(
            f"{path} is not a readable GGUF file ({error}): it is truncated, damaged, or newer than the installed "
            "package gguf"
        ) from error
    problems = {kind: _problem(kind) for kind in kinds.values() if kind.name not in PLAIN}
    stored = []
    for region in regions:
        kind = kinds[region.name]
        problem = problems.get(kind)
        if kind.name not in PLAIN and re.sub(r"\.weight$", ".scale", region.name) in kinds.keys() - {region.name}:
            problem = f"quantized codes ({kind.name}) with a separate scale, which is not supported yet"
        stored.append(_stored(region, kind, problem))
    return stored, header


def _region(file: DataFile, info: TensorInfo, kind: Any) -> Region:
    if kind.name in PLAIN:
        return Region(file, info.name, info.offset, info.shape, PLAIN[kind.name])
    block, _ = _block_of(kind)
    if not info.shape or info.shape[-1] % block:
        raise ValueError(
            f"the rows of {info.name!r} are not a multiple of the {block} weights in a block of {kind.name}"
        )
    return Coded(file, info.name, info.offset, info.shape, kind)


def _check_ranges(regions: Sequence[Region], size: int) -> None:
    """Raise ValueError if tensors overlap, or extend beyond the end of the file."""
    end, before = 0, ""
    for region in sorted(regions, key=lambda r: (r.offset, r.span(()))):
        start, length = region.span(())
        if start < end:
            raise ValueError(f"{before!r} and {region.name!r} overlap")
        if start + length > size:
            raise ValueError(f"{region.name!r} extends beyond the end of the file")
        end, before = start + length, region.name


def _stored(region: Region, kind: Any, problem: str | None) -> Stored:
    coded = isinstance(region, Coded)
    item = Stored(
        names=(region.name,),
        shape=region.shape,
        dtype=region.dtype,
        device=torch.device("cpu"),
        take=region.take,
        problem=problem,
        quantization=f"gguf {kind.name}" if coded and problem is None else None,
        overhead=4 * files.ROWS if coded else 0,  # codes, weights, and intermediate results
    )
    return region.described(item)


def _parts_of(path: Path) -> list[Path]:
    """Return all files of the model, in order."""
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.name.endswith(ENDING))
        models = {_SPLIT.sub(r"\g<stem>-*-of-\g<count>.gguf", p.name) for p in inside}
        if len(models) > 1:
            raise SourceError(
                f"{path} has several GGUF models ({', '.join(sorted(models))}): give the path of one of them"
            )
        check_finished(path, [p.name for p in inside], [p.name for p in path.iterdir()])
        path = inside[0]
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    parts = [path.with_name(f"{found['stem']}-{i:05d}-of-{count:05d}{ENDING}") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise SourceNotFoundError(f"{path} is one of {count} parts, and {missing[0]} is missing: finish the download")
    return parts
