"""Whether all ranks are about to do the same: the same versions, settings, matrices and weights.

A ranking made of the results of two models, or of two settings, would be one of none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..cache.fingerprints import checksum, fingerprint
from ..sources.base import FileState, Matrix, Source
from ..spectrum.resolution import NUMERICS

_CONTENT_IN_NAME = re.compile(r"[0-9a-f]{64}")  # how the hub's cache calls a file


def versions() -> dict[str, Any]:
    """What must be the same so that ranks understand each other, and so that the same weights give the same bits."""
    return {"kappa_fast": __version__, "its numerics": NUMERICS, "torch": torch.__version__}


def contents(source: Source, moved: Callable[[], None]) -> dict[str, str]:
    """What identifies the values of every matrix, by key.

    Of weights in memory a hash of all their bits. Of files their names, sizes and times of change, or their content
    where the hub's cache has it in the name: no rank reads a tensor that it does not rank. Pieces of sharded weights
    are not compared here: each is on one rank, or its copies are compared (``pieces.py``).
    """
    if source.in_memory:
        found = {}
        for matrix in source.matrices:
            moved()
            found[matrix.key] = "in pieces" if matrix.is_spread else fingerprint(matrix.load())
        return found
    return {matrix.key: " + ".join(map(_identity, _files(matrix))) for matrix in source.matrices}


def inventory(source: Source, *, shards: bool = True) -> dict[str, Any]:
    """What is ranked and what is not, by key, and how what is sharded lies on its processes."""
    ranked = {m.key: f"{m.shape} {m.dtype} {m.quantization} {m.aliases} {m.index}" for m in source.matrices}
    found = source.shards.tensors.values() if shards and source.shards is not None else ()
    spread = {f"{t.name} in pieces": f"{t.shape} {t.dtype} {t.kind}: {t.how}" for t in found}
    left_out = {s.name: f"{s.shape}, {s.reason}" for s in source.skipped}
    return {**ranked, **spread, **left_out, "number of parameters": source.num_parameters}


def digest(document: Mapping[str, Any]) -> str:
    """The same for equal documents, which are plain JSON."""
    return checksum(json.dumps(document, sort_keys=True).encode())


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of what the two do not have in common."""
    return [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]


def _files(matrix: Matrix) -> tuple[FileState, ...]:
    if matrix.stamp is not None:
        return matrix.stamp.files
    return () if matrix.location is None else (FileState.of(Path(matrix.location[0])),)


def _identity(state: FileState) -> str:
    name = os.path.basename(state.path)
    told = "" if _CONTENT_IN_NAME.fullmatch(name) else f", last changed {state.mtime_ns}"
    return f"{name} of {state.size} bytes{told}"
