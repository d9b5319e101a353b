"""How the ranks of a process group would divide the work of a ranking, from predicted costs alone: for plan()."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..distributed.shares import Shares
from ..execution.cost import relative_cost
from ..sources.base import Matrix


@dataclass(frozen=True)
class Division:
    """What each of ``ranks`` ranks, all of the same speed, would do.

    matrices: fewest and most of one rank.  share: of the rank with the most to do, of all predicted cost.
    nbytes: most bytes of weights that one rank works on, as stored (for quantized ones: when they are dequantized).
    """

    ranks: int
    matrices: tuple[int, int]
    share: float
    nbytes: int

    @property
    def imbalance(self) -> float:
        """The longest time of a rank by their mean."""
        return self.share * self.ranks


def divide(matrices: Sequence[Matrix], certify: bool, ranks: int) -> Division:
    """The division of these matrices among so many ranks, as rank() would make it."""
    costs = {number: relative_cost(matrix.shape, certify) for number, matrix in enumerate(matrices)}
    parts = simulate(Shares.of(costs, ranks), costs, [1.0] * ranks)
    loads = [sum(costs[i] for i in part) for part in parts]
    counts = [len(part) for part in parts]
    return Division(
        ranks=ranks,
        matrices=(min(counts), max(counts)),
        share=max(loads) / sum(loads) if matrices else 1 / ranks,
        nbytes=max(sum(matrices[i].nbytes for i in part) for part in parts),
    )


def simulate(shares: Shares, costs: Mapping[int, float], speeds: Sequence[float]) -> list[list[int]]:
    """What each rank would have done in the end, if ranks have these speeds and ask for the next piece when free."""
    done = [list(first) for first in shares.first]
    free = [(sum(costs[i] for i in first) / speeds[rank], rank) for rank, first in enumerate(shares.first)]
    heapq.heapify(free)
    for piece in shares.pieces:
        at, rank = free[0]
        heapq.heapreplace(free, (at + sum(costs[i] for i in piece) / speeds[rank], rank))
        done[rank] += piece
    return done
