"""The color scale of the heat maps: viridis, whose lightness rises evenly and which color-blind people can read."""

from __future__ import annotations

# By S. van der Walt and N. Smith (CC0), at 17 places; linear interpolation is within 6/255 of matplotlib's colors.
_STOPS = (
    *("440154", "48186a", "472d7b", "424086", "3b528b", "33638d", "2c728e", "26828e", "21918c"),
    *("1fa088", "28ae80", "3fbc73", "5ec962", "84d44b", "addc30", "d8e219", "fde725"),
)


def viridis(count: int = 256) -> list[str]:
    """``count`` colors as "#rrggbb", from dark violet to yellow."""
    return [_at(i / max(1, count - 1)) for i in range(count)]


def _at(place: float) -> str:
    position = place * (len(_STOPS) - 1)
    left = min(int(position), len(_STOPS) - 2)
    ends = [[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in _STOPS[left : left + 2]]
    mixed = [round(a + (b - a) * (position - left)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
