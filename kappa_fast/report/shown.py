"""What a picture of a ranking shows of every matrix: kappa, or the statistic that it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..results.scores import LOGARITHMIC, NAMES, NamedScore, score_of
from ..results.statistics import COUNTS
from ..results.units import geometric_mean

if TYPE_CHECKING:
    from ..results.entries import TensorKappa
    from ..results.ranking import Ranking


LINEAR = (*LOGARITHMIC, *COUNTS, "spectral_entropy")  # not all are positive, or all are below 1


@dataclass(frozen=True)
class Shown:
    """A field of the entries; ``logarithmic``: whether its values are positive and shown on such a scale."""

    name: str = "kappa"
    logarithmic: bool = True

    @classmethod
    def named(cls, name: str) -> Shown:
        """What this score is shown as."""
        return cls(name, name not in LINEAR)

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Shown:
        """What a ranking with this metadata is sorted by; kappa where a callable has sorted it."""
        score = score_of(metadata)
        return cls() if score is None else cls.named(score.name)

    @classmethod
    def chosen(cls, ranking: Ranking, show: str | None) -> Shown:
        """What is to be shown of a ranking: the score with this name, or that by which it is sorted.

        Raises:
            OptionError: there is no such score, or no matrix has it.
        """
        if show is None:
            return cls.of(ranking.metadata)
        found = cls.named(NamedScore.of(show, "show").name)
        if all(math.isnan(found.value(entry)) for entry in ranking):
            raise OptionError(f"show={show!r}: no matrix of the ranking has a finite {found.name}")
        return found

    @classmethod
    def choices(cls, entries: Iterable[TensorKappa]) -> list[Shown]:
        """Kappa, and what else at least one entry has."""
        entries = tuple(entries)
        named = [cls.named(name) for name in NAMES if name != KAPPA.name]
        return [KAPPA, *(each for each in named if any(not math.isnan(each.value(entry)) for entry in entries))]

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
