"""rank(): the stages in order. source -> matrices -> waves -> spectrum -> Ranking."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from . import stops
from ._version import __version__
from .backends import Backend
from .budget import BudgetedTop, TopGroup
from .cache import Bound, CacheOption, ResultCache, Wanted, cache_directory, opened_cache
from .cache.records import Question
from .distributed.ranks import Ranks, joined
from .entries import TensorKappa
from .errors import Interrupted, OptionError
from .execution import Executor, Work, operations
from .integrations.checkpoint_names import places_of
from .progress import ProgressOption, Tracker, shown, tracking
from .ranking import Ranking
from .sources import Filters, open_source
from .sources.adapters import has_trained_adapters
from .sources.base import Matrix, Source
from .spectrum.exact import Room
from .spectrum.ladder import Goal, Resolution, resolve
from .spectrum.probe import lower_bounds
from .texts import warn
from .undisturbed import undisturbed
from .waves import parse_bytes
from .workers import stopping

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Score = Literal["kappa"] | Callable[[TensorKappa], float]
Patterns = str | Sequence[str] | None
R = TypeVar("R")


def rank(
    source: torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
    *,
    top: int | float | None = None,
    top_per_group: bool = False,
    rtol: float = 1e-2,
    certify: bool | Literal["selection"] = False,
    score: Score = "kappa",
    include: Patterns = None,
    exclude: Patterns = None,
    embeddings: bool = False,
    routers: bool = False,
    fused: Literal["split", "stored"] = "split",
    adapters: Literal["base", "merged"] | None = None,
    min_dim: int = 16,
    max_dim: int | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    cache: CacheOption = None,
    progress: ProgressOption = None,
    process_group: ProcessGroup | None = None,
) -> Ranking:
    """Rank the weight matrices of a model by their condition number sigma_max / sigma_min, lowest first.

    Args:
        source: a module, a mapping of names to tensors, a .safetensors or .gguf file, a directory with them, or the id
            of a model on the hub ("org/name", "org/name@revision"), from the local cache if it is complete there.
        top: resolve only what is needed to know the ``top`` entries with the lowest score (an int), or that share of
            all (a float in (0, 1]); the others are reported as "bounded".
        top_per_group: ``top`` counts within each group of like matrices.
        rtol: relative half-width that the interval around kappa is to reach.
        certify: True proves every interval in float64 (two to six times the work); "selection" only those of the
            ``top`` entries.
        score: "kappa", or a callable that gives an entry its score; with a callable everything is resolved.
        include, exclude: regular expressions (re.search) on parameter names.
        embeddings, routers: rank embeddings and output heads, and the routers of mixtures of experts.
        fused: "split" ranks the parts of fused projections on their own, "stored" the tensor as it is.
        adapters: of a model that PEFT has put adapters into, "base" ranks the weights beside which they lie, "merged"
            what both together compute, as merge_and_unload() would store it; None is "base", and warns where adapters
            have learned something.
        min_dim, max_dim: skip matrices whose smaller side is below, or whose larger side is above.
        device: where to compute; by default where the weights are, or the current CUDA device for weights on the CPU.
        backend: "auto" (Triton on a GPU, else torch), "torch" or "triton".
        memory_budget: bytes, or a text such as "2GB", that a wave may take beside the weights.
        cache: where results are kept and looked up by the content of the weights: a directory, or True for that of the
            user (or of the environment variable KAPPA_FAST_CACHE). An interrupted run goes on from there.
        progress: None for a bar on a terminal, True, False, or a callable that takes a Progress.
        process_group: of torch.distributed, all of whose ranks make this call: each works on a share of the matrices,
            and all return the same Ranking. Without it nothing is asked of other processes.

    Returns:
        A Ranking. The model is not changed in any way, also when an error is raised.

    Raises:
        OptionError: an argument cannot work.  SourceError: the source cannot be read.  BackendError: no such backend.
        ComputeError: a single matrix does not fit into memory, or a library routine failed on it.
        Interrupted: Ctrl-C; its ``partial`` is the Ranking of what was done.
        ProcessGroupError: another rank has failed, hangs, or has other weights, settings or versions.
        NotImplementedError: a parameter is sharded (DTensor, ZeRO).

    Warns:
        UserWarning: weights of the model have no values to read; intervals could not be proven; the cache is damaged,
            or cannot be written to; adapters of PEFT have learned something that is left out.
    """
    with joined(process_group) as ranks:
        check_options(top, top_per_group, rtol, certify)
        _check(score)
        directory = cache_directory(cache)
        if ranks is not None and not ranks.first and not callable(progress):
            progress = False  # that of rank 0 shows the work of all
        filters = Filters(include, exclude, embeddings, routers, fused, min_dim, max_dim, adapters or "base")
        settings: dict[str, Any] = {
            "top": top,
            "top_per_group": top_per_group,
            "rtol": rtol,
            "certify": certify,
            "score": score if isinstance(score, str) else getattr(score, "__name__", "callable"),
            "include": include if isinstance(include, str) else filters.include,
            "exclude": exclude if isinstance(exclude, str) else filters.exclude,
            "embeddings": embeddings,
            "routers": routers,
            "fused": fused,
            "adapters": filters.adapters,
            "min_dim": min_dim,
            "max_dim": max_dim,
        }
        started = time.perf_counter()
        with undisturbed():
            opened = open_source(source, filters, places_of, quiet=not shown(progress))
            stops.check()
            _warn_absent(opened)
            _warn_unfollowed(opened)
            if adapters is None and isinstance(source, torch.nn.Module):
                _warn_adapters(source)
            executor = Executor(
                opened, backend, usable_device(device), parse_bytes(memory_budget), proofs=certify is not False
            )
            budgeted = None if top is None else BudgetedTop.of(opened.matrices, top, top_per_group)
            goal = Goal(rtol, certify is True)
            if ranks is not None:
                ranks.agree(opened, _what_must_agree(settings, executor, directory))
                ranks.after_the_first()
            with opened_cache(directory, opened.matrices) as store:
                if ranks is not None:
                    ranks.opened()
                run = _Run(opened, executor, store, progress, score, ranks)
                try:
                    with run.tracking() as tracker:
                        executor.notify = tracker.note
                        if budgeted is None or callable(score):  # bounds of kappa say nothing of another score
                            run.resolve_all(goal, tracker)
                        else:
                            run.resolve_top(budgeted, goal, tracker)
                        if budgeted is not None and certify == "selection":
                            run.prove(budgeted.winners(run.entries), goal, tracker)
                    if ranks is not None:
                        ranks.finished(store)
                except KeyboardInterrupt as stop:
                    done = f"interrupted: {len(run.entries)} of {len(opened.matrices)} matrices are done (see .partial)"
                    partial = run.ranking(settings, started, partial=True)
                    raise Interrupted(done, partial, resumable=store is not None and store.keeps) from stop
        ranking = run.ranking(settings, started, partial=False)
    _warn_unproven(ranking, certify)
    return ranking


def _what_must_agree(settings: Mapping[str, Any], executor: Executor, cache: Path | None) -> dict[str, Any]:
    """What decides the bits of a result, or the order of the steps."""
    kinds = sorted({device.partition(":")[0] for device in executor.devices})
    used = {"backend": executor.backend_name, "device": kinds, "threads": torch.get_num_threads()}
    return {**_plain(settings), **used, "cache": cache is not None}


class _Run:
    """One call of rank(): what is to be resolved, and the results by position of the matrix."""

    def __init__(
        self,
        source: Source,
        executor: Executor,
        store: ResultCache | None,
        progress: ProgressOption,
        score: Score,
        ranks: Ranks | None = None,
    ) -> None:
        self.source, self.executor, self.store, self.entries = source, executor, store, dict[int, TensorKappa]()
        self._ranks = ranks
        self._progress, self._score = progress, score
        # Exact decompositions are made on the CPU, whatever the device.
        self._room = Room(executor.budget_on(torch.device("cpu")), stopping)

    def tracking(self) -> contextlib.AbstractContextManager[Tracker]:
        everything = range(len(self.source.matrices))
        return tracking(self._progress, len(everything), self._operations(everything))

    def _operations(self, positions: Iterable[int]) -> float:
        return sum(operations(self.source.matrices[i].shape) for i in positions)

    def resolve_all(self, goal: Goal, tracker: Tracker) -> None:
        self._resolve(range(len(self.source.matrices)), goal, tracker)

    def resolve_top(self, budgeted: BudgetedTop, goal: Goal, tracker: Tracker) -> None:
        """Resolve in batches of the likeliest first; a proven lower bound above the cutoff ends a matrix's way."""
        for group in budgeted.groups:
            self._resolve_group(group, goal, tracker)

    def prove(self, positions: Sequence[int], goal: Goal, tracker: Tracker) -> None:
        """Once more, with proofs: who is among the lowest is known only now."""
        tracker.extend(len(positions), self._operations(positions))
        self._resolve(positions, replace(goal, certify=True), tracker)

    def _resolve_group(self, group: TopGroup, goal: Goal, tracker: Tracker) -> None:
        rest = list(group.order)
        bounds: dict[int, float] | None = None
        while rest:  # in batches whose size the waves have no say in: what is resolved must not depend on memory
            cutoff = group.cutoff(self.entries)
            if bounds is None and math.isfinite(cutoff):
                bounds = self._probe(rest, cutoff)
                rest.sort(key=lambda i: (bounds[i], self.source.matrices[i].key))
            batch, rest = rest[: group.count], rest[group.count :]
            hopeless = [i for i in batch if bounds is not None and bounds[i] > cutoff]
            self._bound(hopeless, bounds or {}, tracker)
            self._resolve([i for i in batch if i not in hopeless], replace(goal, cutoff=cutoff), tracker)

    def ranking(self, settings: dict[str, Any], started: float, partial: bool) -> Ranking:
        metadata = {
            "versions": {"kappa_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "backend": self.executor.backend_name,
            "device": self.executor.devices,
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - started,
            "work": self.executor.counts,
            "settings": _plain(settings),
            "source": dict(self.source.metadata),
            "num_parameters": self.source.num_parameters,
            "partial": partial,
        }
        if self.store is not None:
            metadata["cache"] = self.store.metadata(self.entries)
        if self._ranks is not None and not partial:
            metadata = self._ranks.metadata(metadata)
        return Ranking(self.entries.values(), self.source.skipped, metadata)

    def _resolve(self, positions: Sequence[int], goal: Goal, tracker: Tracker) -> None:
        def work(_: Sequence[int], backend: Backend, weights: list[torch.Tensor]) -> list[Resolution]:
            return resolve(backend, weights, goal, self._room)

        with contextlib.closing(self._results(positions, work, Wanted(goal), goal.certify)) as results:
            for position, found in results:
                stops.check()
                self.entries[position] = self._entry(self.source.matrices[position], found, goal)
                tracker.advance(1, self._operations([position]))

    def _probe(self, positions: Sequence[int], cutoff: float) -> dict[int, float]:
        def work(_: Sequence[int], backend: Backend, weights: list[torch.Tensor]) -> list[float]:
            return lower_bounds(backend, weights, cutoff)

        with contextlib.closing(self._results(positions, work, Bound(cutoff), False)) as found:
            return dict(found)

    def _results(
        self, positions: Sequence[int], work: Work[R], question: Question[R], certify: bool
    ) -> Generator[tuple[int, R], None, None]:
        def own(positions: Sequence[int]) -> Generator[tuple[int, R], None, None]:
            if self.store is None:
                return self.executor.results(positions, work)
            return self.store.results(self.executor, positions, work, question)

        if self._ranks is None:
            return own(positions)
        from .planning.calibration import relative_cost  # planning knows the options of rank(), and so this file

        costs = {i: relative_cost(self.source.matrices[i].shape, certify) for i in positions}
        return self._ranks.results(positions, costs, own, question, self.store)

    def _bound(self, positions: Sequence[int], bounds: Mapping[int, float], tracker: Tracker) -> None:
        nan = math.nan
        for i in positions:
            found = Resolution("bounded", nan, bounds[i], math.inf, nan, nan, "probe")
            self.entries[i] = self._entry(self.source.matrices[i], found, Goal(0.0))
            tracker.advance(1, self._operations([i]))

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
        if callable(self._score) and found.status in ("ok", "rank_deficient"):
            entry = replace(entry, score=_scored(self._score, entry))
        return entry


def check_options(top: object, top_per_group: object, rtol: object, certify: object) -> None:
    """Raises OptionError where one of them is not what rank() takes."""
    if top is not None:
        count = isinstance(top, int) and not isinstance(top, bool) and top >= 1
        share = isinstance(top, float) and 0 < top <= 1
        if not (count or share):
            raise OptionError(f"top={top!r}: give a count (1 or more) or a share of all entries as a float in (0, 1]")
    if not isinstance(rtol, (int, float)) or isinstance(rtol, bool) or not 1e-8 <= rtol < 1:
        raise OptionError(f"rtol={rtol!r}: give a relative half-width from 1e-8 to below 1")
    if not isinstance(top_per_group, bool):
        raise OptionError(f"top_per_group={top_per_group!r}: give True or False")
    if not isinstance(certify, bool) and not (isinstance(certify, str) and certify == "selection"):
        raise OptionError(f"certify={certify!r}: give True, False or 'selection'")
    if isinstance(certify, str) and top is None:
        raise OptionError("certify='selection' proves what decides who is in the top: give top= as well")


def _check(score: object) -> None:
    if not callable(score) and not (isinstance(score, str) and score == "kappa"):
        raise OptionError(f"score={score!r}: give 'kappa' or a callable that takes a TensorKappa")


def usable_device(device: torch.device | str | None) -> torch.device | None:
    """The device as torch has it, None for None; OptionError where rank() could not compute there."""
    if device is None:
        return None
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:
        raise OptionError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen.type in ("meta", "mps"):
        raise OptionError(f"device={device!r} has no float64 arithmetic: use 'cpu' or a CUDA device")
    return torch.device("cuda", torch.cuda.current_device()) if str(chosen) == "cuda" else chosen


def _scored(score: Callable[[TensorKappa], float], entry: TensorKappa) -> float:
    value = score(entry)
    if not isinstance(value, (int, float)) or math.isnan(value):
        raise OptionError(f"score() returned {value!r} for {entry.key!r}: it must return a number")
    return float(value)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in settings.items()}


def _warn_unproven(entries: Iterable[TensorKappa], certify: object) -> None:
    if certify is not True:
        return
    unproven = [e.key for e in entries if e.status in ("ok", "rank_deficient") and not e.certified]
    if unproven:
        warn(
            f"float64 cannot prove the interval of {len(unproven)} of the entries, {unproven[0]!r} among them: "
            "they keep certified=False and their best estimate",
            stacklevel=3,
        )


def _warn_absent(source: Source) -> None:
    if source.absent:
        first = source.absent[0]
        warn(
            f"{len(source.absent)} weights of the model have no values to read and are not ranked, {first.name!r} "
            f"among them ({first.reason}); ranking.skipped has them all, and shares of the parameters count them",
            stacklevel=3,
        )


def _warn_unfollowed(source: Source) -> None:
    if source.unfollowed:
        warn(
            f"{len(source.unfollowed)} weights are ranked as they are held, {source.unfollowed[0]!r} among them, "
            "though the forward() of their layers cannot be followed: if it computes another weight from them (a "
            'mask, a scale), leave them out with exclude=; metadata["source"]["evidence"] has them all',
            stacklevel=3,
        )


def _warn_adapters(model: torch.nn.Module) -> None:
    if has_trained_adapters(model):
        import warnings

        warnings.warn(
            "the model has adapters of PEFT that change its weights, and the weights are ranked without them: "
            "adapters='merged' ranks what the model computes, and adapters='base' says that this is meant",
            stacklevel=3,
        )
