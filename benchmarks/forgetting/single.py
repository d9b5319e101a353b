"""One base, whose kappa-lowest selection is one: its rank among random selections, and what so many can tell.

A study of several bases has the base as its unit (analysis.py). With one base the random selections are all there is to
compare with. If kappa meant nothing on it, the kappa-lowest selection would be like one more draw, and each rank among
k draws equally likely. So the smallest p-value is 1 / (k + 1), and it speaks of this base and these texts only.
"""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .analysis import Cell, Key, Outcome
from .plan import Plan, numbers

LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Standing:
    """A method among random draws of the same base.

    Attributes:
        method: its name, with the fraction.
        draws: how many selections it is compared with.
        behind: how many of them forgot less, or as much; 0 if it forgot least.
        p: (1 + behind) / (1 + draws), one-sided: how often a draw would stand there or better.
        gain: forgetting less the mean of the draws, over tasks and targets that all reached.
        deviations: the same in standard deviations of the draws.
        reached: at how many of its targets it arrived, of ``targets``.
    """

    method: str
    draws: int
    behind: int
    p: float
    gain: float
    deviations: float
    reached: int
    targets: int


def standing(
    found: Mapping[Cell, Mapping[Key, Outcome]], plan: Plan, asked: Mapping[str, Any], base: int = 0
) -> Standing | None:
    """Where a method stands; None before all of its runs and of its draws are there.

    Each selection has one number: its rank among the method and all draws, averaged over tasks and targets. What did
    not get to a target, failed or diverged shares the last rank.
    """
    wanted = numbers(plan.methods[asked["draws"]].get("draws", 1))
    fraction, other = asked.get("fraction"), asked.get("draws_fraction", asked.get("fraction"))
    ranks: list[np.ndarray] = []
    gains: list[float] = []
    deviations: list[float] = []
    reached = 0
    for task in asked.get("tasks", plan.tasks):
        cell = found.get((asked["kind"], base, task), {})
        method = cell.get((asked["method"], fraction, 0))
        draws = [cell[key] for i in wanted if (key := (asked["draws"], other, i)) in cell]
        if method is None or len(draws) < len(wanted):
            return None
        for i, value in enumerate(method.at):
            others = [draw.at[i] for draw in draws]
            ranks.append(midranks([value, *others]))
            reached += math.isfinite(value)
            if math.isfinite(value) and all(map(math.isfinite, others)):
                gains.append(value - plain.fmean(others))
                spread = plain.stdev(others) if len(others) > 1 else 0.0
                if spread > 0:
                    deviations.append(gains[-1] / spread)
    if not ranks:
        return None
    own, *rest = np.mean(ranks, axis=0).tolist()
    behind = sum(rank <= own + 1e-9 for rank in rest)
    return Standing(
        method=asked["method"] + (f" {fraction:.0%}" if fraction else ""),
        draws=len(rest),
        behind=behind,
        p=(1 + behind) / (1 + len(rest)),
        gain=plain.fmean(gains) if gains else math.nan,
        deviations=plain.fmean(deviations) if deviations else math.nan,
        reached=reached,
        targets=len(ranks),
    )


def midranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1 on; equal values, inf among them, share the mean of their ranks."""
    return np.array([sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values])


def smallest_p(draws: int) -> float:
    """Of a method that forgot less than every draw."""
    return 1 / (draws + 1)


def detectable(draws: int, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest effect that so many draws find with this power, in standard deviations of the draws.

    For outcomes that are normal over selections: one that forgets d deviations less is found if at most
    level * (draws + 1) - 1 draws stand before it. inf where no p-value can be as small as the level.
    """
    most = math.floor(level * (draws + 1) + 1e-9) - 1
    if most < 0:
        return math.inf
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _found(middle, draws, most) >= power else (middle, high)
    return high


def _found(effect: float, draws: int, most: int) -> float:
    """The probability that at most so many of the draws lie below a normal value that is shifted down."""
    x = np.linspace(-9, 9, 2001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-(value - effect) / math.sqrt(2)) for value in x])
    chance = sum(math.comb(draws, i) * below**i * (1 - below) ** (draws - i) for i in range(most + 1))
    return float(np.trapezoid(density * chance, x))
