"""The files of the weights of bases, and how they are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def base_name(kind: str, seed: int) -> str:
    """Of the files of a base."""
    return f"{kind}-{seed}"


def file_of(kind: str, seed: int, folder: Path) -> Path:
    """Where pre-training leaves the weights of a base."""
    return folder / f"{base_name(kind, seed)}.safetensors"


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of names and values, numpy arrays, 16 digits."""
    found = hashlib.sha256()
    for name, value in sorted(values.items()):
        found.update(name.encode() + value.tobytes())
    return found.hexdigest()[:16]


def digest_of(file: Path) -> str | None:
    """Of the weights in a file; None where there is no whole one."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return digest(load_file(file))
    except (FileNotFoundError, SafetensorError):
        return None
