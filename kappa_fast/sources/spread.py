"""Tensors that lie in pieces on several processes: where each piece is, and how a part is put together from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ShardedError
from ..results.entries import Index

Box = tuple[range, ...]  # what of each dimension is meant
# fetch(rank, name, box): that part of what the process with this global rank holds of the tensor, on the CPU.
Fetch = Callable[[int, str, Box], torch.Tensor]
TOGETHER = (
    "rank it on all of these processes together, rank(model, process_group=torch.distributed.group.WORLD), or rank "
    "the checkpoint directory"
)


@dataclass(frozen=True)
class Piece:
    """A part of a tensor without gaps. Several processes may hold copies of it.

    Attributes:
        start, size: where it lies in the tensor.
        at: where it begins in what each of its holders has.
        ranks: the holders, by their global ranks.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    at: tuple[int, ...]
    ranks: tuple[int, ...]

    def overlap(self, wanted: Box) -> tuple[tuple[slice, ...], Box] | None:
        """Where what it has of ``wanted`` goes in the result, and where a holder finds it; None if it has nothing."""
        places, found = [], []
        for start, size, at, part in zip(self.start, self.size, self.at, wanted, strict=True):
            first = max(0, -((part.start - start) // part.step))
            last = min(len(part), -((part.start - start - size) // part.step))
            if first >= last:
                return None
            places.append(slice(first, last))
            begin = part[first] - start + at
            found.append(range(begin, begin + (last - first - 1) * part.step + 1, part.step))
        return tuple(places), tuple(found)


@dataclass(frozen=True)
class Spread:
    """A tensor that this process has a part of, or none.

    Attributes:
        name: the first one that the model has for it.
        kind: what has spread it, such as "DTensor".
        how: in which way, for people; equal on all processes.
        over: the processes that have pieces, by their global ranks. Others may have copies of all pieces.
        shape, dtype, device: of the whole; the device is the one where this process has its part.
        pieces: all of them; they cover the tensor, none overlaps another.
        local: what this process holds.
        is_flat: the pieces are parts of all entries in a row, with one dimension.
        problem: why it cannot be read, or None; then there are no pieces.
    """

    name: str
    kind: str
    how: str
    over: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    pieces: tuple[Piece, ...]
    local: torch.Tensor = field(repr=False, compare=False)
    is_flat: bool = False
    problem: str | None = None

    @property
    def overhead(self) -> int:
        """Bytes on their way while it is put together, or one matrix of a stack of three dimensions is."""
        itself = math.prod(self.shape)
        one = itself // self.shape[0] if len(self.shape) == 3 and self.shape[0] else itself
        return max(1, one) * self.dtype.itemsize

    def part(self, box: Box) -> torch.Tensor:
        """What of the local tensor is meant, a view.

        Raises:
            ShardedError: its memory has been freed.
        """
        if self.local.numel() and not self.local.untyped_storage().nbytes():
            raise ShardedError(f"the memory of {self.name} has been freed: rank between two steps of training")
        return self.local.detach()[tuple(slice(r.start, r.stop, r.step) for r in box)]

    def own(self, rank: int) -> Iterator[Piece]:
        """The pieces of one process."""
        return (piece for piece in self.pieces if rank in piece.ranks)


class Shards:
    """All tensors of a model that lie on several processes. ``connect`` says how to get at what is elsewhere."""

    def __init__(self) -> None:
        self.tensors: dict[str, Spread] = {}
        self.rank = _global_rank()
        self._fetch: Fetch = _nobody

    def connect(self, fetch: Fetch) -> None:
        """``fetch`` gets pieces of other processes; without one only what is here can be read."""
        self._fetch = fetch

    @property
    def elsewhere(self) -> list[Spread]:
        """Those of which not every piece is here."""
        return [t for t in self.tensors.values() if not all(self.rank in piece.ranks for piece in t.pieces)]

    def check_here(self) -> None:
        """Make sure that nothing of it is elsewhere.

        Raises:
            ShardedError: something is.
        """
        away = self.elsewhere
        if away:
            first = away[0]
            more = f", and so are {len(away) - 1} more" if len(away) > 1 else ""
            what = f"{first.name} of shape {first.shape} is sharded over several processes ({first.kind}){more}"
            raise ShardedError(f"{what}: {TOGETHER}")

    def taker(self, spread: Spread) -> Callable[..., torch.Tensor]:
        """``Stored.take`` of this tensor."""

        def take(index: Index, device: torch.device | None = None) -> torch.Tensor:
            return self.read(spread, index)

        return take

    def read(self, spread: Spread, index: Index = ()) -> torch.Tensor:
        """That part of the tensor, where this process has its own part of it.

        Raises:
            ShardedError: a part of it is on another process, and there is no connection.
        """
        if spread.is_flat:
            return self._read_flat(spread, index)
        wanted, dropped = box_of(index, spread.shape)
        found = self._gathered(spread, wanted)
        return found[tuple(0 if gone else slice(None) for gone in dropped)]

    def _read_flat(self, spread: Spread, index: Index) -> torch.Tensor:
        """Integers at the beginning of the index leave what lies in a row; the rest of it is applied to that."""
        start, shape, rest = 0, spread.shape, tuple(index)
        while rest and isinstance(rest[0], int):
            start += rest[0] % shape[0] * math.prod(shape[1:])
            shape, rest = shape[1:], rest[1:]
        whole = self._gathered(spread, (range(start, start + math.prod(shape)),)).view(shape)
        return whole[rest].clone() if rest else whole

    def _gathered(self, spread: Spread, wanted: Box) -> torch.Tensor:
        shape = [len(part) for part in wanted]
        cuts = [(piece, cut) for piece in spread.pieces if (cut := piece.overlap(wanted)) is not None]
        if len(cuts) == 1 and self.rank in cuts[0][0].ranks:
            _, (_, found) = cuts[0]
            return self._checked(spread, spread.part(found), shape)
        made = torch.empty(shape, dtype=spread.dtype, device=spread.device)
        filled = 0
        for piece, (places, found) in cuts:
            if self.rank in piece.ranks:
                part = spread.part(found)
            else:  # of copies, others take others
                part = self._fetch(piece.ranks[self.rank % len(piece.ranks)], spread.name, found)
            target = made[places]
            target.copy_(self._checked(spread, part, target.shape))
            filled += part.numel()
        if filled != made.numel():
            some = f"{filled} of {made.numel()} entries"
            raise ShardedError(f"{spread.name}: no more than {some} are held by any process ({spread.how})")
        return made

    def _checked(self, spread: Spread, part: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        if tuple(part.shape) != tuple(shape) or part.dtype != spread.dtype:
            raise ShardedError(
                f"{spread.name}: a piece is {tuple(part.shape)}, {part.dtype} instead of {tuple(shape)}, "
                f"{spread.dtype}: the model has been changed meanwhile"
            )
        return part


def box_of(index: Index, shape: tuple[int, ...]) -> tuple[Box, tuple[bool, ...]]:
    """What an index of integers and slices means in each dimension, and which dimensions it takes away."""
    parts: list[range] = []
    dropped: list[bool] = []
    for position, size in enumerate(shape):
        item: Any = index[position] if position < len(index) else slice(None)
        whole = isinstance(item, slice)
        parts.append(range(*item.indices(size)) if whole else range(item % size, item % size + 1))
        dropped.append(not whole)
    return tuple(parts), tuple(dropped)


def _global_rank() -> int:
    from torch import distributed

    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _nobody(rank: int, name: str, box: Box) -> torch.Tensor:
    raise ShardedError(f"a part of {name} is on rank {rank}: {TOGETHER}")
