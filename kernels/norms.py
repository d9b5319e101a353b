"""The largest sum over the rows or columns of every matrix of a wave, from partial sums of quantize.py.

||D||_1 is the largest sum of absolute entries of a column, ||D||_inf of a row, and ||D||_2^2 <= ||D||_1 ||D||_inf: for
a sparse D a bound far below ||D||_F^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import launch
from .problems import Instance, Problems, Tensor, locate, starts_of, to_device

LINES = tl.constexpr(256)  # lines (rows or columns) per program
WARPS = 4


@triton.jit
def _longest_kernel(owner, first, starts, lengths, counts, parts, largest):
    """The largest of LINES sums, each over the parts of its line in their order."""
    matrix, block = locate(owner, first)
    length = tl.load(lengths + matrix)
    line = block * LINES + tl.arange(0, LINES)
    place = parts + tl.load(starts + matrix) + line
    total = tl.zeros((LINES,), tl.float64)
    for _ in range(0, tl.load(counts + matrix)):
        total += tl.load(place, mask=line < length, other=0.0)
        place += length
    tl.store(largest + tl.program_id(0), tl.max(total, axis=0))


@dataclass(frozen=True)
class LineSums:
    """Partial sums of the lines of a wave. parts: float64, of every matrix ``counts`` runs of ``lengths`` numbers.

    lengths, counts: (w,) int64 on the host.  starts: (w,) int64, where the parts of every matrix begin.
    """

    parts: Tensor
    lengths: Tensor
    counts: Tensor
    starts: Tensor

    @classmethod
    def of(cls, problems: Problems, lengths: Tensor, counts: Tensor) -> LineSums:
        """Uninitialized memory for the partial sums."""
        starts, total = starts_of(lengths * counts)
        parts = torch.empty(total, dtype=torch.float64, device=problems.device)
        return cls(parts, lengths, counts, to_device(starts, problems.device))

    def largest(self, problems: Problems) -> Tensor:
        """The largest sum of every matrix, (w,) float64, always added in the same order. One launch."""
        device = problems.device
        tiles = problems.tiles(-(-self.lengths // LINES.value))
        found = torch.empty(tiles.total, dtype=torch.float64, device=device)
        lengths, counts = (to_device(x, device, torch.int32) for x in (self.lengths, self.counts))
        places = (tiles.owner, tiles.first, self.starts, lengths, counts, self.parts, found)
        launch(_longest_kernel, (tiles.total,), *places, num_warps=WARPS)
        sums = torch.zeros(len(self.lengths), dtype=torch.float64, device=device)
        return sums.scatter_reduce_(0, tiles.owner.to(torch.int64), found, "amax")


def instances() -> list[Instance]:
    """Everything that ``largest`` can ask the compiler for."""
    types = {"owner": "*i32", "first": "*i32", "starts": "*i64", "lengths": "*i32", "counts": "*i32"}
    return [Instance(_longest_kernel, {**types, "parts": "*fp64", "largest": "*fp64"}, {}, WARPS)]
