"""Ranks that hold different parts of one model: stages of a pipeline, experts of their own. What they have together.

Every rank tells what it has, and all make the same list of it. A matrix is ranked by those that hold it; no weight is
sent to others for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cache.fingerprints import checksum
from ..errors import ProcessGroupError
from ..results.entries import Index, Skipped
from ..sources.base import Matrix, Source
from .agreement import digest
from .line import Line


@dataclass(frozen=True)
class Together:
    """All matrices of the ranks, and for each of them, by its key, the ranks that hold it."""

    source: Source
    holders: Mapping[str, tuple[int, ...]]


def united(mine: Source, line: Line) -> Together:
    """What all ranks have, in the order of the ranks; the same list on each of them.

    Raises:
        ProcessGroupError: two ranks have something different under one name.
    """
    told = _told(mine)
    own = digest(told)
    line.post(f"stages/of/{line.rank}", own)
    digests = [line.expect(f"stages/of/{rank}") for rank in range(line.size)]
    if digests.index(own) == line.rank:
        line.post(f"stages/{own}", told)
    parts = {text: line.expect(f"stages/{text}") for text in dict.fromkeys(digests)}
    found, holders = _matrices(parts, digests)
    left_out = _skipped(parts, digests, found)
    here = {matrix.key: matrix for matrix in mine.matrices}
    device = mine.matrices[0].device if mine.matrices else torch.device("cpu")
    matrices = tuple(here.get(key) or _elsewhere(described, device) for key, described in found.items())
    source = replace(
        mine,
        matrices=matrices,
        skipped=tuple(Skipped(name, tuple(shape), reason) for name, (shape, reason) in left_out.items()),
        num_parameters=_count(parts.values()),
        metadata=_metadata([part["metadata"] for part in parts.values()]),
    )
    return Together(source, holders)


def _told(source: Source) -> dict[str, Any]:
    return {
        "matrices": [_described(matrix) for matrix in source.matrices],
        "skipped": [[s.name, list(s.shape), s.reason] for s in source.skipped],
        "parameters": source.num_parameters,
        "sizes": dict(source.sizes),
        "metadata": dict(source.metadata),
    }


def _described(matrix: Matrix) -> dict[str, Any]:
    return {
        "name": matrix.name,
        "part": matrix.part,
        "aliases": list(matrix.aliases),
        "index": [[i.start, i.stop, i.step] if isinstance(i, slice) else i for i in matrix.index],
        "layer": matrix.layer,
        "group": matrix.group,
        "shape": list(matrix.shape),
        "dtype": str(matrix.dtype).removeprefix("torch."),
        "quantization": matrix.quantization,
        "is_spread": matrix.is_spread,
    }


def _elsewhere(described: Mapping[str, Any], device: torch.device) -> Matrix:
    """A matrix that this rank only hears of."""
    index: Index = tuple(slice(*i) if isinstance(i, list) else i for i in described["index"])
    rows, columns = described["shape"]
    known = {name: described[name] for name in ("name", "part", "layer", "group", "quantization", "is_spread")}
    return Matrix(
        **known,
        aliases=tuple(described["aliases"]),
        index=index,
        shape=(rows, columns),
        dtype=getattr(torch, described["dtype"]),
        device=device,
        load=_never,
    )


def _never(device: torch.device | None = None) -> torch.Tensor:
    raise AssertionError("it is on another rank, and ranked there")


def _matrices(
    parts: Mapping[str, Any], digests: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[int, ...]]]:
    found: dict[str, dict[str, Any]] = {}
    holders: dict[str, list[int]] = {}
    for rank, text in enumerate(digests):
        for described in parts[text]["matrices"]:
            key = described["name"] + described["part"]
            if found.setdefault(key, described) != described:
                raise _different(rank, key, holders[key][0])
            holders.setdefault(key, []).append(rank)
    return found, {key: tuple(ranks) for key, ranks in holders.items()}


def _skipped(
    parts: Mapping[str, Any], digests: Sequence[str], ranked: Mapping[str, Any]
) -> dict[str, tuple[list[int], str]]:
    found: dict[str, tuple[list[int], str]] = {}
    first: dict[str, int] = {}
    for rank, text in enumerate(digests):
        for name, shape, reason in parts[text]["skipped"]:
            if found.setdefault(name, (shape, reason)) != (shape, reason) or name in ranked:
                raise _different(rank, name, first.get(name, 0))
            first.setdefault(name, rank)
    return found


def _different(rank: int, name: str, first: int) -> ProcessGroupError:
    return ProcessGroupError(
        f"rank {rank} has another {name} than rank {first} (shape, dtype or what is left out): parts of one model that "
        "have the same name must be the same; name layers and experts by their number in the whole model",
        rank,
    )


def _count(parts: Iterable[Mapping[str, Any]]) -> int:
    """Weights of all parts, those that several have counted once."""
    seen: set[str] = set()
    count = 0
    for part in parts:
        count += part["parameters"] - sum(size for name, size in part["sizes"].items() if name in seen)
        seen.update(part["sizes"])
    return count


def _metadata(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """That of the first part, with what all of them list."""
    made = dict(parts[0])
    for part in parts[1:]:
        for name, value in part.items():
            known = made.get(name)
            if isinstance(value, dict):
                made[name] = _merged(known if isinstance(known, dict) else {}, value)
            elif isinstance(value, list) and isinstance(known, list):
                made[name] = list(dict.fromkeys((*known, *value)))
            elif known is None:
                made[name] = value
    if len(parts) > 1:
        made["fingerprint"] = checksum("".join(str(part.get("fingerprint")) for part in parts).encode())
    return made


def _merged(known: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(known)
    for name, value in more.items():
        if isinstance(value, list):
            made[name] = list(dict.fromkeys((*made.get(name, []), *value)))
        elif isinstance(value, int):
            made[name] = made.get(name, 0) + value
        else:
            made.setdefault(name, value)
    return made
