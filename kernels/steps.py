"""Which tiles of a wave each step of a blocked factorization works on, made once on the host: see cholesky.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .problems import Problems, Tensor, starts_of, to_device


@dataclass(frozen=True)
class Steps:
    """Which tiles of a wave each step works on: always the first so many of one list that is made once.

    order (w,) int64: matrices, the largest first, for diagonal tiles.  below, behind: int64 each, 2^32 matrix + 2^16
    row + column of a tile, in the order in which steps have done with them, last ones first: below diagonal tiles
    (columns unused) and behind super-panels.  diagonals, belows, behinds: how many of each take part in a step.
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
        """For diagonal tiles of ``block`` columns, super-panels of ``panel`` and tiles of ``side`` behind them."""
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
    """Of runs of these lengths, for every element: which run, and where within."""
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
