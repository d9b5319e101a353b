"""Divides tensors of a checkpoint whose rows become several parameters of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ..results.entries import Index
from .base import Division, Inventory, Place, Stamp, Stored


def divide(inventory: Inventory, places: Mapping[str, Place | Division]) -> tuple[Inventory, dict[str, Place]]:
    """Return the inventory with divided tensors replaced by their parts, and the places of all tensors by name."""
    found = {name: place for name, place in places.items() if isinstance(place, Place)}
    tensors: list[Stored] = []
    for stored in inventory.tensors:
        place = places.get(stored.name)
        parts = list(_parts(stored, place)) if isinstance(place, Division) else []
        found |= {part.name: at for part, at in parts}
        tensors += [part for part, _ in parts] or [stored]
    return (inventory if len(found) == len(places) else replace(inventory, tensors=tensors)), found


def _parts(stored: Stored, division: Division) -> Iterator[tuple[Stored, Place]]:
    made = stored.quantization is not None or stored.overhead > 0
    itemsize = stored.dtype.itemsize if stored.dtype is not None else 0
    for rows, place in division.parts:
        number = len(range(*rows.indices(stored.shape[0])))
        where = f"rows {rows.start}:{rows.stop or ''}" + (f":{rows.step}" if rows.step else "")
        yield (
            replace(
                stored,
                names=(place.name,),
                shape=(number, *stored.shape[1:]),
                take=_TakeRows(stored, rows),
                prefetch=None if stored.prefetch is None else _PrefetchRows(stored, rows),
                stamp=None if stored.stamp is None else Stamp(stored.stamp.files, f"{stored.stamp.what} {where}"),
                overhead=stored.overhead + (math.prod(stored.shape) * itemsize if made else 0),
                evidence=stored.evidence and f"{stored.evidence}, {where} of {stored.name}",
            ),
            place,
        )


@dataclass(frozen=True)
class _TakeRows:
    """``Stored.take`` of some rows of a tensor."""

    stored: Stored
    rows: slice

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        found = self.stored.take((self.rows,), device)
        return found[index] if index else found


@dataclass(frozen=True)
class _PrefetchRows:
    """``Stored.prefetch`` of some rows of a tensor."""

    stored: Stored
    rows: slice

    def __call__(self, index: Index) -> None:
        assert self.stored.prefetch is not None
        self.stored.prefetch((self.rows,))
