"""A sharded model on several ranks: who has which piece, whether copies of a piece are equal, and how pieces come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..cache.fingerprints import fingerprint
from ..errors import OptionError, ProcessGroupError
from ..sources.base import Source
from ..sources.spread import Box, Piece, Shards, Spread
from .line import Line
from .transfer import Transfer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]


class Pieces:
    """The shards of a model that the ranks of a group hold together, connected for one call of rank()."""

    def __init__(self, source: Source, line: Line, group: ProcessGroup, store: Store) -> None:
        """
        Raises:
            OptionError: a piece is on a process that does not belong to the group.
            ProcessGroupError: a rank is lost.
        """
        shards = source.shards or Shards()
        self._shards, self._line = shards, line
        self._numbers = _numbers_in(group, shards)
        for device in {t.device for t in shards.tensors.values() if t.device.type == "cuda"}:
            torch.cuda.synchronize(device)  # other threads read what the caller's streams may still write
        self._transfer = Transfer(line, store, self._give)
        shards.connect(self._fetch)

    @property
    def received(self) -> int:
        """Bytes of weights that other ranks have given to this one."""
        return self._transfer.received

    def agree(self, others: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Make sure that all copies of a piece are equal, wherever they are, and of others that several ranks hold.

        Raises:
            ProcessGroupError: they are not; its ``rank`` has another one than the first that holds it.
        """
        line = self._line
        mine = {
            _called(spread, piece): _print_of(spread, piece)
            for spread in self._shards.tensors.values()
            for piece in spread.own(self._shards.rank)
            if len(piece.ranks) > 1 or len(set(spread.over)) < line.size
        }
        for name, load in others.items():
            line.moved()
            mine[name] = fingerprint(load())
        line.post(f"pieces/{line.rank}", mine)
        if line.rank == 0:
            line.post("pieces", _odd([line.expect(f"pieces/{rank}") for rank in range(line.size)]))
        odd = line.expect("pieces")
        if odd:
            rank, name, first = odd
            raise ProcessGroupError(
                f"rank {rank} has another copy of {name} than rank {first}, though both are to hold the same: "
                "broadcast it, or load the model again",
                rank,
            )

    def close(self) -> None:
        """Nothing more is asked of this rank. Never raises."""
        self._transfer.close()

    def _fetch(self, rank: int, name: str, box: Box) -> torch.Tensor:
        spread = self._shards.tensors[name]
        found = self._transfer.fetch(self._numbers[rank], name, box)
        return found.view(spread.dtype).reshape([len(part) for part in box])

    def _give(self, name: str, box: Box) -> torch.Tensor:
        return self._shards.tensors[name].part(box)


def _numbers_in(group: ProcessGroup, shards: Shards) -> dict[int, int]:
    """By the global rank of a process, its number within the group."""
    from torch import distributed

    numbers = {rank: number for number, rank in enumerate(distributed.get_process_group_ranks(group))}
    for spread in shards.tensors.values():
        away = [rank for piece in spread.pieces for rank in piece.ranks if rank not in numbers]
        if away:
            raise OptionError(
                f"process_group lacks rank {away[0]}, which holds a part of {spread.name!r} ({spread.how}): give the "
                "group of all processes that hold the model"
            )
    return numbers


def _odd(prints: Sequence[Mapping[str, str]]) -> list[Any]:
    """The first rank whose copy of a piece is another than that of an earlier rank, with the piece and that rank."""
    known: dict[str, tuple[int, str]] = {}
    for rank, found in enumerate(prints):
        for name, text in found.items():
            first, other = known.setdefault(name, (rank, text))
            if other != text:
                return [rank, name, first]
    return []


def _called(spread: Spread, piece: Piece) -> str:
    return f"{spread.name} from {piece.start} on"


def _print_of(spread: Spread, piece: Piece) -> str:
    box = tuple(range(at, at + size) for at, size in zip(piece.at, piece.size, strict=True))
    part = spread.part(box)
    return fingerprint(part.reshape(len(part) if part.dim() else 1, -1))
