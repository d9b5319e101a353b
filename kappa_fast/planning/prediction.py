"""From what single matrices cost to what a whole ranking would: waves, threads, ``top`` and proofs."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from ..execution.cost import operations
from ..execution.executor import PlannedWave
from ..execution.top import BudgetedTop
from ..machine.threads import fits_one_thread
from ..sources.base import Matrix
from ..spectrum.resolution import Goal
from .calibration import SECONDS, Costs, Duration, Item, calibrate, counted

# What the search for matrices that cannot be among the top= costs, as a share of resolving all of them.
# The most: a probe takes 8% (2048 x 2048) to 17% (384 x 384) of resolving a matrix, and where probes rule nothing out
# only a few matrices are probed.
PROBES = 0.2


@dataclass(frozen=True)
class Prediction:
    """How long the computing would take on the device at hand, from a short measurement there. All in seconds.

    seconds: the prediction; None with ``top``, where it depends on the weights how many must be resolved.
    low, high: the spread of what was measured, or of what extrapolating from it may be off by; with ``top``, from only
    the likeliest being resolved to all.  hard: in place of ``high``, if the cheapest rung of the ladder resolves no
    matrix.  opening: of them, what finding the matrices took.  measured: what the measurement took.
    shapes: those that were measured; ``exact`` says for which share of the operations the shape itself was.
    """

    seconds: float | None
    low: float
    high: float
    hard: float
    opening: float
    measured: float
    shapes: tuple[tuple[int, int], ...]
    exact: float


@dataclass(frozen=True)
class Work:
    """The matrices that are resolved: for certain, at most, and once more with proofs."""

    certain: Sequence[Matrix]
    possible: Sequence[Matrix]
    selected: Sequence[Matrix]  # what certify="selection" resolves again
    certify: bool

    @classmethod
    def of(
        cls, matrices: Sequence[Matrix], top: int | float | None, per_group: bool, certify: bool | Literal["selection"]
    ) -> Work:
        groups = BudgetedTop.of(matrices, top, per_group).groups
        certain = [matrix for group in groups for matrix in group.first]
        likeliest = [matrix for group in groups for matrix in group.order[: group.count]]
        return cls(certain, matrices, likeliest if certify == "selection" else (), certify is True)

    @property
    def floor(self) -> tuple[Sequence[Matrix], Sequence[Matrix], Sequence[Matrix]]:
        """What floor_of() wants: all, for certain, proven."""
        proven = self.selected or (self.certain if self.certify else ())
        return self.possible, self.certain, proven


def predict(backend: str, waves: Sequence[PlannedWave], work: Work, goal: Goal, opening: float) -> Prediction:
    """Measure what the matrices cost, and add up.

    goal: that of every matrix, proofs aside, which ``work`` has.  opening: what finding them took, in seconds.
    """

    def costs(matrices: Iterable[Matrix], certify: bool, seconds: float) -> dict[torch.device, Costs]:
        chosen = set(matrices)
        each = replace(goal, certify=certify)
        of_device: dict[torch.device, list[Matrix]] = {}
        for wave in waves:
            of_device.setdefault(wave.device, []).extend(matrix for matrix in wave.matrices if matrix in chosen)
        return {
            device: calibrate(counted(item_of(matrix) for matrix in some), backend, device, each, seconds)
            for device, some in of_device.items()
            if some
        }

    share = 0.5 if work.selected else 1.0
    first = costs(work.possible, work.certify, share * SECONDS)
    again = costs(work.selected, True, share * SECONDS)
    least, most = _total(waves, work.certain, first), _total(waves, work.possible, first)
    proofs = _total(waves, work.selected, again)
    ranged = len(work.certain) < len(work.possible)
    probes = PROBES * most.typical if ranged else 0.0
    every = [*first.values(), *again.values()]
    return Prediction(
        seconds=None if ranged else opening + most.typical + proofs.typical,
        low=opening + least.low + proofs.low,
        high=opening + most.high + probes + proofs.high,
        hard=opening + most.hard + probes + proofs.hard,
        opening=opening,
        measured=sum(found.seconds for found in every),
        shapes=tuple(sorted({sample.shape for found in every for sample in found.samples}, reverse=True)),
        exact=_share_measured(waves, first),
    )


def _total(waves: Sequence[PlannedWave], matrices: Iterable[Matrix], costs: Mapping[torch.device, Costs]) -> Duration:
    """Seconds for some of the matrices, wave after wave."""
    chosen = set(matrices)
    durations: dict[tuple[torch.device, tuple[int, int], torch.dtype], Duration] = {}
    for wave in waves:
        for matrix in wave.matrices:
            key = (wave.device, *item_of(matrix))
            if matrix in chosen and key not in durations:
                durations[key] = costs[wave.device].of(*item_of(matrix))

    def seconds(quantile: str) -> float:
        total = 0.0
        for wave in waves:
            kept = [matrix for matrix in wave.matrices if matrix in chosen]
            times = [float(getattr(durations[wave.device, *item_of(matrix)], quantile)) for matrix in kept]
            total += _wave_seconds([matrix.shape for matrix in kept], times, wave.side_by_side)
        return total

    return Duration(*(seconds(f.name) for f in fields(Duration)))


def _wave_seconds(shapes: Sequence[tuple[int, int]], seconds: Sequence[float], side_by_side: bool) -> float:
    """Small matrices go to whichever thread is free, the longest first; large ones have all threads one by one."""
    if not side_by_side:
        return sum(seconds)
    alone = [s for shape, s in zip(shapes, seconds, strict=True) if not fits_one_thread(shape)]
    shared = [(operations(shape), s) for shape, s in zip(shapes, seconds, strict=True) if fits_one_thread(shape)]
    threads = [0.0] * torch.get_num_threads()
    for _, s in sorted(shared, reverse=True):
        heapq.heapreplace(threads, threads[0] + s)
    return sum(alone) + max(threads)


def _share_measured(waves: Sequence[PlannedWave], costs: Mapping[torch.device, Costs]) -> float:
    exact = total = 0.0
    for wave in waves:
        found = costs[wave.device]
        measured = {(sample.kind, *sorted(sample.shape)) for sample in found.samples}
        for matrix in wave.matrices:
            item = item_of(matrix)
            total += operations(item[0])
            exact += operations(item[0]) if (found.kind(*item), *sorted(item[0])) in measured else 0.0
    return exact / total if total else 1.0


def item_of(matrix: Matrix) -> Item:
    """Shape and dtype, which the costs depend on."""
    return matrix.shape, matrix.dtype
