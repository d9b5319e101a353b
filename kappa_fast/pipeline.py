"""rank(): the stages in order. source -> matrices -> waves -> spectrum -> Ranking."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch

from ._version import __version__
from .backends import Backend, get_backend
from .budget import BudgetedTop, TopGroup
from .entries import TensorKappa
from .errors import ComputeError, Interrupted, OptionError
from .progress import ProgressOption, Tracker, tracking
from .ranking import Ranking
from .sources import Filters, open_source
from .sources.base import Matrix, Source
from .spectrum.ladder import Goal, Resolution, resolve
from .spectrum.probe import lower_bounds
from .undisturbed import undisturbed, undisturbed_thread
from .waves import cut, default_budget, is_out_of_memory, parse_bytes
from .workers import each_on_one_thread, fits_one_thread

log = logging.getLogger("kappa_fast")

LINALG_ERROR: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

Score = Literal["kappa"] | Callable[[TensorKappa], float]
Patterns = str | Sequence[str] | None

R = TypeVar("R")
Work = Callable[[Backend, list[torch.Tensor]], list[R]]  # on the weights of a wave


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
    min_dim: int = 16,
    max_dim: int | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    cache: None = None,
    progress: ProgressOption = None,
    process_group: None = None,
) -> Ranking:
    """Rank the weight matrices of a model by their condition number sigma_max / sigma_min, lowest first.

    Args:
        source: a module, a mapping of names to tensors, a .safetensors file, or a directory of them.
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
        min_dim, max_dim: skip matrices whose smaller side is below, or whose larger side is above.
        device: where to compute; by default where the weights are, or the current CUDA device for weights on the CPU.
        backend: "auto" or "torch".
        memory_budget: bytes, or a text such as "2GB", that a wave may take beside the weights.
        cache, process_group: reserved; only None for now.
        progress: None for a bar on a terminal, True, False, or a callable that takes a Progress.

    Returns:
        A Ranking. The model is not changed in any way, also when an error is raised.

    Raises:
        OptionError: an argument cannot work.  SourceError: the source cannot be read.  BackendError: no such backend.
        ComputeError: a single matrix does not fit into memory, or a library routine failed on it.
        Interrupted: Ctrl-C; its ``partial`` is the Ranking of what was done.
        NotImplementedError: a parameter is sharded (DTensor, ZeRO), or cache or process_group was given.
    """
    _check(top, top_per_group, rtol, certify, score, cache, process_group)
    filters = Filters(include, exclude, embeddings, routers, fused, min_dim, max_dim)
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
        "min_dim": min_dim,
        "max_dim": max_dim,
    }
    started = time.perf_counter()
    with undisturbed():
        opened = open_source(source, filters)
        run = _Run(opened, backend, _device(device), parse_bytes(memory_budget), progress, score)
        budgeted = None if top is None else BudgetedTop.of(opened.matrices, top, top_per_group)
        goal = Goal(rtol, certify is True)
        try:
            with run.tracking() as tracker:
                if budgeted is None or callable(score):  # bounds of kappa say nothing of another score
                    run.resolve_all(goal, tracker)
                else:
                    run.resolve_top(budgeted, goal, tracker)
                if budgeted is not None and certify == "selection":
                    run.prove(budgeted.winners(run.entries), goal, tracker)
        except KeyboardInterrupt as stop:
            done = f"interrupted: {len(run.entries)} of {len(opened.matrices)} matrices are done (see .partial)"
            raise Interrupted(done, run.ranking(settings, started, partial=True)) from stop
    _warn_unproven(run.entries.values(), certify)
    return run.ranking(settings, started, partial=False)


class _Run:
    """One call of rank(): backends by device, results by position of the matrix."""

    def __init__(
        self,
        source: Source,
        backend: str,
        device: torch.device | None,
        budget: int | None,
        progress: ProgressOption,
        score: Score,
    ) -> None:
        self.source, self.entries = source, dict[int, TensorKappa]()
        self._backend_name, self._device, self._budget = backend, device, budget
        self._progress, self._score = progress, score
        self._backends: dict[torch.device, Backend] = {}
        # A backend that is unknown, or that cannot work where the weights will be, fails before any work.
        places = [self._where(matrix) for matrix in source.matrices[:1]] or [device or torch.device("cpu")]
        self._backend_for(places[0])

    def tracking(self) -> contextlib.AbstractContextManager[Tracker]:
        everything = range(len(self.source.matrices))
        return tracking(self._progress, len(everything), sum(self._operations(i) for i in everything))

    def resolve_all(self, goal: Goal, tracker: Tracker) -> None:
        self._resolve(range(len(self.source.matrices)), goal, tracker)

    def resolve_top(self, budgeted: BudgetedTop, goal: Goal, tracker: Tracker) -> None:
        """Resolve in batches of the likeliest first; a proven lower bound above the cutoff ends a matrix's way."""
        for group in budgeted.groups:
            self._resolve_group(group, goal, tracker)

    def prove(self, positions: Sequence[int], goal: Goal, tracker: Tracker) -> None:
        """Once more, with proofs: who is among the lowest is known only now."""
        tracker.extend(len(positions), sum(self._operations(i) for i in positions))
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
            "backend": next(iter(self._backends.values())).name,
            "device": sorted({str(d) for d in self._backends}),
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - started,
            "settings": _plain(settings),
            "source": dict(self.source.metadata),
            "num_parameters": self.source.num_parameters,
            "partial": partial,
        }
        return Ranking(self.entries.values(), self.source.skipped, metadata)

    def _operations(self, position: int) -> float:
        m, n = max(self.source.matrices[position].shape), min(self.source.matrices[position].shape)
        return float(m) * n * n + n**3 / 3

    def _resolve(self, positions: Sequence[int], goal: Goal, tracker: Tracker) -> None:
        with contextlib.closing(self._results(positions, lambda b, weights: resolve(b, weights, goal))) as results:
            for position, found in results:
                self.entries[position] = self._entry(self.source.matrices[position], found, goal)
                tracker.advance(1, self._operations(position))

    def _results(self, positions: Sequence[int], work: Work[R]) -> Generator[tuple[int, R], None, None]:
        """``work`` on every matrix, wave by wave."""
        for wave in self._waves(positions):
            single, shared = self._divide(wave)
            with contextlib.closing(self._side_by_side(single, work)) as results:
                yield from results
            for part in shared:
                yield from zip(part, self._attempt(part, work), strict=True)

    def _side_by_side(self, positions: Sequence[int], work: Work[R]) -> Generator[tuple[int, R], None, None]:
        """One thread for each matrix; those for which the others left no memory come again, one at a time."""

        def attempt(i: int) -> R | None:
            try:
                return self._attempt([i], work)[0]
            except ComputeError as error:
                if not is_out_of_memory(error.__cause__):
                    raise
                return None

        crowded: list[int] = []
        with contextlib.closing(each_on_one_thread(attempt, positions)) as results:
            for i, found in results:
                if found is None:
                    crowded.append(i)
                else:
                    yield i, found
        for i in crowded:
            yield from each_on_one_thread(lambda i: self._attempt([i], work)[0], [i])

    def _divide(self, wave: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        """On a CPU the small matrices by themselves, for one thread each, and the large ones one by one."""
        if not self._backend_for(self._where(self.source.matrices[wave[0]])).side_by_side:
            return [], [list(wave)]
        single = [i for i in wave if fits_one_thread(self.source.matrices[i].shape)]
        large = [[i] for i in wave if not fits_one_thread(self.source.matrices[i].shape)]
        return sorted(single, key=self._operations, reverse=True), large  # the longest first: no core waits at the end

    def _attempt(self, wave: Sequence[int], work: Work[R]) -> list[R]:
        """One wave; when memory runs out, in halves."""
        matrices = [self.source.matrices[i] for i in wave]
        try:
            with undisturbed_thread():
                return work(self._backend_for(self._where(matrices[0])), [m.load() for m in matrices])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) and not isinstance(error, LINALG_ERROR):
                raise
            if len(wave) == 1:
                raise _failure(matrices[0], error) from error
            log.info("a wave of %d matrices failed (%s); trying halves", len(wave), error)
        half = len(wave) // 2
        return self._attempt(wave[:half], work) + self._attempt(wave[half:], work)

    def _probe(self, positions: Sequence[int], cutoff: float) -> dict[int, float]:
        with contextlib.closing(self._results(positions, lambda b, weights: lower_bounds(b, weights, cutoff))) as found:
            return dict(found)

    def _bound(self, positions: Sequence[int], bounds: Mapping[int, float], tracker: Tracker) -> None:
        nan = math.nan
        for i in positions:
            found = Resolution("bounded", nan, bounds[i], math.inf, nan, nan, "probe")
            self.entries[i] = self._entry(self.source.matrices[i], found, Goal(0.0))
            tracker.advance(1, self._operations(i))

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
        )
        if callable(self._score) and found.status in ("ok", "rank_deficient"):
            entry = replace(entry, score=_scored(self._score, entry))
        return entry

    def _waves(self, positions: Sequence[int]) -> Iterator[list[int]]:
        by_device: dict[torch.device, list[int]] = {}
        for i in positions:
            by_device.setdefault(self._where(self.source.matrices[i]), []).append(i)
        for device, chosen in by_device.items():
            backend = self._backend_for(device)
            budget = self._budget or default_budget(device)
            yield from cut(chosen, lambda i, b=backend: self._need(i, b), budget)  # type: ignore[misc]

    def _need(self, position: int, backend: Backend) -> int:
        matrix = self.source.matrices[position]
        tall = (max(matrix.shape), min(matrix.shape))
        moved = 0 if matrix.device == backend.device and self.source.in_memory else matrix.nbytes
        return backend.workspace(tall, matrix.dtype) + moved

    def _where(self, matrix: Matrix) -> torch.device:
        if self._device is not None:
            return self._device
        if matrix.device.type not in ("cpu", "meta"):
            return matrix.device if matrix.device.type != "mps" else torch.device("cpu")  # MPS has no float64
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else matrix.device

    def _backend_for(self, device: torch.device) -> Backend:
        if device not in self._backends:
            self._backends[device] = get_backend(self._backend_name, device)
        return self._backends[device]


def _check(
    top: object,
    top_per_group: object,
    rtol: object,
    certify: object,
    score: object,
    cache: object,
    process_group: object,
) -> None:
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
    if not callable(score) and not (isinstance(score, str) and score == "kappa"):
        raise OptionError(f"score={score!r}: give 'kappa' or a callable that takes a TensorKappa")
    if cache is not None:
        raise NotImplementedError("cache= is not part of this version: store rankings with to_json() and from_json()")
    if process_group is not None:
        raise NotImplementedError("process_group= is not part of this version: rank on one process, share the JSON")


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise OptionError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen.type in ("meta", "mps"):
        raise OptionError(f"device={device!r} has no float64 arithmetic: use 'cpu' or a CUDA device")
    return torch.device("cuda", torch.cuda.current_device()) if str(chosen) == "cuda" else chosen


def _failure(matrix: Matrix, error: Exception) -> ComputeError:
    what = "there is not enough memory for" if is_out_of_memory(error) else f"a library routine failed ({error}) on"
    return ComputeError(
        f"{what} {matrix.key!r} of shape {tuple(matrix.shape)}, {matrix.dtype}: "
        f"free memory, use another device, or leave it out with exclude={matrix.name!r}"
    )


def _scored(score: Callable[[TensorKappa], float], entry: TensorKappa) -> float:
    value = score(entry)
    if not isinstance(value, (int, float)) or math.isnan(value):
        raise OptionError(f"score() returned {value!r} for {entry.key!r}: it must return a number")
    return float(value)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in settings.items()}


def _warn_unproven(entries: Iterable[TensorKappa], certify: object) -> None:
    if certify is not True:
        return
    unproven = [e.key for e in entries if e.status in ("ok", "rank_deficient") and not e.certified]
    if unproven:
        import warnings

        warnings.warn(
            f"float64 cannot prove the interval of {len(unproven)} of the entries, {unproven[0]!r} among them: "
            "they keep certified=False and their best estimate",
            stacklevel=3,
        )
