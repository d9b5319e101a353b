"""What a matrix of some shape costs on the device at hand: a few are made, and resolved as rank() would.

Times of weights cannot be known without them: how many steps a matrix takes depends on its spectrum. The matrices made
here are trained-like, a Gaussian with some outliers, which need about as many as trained ones.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..backends import Backend, get_backend
from ..cache import ResolutionQuery
from ..execution.cost import UNIT, growth, operations
from ..execution.executor import Executor
from ..execution.step import Step
from ..machine.threads import SINGLE_THREAD_OPERATIONS, fits_one_thread
from ..sources.base import Matrix, Source
from ..spectrum import small
from ..spectrum.ladder import goes_in_batches, left_to_the_svd, resolve
from ..spectrum.resolution import Goal, Resolution

Shape = tuple[int, int]
Item = tuple[Shape, torch.dtype]

SECONDS = 2.0  # of measurement, as a rule
LEAST = 0.1  # seconds that the first matrix of every kind, and a few much smaller ones, may take whatever is left
FEW = 6
FAR = 4.0  # ratio of operations from which a time is better measured than scaled
FIRST: tuple[Shape, ...] = (UNIT, (512, 384))  # the first that is no larger than the work shows the speed
OUTLIERS, STRENGTH = 48, 3.0  # of the matrices that are measured: how many directions, and the first over the edge
CERTIFIED_GUESS = 2.5  # times as long with proofs
CLIMB_GUESS = 2.5  # times as long where the first rung fails and the second answers
WAVE = 8  # matrices of a wave on an accelerator


clock = time.perf_counter  # a benchmark on a busy machine looks at the time of the processor instead


@dataclass(frozen=True)
class Duration:
    """Seconds. ``low`` and ``high`` are what was seen, or what extrapolation may be off by; ``hard`` is the time if
    the cheapest rung of the ladder resolves no such matrix."""

    typical: float
    low: float
    high: float
    hard: float


@dataclass(frozen=True)
class Kind:
    """Matrices whose times can be told from each other: same first step of the ladder, dtype, use of threads, goal."""

    method: str
    dtype: torch.dtype
    large: bool
    certify: bool


@dataclass(frozen=True)
class Sample:
    """Seconds that one matrix took, measured several times."""

    kind: Kind
    shape: Shape
    seconds: tuple[float, ...]

    def same(self, shape: Shape) -> bool:
        """Whether it tells what such a matrix costs, or its transpose."""
        return sorted(self.shape) == sorted(shape)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Costs:
    """What was measured. ``climb`` is by how much longer a matrix takes that the first rung does not resolve."""

    samples: tuple[Sample, ...]
    climb: float
    seconds: float
    backend: Backend
    goal: Goal

    def of(self, shape: Shape, dtype: torch.dtype) -> Duration:
        """Seconds for one matrix (with the others of its wave beside it): as measured, or scaled from what was."""
        kind = self.kind(shape, dtype)
        alike = [s for s in self.samples if s.kind == kind] or list(self.samples)
        typical, low, high = _scaled(alike, shape)
        return Duration(typical, low, high, high * self.climb if _may_climb(self.backend, shape, dtype) else high)

    def kind(self, shape: Shape, dtype: torch.dtype) -> Kind:
        """What such a matrix is here."""
        return kind_of(self.backend, shape, dtype, self.goal)


def calibrate(counts: Mapping[Item, int], backend: str, device: torch.device, goal: Goal, seconds: float) -> Costs:
    """Measure the shapes that most of the work is in, or smaller ones of the same kind where time does not allow it.

    Args:
        counts: how many matrices there are of each shape and dtype.
        backend: name of the backend that rank() would use on ``device``.
        seconds: what the measurement should take; with many kinds of matrices or large ones it takes longer.
    """
    run = _Run(get_backend(backend, device), goal, seconds)
    run.warm_up(max(operations(shape) for shape, _ in counts))
    weight = {item: counts[item] * operations(item[0]) for item in counts}
    items = sorted(counts, key=lambda item: (-weight[item], item[0], str(item[1])))
    kinds: dict[Kind, Item] = {}
    for item in items:
        kinds.setdefault(run.kind(item), item)
    for number, item in enumerate(kinds.values()):
        share = run.left / (len(kinds) - number)
        run.measure(run.affordable(item, max(share, LEAST)))
    for item in sorted((i for i in items if run.is_far(i)), key=lambda i: operations(i[0]))[:FEW]:
        if run.is_far(item) and run.expected(item) <= LEAST:
            run.measure(item)
    for item in items:
        if not run.has(item) and run.expected(item) <= run.left:
            run.measure(item)
    climb = run.climb([item for item in items if _may_climb(run.backend, *item)])
    return Costs(tuple(run.samples), climb, time.perf_counter() - run.started, run.backend, goal)


def kind_of(backend: Backend, shape: Shape, dtype: torch.dtype, goal: Goal) -> Kind:
    """The kind of such a matrix on this backend."""
    tall = (max(shape), min(shape))
    large = backend.side_by_side and not fits_one_thread(tall)
    if backend.side_by_side and goes_in_batches(tall, goal):
        method = small.METHOD
    else:
        method = "svd" if left_to_the_svd(tall) else backend.rungs(tall, dtype, proofs=goal.certify)[0].name
    return Kind(method, dtype, large, goal.certify)


class _Run:
    """One calibration: what has been measured so far, and the time that is left."""

    def __init__(self, backend: Backend, goal: Goal, seconds: float) -> None:
        self.backend, self.samples, self.started = backend, list[Sample](), time.perf_counter()
        self._goal, self._seconds = goal, seconds
        self._first: Sample | None = None

    @property
    def left(self) -> float:
        return self._seconds - (time.perf_counter() - self.started)

    def kind(self, item: Item) -> Kind:
        """The kind of such a matrix."""
        return kind_of(self.backend, *item, self._goal)

    def warm_up(self, largest: float) -> None:
        """Libraries are loaded and threads started before anything counts, and a first speed is seen.

        largest: operations of the largest matrix of the model.
        """
        goal, self._goal = self._goal, Goal(self._goal.rtol)
        self.measure(((256, 192), torch.float32), keep=False)
        shape = next((shape for shape in FIRST if operations(shape) <= largest), FIRST[-1])
        median = self.measure((shape, torch.float32), keep=False)
        self._first = Sample(self.kind((shape, torch.float32)), shape, (median,))
        self._goal, self.started = goal, time.perf_counter()

    def is_far(self, item: Item) -> bool:
        """Whether everything of its kind that was measured is many times smaller or larger."""
        kind, size = self.kind(item), operations(item[0])
        sizes = [operations(s.shape) / size for s in self.samples if s.kind == kind]
        return all(max(ratio, 1 / ratio) > FAR for ratio in sizes)

    def has(self, item: Item) -> bool:
        kind = self.kind(item)
        return any(s.same(item[0]) and s.kind == kind for s in self.samples)

    def expected(self, item: Item) -> float:
        """Seconds that measuring it takes, at a guess, the making of the matrix included."""
        shape, _ = item
        kind = self.kind(item)
        making = 2e-8 * shape[0] * shape[1]
        alike = [s for s in self.samples if s.kind == kind]
        if alike:
            return making + _scaled(alike, shape)[2]
        if self._first is None:
            return making
        factor = CERTIFIED_GUESS if self._goal.certify else 1.0
        threads = torch.get_num_threads() if kind.large else 1
        return making + factor * _scaled([self._first], shape)[0] / threads

    def affordable(self, item: Item, seconds: float) -> Item:
        """``item``, or a smaller matrix with the same ratio of sides and of the same kind that ``seconds`` suffice for.

        Matrices that all threads share have a least size, and are measured whatever they take.
        """
        (rows, columns), dtype = item
        kind = self.kind(item)
        while self.expected(((rows, columns), dtype)) > seconds:
            shrink = 0.9
            if kind.large:
                shrink = max(0.9, (1.01 * SINGLE_THREAD_OPERATIONS / _single(rows, columns)) ** (1 / 3))
            smaller = (_rounded(rows * shrink), _rounded(columns * shrink))
            square = rows == columns
            if smaller == (rows, columns) or self.kind((smaller, dtype)) != kind:
                break
            rows, columns = (smaller[0], smaller[0]) if square else smaller
        return (rows, columns), dtype

    def measure(self, item: Item, *, keep: bool = True, hard: bool = False) -> float:
        """The median of several times, at once on all threads where rank() would do so."""
        shape, dtype = item
        kind = self.kind(item)
        expected = self.expected(item)
        rounds = max(1, min(3, int(0.1 / max(expected, 1e-3))))
        in_parts = torch.get_num_threads() * small.batch_size(max(shape), min(shape))
        at_once = WAVE if not self.backend.side_by_side else 1 if kind.large else in_parts
        times = _resolve_timed(self.backend, _trained_like(shape, dtype, self.backend.device, hard), self._goal,
                               at_once, rounds)  # fmt: skip
        sample = Sample(kind, shape, tuple(times))
        if keep:
            self.samples.append(sample)
        return sample.median

    def climb(self, items: Sequence[Item]) -> float:
        """How much longer a matrix takes if the first rung fails on it; measured on one where time allows for it."""
        for item in items:
            kind = self.kind(item)
            alike = sorted((s for s in self.samples if s.kind == kind), key=lambda s: -s.median)
            for sample in alike:
                if CLIMB_GUESS * sample.median <= max(self.left, 2 * LEAST):
                    return max(1.0, self.measure((sample.shape, kind.dtype), keep=False, hard=True) / sample.median)
        return CLIMB_GUESS if items else 1.0


def _resolve_timed(backend: Backend, weight: torch.Tensor, goal: Goal, at_once: int, rounds: int) -> list[float]:
    """Seconds for each of ``at_once`` matrices side by side, or in one wave, ``rounds`` times over."""
    times: list[float] = []

    def timed(backend: Backend, weights: list[torch.Tensor]) -> list[Resolution]:
        started = clock()
        resolutions = resolve(backend, weights, goal)  # it reads numbers from the device, and so waits for it
        times.extend([(clock() - started) / len(weights)] * len(weights))
        return resolutions

    shape = (weight.shape[0], weight.shape[1])
    matrices = [
        Matrix(
            name=f"calibration.{i}",
            aliases=(),
            part="",
            index=(),
            layer=None,
            group="",
            shape=shape,
            dtype=weight.dtype,
            device=weight.device,
            load=lambda *_: weight,
        )
        for i in range(at_once * rounds)
    ]
    source = Source(tuple(matrices), (), 0, {})
    executor = Executor(source, backend.name, backend.device, None)
    step = Step(ResolutionQuery(goal), timed)
    for first in range(0, len(matrices), at_once):
        for _ in executor.results(step, matrices[first : first + at_once]):
            pass
    return times


def _trained_like(shape: Shape, dtype: torch.dtype, device: torch.device, hard: bool) -> torch.Tensor:
    """A Gaussian matrix with a decaying spectrum of outliers on top; ``hard``: with a kappa of about 1e5."""
    rows, columns = shape
    generator = torch.Generator(device).manual_seed(rows * 31 + columns)

    def gaussian(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, generator=generator, device=device)

    matrix = gaussian(rows, columns)
    outliers = min(OUTLIERS, min(shape) // 4)
    if outliers:
        edge = math.sqrt(rows) + math.sqrt(columns)
        heights = edge * torch.logspace(math.log10(STRENGTH), math.log10(0.5), outliers, device=device)
        matrix.addmm_(gaussian(rows, outliers) / math.sqrt(rows) * heights, gaussian(outliers, columns) / columns**0.5)
    if hard:  # two nearly equal columns, or rows: one singular value far below the others
        thin = matrix if rows >= columns else matrix.T
        thin[:, -1] = thin[:, 0] + 3e-4 * thin[:, -1]
    return matrix.mul_(0.02).to(dtype)


def _scaled(samples: Sequence[Sample], shape: Shape) -> tuple[float, float, float]:
    """Median, least and most seconds for such a matrix, from samples of its kind."""
    size = operations(shape)
    exact = [s for s in samples if s.same(shape)]
    if exact:
        times = [t for s in exact for t in s.seconds]
        return statistics.median(times), min(times), max(times)
    ordered = sorted(samples, key=lambda s: operations(s.shape))
    above = next((s for s in ordered if operations(s.shape) >= size), None)
    below = next((s for s in reversed(ordered) if operations(s.shape) <= size), None)
    if above is not None and below is not None and operations(above.shape) > operations(below.shape):
        small, big = operations(below.shape), operations(above.shape)
        t = math.log(size / small) / math.log(big / small)
        typical, low, high = (
            math.exp((1 - t) * math.log(pick(below.seconds)) + t * math.log(pick(above.seconds)))
            for pick in (statistics.median, min, max)
        )
        return typical, low, high
    nearest = above or below
    assert nearest is not None  # one of them holds
    ratio = size / operations(nearest.shape)
    slow, fast = sorted((ratio, ratio**0.5))
    pairs = max(1.0, torch.get_num_threads() / 2) if nearest.kind.large else 1.0
    longer = growth(operations(nearest.shape), ratio, nearest.kind.certify, pairs)
    return nearest.median * longer, min(nearest.seconds) * slow, max(nearest.seconds) * fast


def _may_climb(backend: Backend, shape: Shape, dtype: torch.dtype) -> bool:
    """Whether the first rung answers for low condition numbers only."""
    tall = (max(shape), min(shape))
    return not left_to_the_svd(tall) and len(backend.rungs(tall, dtype)) > 2


def _single(rows: int, columns: int) -> float:
    return float(max(rows, columns)) * min(rows, columns) ** 2


def _rounded(size: float) -> int:
    return max(1, int(size) // 16 * 16)


def counted(items: Iterable[Item]) -> dict[Item, int]:
    """How many there are of each shape and dtype."""
    counts: dict[Item, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts
