"""Parts of a parameter as boxes (a range per dimension): conversion from and to indices, overlap and containment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..results.entries import Index


@dataclass(frozen=True)
class Box:
    """A range along every dimension; ``dropped`` says which dimensions the index removes, because it has an int."""

    ranges: tuple[range, ...]
    dropped: tuple[bool, ...]

    @property
    def numel(self) -> int:
        return math.prod(len(r) for r in self.ranges)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the part that the index selects."""
        return tuple(len(r) for r, gone in zip(self.ranges, self.dropped, strict=True) if not gone)

    def holds(self, other: Box) -> bool:
        """Return whether this box contains the other one."""
        return all(_holds(a, b) for a, b in zip(self.ranges, other.ranges, strict=True))

    def meets(self, other: Box) -> bool:
        """Return whether the boxes overlap."""
        return all(_meet(a, b) for a, b in zip(self.ranges, other.ranges, strict=True))


def box_of(index: Index, shape: Sequence[int]) -> Box:
    """Return the box that an index selects in a tensor of this shape.

    Raises:
        IndexError: the index does not fit the shape.
    """
    if len(index) > len(shape):
        raise IndexError(f"{index} has more dimensions than {tuple(shape)}")
    full = (*index, *(slice(None) for _ in range(len(shape) - len(index))))
    ranges = []
    for part, size in zip(full, shape, strict=True):
        if isinstance(part, slice):
            if (part.stop or 0) > size:
                raise IndexError(f"{part} is beyond {size}")
            ranges.append(range(*part.indices(size)))
        else:
            ranges.append(range(size)[part : part + 1 or None])
            if len(ranges[-1]) != 1:
                raise IndexError(f"{part} is beyond {size}")
    return Box(tuple(ranges), tuple(not isinstance(part, slice) for part in full))


def index_of(box: Box, shape: Sequence[int]) -> Index:
    """Return the index that selects a box, without trailing dimensions that are selected as a whole."""
    parts: list[int | slice] = []
    for r, gone in zip(box.ranges, box.dropped, strict=True):
        parts.append(r.start if gone else slice(r.start, r.stop, r.step if r.step != 1 else None))
    while parts and isinstance(parts[-1], slice) and len(box.ranges[len(parts) - 1]) == shape[len(parts) - 1]:
        parts.pop()
    return tuple(parts)


def disjoint(boxes: Sequence[Box]) -> list[Box]:
    """Return the boxes that no other box contains, in the order of memory.

    Raises:
        ValueError: two boxes overlap and neither contains the other.
    """
    kept: dict[int | None, list[Box]] = {}
    for box in sorted(boxes, key=lambda b: -b.numel):
        # Boxes are grouped by expert: a parameter has hundreds, and boxes of different experts cannot overlap.
        expert = box.ranges[0].start if box.ranges and len(box.ranges[0]) == 1 else None
        rivals = [b for key in kept for b in kept[key] if expert is None or key in (expert, None)]
        if any(rival.holds(box) for rival in rivals):
            continue
        meeting = next((rival for rival in rivals if rival.meets(box)), None)
        if meeting is not None:
            raise ValueError(f"{meeting.ranges} and {box.ranges}")
        kept.setdefault(expert, []).append(box)
    return sorted((b for found in kept.values() for b in found), key=lambda b: [r.start for r in b.ranges])


def _holds(a: range, b: range) -> bool:
    return all(x in a for x in (b[0], b[-1])) and (len(b) == 1 or b.step % a.step == 0) if b else True


def _meet(a: range, b: range) -> bool:
    if not a or not b:
        return False
    short, long = sorted((a, b), key=len)
    if short.step == long.step == 1:
        return max(a.start, b.start) < min(a.stop, b.stop)
    return any(x in long for x in short)
