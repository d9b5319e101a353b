"""One run of rank(): resolves the matrices of a source, all or the likeliest first, and makes the ranking of them."""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .._version import __version__
from ..cache import LowerBoundQuery, ResolutionQuery, ResultCache
from ..machine import signals as stops
from ..options import Options
from ..results.entries import TensorKappa
from ..results.interruption import Interrupted
from ..results.ranking import Ranking
from ..results.scores import scored
from ..sources.base import Matrix, Source
from ..spectrum.exact import MemoryGate
from ..spectrum.ladder import resolve
from ..spectrum.probe import lower_bounds
from ..spectrum.resolution import Goal, Resolution
from ..texts import warn
from .cost import operations
from .executor import Executor
from .progress import ProgressOption, Tracker, tracking
from .step import Step
from .top import BudgetedTop, TopGroup, scouted, worth_probing

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks

Results = Callable[[Step[Any], Sequence[Matrix], threading.Event], Generator[tuple[Matrix, Any], None, None]]
Batch = tuple[Sequence[Matrix], Goal]  # matrices, and what they are resolved to


class Run:
    """One call of rank(), from when its matrices are known.

    Attributes:
        entries: the results so far.
    """

    def __init__(
        self, source: Source, options: Options, executor: Executor, cache: ResultCache | None, ranks: Ranks | None
    ) -> None:
        self.entries: dict[Matrix, TensorKappa] = {}
        self._source, self._options, self._executor = source, options, executor
        self._cache, self._ranks = cache, ranks
        own: Results = executor.results
        self._results = own if ranks is None else functools.partial(ranks.results, own)
        self._stop = threading.Event()
        # Exact decompositions are made on the CPU, whatever the device.
        self._gate = MemoryGate(executor.budget_on(torch.device("cpu")), self._stop)
        self._tracker = Tracker(len(source.matrices), _operations(source.matrices), None)

    @contextlib.contextmanager
    def reporting(self, progress: ProgressOption) -> Iterator[None]:
        """For the body of the context, tell of the progress as that option of rank() says."""
        with tracking(progress, len(self._source.matrices), _operations(self._source.matrices)) as self._tracker:
            self._executor.notify = self._tracker.note
            yield

    def resolve(self, order: BudgetedTop) -> None:
        """Resolve what the options ask for, in this order."""
        for matrices, goal in self._batches(order):
            step = Step(ResolutionQuery(goal), functools.partial(resolve, goal=goal, gate=self._gate), self._cache)
            with contextlib.closing(self._results(step, matrices, self._stop)) as results:
                for matrix, resolution in results:
                    stops.check()
                    if self._cache is not None and (failure := self._cache.new_failure()) is not None:
                        warn(failure)
                    self.entries[matrix] = self._entry(matrix, resolution, goal)
                    self._tracker.advance(1, operations(matrix.shape))

    def ranking(self, seconds: float, *, partial: bool = False) -> Ranking:
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
        if self._cache is not None:
            metadata["cache"] = self._cache.metadata(self.entries)
        if self._ranks is not None and not partial:
            metadata = self._ranks.metadata(metadata)
        return Ranking(self.entries.values(), self._source.skipped, metadata)

    def interrupted(self, seconds: float) -> Interrupted:
        """What rank() raises on Ctrl-C. ``seconds``: since the call began."""
        done, total = self.ranking(seconds, partial=True), len(self._source.matrices)
        resumable = self._cache is not None and self._cache.keeps
        message = f"interrupted: {len(done)} of {total} matrices are done (see .partial)"
        return Interrupted(message, done, total=total, resumable=resumable)

    def _batches(self, order: BudgetedTop) -> Iterator[Batch]:
        """What is resolved together; the next batch depends on the entries of those before."""
        if self._options.score != "kappa":  # bounds of kappa say nothing of another score
            yield self._source.matrices, self._options.goal
        else:
            yield [matrix for group in order.groups for matrix in group.first], self._options.goal
            for group in order.groups:
                yield from self._rest_of(group)
        if self._options.certify == "selection":  # once more, with proofs: who is among the lowest is known only now
            winners = order.winners(self.entries)
            self._tracker.extend(len(winners), _operations(winners))
            yield winners, replace(self._options.goal, certify=True)

    def _rest_of(self, group: TopGroup) -> Iterator[Batch]:
        """What remains of a group but for those that a proven lower bound above the cutoff rules out, all at once.

        What is resolved must not depend on memory, so no batch depends on the waves.
        """
        rest = group.order[len(group.first) :]
        while rest and math.isinf(group.cutoff(self.entries)):  # singular or broken matrices were among the likeliest
            yield rest[: group.count], self._options.goal
            rest = rest[group.count :]
        if rest:
            cutoff = group.cutoff(self.entries)
            bounds = self._lower_bounds(rest, cutoff)
            hopeless = [matrix for matrix in rest if bounds.get(matrix, 1.0) > cutoff]
            self._report_bounds(hopeless, bounds)
            ruled_out = set(hopeless)
            yield [matrix for matrix in rest if matrix not in ruled_out], replace(self._options.goal, cutoff=cutoff)

    def _lower_bounds(self, matrices: Sequence[Matrix], cutoff: float) -> dict[Matrix, float]:
        """Bounds of the matrices that a probe may prove to lie above the cutoff: scouts tell which shapes they have."""
        step = Step(LowerBoundQuery(cutoff), functools.partial(lower_bounds, cutoff=cutoff), self._cache)
        scouts, others = scouted(matrices)
        with contextlib.closing(self._results(step, scouts, self._stop)) as results:
            bounds = dict(results)
        worthwhile = worth_probing(others, bounds, cutoff)
        with contextlib.closing(self._results(step, worthwhile, self._stop)) as results:
            return bounds | dict(results)

    def _report_bounds(self, matrices: Sequence[Matrix], bounds: Mapping[Matrix, float]) -> None:
        """Report matrices as bounded only."""
        nan = math.nan
        for matrix in matrices:
            resolution = Resolution("bounded", nan, bounds[matrix], math.inf, nan, nan, "probe")
            self.entries[matrix] = self._entry(matrix, resolution, Goal(0.0))
            self._tracker.advance(1, operations(matrix.shape))

    def _entry(self, matrix: Matrix, resolution: Resolution, goal: Goal) -> TensorKappa:
        if resolution.status == "ok" and resolution.lower > goal.cutoff:
            nan = math.nan
            known = resolution.statistics
            resolution = Resolution(
                "bounded", nan, resolution.lower, math.inf, nan, nan, resolution.method, statistics=known
            )
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
            kappa=resolution.kappa,
            lower=resolution.lower,
            upper=resolution.upper,
            sigma_max=resolution.sigma_max,
            sigma_min=resolution.sigma_min,
            score=resolution.kappa,
            certified=resolution.certified,
            method=resolution.method,
            sensitivity=resolution.sensitivity,
            status=resolution.status,
            quantization=matrix.quantization,
            **vars(resolution.statistics),
        )
        return entry if self._options.score == "kappa" else scored(entry, self._options.score)


def _operations(matrices: Iterable[Matrix]) -> float:
    return sum(operations(matrix.shape) for matrix in matrices)
