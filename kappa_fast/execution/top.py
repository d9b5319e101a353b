"""``top=``: which matrices are worth resolving when only the lowest condition numbers are wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..results.entries import TensorKappa
from ..sources.base import Matrix


@dataclass(frozen=True)
class TopGroup:
    """Matrices among which ``count`` are wanted; ``order`` holds their positions, the likeliest first."""

    count: int
    order: tuple[int, ...]

    def cutoff(self, entries: Mapping[int, TensorKappa]) -> float:
        """An upper bound of the count-th lowest kappa: whatever is proven to lie above it is not among the lowest."""
        uppers = sorted(entries[i].upper for i in self.order if i in entries and entries[i].status == "ok")
        return uppers[self.count - 1] if len(uppers) >= self.count else math.inf


@dataclass(frozen=True)
class BudgetedTop:
    """The whole of ``top=``: one group, or one for each group of like matrices."""

    groups: tuple[TopGroup, ...]

    @classmethod
    def of(cls, matrices: Sequence[Matrix], top: int | float, per_group: bool) -> BudgetedTop:
        members: dict[str, list[int]] = {}
        for i, matrix in enumerate(matrices):
            members.setdefault(matrix.group if per_group else "", []).append(i)
        groups = []
        for positions in members.values():
            count = top if isinstance(top, int) else max(1, int(len(positions) * top))
            order = sorted(positions, key=lambda i: (expected_kappa(matrices[i].shape), matrices[i].key))
            groups.append(TopGroup(min(count, len(positions)), tuple(order)))
        return cls(tuple(groups))

    def winners(self, entries: Mapping[int, TensorKappa]) -> list[int]:
        """Positions of the ``count`` resolved entries with the lowest score of every group."""
        chosen = []
        for group in self.groups:
            resolved = [i for i in group.order if i in entries and entries[i].status == "ok"]
            chosen += sorted(resolved, key=lambda i: (entries[i].score, entries[i].key))[: group.count]
        return chosen


def expected_kappa(shape: tuple[int, int]) -> float:
    """Kappa of a large Gaussian matrix of this shape, (1 + sqrt(b)) / (1 - sqrt(b)) with b the ratio of its sides.

    Only the order of work depends on it: the edges of Marchenko and Pastur, as in Edelman, SIAM J. Matrix Anal.
    Appl. 9 (1988).
    """
    root = math.sqrt(min(shape) / max(shape))
    return (1 + root) / (1 - root) if root < 1 else math.inf
