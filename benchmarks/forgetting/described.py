"""What the study shows beside its plan: looked at after the fact, so described only, with intervals and no p-value."""

from __future__ import annotations

import itertools
import math
import statistics as plain
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import analysis, statistics
from .analysis import Cell, Key, Outcome
from .markdown import interval, number, table
from .plan import Plan, numbers

Found = Mapping[Cell, Mapping[Key, Outcome]]
_UNPLANNED = "This was not planned: it is described only."


def at_rates(records: Iterable[Mapping[str, Any]], plan: Plan) -> dict[float, dict[Cell, dict[Key, Outcome]]]:
    """By learning rate, of every method, fraction and draw: what it comes to if it is trained at that rate."""
    found: dict[float, dict[Cell, dict[Key, Outcome]]] = defaultdict(lambda: defaultdict(dict))
    for (cell, key), members in analysis.runs_of(records, plan).items():
        for rate in {run["lr"] for run in members}:
            there = [run for run in members if run["lr"] == rate]
            if len(there) == len(plan.seeds):
                found[rate][cell][key] = analysis.outcome(there, plan, cell[2])
    return {rate: dict(cells) for rate, cells in sorted(found.items())}


def curved(found: Found, plan: Plan) -> dict[Cell, dict[Key, Outcome]]:
    """Outcomes whose forgetting before the first endpoint is read on a curve (``bent_at``) and not on a line."""
    return {
        cell: {
            key: replace(
                done,
                at=tuple(bent_at(done.path, share * done.path[0][0]) for share in plan.analysis["targets"][cell[2]])
                if done.path
                else done.at,
            )
            for key, done in methods.items()
        }
        for cell, methods in found.items()
    }


def bent_at(path: Sequence[tuple[float, float]], target: float) -> float:
    """Forgetting at a target; before the first endpoint on the power of what was learned that meets the first two.

    Forgetting bends most there: a line from the base overstates it, and the more, the faster a method learns.
    """
    linear = analysis.forgotten_at(path, target)
    start = path[0][0]
    if len(path) < 3 or not path[1][0] <= target < start:
        return linear
    (first, less), (second, more) = ((start - loss, forgotten) for loss, forgotten in path[1:3])
    if not (0 < first < second and 0 < less < more):
        return linear
    power = math.log(more / less) / math.log(second / first)
    return less * ((start - target) / first) ** power


@dataclass(frozen=True)
class Slower:
    """A learning rate against the next higher one, where the same selection got to the same target at both.

    ``gain`` is the mean over bases of the difference of forgetting in nats, ``share`` the median of its ratio, and
    ``compared`` the number of pairs, of the ``reached`` selections and targets at the higher rate.
    """

    kind: str
    task: str
    method: str
    rates: tuple[float, float]
    compared: int
    reached: int
    gain: float
    interval: tuple[float, float]
    share: float


def slower(records: Iterable[Mapping[str, Any]], shown: Found, plan: Plan) -> list[Slower]:
    """For every kind, task and method; ``shown`` has those that count."""
    there = {(kind, *key[:2]) for (kind, _, _), cell in shown.items() for key in cell}
    found = []
    for (low, slow), (high, fast) in itertools.pairwise(at_rates(records, plan).items()):
        pairs: dict[tuple[str, str, str], dict[int, list[tuple[float, float]]]] = {}
        reached: dict[tuple[str, str, str], int] = defaultdict(int)
        for (kind, base, task), cell in fast.items():
            for key, done in cell.items():
                other = slow.get((kind, base, task), {}).get(key)
                if other is None or (kind, *key[:2]) not in there:
                    continue
                group = (kind, task, key[0] + (f" {key[1]:.0%}" if key[1] else ""))
                both = [pair for pair in zip(other.at, done.at, strict=True) if all(map(math.isfinite, pair))]
                reached[group] += sum(map(math.isfinite, done.at))
                pairs.setdefault(group, {}).setdefault(base, []).extend(both)
        found += [
            _slower(group, of, reached[group], (low, high), plan) for group, of in pairs.items() if any(of.values())
        ]
    return sorted(found, key=lambda one: (one.kind, one.task, one.rates))


def _slower(
    group: tuple[str, str, str],
    of_bases: Mapping[int, list[tuple[float, float]]],
    reached: int,
    rates: tuple[float, float],
    plan: Plan,
) -> Slower:
    means = [plain.fmean(a - b for a, b in pairs) for pairs in of_bases.values() if pairs]
    ratios = [a / b if b > 0 else math.inf for pairs in of_bases.values() for a, b in pairs]
    spread = statistics.bootstrap(means, int(plan.analysis["resamples"]))
    return Slower(*group, rates, len(ratios), reached, plain.fmean(means), spread, plain.median(ratios))


def tables(records: list[dict[str, Any]], shown: Found, plan: Plan) -> dict[str, str]:
    """By heading. At one learning rate stands what has run at that one on all bases, whatever others lack."""
    asked = [each for each in (plan.analysis["primary"], *plan.analysis["comparisons"])]
    by_rate = at_rates(records, plan)
    whole = [each for each in asked if analysis.contrast(shown, plan, each).complete]
    if not whole:
        return {}
    return {
        "The first stretch read on a curve": _curved_table(shown, whole, plan),
        "Comparisons at one learning rate for all": _at_one_rate(by_rate, asked, plan),
        "After the same number of steps": same_steps(by_rate, asked, plan),
        "A lower learning rate at the same target": _slower_table(slower(records, shown, plan)),
        "Kappa and forgetting among random draws alone": _draws_table(shown, plan),
    }


def _draws_table(shown: Found, plan: Plan) -> str:
    """The slope of forgetting over log kappa, among draws that the same rule made."""
    drawn = [name for name in plan.analysis.get("regression", []) if plan.methods[name].get("draws", 1) != 1]
    rows = []
    for kind, task, method in itertools.product(plan.bases, plan.tasks, drawn):
        free, held = (analysis.explain(shown, plan, kind, task, [method], at) for at in (False, True))
        if free is not None and held is not None:
            rows.append([kind, task, method, str(free.selections), number(free.slope, 4), interval(*free.interval)])
            rows[-1] += [number(held.slope, 4), interval(*held.interval)]
    head = ["base", "task", "draws", "selections", "nats per unit of log kappa", "95%", "at equal loss", "95%"]
    said = (
        f"Least squares within bases, at equal shares of layers, after {plan.analysis['budget']} steps: above 0 a "
        "lower kappa forgets less. At equal loss: the loss on the new text stands beside the layers. " + _UNPLANNED
    )
    return f"{table(head, rows)}\n\n{said}" if rows else ""


def _curved_table(shown: Found, asked: list[dict[str, Any]], plan: Plan) -> str:
    bent = curved(shown, plan)
    rows = []
    for each in asked:
        for name, found in (("a line, as planned", shown), ("a curve", bent)):
            one = analysis.contrast(found, plan, each)
            above = f"{sum(effect > 0 for effect in one.effects)} of {len(one.bases)}"
            rows.append([one.name, name, number(one.effect), interval(*one.effect_interval), above])
            rows[-1] += [number(one.gain, 4), interval(*one.gain_interval)]
    head = ["comparison", "before the first endpoint", "place - 1/2", "95%", "bases above 0", "nats", "95%"]
    said = (
        "A target that is reached before the first endpoint is read on a line from the base, which overstates "
        "forgetting, and most for what learns fastest. The curve is the power of what was learned that meets the first "
        "two endpoints. " + _UNPLANNED
    )
    return f"{table(head, rows)}\n\n{said}"


def _at_one_rate(by_rate: Mapping[float, Found], asked: list[dict[str, Any]], plan: Plan) -> str:
    rows = []
    for each in asked:
        for rate, found in by_rate.items():
            one = analysis.contrast(found, plan, each)
            if one.complete:
                rows.append([one.name, f"{rate:g}", number(one.effect), interval(*one.effect_interval)])
                rows[-1] += [number(one.gain, 4), interval(*one.gain_interval), f"{one.censored} of {one.compared}"]
    head = ["comparison", "learning rate", "place - 1/2", "95%", "nats", "95%", "censored"]
    said = "What does not get to a target counts as the worst, and where neither does they tie. " + _UNPLANNED
    return f"{table(head, rows)}\n\n{said}"


def same_steps(by_rate: Mapping[float, Found], asked: list[dict[str, Any]], plan: Plan) -> str:
    """What was learned and forgotten after the longest budget, beside the draws of each comparison."""
    rows = []
    for each in asked:
        for rate, found in by_rate.items():
            row = _at_the_end(found, each, plan) if analysis.contrast(found, plan, each).complete else []
            if row:
                rows.append([analysis.name_of(each), f"{rate:g}", *row])
    head = ["comparison", "learning rate", "learned more than every draw", "less than every draw"]
    said = (
        f"After {plan.analysis['budget']} steps, whatever was learned: on how many bases and texts the loss on the new "
        "text was below, or above, that of every draw, and what was forgotten less the mean of the draws. " + _UNPLANNED
    )
    return f"{table([*head, 'forgot more by, nats', '95%'], rows)}\n\n{said}"


def _at_the_end(found: Found, asked: Mapping[str, Any], plan: Plan) -> list[str]:
    other = asked.get("draws_fraction", asked.get("fraction"))
    wanted = numbers(plan.methods[asked["draws"]].get("draws", 1))
    more = less = cells = 0
    gains: dict[int, list[float]] = defaultdict(list)
    for (kind, base, _), cell in found.items():
        one = cell.get((asked["method"], asked.get("fraction"), 0))
        draws = [cell[key] for i in wanted if (key := (asked["draws"], other, i)) in cell]
        if kind != asked["kind"] or one is None or any(done.status != "ok" for done in (one, *draws)) or not draws:
            continue
        new = [done.end["new"] for done in draws]
        cells += 1
        more += one.end["new"] < min(new)
        less += one.end["new"] > max(new)
        gains[base].append(one.end["forgotten"] - plain.fmean(done.end["forgotten"] for done in draws))
    means = [plain.fmean(values) for values in gains.values()]
    if not means:
        return []
    spread = statistics.bootstrap(means, int(plan.analysis["resamples"]))
    return [f"{more} of {cells}", f"{less} of {cells}", number(plain.fmean(means), 4), interval(*spread)]


def _slower_table(found: list[Slower]) -> str:
    rows = []
    for one in found:
        rows.append([one.kind, one.task, one.method, f"{one.rates[0]:g} against {one.rates[1]:g}"])
        rows[-1] += [f"{one.compared} of {one.reached}", number(one.gain, 4), interval(*one.interval)]
        rows[-1].append(f"{one.share:.2f}")
    head = ["base", "task", "method", "learning rates", "pairs", "nats", "95%", "median ratio"]
    said = (
        "Pairs: the same selection at the same target, reached at both rates, of those that reached it at the higher "
        "one. Nats and ratio: what it forgot at the lower rate, less or over what it forgot at the higher one. The "
        "lower rate takes more steps to a target. " + _UNPLANNED
    )
    return f"{table(head, rows)}\n\n{said}" if rows else ""
