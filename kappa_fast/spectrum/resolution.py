"""Goal and Resolution: the input and the result of the numerics for one matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..results.entries import Status
from ..results.statistics import UNKNOWN, Statistics

# Raise this number when a correction in spectrum/, in a backend or in the reading of weights makes earlier results
# wrong: cached results with another number are not used any more.
NUMERICS = 4


@dataclass(frozen=True)
class Goal:
    """An interval of relative half-width ``rtol`` is wanted, unless kappa provably exceeds ``cutoff``.

    ends: False where neither end of the spectrum is wanted, but the statistics that come with a factor.
    statistics: those that have to be known, whatever the rung gives.
    """

    rtol: float
    certify: bool = False
    cutoff: float = math.inf
    ends: bool = True
    statistics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resolution:
    """The result for one matrix. Singular values and the norm are in the units of the weights."""

    status: Status
    kappa: float
    lower: float
    upper: float
    sigma_max: float
    sigma_min: float
    method: str
    certified: bool = False
    sensitivity: float = math.nan
    statistics: Statistics = UNKNOWN

    @property
    def half_width(self) -> float:
        return (self.upper - self.lower) / 2 / self.kappa if self.status == "ok" else math.inf
