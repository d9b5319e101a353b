"""The ranks of LoRA adapters by a statistic of the weights that they adapt, within one budget of parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import OptionError
from ..results.budgets import is_count, is_number
from ..results.entries import TensorKappa
from ..results.scores import NamedScore

RankBy = str | Callable[[TensorKappa], float]
LEAST = 1e-100  # of a statistic that ranks are in proportion to, and 1 / LEAST is the most: ratios are float64 numbers


def patterns(
    entries: Mapping[str, TensorKappa], by: RankBy, budget: int | None, options: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """``rank_pattern`` and ``alpha_pattern`` for modules with these weights.

    Ranks are as proportional to the statistic as whole numbers from 1 to the smaller side allow, and take together at
    most ``budget`` parameters, r (rows + columns) each; None is what rank ``r`` of the options takes for all. Alphas
    are such that every adapter is scaled as one of rank ``r`` would be. DoRA has a magnitude for each output beside
    that, and ``lora_bias`` a bias; the larger side is counted for these, which is no less.

    Raises:
        OptionError: the statistic is unknown, not positive or not known for a matrix, a callable raises, r is not a
            count, or the budget is too small.
    """
    for name in ("rank_pattern", "alpha_pattern"):
        if options.get(name):
            raise OptionError(f"rank= decides {name}: leave this option out")
    base, alpha = options.get("r", 8), options.get("lora_alpha", 8)
    weights = {name: _weight(by, entry) for name, entry in entries.items()}
    sizes = {name: sum(entry.shape) for name, entry in entries.items()}
    most = {name: min(entry.shape) for name, entry in entries.items()}
    if not is_count(base):
        raise OptionError(f"r={base!r}: give a count from 1 on")
    per_output = options.get("use_dora") or options.get("lora_bias")
    beside = sum(max(entry.shape) for entry in entries.values()) if per_output else 0
    whole = base * sum(sizes.values()) + beside if budget is None else budget
    ranks = _shared_out(weights, sizes, most, whole, beside)
    power = 0.5 if options.get("use_rslora") else 1.0
    keys = {name: f"^{re.escape(name)}" for name in entries}  # PEFT takes keys for the ends of names otherwise
    return {
        "rank_pattern": {keys[name]: rank for name, rank in ranks.items()},
        "alpha_pattern": {keys[name]: alpha * (rank / base) ** power for name, rank in ranks.items()},
    }


def _weight(by: RankBy, entry: TensorKappa) -> float:
    try:
        value: Any = by(entry) if callable(by) else NamedScore.of(by, "rank").value(entry)
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(f"rank= raised {type(error).__name__} for {entry.key!r}: {error}") from error
    if not (is_number(value) and LEAST <= float(value) <= 1 / LEAST):
        what = "the callable of rank=" if callable(by) else repr(by)
        raise OptionError(
            f"{what} gives {value!r} for {entry.key!r}, and a rank needs a positive finite number (from "
            f"{LEAST:g} to {1 / LEAST:g}): use another statistic, or rank the weights again with score='stable_rank'"
        )
    return float(value)


def _shared_out(
    weights: Mapping[str, float], sizes: Mapping[str, int], most: Mapping[str, int], budget: int, beside: int
) -> dict[str, int]:
    """The largest ranks, proportional to the weights but for rounding, whose adapters take at most ``budget``.

    beside: what adapters take whatever their ranks.
    """
    least = sum(sizes.values()) + beside
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < least:
        raise OptionError(
            f"budget={budget!r}: adapters of rank 1 for all of the selection take {least:,} parameters: "
            "give at least that many, or select less"
        )

    def ranks(factor: float) -> dict[str, int]:
        return {name: max(1, min(most[name], math.floor(factor * weight))) for name, weight in weights.items()}

    def total(found: Mapping[str, int]) -> int:
        return beside + sum(rank * sizes[name] for name, rank in found.items())

    low, high = 0.0, max(most[name] / weight for name, weight in weights.items())
    if total(ranks(high * (1 + 1e-9))) <= budget:  # all can have full rank
        return ranks(high * (1 + 1e-9))
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if total(ranks(middle)) <= budget else (low, middle)
    found = ranks(low)
    # What whole numbers have left goes to those that lack the most of a rank.
    for name in sorted(found, key=lambda name: (found[name] - low * weights[name], name)):
        if found[name] < most[name] and total(found) + sizes[name] <= budget:
            found[name] += 1
    return found
