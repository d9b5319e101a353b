"""Tables and numbers in Markdown."""

from __future__ import annotations

import math


def table(head: list[str], rows: list[list[str]]) -> str:
    """Of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float, digits: int = 3) -> str:
    """With so many digits, and no minus in front of zeros; "-" where there is none."""
    return f"{round(value, digits) + 0.0:.{digits}f}" if math.isfinite(value) else "-"


def interval(low: float, high: float, digits: int = 3) -> str:
    """With so many digits."""
    return f"{number(low, digits)} to {number(high, digits)}"
