"""Weights from safetensors: one file, or a directory with or without an index. Memory-mapped, read matrix by matrix."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from ..entries import Index
from ..errors import SourceError, SourceNotFoundError
from .base import Inventory, Stored
from .tensors import fingerprint, plain_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# What safetensors calls its dtypes; one that is missing here is skipped with that reason.
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


def read_checkpoint(path: Path) -> Inventory:
    """What a .safetensors file or a directory of them holds; only headers are read.

    Raises:
        SourceNotFoundError: the path or a shard that the index names does not exist.
        SourceError: it is no model, damaged, pickled, or its index is wrong.
    """
    if not path.exists():
        raise SourceNotFoundError(
            f"{path}: no such file or directory; hub ids are not resolved yet: give the directory of a downloaded model"
        )
    if path.is_dir():
        files, expected = _files_of(path)
    elif path.name.endswith(".safetensors"):
        files, expected = [path], None
    else:
        raise _not_safetensors(path)
    config = _read_config((path if path.is_dir() else path.parent) / "config.json")
    tensors: dict[str, Stored] = {}
    homes: dict[str, Path] = {}
    for file in files:
        for item in _Shard(file).tensors(expected):
            if item.name in tensors:
                raise SourceError(f"{item.name!r} is in both {homes[item.name]} and {file}: remove the stale file")
            tensors[item.name], homes[item.name] = item, file
    for name, file in (expected or {}).items():
        if homes.get(name) != file:
            raise SourceError(
                f"the index of {path} says that {name!r} is in {file.name}, but it is not: download it again"
            )
    found = list(tensors.values())
    metadata = {
        "kind": "directory" if path.is_dir() else "file",
        "path": str(path),
        "files": [file.name for file in files],
        "model_type": config.get("model_type"),
        "fingerprint": fingerprint(found),
    }
    return Inventory(found, sum(t.numel for t in found), config, metadata, in_memory=False)


class _Shard:
    """One safetensors file, opened when it is first read from and kept open (a memory map, no copy)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None

    def tensors(self, expected: Mapping[str, Path] | None) -> list[Stored]:
        """Everything in the file, in the order of its names; what an index does not list carries that problem."""
        found = []
        handle = self._open()
        for name in handle.keys():  # noqa: SIM118 - not a dict
            part = handle.get_slice(name)
            dtype = getattr(torch, DTYPES.get(part.get_dtype(), ""), None)
            stray = expected is not None and name not in expected
            note = f"in {self.path.name}, but not listed in the index" if stray else None
            shape = tuple(part.get_shape())
            found.append(Stored((name,), shape, dtype, torch.device("cpu"), self._taker(name), note))
        return found

    def _open(self) -> Any:
        if self._handle is None:
            from safetensors import SafetensorError, safe_open

            try:
                self._handle = safe_open(self.path, framework="pt", device="cpu")
            except FileNotFoundError as error:
                raise SourceNotFoundError(f"{self.path}: no such file") from error
            except (SafetensorError, OSError, ValueError) as error:
                raise SourceError(
                    f"{self.path} is no readable safetensors file ({error}): truncated or damaged, download it again"
                ) from error
        return self._handle

    def _taker(self, name: str) -> Callable[[Index], torch.Tensor]:
        def take(index: Index) -> torch.Tensor:
            try:
                handle = self._open()
                # Only a leading number or slice lets the reader skip the rest of a stack.
                if index and (not isinstance(index[0], slice) or index[0] != slice(None)):
                    lead = index[0]
                    part = handle.get_slice(name)[lead if isinstance(lead, slice) else slice(lead, lead + 1)]
                    rest = (0 if not isinstance(lead, slice) else slice(None), *index[1:])
                    tensor: torch.Tensor = part[rest]
                    return tensor
                whole: torch.Tensor = handle.get_tensor(name)
                return whole[index] if index else whole
            except SourceError:
                raise
            except Exception as error:  # the file changed under the map, or the disk failed
                raise SourceError(
                    f"{name!r} could not be read from {self.path} ({error}): download it again"
                ) from error

        return take


def _files_of(directory: Path) -> tuple[list[Path], dict[str, Path] | None]:
    index = directory / INDEX
    if index.is_file():
        expected = _read_index(index)
        return sorted(set(expected.values())), expected
    files = sorted(p for p in directory.iterdir() if p.name.endswith(".safetensors") and p.is_file())
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if not (directory / SINGLE).is_file() and indices:
        expected = _read_index(indices[0])
        return sorted(set(expected.values())), expected
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], None
    if not files:
        pickled = sorted(p for p in directory.iterdir() if p.name.endswith(PICKLED))
        if pickled:
            raise _not_safetensors(pickled[0])
        raise SourceError(f"{directory} holds no .safetensors file: give the directory of a model")
    return files, None


def _read_index(index: Path) -> dict[str, Path]:
    """Names and the shards they are in. A shard may be a link, as in the hub's cache; its name may not wander off."""
    try:
        document = json.loads(index.read_bytes())
        weight_map = document["weight_map"]
        items = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{index} is no index of a sharded checkpoint ({error!r}): download it again") from error
    if not items:
        raise SourceError(f"{index} lists no tensors: download it again")
    expected: dict[str, Path] = {}
    for name, shard in items:
        parts = PurePosixPath(shard).parts
        wanders = PureWindowsPath(shard).is_absolute() or PureWindowsPath(shard).drive or "\\" in shard
        if not parts or ".." in parts or os.path.isabs(shard) or wanders or not shard.endswith(".safetensors"):
            raise SourceError(f"{index} puts {name!r} into {shard!r}, which is no safetensors file in its directory")
        expected[name] = index.parent / shard
    missing = sorted({file.name for file in expected.values() if not file.is_file()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceNotFoundError(f"{index} names {missing[0]}{more}, which is not there: finish the download")
    return expected


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return plain_config(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read ({error}): repair it, or move it away to rank without it") from error


def _not_safetensors(path: Path) -> SourceError:
    if path.name.endswith(PICKLED):
        command = (
            'python -c "import torch, safetensors.torch as s; '
            f"weights = torch.load('{path.name}', map_location='cpu', weights_only=True); "
            "s.save_file({k: v.clone().contiguous() for k, v in weights.items()}, 'model.safetensors')\""
        )
        return SourceError(f"{path} is a pickled checkpoint, which can run code when it is read; convert it: {command}")
    return SourceError(f"{path} is no .safetensors file: give one, or the directory of a model")
