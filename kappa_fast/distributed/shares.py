"""Who works on which matrices: a first share for every rank, and the rest in pieces for whoever is free."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FIRST = 0.5  # of the cost; a rank at half the speed of the others is then done with its share as they run out of work
SMALLEST = 32  # a piece holds at least one part in so many of what a rank does in all: handing out takes time too


@dataclass(frozen=True)
class Shares:
    """Positions of matrices. ``first[rank]`` is for that rank, ``pieces`` are for whoever asks next, in this order.

    Every rank computes the same from the same costs.
    """

    first: tuple[tuple[int, ...], ...]
    pieces: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, costs: Mapping[int, float], ranks: int) -> Shares:
        """Divide by predicted cost, in any unit, the longest first.

        A first share takes the next matrix as long as its rank is the one with the least to do (Graham, SIAM J. Appl.
        Math. 17 (1969)); pieces get smaller as the work comes to its end (Polychronopoulos and Kuck, IEEE Trans.
        Comput. C-36 (1987)).
        """
        order = sorted(costs, key=lambda i: (-costs[i], i))
        total = sum(costs.values())
        first: list[list[int]] = [[] for _ in range(ranks)]
        loads = [(0.0, rank) for rank in range(ranks)]
        given, taken = 0.0, 0
        for i in order:
            if given >= FIRST * total and taken >= ranks:
                break
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + costs[i], rank))
            first[rank].append(i)
            given, taken = given + costs[i], taken + 1
        return cls(tuple(map(tuple, first)), _pieces(order[taken:], costs, ranks, total))


def shares_of(costs: Mapping[int, float], holders: Callable[[int], tuple[int, ...]]) -> dict[tuple[int, ...], Shares]:
    """The shares of all that hold the same matrices, by their ranks: ``first`` is in the order of these."""
    found: dict[tuple[int, ...], dict[int, float]] = {}
    for i, cost in costs.items():
        found.setdefault(holders(i), {})[i] = cost
    return {ranks: Shares.of(part, len(ranks)) for ranks, part in sorted(found.items())}


def _pieces(order: list[int], costs: Mapping[int, float], ranks: int, total: float) -> tuple[tuple[int, ...], ...]:
    rest = sum(costs[i] for i in order)
    pieces: list[tuple[int, ...]] = []
    piece: list[int] = []
    size = 0.0
    for i in order:
        piece.append(i)
        size += costs[i]
        if size >= max(rest / (2 * ranks), total / (SMALLEST * ranks)):
            pieces.append(tuple(piece))
            rest -= size
            piece, size = [], 0.0
    return (*pieces, tuple(piece)) if piece else tuple(pieces)
