"""The order in which a run resolves matrices: with ``top=`` the likeliest first, so that others need not be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..results.entries import TensorKappa
from ..sources.base import Matrix

# Matrices of one shape that tell whether probes of that shape prove anything: one of so many, and this many at most.
ONE_SCOUT_OF = 4
SCOUTS = 3


@dataclass(frozen=True)
class TopGroup:
    """Matrices of which the ``count`` with the lowest kappa are wanted, the likeliest first."""

    count: int
    order: tuple[Matrix, ...]

    @property
    def first(self) -> tuple[Matrix, ...]:
        """The likeliest ``count``, which are resolved at once, and with them the next ones of the last one's shape.

        A probe hardly ever tells matrices of one shape apart, and cores would wait for each other twice. Where the
        next ones are more than ``count``, too much would be resolved, and there are none.
        """
        if not 0 < self.count < len(self.order):
            return self.order[: self.count]
        last, rest = _sides(self.order[self.count - 1]), self.order[self.count :]
        alike = sum(1 for _ in itertools.takewhile(lambda matrix: _sides(matrix) == last, rest))
        return self.order[: self.count + (alike if alike <= self.count else 0)]

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


def scouted(matrices: Sequence[Matrix]) -> tuple[list[Matrix], list[Matrix]]:
    """A few matrices of every shape, spread over those of that shape, and the others."""
    alike: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        alike.setdefault(_sides(matrix), []).append(matrix)
    scouts, others = list[Matrix](), list[Matrix]()
    for members in alike.values():
        count = min(SCOUTS, -(-len(members) // ONE_SCOUT_OF))
        chosen = {(2 * i + 1) * len(members) // (2 * count) for i in range(count)}
        for position, matrix in enumerate(members):
            (scouts if position in chosen else others).append(matrix)
    return scouts, others


def worth_probing(matrices: Sequence[Matrix], bounds: Mapping[Matrix, float], cutoff: float) -> list[Matrix]:
    """Those of a shape of which a scout is proven to lie above the cutoff."""
    shapes = {_sides(matrix) for matrix, bound in bounds.items() if bound > cutoff}
    return [matrix for matrix in matrices if _sides(matrix) in shapes]


def _sides(matrix: Matrix) -> tuple[int, int]:
    """The larger side and the smaller one: kappa does not change where a matrix is turned."""
    return max(matrix.shape), min(matrix.shape)


def expected_kappa(shape: tuple[int, int]) -> float:
    """Kappa of a large Gaussian matrix of this shape, (1 + sqrt(b)) / (1 - sqrt(b)) with b the ratio of its sides.

    Only the order of work depends on it: the edges of Marchenko and Pastur, as in Edelman, SIAM J. Matrix Anal.
    Appl. 9 (1988).
    """
    root = math.sqrt(min(shape) / max(shape))
    return (1 + root) / (1 - root) if root < 1 else math.inf
