"""What a picture of a ranking shows of every matrix: kappa, or the statistic that it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..results.scores import LOGARITHMIC, score_of
from ..results.units import geometric_mean

if TYPE_CHECKING:
    from ..results.entries import TensorKappa


@dataclass(frozen=True)
class Shown:
    """A field of the entries; ``logarithmic``: whether its values are positive and shown on such a scale."""

    name: str = "kappa"
    logarithmic: bool = True

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Shown:
        """What a ranking with this metadata is sorted by; kappa where a callable has sorted it."""
        score = score_of(metadata)
        return cls() if score is None else cls(score.name, score.name not in LOGARITHMIC)

    def value(self, entry: TensorKappa) -> float:
        """The number that is shown; nan where there is none that the scale can show."""
        found: float | None = getattr(entry, self.name)
        if entry.status not in ("ok", "scored") or found is None or not math.isfinite(found):
            return math.nan
        return found if found > 0 or not self.logarithmic else math.nan

    def mean(self, values: Sequence[float]) -> float:
        """The mean of several matrices: geometric, or arithmetic for what is a logarithm itself."""
        return geometric_mean(values) if self.logarithmic else math.fsum(values) / len(values)


KAPPA = Shown()
