"""One run of rank(): the matrices of a source are resolved, all or the likeliest first, and become entries."""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from .._version import __version__
from ..backends import Backend
from ..cache import LowerBoundQuery, ResolutionQuery, ResultCache
from ..cache.records import Query
from ..distributed.ranks import Ranks
from ..errors import OptionError
from ..machine import signals as stops
from ..machine.threads import stopping
from ..options import Options
from ..results.entries import TensorKappa
from ..results.ranking import Ranking
from ..sources.base import Matrix, Source
from ..spectrum.exact import Room
from ..spectrum.ladder import resolve
from ..spectrum.probe import lower_bounds
from ..spectrum.resolution import Goal, Resolution
from .cost import operations, relative_cost
from .executor import Executor, Work
from .progress import Tracker
from .top import BudgetedTop, TopGroup

R = TypeVar("R")


class Run:
    """One call of rank(): what is to be resolved, and the results by position of the matrix.

    Attributes:
        entries: the results so far.
        operations: multiply-adds of all matrices.
        tracker: what is told of every step; to be set before the work begins.
    """

    tracker: Tracker

    def __init__(
        self, source: Source, options: Options, executor: Executor, store: ResultCache | None, ranks: Ranks | None
    ) -> None:
        self.entries: dict[int, TensorKappa] = {}
        self._source, self._options, self._executor, self._store = source, options, executor, store
        self._ranks = ranks
        # Exact decompositions are made on the CPU, whatever the device.
        self._room = Room(executor.budget_on(torch.device("cpu")), stopping)
        self._everything = range(len(source.matrices))
        self.operations = self._operations(self._everything)
        top, per_group = options.top, options.top_per_group
        self._budgeted = None if top is None else BudgetedTop.of(source.matrices, top, per_group)

    def resolve(self) -> None:
        """Resolve what the options ask for."""
        if self._budgeted is None or callable(self._options.score):  # bounds of kappa say nothing of another score
            self._resolve(self._everything, self._options.goal)
        else:  # in batches of the likeliest first; a proven lower bound above the cutoff ends a matrix's way
            for group in self._budgeted.groups:
                self._resolve_group(group)
        if self._budgeted is not None and self._options.certify == "selection":
            self._prove(self._budgeted.winners(self.entries))

    def ranking(self, seconds: float, partial: bool) -> Ranking:
        """What is resolved by now. ``seconds``: since the call began."""
        metadata = {
            "versions": {"kappa_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "backend": self._executor.backend_name,
            "device": self._executor.devices,
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "work": self._executor.counts,
            "settings": self._options.settings(),
            "source": dict(self._source.metadata),
            "num_parameters": self._source.num_parameters,
            "partial": partial,
        }
        if self._store is not None:
            metadata["cache"] = self._store.metadata(self.entries)
        if self._ranks is not None and not partial:
            metadata = self._ranks.metadata(metadata)
        return Ranking(self.entries.values(), self._source.skipped, metadata)

    def _operations(self, positions: Iterable[int]) -> float:
        return sum(operations(self._source.matrices[i].shape) for i in positions)

    def _prove(self, positions: Sequence[int]) -> None:
        """Once more, with proofs: who is among the lowest is known only now."""
        self.tracker.extend(len(positions), self._operations(positions))
        self._resolve(positions, replace(self._options.goal, certify=True))

    def _resolve_group(self, group: TopGroup) -> None:
        rest = list(group.order)
        bounds: dict[int, float] | None = None
        while rest:  # in batches whose size the waves have no say in: what is resolved must not depend on memory
            cutoff = group.cutoff(self.entries)
            if bounds is None and math.isfinite(cutoff):
                bounds = self._probe(rest, cutoff)
                rest.sort(key=lambda i: (bounds[i], self._source.matrices[i].key))
            batch, rest = rest[: group.count], rest[group.count :]
            hopeless = [i for i in batch if bounds is not None and bounds[i] > cutoff]
            self._bound(hopeless, bounds or {})
            self._resolve([i for i in batch if i not in hopeless], replace(self._options.goal, cutoff=cutoff))

    def _resolve(self, positions: Sequence[int], goal: Goal) -> None:
        def work(_: Sequence[int], backend: Backend, weights: list[torch.Tensor]) -> list[Resolution]:
            return resolve(backend, weights, goal, self._room)

        with contextlib.closing(self._results(positions, work, ResolutionQuery(goal), goal.certify)) as results:
            for position, found in results:
                stops.check()
                self.entries[position] = self._entry(self._source.matrices[position], found, goal)
                self.tracker.advance(1, self._operations([position]))

    def _probe(self, positions: Sequence[int], cutoff: float) -> dict[int, float]:
        def work(_: Sequence[int], backend: Backend, weights: list[torch.Tensor]) -> list[float]:
            return lower_bounds(backend, weights, cutoff)

        with contextlib.closing(self._results(positions, work, LowerBoundQuery(cutoff), False)) as found:
            return dict(found)

    def _results(
        self, positions: Sequence[int], work: Work[R], query: Query[R], certify: bool
    ) -> Generator[tuple[int, R], None, None]:
        def own(positions: Sequence[int]) -> Generator[tuple[int, R], None, None]:
            if self._store is None:
                return self._executor.results(positions, work)
            return self._store.results(self._executor, positions, work, query)

        if self._ranks is None:
            return own(positions)
        costs = {i: relative_cost(self._source.matrices[i].shape, certify) for i in positions}
        return self._ranks.results(positions, costs, own, query, self._store)

    def _bound(self, positions: Sequence[int], bounds: Mapping[int, float]) -> None:
        nan = math.nan
        for i in positions:
            found = Resolution("bounded", nan, bounds[i], math.inf, nan, nan, "probe")
            self.entries[i] = self._entry(self._source.matrices[i], found, Goal(0.0))
            self.tracker.advance(1, self._operations([i]))

    def _entry(self, matrix: Matrix, found: Resolution, goal: Goal) -> TensorKappa:
        if found.status == "ok" and found.lower > goal.cutoff:
            nan = math.nan
            found = Resolution("bounded", nan, found.lower, math.inf, nan, nan, found.method)
        entry = TensorKappa(
            name=matrix.name,
            aliases=matrix.aliases,
            part=matrix.part,
            index=matrix.index,
            layer=matrix.layer,
            group=matrix.group,
            shape=matrix.shape,
            dtype=str(matrix.dtype).removeprefix("torch."),
            numel=matrix.shape[0] * matrix.shape[1],
            kappa=found.kappa,
            lower=found.lower,
            upper=found.upper,
            sigma_max=found.sigma_max,
            sigma_min=found.sigma_min,
            score=found.kappa,
            certified=found.certified,
            method=found.method,
            sensitivity=found.sensitivity,
            status=found.status,
            quantization=matrix.quantization,
        )
        score = self._options.score
        if callable(score) and found.status in ("ok", "rank_deficient"):
            entry = replace(entry, score=_scored(score, entry))
        return entry


def _scored(score: Callable[[TensorKappa], float], entry: TensorKappa) -> float:
    value = score(entry)
    if not isinstance(value, (int, float)) or math.isnan(value):
        raise OptionError(f"score() returned {value!r} for {entry.key!r}: it must return a number")
    return float(value)
