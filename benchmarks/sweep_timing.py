"""Both sides of a comparison in turn, by the wall clock and by processor time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LONG = 0.3  # seconds: the first run of what takes longer counts, that of others only warms up
SAMPLE = 0.02  # seconds that a sample lasts at least: what takes less is repeated within it
CHANCELESS = 2.5  # times the fastest: what takes longer at first is not measured again


@dataclass
class Times:
    """Seconds of single calls, by the wall clock and by the processor time of the process, and what was returned."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    result: Any = None

    def as_json(self) -> dict[str, float]:
        return {
            "wall": statistics.median(self.wall),
            "processor": statistics.median(self.processor),
            "least wall": min(self.wall),
            "samples": len(self.wall),
        }


def alternate(
    ours: Mapping[str, Callable[[], Any]], others: Mapping[str, Callable[[], Any]], seconds: float, most: int = 9
) -> dict[str, Times]:
    """Run everything in turn, ``most`` times or until ``seconds`` have gone, but three times what is short.

    others: of these, what takes more than CHANCELESS times the fastest at first is not run again.
    """
    ways = {**ours, **others}
    found: dict[str, Times] = {}
    first: dict[str, float] = {}
    for name, way in ways.items():
        found[name] = Times()
        first[name] = _sample(way, 1, found[name])
        if first[name] < LONG:
            found[name] = Times()
            first[name] = _sample(way, _repeats(first[name]), found[name])
    fastest = min((first[name] for name in others), default=math.inf)
    going = [name for name in ways if name in ours or first[name] <= CHANCELESS * fastest]
    started = time.perf_counter()
    for turn in range(1, most):
        if time.perf_counter() - started > seconds and (turn >= 3 or sum(first[n] for n in going) > seconds):
            break
        for name in going:
            _sample(ways[name], _repeats(first[name]), found[name])
    return found


def _repeats(seconds: float) -> int:
    return max(1, min(1000, math.ceil(SAMPLE / max(seconds, 1e-6))))


def _sample(way: Callable[[], Any], repeats: int, times: Times) -> float:
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        times.result = way()
    times.processor.append((time.process_time() - processor) / repeats)
    times.wall.append((time.perf_counter() - wall) / repeats)
    return times.wall[-1]
