"""Bounds that hold with a stated probability, for eigenvalues that a search from a random start may have missed.

Let u be the wanted eigenvector and Q1 the orthonormalized Gaussian start of width b. For every matrix, the cosine
||u^T Q1|| falls below ``start_overlap(n, b)`` with probability at most FAILURE; all bounds here hold outside of that
event. docs/numerics.md has the derivations.
"""

from __future__ import annotations

import math

import torch

from ..backends.base import Ritz, Tensor
from ..backends.moving import constants

# Per end and per matrix: the 89,088 ends of a model with 44,544 experts fail together with probability below 1e-5.
FAILURE = 1e-10
# The relative gaps that excess() tries, and the steps within a decade. The powers are computed here and not on tensors,
# because a tensor library may round an element differently at another position of its vector.
DECADES = tuple(10.0**k for k in range(-16, 9))
STEPS_IN_DECADE = tuple(10.0 ** (k / 24) for k in range(25))
LARGEST_GAP = DECADES[-1]  # a larger bound is reported as infinite


def start_overlap(n: int, width: int) -> float:
    """A cosine that ||u^T Q1|| exceeds with probability 1 - FAILURE, for a unit vector u in n dimensions.

    The squared cosine follows Beta(b/2, (n-b)/2), whose density is at most x^(b/2-1) / B(b/2, (n-b)/2) as soon as
    n - b >= 2, so its quantile is bounded from below in closed form. With b >= n the block spans everything: 1.
    """
    if n - width < 2:
        return 1.0 if width >= n else _overlap_beside_one(width)
    a, c = width / 2, (n - width) / 2
    log_beta = math.lgamma(a) + math.lgamma(c) - math.lgamma(a + c)
    return math.exp(min(0.0, (math.log(FAILURE * a) + log_beta) / a) / 2)


def _overlap_beside_one(width: int) -> float:
    # n - b = 1: the squared cosine follows Beta(b/2, 1/2), and the same bound on the density applies.
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
    """The Ritz gap bound d, shape (w,): the largest eigenvalue lies in [theta, theta (1 + d)], unless the start block
    missed its eigenvector.

    ritz: eigenpairs of T = V^T H V for a Krylov basis V whose first block Q1 is the start, H V = V T + Q B E^T.
    overlap (w,): a number that ||u^T Q1|| exceeds.  noise (w,): a bound, relative to theta, on the rounding error of
    that relation.

    For an eigenpair (lambda, u) of H with lambda above all Ritz values, u^T Q1 = u^T Q B E^T (lambda - T)^-1 E_1, hence
    overlap <= ||B E^T (lambda - T)^-1 E_1|| + noise theta / (lambda - theta). The right side falls as lambda grows,
    and the largest lambda that still satisfies the inequality bounds the spectrum: van Dorsselaer, Hochstenbach and
    van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000), carried over to blocks. The bound exceeds the exact solution by
    10% at most; it is infinite if gaps up to LARGEST_GAP satisfy the inequality.
    """

    def last_possible(gaps: Tensor) -> Tensor:
        """The position, counted from 1, of the last of the ascending gaps (w, p) that lambda may have; 0 for none."""
        possible = ~(ritz.reach(gaps) + noise[:, None] / gaps < overlap[:, None])  # a nan excludes no gap
        return (possible * torch.arange(1, gaps.shape[1] + 1, device=gaps.device)).amax(dim=1)

    device = ritz.theta.device
    decades, finer = constants(DECADES, device), constants(STEPS_IN_DECADE, device)
    count = last_possible(decades.expand(len(overlap), -1))
    low = decades[(count - 1).clamp(min=0)]
    gaps = low[:, None] * finer
    found = gaps.gather(1, last_possible(gaps).clamp(max=len(STEPS_IN_DECADE) - 1)[:, None])[:, 0]
    found = torch.where(count == len(DECADES), math.inf, torch.where(count == 0, low, found))
    return torch.where((ritz.theta > 0) & torch.isfinite(ritz.theta), found, math.inf)
