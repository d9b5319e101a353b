"""The comparisons that have a name and a goal, beside the cells of the sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import workloads
from sweep_cells import Cell, mapping, plain_ways

import kappa_fast

Ways = Mapping[str, Callable[[], Any]]
Medians = Mapping[str, float]


@dataclass(frozen=True)
class Claim:
    """A figure that is made of times measured in turn.

    Attributes:
        text: what the figure is.
        reach: its goal: at least that, or at most where ``at_most``.
        ours, others: what is run in turn; of the others only what has a chance is run again (sweep_timing.alternate).
        figure: of the medians in seconds.
        check: raises AssertionError where an answer of ours is wrong, by the last results.
        quick: whether one round takes a few seconds at most on one thread.
    """

    text: str
    reach: float
    at_most: bool
    ours: Callable[[], Ways]
    others: Callable[[], Ways]
    figure: Callable[[Medians], float]
    check: Callable[[Mapping[str, Any]], None]
    quick: bool = False


def _rank(weights: Any, **options: Any) -> Any:
    return kappa_fast.rank(weights, progress=False, **options)


@cache
def _cell(text: str) -> list[torch.Tensor]:
    return Cell.parse(text).matrices()


@cache
def _tinyllama() -> torch.nn.Module:
    return workloads.tinyllama("trained")


@cache
def _minilm() -> dict[str, torch.Tensor]:
    weights = workloads.minilm()
    return {entry.name: weights[entry.name] for entry in _rank(weights)}


def _peft(model: torch.nn.Module) -> Callable[[], None]:
    from peft import helpers

    return lambda: helpers.KappaTuneSelector(model, show_progress=False)._compute_kappas()


def _of_cell(text: str, figure: Callable[[float, float, int], float], what: str, reach: float, at_most: bool) -> Claim:
    """A comparison with the fastest plain way: ``figure`` of seconds of ours, of theirs, and the number of matrices."""

    def check(results: Mapping[str, Any]) -> None:
        assert_contains(results["rank"], results["torch svdvals float64"])

    return Claim(
        what,
        reach,
        at_most,
        lambda: {"rank": lambda: _rank(mapping(_cell(text)))},
        lambda: plain_ways(_cell(text), peft=False),
        lambda t: figure(t["rank"], min(s for name, s in t.items() if name != "rank"), Cell.parse(text).count),
        check,
        quick=True,
    )


def assert_contains(ranking: Any, exact: list[float], slack: float = 1e-9) -> None:
    """Every interval holds the float64 SVD's kappa, of entries in the order of their names' numbers."""
    entries = sorted(ranking, key=lambda entry: int(entry.name.split(".")[1]))
    assert len(entries) == len(exact)
    for entry, kappa in zip(entries, exact, strict=True):
        assert entry.lower <= kappa * (1 + slack), (entry, kappa)
        assert kappa * (1 - slack) <= entry.upper, (entry, kappa)


def _same_lowest(results: Mapping[str, Any], options: str, share: float) -> None:
    count = max(1, int(len(results["rank"]) * share))
    assert {e.name for e in results[options][:count]} == {e.name for e in results["rank"][:count]}


def _all_certified(results: Mapping[str, Any]) -> None:
    assert all(entry.certified for entry in results["rank(certify=True)"])


def _holds_minilm(results: Mapping[str, Any]) -> None:
    exact = dict(zip(_minilm(), results["svdvals float64"], strict=True))
    assert {entry.name for entry in results["rank"]} == set(exact)
    for entry in results["rank"]:
        assert entry.lower <= exact[entry.name] * (1 + 1e-9)
        assert exact[entry.name] * (1 - 1e-9) <= entry.upper


def _svdvals(weights: Mapping[str, torch.Tensor]) -> list[float]:
    sigmas = [torch.linalg.svdvals(weight.double()) for weight in weights.values()]
    return [float(s[0] / s[-1]) for s in sigmas]


def _tinyllama_ways(**more: dict[str, Any]) -> Callable[[], Ways]:
    def ways() -> Ways:
        named = {f"rank({', '.join(f'{k}={v}' for k, v in o.items())})": o for o in more.values()}
        return {
            "rank": lambda: _rank(_tinyllama()),
            **{name: (lambda options=options: _rank(_tinyllama(), **options)) for name, options in named.items()},
        }

    return ways


def _peft_alone() -> Ways:
    return {"PEFT": _peft(_tinyllama())}


LAYERS = "two layers of TinyLlama-1.1B, trained-like"
CLAIMS: dict[str, Claim] = {
    "small": _of_cell(
        "24x64x64", lambda ours, plain, count: plain / ours, "24 of 64 x 64: best plain way / rank()", 1.0, False
    ),
    "many": _of_cell(
        "2000x64x128",
        lambda ours, plain, count: 1e3 * (ours - plain) / count,
        "2000 of 64 x 128: ms per matrix beyond the best plain way",
        0.2,
        True,
    ),
    "minilm": Claim(
        "MiniLM: svdvals float64 / rank()",
        5.0,
        False,
        lambda: {"rank": lambda: _rank(_minilm())},
        lambda: {"svdvals float64": lambda: _svdvals(_minilm())},
        lambda t: t["svdvals float64"] / t["rank"],
        _holds_minilm,
        quick=True,
    ),
    "peft": Claim(
        f"PEFT / rank(), {LAYERS}",
        8.0,
        False,
        _tinyllama_ways(),
        _peft_alone,
        lambda t: t["PEFT"] / t["rank"],
        lambda results: None,
    ),
    "top": Claim(
        f"PEFT / rank(top=0.2), {LAYERS}",
        25.0,
        False,
        _tinyllama_ways(top={"top": 0.2}),
        _peft_alone,
        lambda t: t["PEFT"] / t["rank(top=0.2)"],
        lambda results: _same_lowest(results, "rank(top=0.2)", 0.2),
    ),
    "inside": Claim(
        f"rank(top=0.5) / rank(), {LAYERS}, the cut inside a type",
        1.02,
        True,
        _tinyllama_ways(top={"top": 0.5}),
        dict,
        lambda t: t["rank(top=0.5)"] / t["rank"],
        lambda results: _same_lowest(results, "rank(top=0.5)", 0.5),
    ),
    "certify": Claim(
        f"rank(certify=True) / rank(), {LAYERS}",
        2.5,
        True,
        _tinyllama_ways(certify={"certify": True}),
        dict,
        lambda t: t["rank(certify=True)"] / t["rank"],
        _all_certified,
    ),
}
