"""Bounds with a stated probability: what a random start says about what it may have missed.

u is the wanted eigenvector, fixed by the matrix; Q1 is the orthonormalized Gaussian start of width b. The cosine
||u^T Q1|| falls below ``start_overlap(n, b)`` with probability at most FAILURE, whatever the matrix, and everything
here holds outside of that event. The derivations are in docs/numerics.md.
"""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor

# Per end and per matrix: the 89,088 ends of a model with 44,544 experts fail together with probability below 1e-5.
FAILURE = 1e-10
WIDEST = 1e30  # a relative excess beyond which the bound is called infinite
NARROWEST, RESOLUTION, POINTS = -16.0, 0.03, 9  # decades; nine points narrow the search down to an eighth


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


def excess(
    theta: Tensor,
    vectors: Tensor,
    coupling: Tensor,
    start: int,
    overlap: float,
    noise: float,
    tolerance: float = 1.0,
) -> float:
    """D such that the largest eigenvalue lies in [theta_max, theta_max (1 + d)] unless the start missed its vector.

    theta (k,), vectors (k, k): eigenpairs of T = V^T H V, ascending, float64, for a Krylov basis V whose first
    ``start`` columns span the start block.  coupling (r, w): B of H V = V T + Q B E^T, E the last w columns.
    overlap: what ||u^T Q1|| exceeds.  noise: bound on what rounding adds to that relation, relative to theta_max.
    tolerance: looked at first, which halves the search.

    For an eigenpair (lambda, u) of H with lambda above all of theta, u^T Q1 = u^T Q B E^T (lambda - T)^-1 E_1, hence
    overlap <= ||B E^T (lambda - T)^-1 E_1|| + noise theta_max / (lambda - theta_max). The right side falls as lambda
    grows, and the largest lambda that still satisfies it bounds the spectrum: van Dorsselaer, Hochstenbach and van
    der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000), carried over to blocks. Infinite if nothing below WIDEST does.
    """
    top = float(theta[-1])
    if not 0 < top < math.inf:
        return math.inf
    behind = (theta[-1] - theta) / top  # (k,), what lambda - theta_i adds to the gap
    left = coupling @ vectors[-coupling.shape[1] :] / top  # (r, k)
    right = vectors[:start].T  # (k, start)

    def possible(exponents: Tensor) -> list[bool]:
        gaps = 10.0**exponents
        reach = noise / gaps
        if left.shape[0]:
            resolvent = (left[None] / (gaps[:, None] + behind)[:, None, :]) @ right
            reach = reach + torch.linalg.matrix_norm(resolvent)
        return (reach >= overlap).tolist()

    low, high, middle = NARROWEST, math.log10(WIDEST), math.log10(tolerance)
    if possible(torch.tensor([middle], dtype=torch.float64, device="cpu"))[0]:
        low = middle
    else:
        high = middle
    while high - low > RESOLUTION:
        exponents = torch.linspace(low, high, POINTS, dtype=torch.float64, device="cpu")
        within = possible(exponents)
        if not any(within):
            return 10.0**low
        last = POINTS - 1 - within[::-1].index(True)
        if last == POINTS - 1:
            return math.inf
        low, high = float(exponents[last]), float(exponents[last + 1])
    return 10.0**high
