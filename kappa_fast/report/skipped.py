"""What was left out, by reason."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..results.entries import Skipped


def by_reason(skipped: Iterable[Skipped]) -> list[tuple[str, list[Skipped]]]:
    """The skipped parameters under each reason, the most frequent reason first.

    "scales of layers.3.q_proj.weight" and its like are one reason, not one for every layer.
    """
    groups: dict[str, list[Skipped]] = {}
    for item in skipped:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", item.reason), []).append(item)
    return sorted(groups.items(), key=lambda group: -len(group[1]))
