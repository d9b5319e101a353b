"""Constants of rounding, with which the proofs of this package round outward (docs/numerics.md, sections 5 and 6)."""

from __future__ import annotations

import math

U = 2.0**-53  # the unit roundoff of float64
U32 = 2.0**-24  # that of float32
OUT = 1 + 1e-5  # covers the rounding of scalars, of norms, and of float64 sums of up to 1e10 terms of one sign
TINY = 1e-280  # more than all underflows of one product together


def gamma(k: float, u: float = U) -> float:
    """K u / (1 - k u), the relative error of k roundings with unit roundoff u; inf from k u = 1/2 on.

    Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1.
    """
    return k * u / (1 - k * u) if k * u < 0.5 else math.inf
