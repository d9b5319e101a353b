"""The order in which a run resolves matrices: with ``top=`` the likeliest first, so that others need not be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..results.entries import TensorKappa
from ..sources.base import Matrix


@dataclass(frozen=True)
class TopGroup:
    """Matrices of which the ``count`` with the lowest kappa are wanted, the likeliest first."""

    count: int
    order: tuple[Matrix, ...]

    def cutoff(self, entries: Mapping[Matrix, TensorKappa]) -> float:
        """An upper bound of the count-th lowest kappa: whatever is proven to lie above it is not among the lowest."""
        uppers = sorted(entries[m].upper for m in self.order if m in entries and entries[m].status == "ok")
        return uppers[self.count - 1] if 0 < self.count <= len(uppers) else math.inf


@dataclass(frozen=True)
class BudgetedTop:
    """The groups among which ``top=`` counts: all matrices, or those that are alike; without it all are wanted."""

    groups: tuple[TopGroup, ...]

    @classmethod
    def of(cls, matrices: Sequence[Matrix], top: int | float | None, per_group: bool) -> BudgetedTop:
        if top is None:  # in the order of the source: nothing depends on who comes first
            return cls((TopGroup(len(matrices), tuple(matrices)),))
        members: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            members.setdefault(matrix.group if per_group else "", []).append(matrix)
        groups = []
        for alike in members.values():
            count = top if isinstance(top, int) else max(1, int(len(alike) * top))
            order = sorted(alike, key=lambda matrix: (expected_kappa(matrix.shape), matrix.key))
            groups.append(TopGroup(min(count, len(alike)), tuple(order)))
        return cls(tuple(groups))

    def winners(self, entries: Mapping[Matrix, TensorKappa]) -> list[Matrix]:
        """Of every group the ``count`` resolved matrices with the lowest score."""
        chosen: list[Matrix] = []
        for group in self.groups:
            resolved = [m for m in group.order if m in entries and entries[m].status == "ok"]
            chosen += sorted(resolved, key=lambda m: (entries[m].score, entries[m].key))[: group.count]
        return chosen


def expected_kappa(shape: tuple[int, int]) -> float:
    """Kappa of a large Gaussian matrix of this shape, (1 + sqrt(b)) / (1 - sqrt(b)) with b the ratio of its sides.

    Only the order of work depends on it: the edges of Marchenko and Pastur, as in Edelman, SIAM J. Matrix Anal.
    Appl. 9 (1988).
    """
    root = math.sqrt(min(shape) / max(shape))
    return (1 + root) / (1 - root) if root < 1 else math.inf
