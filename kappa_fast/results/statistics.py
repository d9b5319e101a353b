"""Statistics of singular values that are reported beside kappa: what each is, and which of them a matrix has."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is known of a matrix A, m x n or n x m with m >= n, beside both ends of its spectrum; None where it is not.

    So it is on rungs that do not give a statistic, and in files of older versions. docs/scores.md has formulas, sources
    and errors. sigma_1 >= ... >= sigma_n are the singular values of A. TensorKappa has these fields too.

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
        outliers_above, outliers_below: how many singular values lie beyond the edges of noise. These and what follows
            take all singular values, and are None unless they were asked for.
        outliers_undecided: how many lie so close to an edge that rounding leaves open on which side: 0 where both
            counts are exact.
        snr: Spectrum's ratio of signal to noise.
        alpha: the exponent of the power law that fits the largest sigma_i^2.
        spectral_entropy: of the shares of sigma_i^2, from 0 for rank one to 1 where all are equal.
    """

    frobenius: float | None = None
    stable_rank: float | None = None
    participation_ratio: float | None = None
    demmel: float | None = None
    flatness: float | None = None
    flatness_lower: float | None = None
    flatness_upper: float | None = None
    flatness_by_shape: float | None = None
    outliers_above: int | None = None
    outliers_below: int | None = None
    outliers_undecided: int | None = None
    snr: float | None = None
    alpha: float | None = None
    spectral_entropy: float | None = None

    def filled(self, other: Statistics) -> Statistics:
        """These, and where one is not known that of ``other``, of the same matrix."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in STATISTICS)
        return Statistics(**{name: theirs if ours is None else ours for name, ours, theirs in pairs})


UNKNOWN = Statistics()
REQUESTED = {
    "outliers": ("outliers_above", "outliers_below", "outliers_undecided"),
    "spectrum": ("snr", "alpha", "spectral_entropy"),
}
COUNTS = REQUESTED["outliers"]
OF_SPECTRUM = tuple(name for names in REQUESTED.values() for name in names)
STATISTICS = tuple(item.name for item in fields(Statistics))
