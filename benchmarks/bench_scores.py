"""What the statistics beside kappa take of rank(), and what a score takes that needs no singular values at the ends.

Shares of processor time, one thread, medians of rounds in which both sides take turns: other programs on the machine
hardly move them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import workloads

import kappa_fast
from kappa_fast.backends import torch_backend
from kappa_fast.spectrum import small
from kappa_fast.spectrum import statistics as beside

ROUNDS = 5
MOST_FREE = 0.02
MOST_FLATNESS = 0.80  # the factor alone takes 56% (2048 x 2048) and 63% (5632 x 2048) of what kappa takes
MODELS: dict[str, Callable[[], Any]] = {
    "MiniLM": workloads.minilm,
    "TinyLlama-1.1B, 2 layers, trained-like": lambda: workloads.tinyllama("trained"),
}
source = cache(lambda name: MODELS[name]())
# Everything that rank() would not do without the statistics; what these call is counted with them.
ADDED = (
    (torch_backend, "symmetric_norm"),
    (torch_backend.TorchBackend, "volumes"),
    (small._Volumes, "of"),
    (small._Volumes, "one"),
    (beside, "of_gram"),
    (beside, "of_factor"),
    (beside, "of_values"),
    (beside, "of_singular"),
    (beside.Values, "of_values"),
    (beside.Values, "of_squares"),
)


class Watch:
    """The processor time spent in some functions, those that they call among them only once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self._inside = 0.0, False
        for owner, name in ADDED:
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if self._inside:
                return function(*args, **options)
            self._inside, started = True, time.process_time()
            try:
                return function(*args, **options)
            finally:
                self._inside, self.seconds = False, self.seconds + time.process_time() - started

        return timed


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


@pytest.mark.parametrize("name", MODELS)
def test_the_statistics_that_come_with_kappa(benchmark: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, shares = source(name), []
    watch = Watch(monkeypatch)
    kappa_fast.rank(weights, progress=False)
    for _ in range(ROUNDS):
        watch.seconds = 0.0
        shares.append(1 / (seconds(lambda: kappa_fast.rank(weights, progress=False)) / watch.seconds))
    benchmark.pedantic(lambda: None)  # the file of results has a row for it
    benchmark.extra_info["share of rank()"] = share = statistics.median(shares)
    print(f"{name}: {share:.2%} of rank()")
    assert share <= MOST_FREE


@pytest.mark.parametrize("name", MODELS)
def test_flatness_alone(benchmark: Any, name: str) -> None:
    weights, ratios = source(name), []
    runs = [
        lambda score=score: kappa_fast.rank(weights, score=score, progress=False) for score in ("kappa", "-flatness")
    ]
    for _ in range(ROUNDS):
        kappa, flatness = (seconds(run) for run in runs)
        ratios.append(flatness / kappa)
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["of what kappa takes"] = ratio = statistics.median(ratios)
    print(f"{name}: flatness takes {ratio:.0%} of what kappa takes")
    if "trained" in name:
        assert ratio <= MOST_FLATNESS
