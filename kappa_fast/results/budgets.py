"""The budgets that select() takes, with the values that are valid for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


def is_number(value: object) -> bool:
    """Whether the value is a number that is finite as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def is_count(value: object) -> bool:
    """Whether the value is an integer (of any integer class) from 1 on."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1


# By name of a budget: its valid values in words, and a check.
BUDGETS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_tensors": ("a count, an int from 1 on", is_count),
    "top_p": ("a fraction in (0, 1]", lambda value: is_number(value) and 0 < value <= 1),
    "max_kappa": ("a condition number, from 1 on and finite", lambda value: is_number(value) and value >= 1),
    "max_params": (
        "a count of weights (int from 1 on) or a fraction of all parameters (float in (0, 1])",
        lambda value: is_count(value) or (isinstance(value, float) and 0 < value <= 1),
    ),
}
