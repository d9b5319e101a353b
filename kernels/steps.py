"""Lists of the tiles of a wave on which each step of cholesky.py works, made once on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .problems import Problems, Tensor, starts_of, to_device


@dataclass(frozen=True)
class Steps:
    """The tiles on which each step works: the first tiles of lists that are made once for all steps.

    order (w,) int64: the matrices, the largest first, for diagonal tiles.  below, behind: int64 each, 2^32 matrix +
    2^16 row + column of a tile below diagonal tiles (columns unused) or behind super-panels; tiles that more steps use
    come first.  diagonals, belows, behinds: the number of tiles of each list that a step uses.
    """

    order: Tensor
    below: Tensor
    behind: Tensor
    diagonals: list[int]
    belows: list[int]
    behinds: list[int]
    side: int

    @classmethod
    def of(cls, problems: Problems, block: int, panel: int, side: int) -> Steps:
        """The lists for diagonal tiles of ``block`` columns, super-panels of ``panel`` and tiles of ``side`` behind."""
        n, device = problems.n, problems.device
        blocks = -(-n // block)
        largest = int(blocks.max()) if len(blocks) else 0
        if largest > 0xFFFF:
            raise ValueError(f"a matrix of {int(n.max())} columns is too large")
        sizes = torch.bincount(blocks, minlength=largest + 1)  # how many matrices have so many blocks
        at_least = [*sizes.flip(0).cumsum(0).flip(0).tolist(), 0]  # or more
        owner, row = _runs(blocks)
        row = blocks[owner] - 1 - row  # tile rows of every matrix from its last one up
        keep = (row > 0).nonzero().flatten()
        keep = keep[torch.argsort(row[keep], descending=True, stable=True)]
        below = (owner[keep] << 32) + (row[keep] << 16)
        # Row r is below the diagonal tiles of the steps before r.
        belows = [sum(at_least[r + 1] for r in range(step + 1, largest)) for step in range(largest)]
        behind, behinds = _behind(n, panel // side, side)
        return cls(
            to_device(torch.argsort(n, descending=True, stable=True), device),
            to_device(below, device),
            to_device(behind, device),
            [at_least[step + 1] for step in range(largest)],
            belows,
            behinds,
            side,
        )


def _runs(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For every element of runs of these lengths, the number of its run and its position in the run."""
    owner = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)
    starts, total = starts_of(lengths)
    return owner, torch.arange(total, device="cpu") - starts[owner]


def _behind(n: Tensor, per_panel: int, side: int) -> tuple[Tensor, list[int]]:
    """Tiles of the lower triangles by the last super-panel they lie behind, and how many lie behind each."""
    across = -(-n // side)
    owner, column = _runs(across)
    rows = across[owner] - column  # of this column of tiles
    chosen = (column >= per_panel).nonzero().flatten()
    panel = column[chosen] // per_panel - 1
    order = torch.argsort(panel, descending=True, stable=True)
    chosen, panel = chosen[order], panel[order]
    line, down = _runs(rows[chosen])
    tiles = (owner[chosen][line] << 32) + ((column[chosen][line] + down) << 16) + column[chosen][line]
    counts = torch.bincount(panel, weights=rows[chosen].to(torch.float64)).flip(0).cumsum(0).flip(0)
    return tiles, [int(count) for count in counts.tolist()]
