"""A step of a run: what is to be known of every matrix, and how it is computed; the executor carries it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..backends import Backend
from ..cache import Query, ResultCache
from ..sources.base import Matrix
from .cost import relative_cost

R = TypeVar("R")


@dataclass(frozen=True)
class Step(Generic[R]):
    """A query, and what computes the results for weights that lie where a backend works.

    cache: is asked before anything is computed, and told the results; None without a cache.
    """

    query: Query[R]
    compute: Callable[[Backend, list[torch.Tensor]], list[R]]
    cache: ResultCache | None = None

    def known(self, matrix: Matrix) -> R | None:
        """The result of a matrix, if the cache has it without reading the weights."""
        return None if self.cache is None else self.cache.lookup(self.query, matrix)

    def on_wave(self, backend: Backend, matrices: Sequence[Matrix], weights: list[torch.Tensor]) -> list[R]:
        """The results of a wave whose weights are loaded. The executor calls it, on a CPU in one of its threads."""
        if self.cache is None:
            return self.compute(backend, weights)
        results = self.cache.lookup_weights(self.query, matrices, weights)
        unknown = [i for i, result in enumerate(results) if result is None]
        if unknown:
            computed = self.compute(backend, [weights[i] for i in unknown])
            for i, result in zip(unknown, computed, strict=True):
                results[i] = self.cache.store(self.query, matrices[i], result)
        return [result for result in results if result is not None]

    def cost(self, matrix: Matrix) -> float:
        """What a matrix takes, relative to others; the same on every machine."""
        return relative_cost(matrix.shape, self.query.certify)
