"""Bounds with a stated probability: what a random start says about what it may have missed.

u is the wanted eigenvector, fixed by the matrix; Q1 is the orthonormalized Gaussian start of width b. The cosine
||u^T Q1|| falls below ``start_overlap(n, b)`` with probability at most FAILURE, whatever the matrix, and everything
here holds outside of that event. The derivations are in docs/numerics.md.
"""

from __future__ import annotations

import math

import torch

from ..backends.base import Ritz, Tensor

# Per end and per matrix: the 89,088 ends of a model with 44,544 experts fail together with probability below 1e-5.
FAILURE = 1e-10
# Relative gaps that are looked at, and those within a decade. Powers are taken here once and never on tensors, whose
# library may round an element by where it stands in its vector.
DECADES = [10.0**k for k in range(-16, 9)]
FINER = [10.0 ** (k / 24) for k in range(25)]
WIDEST = DECADES[-1]  # beyond it a bound is called infinite


def start_overlap(n: int, width: int) -> float:
    """A cosine that ||u^T Q1|| exceeds with probability 1 - FAILURE, for a unit vector u in n dimensions.

    The squared cosine follows Beta(b/2, (n-b)/2), whose density is at most x^(b/2-1) / B(b/2, (n-b)/2) as soon as
    n - b >= 2, so its quantile is bounded from below in closed form. With b >= n the block spans everything: 1.
    """
    if n - width < 2:
        return 1.0 if width >= n else _overlap_of_chi(n, width)
    a, c = width / 2, (n - width) / 2
    log_beta = math.lgamma(a) + math.lgamma(c) - math.lgamma(a + c)
    return math.exp(min(0.0, (math.log(FAILURE * a) + log_beta) / a) / 2)


def _overlap_of_chi(n: int, width: int) -> float:
    # n - b = 1: the squared sine follows Beta(1/2, b/2); 1 - x is its own tail, bounded by the same density argument
    a = width / 2
    log_beta = math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)
    # density <= x^(a-1) (1-x)^(-1/2) / B <= sqrt(2) x^(a-1) / B for x <= 1/2
    return math.exp(min(math.log(0.5), (math.log(FAILURE * a) + log_beta - 0.5 * math.log(2)) / a) / 2)


def norm_factor(width: int) -> float:
    """The c with ||M||_F <= c ||M X||_F / sqrt(b), for a Gaussian X of width b, outside of probability FAILURE.

    ||M X||_F^2 is a sum of chi-square(b) variables weighted with the squared singular values of M. It is most likely
    to be small when one of them carries all the weight, so c^2 = b / (FAILURE-quantile of chi-square(b)), bounded in
    closed form: the distribution function of chi-square(b) at x is at most (x/2)^(b/2) / Gamma(b/2 + 1).
    """
    a = width / 2
    log_quantile = math.log(2) + (math.log(FAILURE) + math.lgamma(a + 1)) / a
    return math.sqrt(width / math.exp(log_quantile))


def excess(ritz: Ritz, overlap: Tensor, noise: Tensor) -> Tensor:
    """The Ritz gap bound d, of shape (w,): the largest eigenvalue lies in [theta, theta (1 + d)], unless the start
    missed its vector.

    ritz: of T = V^T H V, for a Krylov basis V whose first block Q1 is the start, H V = V T + Q B E^T.
    overlap (w,): what ||u^T Q1|| exceeds.  noise (w,): bound on what rounding adds to that relation, relative to theta.

    For an eigenpair (lambda, u) of H with lambda above all Ritz values, u^T Q1 = u^T Q B E^T (lambda - T)^-1 E_1, hence
    overlap <= ||B E^T (lambda - T)^-1 E_1|| + noise theta / (lambda - theta). The right side falls as lambda grows,
    and the largest lambda that still satisfies it bounds the spectrum: van Dorsselaer, Hochstenbach and van der Vorst,
    SIAM J. Matrix Anal. Appl. 22 (2000), carried over to blocks. Infinite if nothing below WIDEST does.
    Found to 10%, from above.
    """

    def last_possible(gaps: Tensor) -> Tensor:
        """How many of the ascending gaps, (w, p), end with one that lambda could have; 0 if none."""
        possible = ~(
            ritz.reach(gaps) + noise[:, None] / gaps < overlap[:, None]
        )  # what is not a number rules out nothing
        return (possible * torch.arange(1, gaps.shape[1] + 1, device=gaps.device)).amax(dim=1)

    decades, finer = ritz.theta.new_tensor(DECADES), ritz.theta.new_tensor(FINER)
    count = last_possible(decades.expand(len(overlap), -1))
    low = decades[(count - 1).clamp(min=0)]
    gaps = low[:, None] * finer
    found = gaps.gather(1, last_possible(gaps).clamp(max=len(FINER) - 1)[:, None])[:, 0]
    found = torch.where(count == len(DECADES), math.inf, torch.where(count == 0, low, found))
    return torch.where((ritz.theta > 0) & torch.isfinite(ritz.theta), found, math.inf)
