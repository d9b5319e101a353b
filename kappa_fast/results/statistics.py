"""Statistics of singular values that are reported beside kappa: what each is, and which of them a matrix has."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Statistics:
    """What is known of a matrix A, m x n or n x m with m >= n, beside both ends of its spectrum; None where it is not.

    docs/scores.md has formulas, sources and errors. sigma_1 >= ... >= sigma_n are the singular values of A.

    Attributes:
        frobenius: ||A||_F, in the units of the weights.
        stable_rank: ||A||_F^2 / sigma_1^2, from 1 to n.
        participation_ratio: (sum of sigma_i^2)^2 / (sum of sigma_i^4), from 1 to n.
        demmel: ||A||_F / sigma_n, from sqrt(n) to inf.
        flatness: mean of log sigma_i - log(mean of sigma_i^2) / 2: 0 where all are equal, negative otherwise, -inf for
            a singular matrix.
        flatness_lower, flatness_upper: an interval that holds the true flatness.
        flatness_by_shape: by how many standard deviations the flatness exceeds the mean over Gaussian matrices of the
            same shape; None for one column, whose flatness is always 0.
    """

    frobenius: float | None = None
    stable_rank: float | None = None
    participation_ratio: float | None = None
    demmel: float | None = None
    flatness: float | None = None
    flatness_lower: float | None = None
    flatness_upper: float | None = None
    flatness_by_shape: float | None = None


UNKNOWN = Statistics()
STATISTICS = tuple(item.name for item in fields(Statistics))
