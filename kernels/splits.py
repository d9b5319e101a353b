"""Splits of the work on a Gram matrix along the rows of the weights, for a matrix that has too few tiles.

The splits depend on the shape alone, so that a result does not depend on the other matrices of the wave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import launch
from .problems import (
    COLUMNS,
    GRAM,
    LEADING,
    ROW_PAD,
    Instance,
    Problems,
    Tensor,
    field,
    locate,
    starts_of,
    to_device,
    triangular,
)

# Two products of digits up to 64 share an accumulator: 2 * 64^2 * rows stays below 2^31 up to 262143 rows. The matrix
# units saturate silently, so longer matrices are split.
INTEGER_ROWS = 131072
BYTE_ROWS = 32768  # digits of 8 bits are up to 128: 2 * 128^2 * rows
# Matrices with fewer tiles than this are split along m, so that one of them keeps a chip with 132 units busy.
FULL_CHIP = 132
SPLIT_ROWS = 8192  # and no split is shorter than this
PART_SIDE = 64


@triton.jit
def store_tile(
    table, matrix, total, r, c, n, out, copy, parts, part_start, split, ADD: tl.constexpr, SIDE: tl.constexpr
):
    """The first split writes, or adds to, the result; the others leave their share for ``_add_parts_kernel``.

    ``copy``: None, or another result in its own dtype.
    """
    leading = field(table, matrix, LEADING, ROW_PAD)
    corner = (r * SIDE).to(tl.int64) * leading + c * SIDE
    side = tl.arange(0, SIDE)
    place = side[:, None] * leading.to(tl.int32) + side[None, :]
    inside = (side < n - r * SIDE)[:, None] & (side < n - c * SIDE)[None, :]
    if split == 0:
        start = field(table, matrix, GRAM, ROW_PAD)
        target = out + start + corner + place
        if ADD:
            total += tl.load(target, mask=inside, other=0.0)
        tl.store(target, total, mask=inside)
        if copy is not None:
            tl.store(copy + start + corner + place, total.to(copy.dtype.element_ty), mask=inside)
    else:
        start = tl.multiple_of(tl.load(part_start + matrix), ROW_PAD) + (split - 1).to(tl.int64) * n * leading
        tl.store(parts + start + corner + place, total, mask=inside)


@triton.jit
def _add_parts_kernel(table, owner, first, out, copy, parts, splits, part_start, SIDE: tl.constexpr):
    """Adds the results of the later splits, in their order."""
    matrix, tile = locate(owner, first)
    n, leading = field(table, matrix, COLUMNS), field(table, matrix, LEADING, ROW_PAD)
    r, c = triangular(tile)
    rows, columns = r * SIDE + tl.arange(0, SIDE), c * SIDE + tl.arange(0, SIDE)
    place = rows.to(tl.int64)[:, None] * leading + columns[None, :]
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    target = out + field(table, matrix, GRAM, ROW_PAD) + place
    total = tl.load(target, mask=inside, other=0.0).to(tl.float64)
    start = tl.multiple_of(tl.load(part_start + matrix), ROW_PAD)
    for _ in range(1, tl.load(splits + matrix)):
        total += tl.load(parts + start + place, mask=inside, other=0.0)
        start += n * leading
    tl.store(target, total, mask=inside)
    if copy is not None:
        copied = copy + field(table, matrix, GRAM, ROW_PAD) + place
        tl.store(copied, total.to(copy.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Splits:
    """The splits of the work on every matrix along m, by its shape alone."""

    counts: Tensor
    on_device: Tensor
    part_start: Tensor
    parts: Tensor  # the results of all splits but the first

    @classmethod
    def of(cls, problems: Problems, side: int, bits: int = 7) -> Splits:
        counts = split_counts(problems, side, bits)
        sizes = (counts - 1) * problems.n * (-(-problems.n // ROW_PAD.value) * ROW_PAD.value)
        starts, total = starts_of(sizes)
        parts = torch.empty(max(1, total), dtype=torch.float64, device=problems.device)
        device = problems.device
        return cls(counts, to_device(counts, device, torch.int32), to_device(starts, device), parts)


def split_counts(problems: Problems, side: int, bits: int = 7) -> Tensor:
    """The number of runs of rows into which the work on each matrix is split, for tiles of this side and these bits."""
    tiles = triangular_tiles(problems.n, side)
    counts = torch.minimum(-(-FULL_CHIP // tiles), problems.m // SPLIT_ROWS).clamp(min=1)
    return torch.maximum(counts, -(-problems.m // (BYTE_ROWS if bits == 8 else INTEGER_ROWS)))


def triangular_tiles(n: Tensor, side: int) -> Tensor:
    """The numbers of tiles of the lower triangles."""
    across = -(-n // side)
    return across * (across + 1) // 2


def instances() -> list[Instance]:
    """Everything that ``add_parts`` can ask the compiler for."""
    types = {
        "table": "*i64",
        "owner": "*i32",
        "first": "*i32",
        "parts": "*fp64",
        "splits": "*i32",
        "part_start": "*i64",
    }
    results = ({"out": "*fp64"}, {"out": "*fp32"}, {"out": "*fp64", "copy": "*fp32"})
    return [Instance(_add_parts_kernel, {**types, **result}, {"SIDE": PART_SIDE}, 4) for result in results]


def add_parts(
    problems: Problems, splits: Splits, out: Tensor, chosen: Sequence[int] | None = None, copy: Tensor | None = None
) -> None:
    """Add the results of the later splits, and ``copy`` them; one launch, none if no matrix is split."""
    members = range(len(problems.m)) if chosen is None else chosen
    counts = splits.counts.tolist()
    split = [i for i in members if counts[i] > 1]
    if not split:
        return
    tiles = problems.tiles(triangular_tiles(problems.n, PART_SIDE), split)
    launch(
        _add_parts_kernel,
        (tiles.total,),
        problems.table,
        tiles.owner,
        tiles.first,
        out,
        copy,
        splits.parts,
        splits.on_device,
        splits.part_start,
        SIDE=PART_SIDE,
        num_warps=4,
    )
