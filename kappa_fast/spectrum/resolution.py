"""Goal and Resolution: what is wanted of a matrix, and what is known of it in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..results.entries import Status

# Raise it when a correction makes earlier results wrong, here, in a backend or in how weights are read: results in
# caches with another number are not used any more.
NUMERICS = 4


@dataclass(frozen=True)
class Goal:
    """What an entry needs: an interval of relative half-width ``rtol``, unless kappa provably exceeds ``cutoff``."""

    rtol: float
    certify: bool = False
    cutoff: float = math.inf


@dataclass(frozen=True)
class Resolution:
    """What is known of one matrix. Singular values are in the units of the weights."""

    status: Status
    kappa: float
    lower: float
    upper: float
    sigma_max: float
    sigma_min: float
    method: str
    certified: bool = False
    sensitivity: float = math.nan

    @property
    def half_width(self) -> float:
        return (self.upper - self.lower) / 2 / self.kappa if self.status == "ok" else math.inf
