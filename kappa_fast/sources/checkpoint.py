"""Reads weights from safetensors: one file, or a directory with or without an index; values matrix by matrix."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from ..errors import SourceError, SourceNotFoundError
from ..io.documents import parse_json, read_document
from ..io.limits import (
    LARGEST_CONFIG,
    LARGEST_INDEX,
    MOST_SHARDS,
    MOST_VALUES_OF_HEADER,
    MOST_VALUES_OF_INDEX,
    check_limit,
)
from ..results.names import in_model_order
from ..texts import warn
from .base import Inventory, Stored
from .boundary import reading
from .files import DataFile, Region
from .names import has_adapters
from .ownership import without_ingredients
from .pointers import pointer_kind
from .quantized import weights_of
from .quantized.comfy import joined
from .quantized.config import quantization_config, unknown_method
from .reparametrized import combine_parts
from .shards import INDEX_ENDING, check_complete, check_finished, chosen_index, is_index, is_numbered, shard_position
from .tensors import count_weights, digest_of_headers, model_types_in, own_names

LONGEST_HEADER = 100_000_000  # bytes; the library safetensors does not read longer headers
INDEX = "model" + INDEX_ENDING
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "weights = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "save_file({k: v.clone().contiguous() for k, v in weights.get('state_dict', weights).items()}, sys.argv[2])"
)

# The names of dtypes in safetensors; tensors of other dtypes are skipped.
DTYPES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
    "C64": "complex64",
}


def read_checkpoint(path: Path, file_of: Callable[[Path], DataFile] = DataFile) -> Inventory:
    """Return the tensors of a .safetensors file or of a directory with such files; only headers are read.

    ``file_of`` returns the object that reads the bytes of a file, if they come from elsewhere.

    Raises:
        SourceNotFoundError: the path, or a shard that the index names, does not exist.
        SourceError: the path is not a model, is damaged or pickled, or its index is wrong.
    """
    if not os.path.exists(path):
        if os.path.islink(path):
            raise SourceNotFoundError(f"{path} is a broken link: give the directory of the model itself")
        raise SourceNotFoundError(
            f"{path}: no such file or directory; a model on the hub has an id such as org/name, without ./ before it"
        )
    directory = path if path.is_dir() else path.parent
    try:
        files, expected = _files_of(path)
    except PermissionError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}): change its permissions, or copy it") from error
    config = _config(directory / "config.json")
    model_types = model_types_in(config)
    tensors: dict[str, Stored] = {}
    paths: dict[str, Path] = {}
    headers: list[dict[str, str]] = []
    for file in files:
        shard = Shard(file_of(file))
        with reading(file):
            items = shard.tensors(expected)
        for item in items:
            if item.name in tensors:
                raise SourceError(
                    f"{item.name!r} is in both {paths[item.name]} and {file}: remove the stale file; or, if several "
                    "processes have each saved a part of the tensor, join the parts first"
                )
            tensors[item.name], paths[item.name] = item, file
        headers.append(shard.header)
    for name, file in (expected or {}).items():
        if paths.get(name) != file:
            raise SourceError(
                f"the index of {directory} says that {name!r} is in {file.name}, but it is not: download it again"
            )
    own = own_names(([name] for name in tensors), saved=True)
    found = [replace(tensors[name], names=own[name], model_types=model_types) for name in in_model_order(tensors)]
    metadata = {
        "kind": "directory" if path.is_dir() else "file",
        "path": str(path),
        "files": [file.relative_to(directory).as_posix() for file in files],
        "model_type": next(iter(model_types), None),
        "fingerprint": digest_of_headers(found),
    }
    quantization = quantization_config(directory, config)
    weights = combine_parts(weights_of(found, quantization, joined(headers)))
    weights = without_ingredients(weights, unknown_method(quantization))
    return Inventory(
        weights, count_weights(weights), metadata, in_memory=False, in_peft=has_adapters(tensors), config=config
    )


def check_files(directory: Path) -> bool:
    """Return True if an index or the numbers in the names of the files prove that no file is missing.

    Raises:
        SourceNotFoundError: a shard is missing.
        SourceError: there are no weights, or their index is wrong.
    """
    files, expected = _files_of(directory)
    return expected is not None or all(file.name == SINGLE or is_numbered(file.name) for file in files)


class Shard:
    """One safetensors file. The library safetensors validates the header; values are read as byte ranges."""

    def __init__(self, file: DataFile) -> None:
        self.path = file.path
        self.header: dict[str, str] = {}
        self._file = file

    def tensors(self, expected: Mapping[str, Path] | None) -> list[Stored]:
        """Return all tensors of the file; those that the index (``expected``) does not list get a problem.

        Raises:
            SourceError: the file is damaged, or cannot be read.
        """
        found = []
        header, start = self._header()
        for name, entry in header.items():
            stray = expected is not None and name not in expected
            note = f"in {self.path.name}, but not listed in the index" if stray else None
            dtype = getattr(torch, DTYPES.get(entry["dtype"], ""), None)
            shape, offset = tuple(entry["shape"]), start + entry["data_offsets"][0]
            # Tensors without a dtype in torch are skipped, so that uint8 is never used for reading.
            region = Region(self._file, name, offset, shape, dtype or torch.uint8)
            item = Stored((name,), shape, dtype, torch.device("cpu"), region.take, note)
            found.append(region.described(item))
        return found

    def _header(self) -> tuple[dict[str, Any], int]:
        """Return the header without its metadata, and the offset where the values begin."""
        from safetensors import SafetensorError, safe_open

        size = torch.zeros(1, dtype=torch.int64)
        try:
            if self._file.size >= size.nbytes:  # safetensors raises its own error for a shorter file
                self._file.read(0, size)
            # safetensors refuses headers that are not JSON, are too long, or have wrong ranges or duplicate names.
            with safe_open(self.path, framework="np"):
                pass
            text = torch.empty(int(size), dtype=torch.uint8)
            self._file.read(size.nbytes, text)
            header = parse_json(text.numpy().tobytes(), self.path, MOST_VALUES_OF_HEADER)
        except OSError as error:
            raise SourceError(
                f"{self.path} cannot be read ({error}): check the disk and the permissions of the file, or copy it"
            ) from error
        except SourceError:
            raise
        except (SafetensorError, ValueError) as error:
            if 0 < int(size) + size.nbytes <= self._file.size and int(size) > LONGEST_HEADER:
                raise SourceError(
                    f"{self.path} has a header of {int(size)} bytes, and the library safetensors reads headers of up "
                    f"to {LONGEST_HEADER}: save the model again in shards with fewer tensors"
                ) from error
            if (pointer := pointer_kind(self.path)) is not None:
                raise SourceError(f"{self.path} is {pointer}") from error
            raise SourceError(
                f"{self.path} is not a readable safetensors file ({error}): truncated or damaged, download it again"
            ) from error
        self.header = header.pop("__metadata__", None) or {}
        return header, size.nbytes + int(size)


def _files_of(path: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """Return the files to read, in order, and the file of each tensor by the index; None without an index."""
    if not path.is_dir():
        if is_index(path.name) and path.is_file():
            return _listed(path)
        if path.name.endswith(".safetensors") and path.is_file():
            if part := shard_position(path):
                warn(
                    f"{path} is shard {part}: only its tensors are ranked, and fractions of the parameters refer to "
                    "this shard; give the directory to rank the model",
                )
            return [path], None
        raise _not_safetensors(path)
    # Opening a pipe would wait forever, so only regular files are considered.
    indices = sorted(p for p in path.glob("*.safetensors.index*.json") if is_index(p.name) and p.is_file())
    names = [p.name for p in path.iterdir()]
    indices = indices or _by_content(path, names)
    if path / INDEX in indices:
        return _listed(path / INDEX)
    if (path / SINGLE).is_file():
        check_finished(path, [SINGLE], [n for n in names if n.startswith(SINGLE)])
        return [path / SINGLE], None
    if indices:
        return _listed(chosen_index(path, indices))
    files = sorted(p for p in path.glob("*.safetensors") if p.is_file())
    if not files:
        raise _no_weights(path)
    check_complete(files, names)
    return files, None


def _by_content(directory: Path, names: Iterable[str]) -> list[Path]:
    """Return indices with unusual names, which are recognized because they list safetensors files."""
    found = []
    for path in (
        directory / name for name in sorted(names) if "index" in name.lower() and name.lower().endswith(".json")
    ):
        try:
            document = read_document(path, LARGEST_INDEX, MOST_VALUES_OF_INDEX) if path.is_file() else None
        except (OSError, ValueError):
            continue  # by its name the file need not be an index
        shards = document.get("weight_map") if isinstance(document, dict) else None
        if isinstance(shards, dict) and any(str(shard).endswith(".safetensors") for shard in shards.values()):
            found.append(path)
    return found


def _listed(index: Path) -> tuple[list[Path], dict[str, Path]]:
    expected = _read_index(index)
    return sorted(set(expected.values())), expected


def _read_index(index: Path) -> dict[str, Path]:
    """Return the names of the tensors with the paths of their shards, all in the directory of the index."""
    try:
        document = read_document(index, LARGEST_INDEX, MOST_VALUES_OF_INDEX)
        weight_map = document["weight_map"]
        items = [(name, shard) for name, shard in weight_map.items() if isinstance(shard, str)]
        if len(items) < len(weight_map):
            raise TypeError("a shard is not a file name")
    except SourceError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValueError) and (pointer := pointer_kind(index)) is not None:
            raise SourceError(f"{index} is {pointer}") from error
        raise SourceError(f"{index} is not an index of a sharded checkpoint ({error!r}): download it again") from error
    if not items:
        raise SourceError(f"{index} lists no tensors: download it again")
    shards = {shard: index.parent / shard for _, shard in items}
    check_limit(index, "the number of shards", len(shards), MOST_SHARDS)
    for shard, file in shards.items():
        if file.name.endswith(PICKLED):
            raise _not_safetensors(file)
        if not stays_inside(shard, index.parent) or not shard.endswith(".safetensors"):
            raise SourceError(
                f"{index} names the shard {shard!r}, which is not a .safetensors file inside its directory, and is not "
                "read: correct the index, or put all files into one directory"
            )
    missing = sorted(shard for shard, file in shards.items() if not os.path.isfile(file))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceNotFoundError(f"{index} names files that are missing, {missing[0]}{more}: finish the download")
    return {name: shards[shard] for name, shard in items}


def stays_inside(shard: str, directory: Path) -> bool:
    """Return whether a shard is inside the directory, links resolved; the hub's cache has links to its blobs."""
    windows = PureWindowsPath(shard)
    if (
        not shard
        or "\0" in shard
        or windows.drive
        or windows.root
        or "\\" in shard
        or ".." in PurePosixPath(shard).parts
    ):
        return False
    base = directory.resolve()
    allowed = [base]
    if base.parent.name == "snapshots":
        allowed += [base.parents[1] / "blobs", base.parents[2] / "blobs"]
    try:
        target = (directory / shard).resolve()
    except (ValueError, RuntimeError, OSError):  # a lone surrogate, which no file name can contain; a loop of links
        return False
    return any(target.is_relative_to(place) for place in allowed)


def _config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = read_document(path, LARGEST_CONFIG)
    except SourceError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and (pointer := pointer_kind(path)) is not None:
            raise SourceError(f"{path} is {pointer}") from error
        raise SourceError(f"{path} cannot be read ({error}): repair it, or move it away to rank without it") from error
    return found if isinstance(found, dict) else {}


def _no_weights(directory: Path) -> SourceError:
    pickled = sorted(p for p in directory.iterdir() if p.name.endswith(PICKLED) and p.is_file())
    if pickled:
        return _not_safetensors(pickled[0])
    inner = sorted(p.parent.name for p in directory.glob("*/*.safetensors"))
    if inner:
        return SourceError(f"{directory} has no .safetensors file itself, but {inner[0]} has: give that directory")
    almost = sorted(p.name for p in directory.iterdir() if ".gguf" in p.name.lower())
    if almost:
        return SourceError(
            f"{directory} has {almost[0]}, which does not end with .gguf: rename the file, or if it was split into "
            "parts, join these (cat) into a file that ends with .gguf"
        )
    return SourceError(f"{directory} has no .safetensors file: give the directory of a model")


def _not_safetensors(path: Path) -> SourceError:
    if path.name.endswith(PICKLED):
        target = path.with_suffix(".safetensors")
        command = f"python -c {shlex.quote(CONVERT)} {shlex.quote(str(path))} {shlex.quote(str(target))}"
        return SourceError(f"{path} is pickled and is not read, because a pickle can run code. Convert it: {command}")
    if ".gguf" in path.name.lower():
        return SourceError(
            f"{path} does not end with .gguf: rename the file, or if it was split into parts, join these (cat) into a "
            "file that ends with .gguf"
        )
    return SourceError(f"{path} is not a .safetensors file: give one, or the directory of a model")
