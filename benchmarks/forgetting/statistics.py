"""Tests and intervals in which a base model is the unit: whatever was run on one base counts once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

EXACT = 16  # up to this many bases all changes of sign are tried, beyond it random ones


def percentile(value: float, draws: Sequence[float]) -> float:
    """Where a value lies among random draws: 0 below all, 1 above all, ties in the middle. inf is a value like others.

    Without an effect it is spread evenly and symmetrically about 1/2.
    """
    below = sum(draw < value for draw in draws)
    ties = sum(draw == value for draw in draws)
    return (below + ties / 2 + 0.5) / (len(draws) + 1)


def sign_flip(effects: Sequence[float], flips: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of the mean of effects, one for each base, that are symmetric about 0 if there is nothing.

    Exact up to EXACT bases: the share of all changes of sign whose mean is at least as far from 0. With n bases the
    smallest is 2 / 2**n.
    """
    values = np.asarray(effects, dtype=float)
    if len(values) == 0:
        return math.nan
    if len(values) <= EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
    else:
        chance = np.random.default_rng(seed).choice((1.0, -1.0), size=(flips, len(values)))
        signs = np.concatenate([np.ones((1, len(values))), chance])
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) - 1e-12))


def bootstrap(values: Sequence[float], resamples: int, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean over bases, drawn with replacement."""
    kept = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    if len(kept) == 0:
        return math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, len(kept), size=(resamples, len(kept)))
    low, high = np.quantile(kept[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values by Holm's step-down method, for as many comparisons as there are."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    ordered = sorted(p_values.items(), key=lambda item: (math.inf if math.isnan(item[1]) else item[1], item[0]))
    for i, (name, p) in enumerate(ordered):
        highest = max(highest, min(1.0, p * (len(ordered) - i))) if not math.isnan(p) else highest
        adjusted[name] = highest if not math.isnan(p) else math.nan
    return adjusted


def regression(outcome: np.ndarray, factors: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares within groups (means of each are taken out): the coefficients, and the explained share of variance.

    Args:
        outcome: one for each selection.  factors: (selections, factors).  groups: the base and task of each.
    """
    y, x = outcome.astype(float).copy(), factors.astype(float).copy()
    for group in np.unique(groups, axis=0):
        rows = (groups == group).all(-1) if groups.ndim > 1 else groups == group
        y[rows] -= y[rows].mean()
        x[rows] -= x[rows].mean(0)
    coefficients, *_ = np.linalg.lstsq(x, y, rcond=None)
    total = float((y**2).sum())
    return coefficients, 1 - float(((y - x @ coefficients) ** 2).sum()) / total if total > 0 else math.nan
