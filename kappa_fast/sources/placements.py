"""Where the pieces of a DTensor are: the same on every process of its mesh, found without asking any of them."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any, NamedTuple

import torch

from ..errors import ShardedError
from .spread import Piece, Spread

_KNOWN = ("Replicate", "Shard", "_StridedShard")  # the class itself: one that inherits may divide in another way


class _Run(NamedTuple):
    """Consecutive entries of one dimension, and where the first of them is on the process that holds them."""

    start: int
    size: int
    at: int


def is_dtensor(tensor: object) -> bool:
    """Whether this is a DTensor, by its class, so that torch.distributed need not be imported."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor this process has: of a DTensor its shard, of others the tensor. Nobody else is asked."""
    if not is_dtensor(tensor):
        return tensor.detach()
    itself: Any = tensor
    with torch.no_grad():
        found: torch.Tensor = itself.to_local()
    return found.detach()


def spread_of(name: str, tensor: torch.Tensor) -> Spread:
    """A DTensor as this room reads it; with a problem where its placements are not understood."""
    itself: Any = tensor
    local, shape = local_of(tensor), tuple(tensor.shape)
    mesh, placements = itself.device_mesh, tuple(itself.placements)
    ranks = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    how = f"{', '.join(map(str, placements))} on a mesh of {' x '.join(map(str, mesh.shape))}"
    problem, pieces = _refused(local, mesh, placements), tuple[Piece, ...]()
    if problem is None:
        pieces = _pieces(shape, tuple(mesh.shape), ranks, placements)
        held = _held_by(shape, tuple(mesh.shape), placements, tuple(mesh.get_coordinate() or ()))
        if held != tuple(local.shape) and math.prod(held) + local.numel() > 0:
            problem = f"its part here is {tuple(local.shape)} instead of {held}"
    if problem is not None:
        problem = f"sharded over several processes ({how}) in a way that is not read: {problem}"
    return Spread(name, "DTensor", how, ranks, shape, tensor.dtype, local.device, pieces, local, problem=problem)


def pieces_here(tensor: torch.Tensor) -> tuple[Piece, ...]:
    """What this process has of a DTensor, piece by piece; where it is a summand, that counts as the place it adds to.

    Raises:
        ShardedError: its placements are not understood.
    """
    from torch.distributed.tensor import Replicate

    itself: Any = tensor
    mesh = itself.device_mesh
    placements = tuple(Replicate() if p.is_partial() else p for p in itself.placements)
    local, coordinate = local_of(tensor), tuple(mesh.get_coordinate() or ())
    problem = _refused(local, mesh, placements)
    held = _held_by(tuple(tensor.shape), tuple(mesh.shape), placements, coordinate)
    if problem is None and held != tuple(local.shape) and math.prod(held) + local.numel() > 0:
        problem = f"its part here is {tuple(local.shape)} instead of {held}"
    if problem is not None:
        raise ShardedError(f"a tensor of shape {tuple(tensor.shape)} is sharded in a way that is not read: {problem}")
    if not coordinate:  # this process does not belong to the mesh
        return ()
    boxes = itertools.product(*_runs(tuple(tensor.shape), tuple(mesh.shape), placements, coordinate))
    parts = [tuple(zip(*box, strict=True)) or ((), (), ()) for box in boxes]
    return tuple(Piece(tuple(start), tuple(size), tuple(at), (mesh.get_rank(),)) for start, size, at in parts)


def _refused(local: torch.Tensor, mesh: Any, placements: tuple[Any, ...]) -> str | None:
    unknown = next((p for p in placements if type(p).__name__ not in _KNOWN), None)
    if unknown is not None:
        return f"{type(unknown).__name__} is none of {', '.join(_KNOWN)}"
    if any(bool((mesh.mesh.diff(dim=dim) <= 0).any()) for dim in range(mesh.mesh.dim())):
        # torch orders the ranks of a group, so the piece of a process is not the one at its place in the mesh.
        return "the ranks of its mesh do not ascend along every dimension"
    if type(local) not in (torch.Tensor, torch.nn.Parameter):
        return f"its pieces are of the class {type(local).__name__}"
    return None if local.layout == torch.strided else f"its pieces are {local.layout}"


@cache
def _pieces(
    shape: tuple[int, ...], mesh: tuple[int, ...], ranks: tuple[int, ...], placements: tuple[Any, ...]
) -> tuple[Piece, ...]:
    """The pieces of all processes of a mesh; copies of a piece are one with several holders."""
    holders: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for number, coordinate in enumerate(itertools.product(*(range(size) for size in mesh))):
        for box in itertools.product(*_runs(shape, mesh, placements, coordinate)):
            # zip(*box): all starts, all sizes, all offsets; a tensor without dimensions has one empty box.
            parts = tuple(tuple(part) for part in zip(*box, strict=True)) or ((), (), ())
            holders.setdefault(parts, []).append(ranks[number])
    return tuple(Piece(start, size, at, tuple(of)) for (start, size, at), of in holders.items())


def _held_by(
    shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...], coordinate: tuple[int, ...]
) -> tuple[int, ...]:
    if not coordinate:  # this process does not belong to the mesh
        return (0,) * len(shape)
    return tuple(sum(run.size for run in parts) for parts in _runs(shape, mesh, placements, coordinate))


def _runs(
    shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...], coordinate: tuple[int, ...]
) -> list[tuple[_Run, ...]]:
    """What one process has of each dimension."""
    return [
        _runs_along(
            size,
            tuple(
                (placement, mesh[i], coordinate[i])
                for i, placement in enumerate(placements)
                if type(placement).__name__ != "Replicate" and placement.dim % len(shape) == dimension
            ),
        )
        for dimension, size in enumerate(shape)
    ]


@cache
def _runs_along(size: int, divisions: tuple[tuple[Any, int, int], ...]) -> tuple[_Run, ...]:
    """Found by dividing the numbers of the entries as torch divides the entries themselves."""
    entries = torch.arange(size)
    for placement, chunks, number in divisions:
        kind, options = type(placement), {}
        if kind.__name__ == "_StridedShard":
            options = {"split_factor": placement.split_factor}
        entries = kind(0, **options)._split_tensor(entries, chunks, with_padding=False)[0][number]
    gaps = (entries[1:] != entries[:-1] + 1).nonzero().flatten() + 1
    breaks = [0, *gaps.tolist(), len(entries)]
    return tuple(
        _Run(int(entries[first]), last - first, first) for first, last in itertools.pairwise(breaks) if last > first
    )
