"""The skipped parameters of a ranking, grouped by reason for the page and the plan."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..results.entries import Skipped


def by_reason(skipped: Iterable[Skipped]) -> list[tuple[str, list[Skipped]]]:
    """The skipped parameters under each reason, the most frequent reason first.

    Reasons that differ only in a name, such as "scales of layers.3.q_proj.weight", are one reason.
    """
    groups: dict[str, list[Skipped]] = {}
    for item in skipped:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", item.reason), []).append(item)
    return sorted(groups.items(), key=lambda group: -len(group[1]))
