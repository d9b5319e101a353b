"""Times as people read them."""

from __future__ import annotations


def format_seconds(value: float) -> str:
    """Two or three digits in the unit that fits: "0.42 s", "3.1 min", "5.2 h"."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 0.1:
        return f"{format_digits(value * 1e3)} ms"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if value < limit:
            return f"{format_digits(value / size)} {unit}"
    return f"{format_digits(value / 86400)} days"


def format_digits(value: float) -> str:
    """Three significant digits below a hundred, whole numbers from there on."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
