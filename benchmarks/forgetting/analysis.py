"""From runs to answers: outcomes at targets, each method at its own best learning rate, contrasts over bases."""

from __future__ import annotations

import itertools
import math
import statistics as plain
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import statistics
from .plan import Plan, numbers

LOSS = "loss on the new text"
WORST = math.inf  # the forgetting of what failed, diverged or did not get to the target

Cell = tuple[str, int, str]  # kind, base, task
Key = tuple[str, float | None, int]  # method, fraction, draw


@dataclass(frozen=True)
class Outcome:
    """What a method came to on a base and a task, at its own best learning rate.

    ``path`` are points (loss on the new text, forgetting) from the base on, by budget; ``at`` the forgetting at each
    target, WORST where it was not reached.
    """

    rate: float
    path: tuple[tuple[float, float], ...]
    at: tuple[float, ...]
    status: str
    end: Mapping[str, float] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)


def outcomes(records: Iterable[Mapping[str, Any]], plan: Plan) -> dict[Cell, dict[Key, Outcome]]:
    """Of every method, fraction and draw of which all runs are there. Of several seeds the best counts, as of rates."""
    found: dict[Cell, dict[Key, Outcome]] = defaultdict(dict)
    for (cell, key), members in runs_of(records, plan).items():
        rates = len(plan.methods[key[0]].get("rates", plan.rates)) * len(plan.seeds)
        if len(members) == rates:
            found[cell][key] = outcome(members, plan, cell[2])
    return dict(found)


def runs_of(records: Iterable[Mapping[str, Any]], plan: Plan) -> dict[tuple[Cell, Key], list[Mapping[str, Any]]]:
    """Those that the plan has, by what they have in common but learning rates and seeds; methods as in the plan."""
    wanted = {job["id"] for job in plan.jobs() if job["what"] == "run"}
    runs: dict[tuple[Cell, Key], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if record["id"] in wanted:
            cell = (record["kind"], record["base"], record["task"])
            runs[cell, (record["method"], record["fraction"], record["draw"])].append(record)
    place = {method: i for i, method in enumerate(plan.methods)}
    return dict(sorted(runs.items(), key=lambda item: (item[0][0], place[item[0][1][0]], item[0][1][1:])))


def complete(found: Mapping[Cell, Mapping[Key, Outcome]], plan: Plan) -> dict[Cell, dict[Key, Outcome]]:
    """Only the methods and fractions whose draws are there for every base and task of a kind: what can be averaged."""
    kept: dict[Cell, dict[Key, Outcome]] = {}
    for kind, bases in plan.bases.items():
        cells = [found.get((kind, base, task), {}) for base in bases for task in plan.tasks]
        whole = set.intersection(*(set(cell) for cell in cells)) if cells else set()
        had = {key[:2] for key in whole}
        for method, fraction in list(had):
            draws = numbers(plan.methods[method].get("draws", 1))
            if any((method, fraction, draw) not in whole for draw in draws):
                had.discard((method, fraction))
        for base in bases:
            for task in plan.tasks:
                cell = found.get((kind, base, task), {})
                kept[kind, base, task] = {key: done for key, done in cell.items() if key[:2] in had}
    return {cell: methods for cell, methods in kept.items() if methods}


def outcome(runs: Sequence[Mapping[str, Any]], plan: Plan, task: str) -> Outcome:
    """The run whose loss on validation texts of the task is lowest after the budget of the plan."""
    budget = str(plan.analysis["budget"])
    whole = [run for run in runs if run["status"] == "ok" and budget in run["endpoints"]]
    shares = plan.analysis["targets"][task]
    if not whole:
        status = Counter(run["status"] for run in runs).most_common(1)[0][0]
        return Outcome(math.nan, (), (WORST,) * len(shares), status)
    best = min(whole, key=lambda run: (run["endpoints"][budget]["validation"], run["lr"]))
    start = best["start"]["new"]
    ends = sorted(best["endpoints"].items(), key=lambda item: int(item[0]))
    path = ((start, 0.0), *((end["new"], end["forgotten"]) for _, end in ends))
    at = tuple(forgotten_at(path, share * start) for share in shares)
    return Outcome(best["lr"], path, at, "ok", best["endpoints"][budget], best.get("selected", {}))


def forgotten_at(path: Sequence[tuple[float, float]], target: float) -> float:
    """Forgetting where a path gets to the target, linearly between its endpoints; WORST if it never does."""
    for (before, less), (after, more) in itertools.pairwise(path):
        if after <= target:
            share = 0.0 if before <= target else (before - target) / (before - after)
            return less + share * (more - less)
    return WORST


@dataclass(frozen=True)
class Contrast:
    """A method against its random draws, base by base.

    ``effects`` are its places among the draws less 1/2, averaged over tasks and targets: below 0 it forgot less than
    most. ``gains`` are differences in nats per token, method less mean of the draws, where all got to a target.
    ``complete``: whether every run of it is there, on all bases and tasks.
    """

    name: str
    bases: tuple[int, ...]
    effects: tuple[float, ...]
    gains: tuple[float, ...]
    p: float
    effect: float
    effect_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]
    censored: int
    compared: int
    complete: bool


def contrast(found: Mapping[Cell, Mapping[Key, Outcome]], plan: Plan, asked: Mapping[str, Any]) -> Contrast:
    """One planned comparison; what a base and a task lack of it is left out until it is there."""
    fraction, other = asked.get("fraction"), asked.get("draws_fraction", asked.get("fraction"))
    places: dict[int, list[float]] = defaultdict(list)
    gains: dict[int, list[float]] = defaultdict(list)
    censored = compared = 0
    wanted = numbers(plan.methods[asked["draws"]].get("draws", 1))
    for (kind, base, task), cell in sorted(found.items()):
        if kind != asked["kind"] or task not in asked.get("tasks", plan.tasks):
            continue
        method = cell.get((asked["method"], fraction, 0))
        draws = [cell[key] for i in wanted if (key := (asked["draws"], other, i)) in cell]
        if method is None or len(draws) < len(wanted):
            continue
        for i, value in enumerate(method.at):
            against = [draw.at[i] for draw in draws]
            places[base].append(statistics.percentile(value, against) - 0.5)
            compared += 1
            censored += value == WORST
            finite = [draw for draw in against if math.isfinite(draw)]
            if math.isfinite(value) and len(finite) == len(against):
                gains[base].append(value - plain.fmean(finite))
    bases = tuple(sorted(places))
    targets = sum(len(plan.analysis["targets"][task]) for task in asked.get("tasks", plan.tasks))
    effects = tuple(plain.fmean(places[base]) for base in bases)
    means = tuple(plain.fmean(gains[base]) if gains.get(base) else math.nan for base in bases)
    known = [gain for gain in means if math.isfinite(gain)]
    resamples = int(plan.analysis["resamples"])
    return Contrast(
        name=name_of(asked),
        bases=bases,
        effects=effects,
        gains=means,
        p=statistics.sign_flip(effects),
        effect=plain.fmean(effects) if effects else math.nan,
        effect_interval=statistics.bootstrap(effects, resamples),
        gain=plain.fmean(known) if known else math.nan,
        gain_interval=statistics.bootstrap(means, resamples),
        censored=censored,
        compared=compared,
        complete=compared == targets * len(plan.bases[asked["kind"]]),
    )


def name_of(asked: Mapping[str, Any]) -> str:
    """A comparison in words."""
    share = f" {asked['fraction']:.0%}" if asked.get("fraction") else ""
    return f"{asked['kind']}: {asked['method']}{share} against {asked['draws']}"


@dataclass(frozen=True)
class Contrasts:
    """The primary comparison; the others that are tested, with p-values by Holm; those that are described only."""

    primary: Contrast
    tested: list[Contrast]
    adjusted: dict[str, float]
    described: list[Contrast]


def contrasts(found: Mapping[Cell, Mapping[Key, Outcome]], plan: Plan) -> Contrasts:
    """All that the plan compares. With n bases no p-value is below 2 / 2**n, so that few can be tested at once."""
    tested = [contrast(found, plan, asked) for asked in plan.analysis["comparisons"]]
    return Contrasts(
        primary=contrast(found, plan, plan.analysis["primary"]),
        tested=tested,
        adjusted=statistics.holm({other.name: other.p for other in tested}),
        described=[contrast(found, plan, asked) for asked in plan.analysis.get("described", [])],
    )


@dataclass(frozen=True)
class Explained:
    """What share of the variance of forgetting among selections layers explain, and what kappa adds.

    ``slope`` is the change of forgetting in nats per unit of mean log kappa, at equal shares of layers, with a
    bootstrap interval over bases; nan without enough selections.
    """

    kind: str
    task: str
    selections: int
    by_layers: float
    with_kappa: float
    slope: float
    interval: tuple[float, float]


def explain(
    found: Mapping[Cell, Mapping[Key, Outcome]],
    plan: Plan,
    kind: str,
    task: str,
    methods: Sequence[str] | None = None,
    at_equal_loss: bool = False,
) -> Explained | None:
    """The secondary analysis: forgetting after the budget, over all selections of ``methods``.

    methods: those that the plan names, if not given.  at_equal_loss: the loss on the new text stands among the layers.
    """
    counted = plan.analysis.get("regression", []) if methods is None else methods
    rows: list[tuple[int, float, float, dict[str, float]]] = []
    for (its_kind, base, its_task), cell in sorted(found.items()):
        if (its_kind, its_task) != (kind, task):
            continue
        for key, done in cell.items():
            if key[0] in counted and done.status == "ok" and done.said.get("log_kappa"):
                loss = {LOSS: done.end["new"]} if at_equal_loss else {}
                rows.append((base, done.end["forgotten"], done.said["log_kappa"], {**done.said["layers"], **loss}))
    layers = sorted({layer for *_, shares in rows for layer in shares} - {LOSS})[1:]  # the shares are 1 together
    layers += [LOSS] if at_equal_loss else []
    if len(rows) < len({row[0] for row in rows}) + len(layers) + 5:  # a mean for each base, a slope for each layer
        return None
    bases = np.array([row[0] for row in rows])
    y = np.array([row[1] for row in rows])
    kappa = np.array([row[2] for row in rows])[:, None]
    shares = np.array([[row[3].get(layer, 0.0) for layer in layers] for row in rows]).reshape(len(rows), len(layers))
    _, alone = statistics.regression(y, shares, bases)
    coefficients, both = statistics.regression(y, np.hstack([shares, kappa]), bases)
    interval = _slopes(y, shares, kappa, bases, plan)
    return Explained(kind, task, len(rows), alone, both, float(coefficients[-1]), interval)


def _slopes(y: Any, shares: Any, kappa: Any, bases: Any, plan: Plan) -> tuple[float, float]:
    names = np.unique(bases)
    chance = np.random.default_rng(0)
    found = []
    for _ in range(min(1000, int(plan.analysis["resamples"]))):
        picked = [np.flatnonzero(bases == name) for name in chance.choice(names, len(names))]
        rows = np.concatenate(picked)
        groups = np.concatenate([np.full(len(part), i) for i, part in enumerate(picked)])
        found.append(statistics.regression(y[rows], np.hstack([shares[rows], kappa[rows]]), groups)[0][-1])
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def counts(records: Iterable[Mapping[str, Any]], plan: Plan) -> dict[str, int]:
    """Results by status, and how many the plan still lacks."""
    jobs = {job["id"] for job in plan.jobs() if job["what"] == "run"}
    statuses = Counter(record["status"] for record in records if record["id"] in jobs)
    return {"planned": len(jobs), **statuses, "missing": len(jobs) - sum(statuses.values())}
