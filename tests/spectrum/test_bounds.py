"""The bounds of stated probability fail as rarely as stated, and are not much wider than that takes."""

import math
from dataclasses import dataclass

import mpmath as mp
import pytest
import torch
from spectra import SPECTRA

from kappa_fast.spectrum import bounds
from kappa_fast.spectrum.bounds import LARGEST_GAP, excess, norm_factor, start_overlap

OFTEN = 0.1  # a failure probability that a simulation can see
SIZES = [(2, 1), (3, 1), (3, 2), (17, 16), (18, 16), (19, 16), (33, 16), (100, 4), (384, 16), (4096, 16), (30522, 16)]


def at_most_often(misses: int, trials: int) -> bool:
    """Whether so many misses agree with a rate of OFTEN, up to four standard deviations."""
    return misses <= OFTEN * trials + 4 * math.sqrt(OFTEN * (1 - OFTEN) * trials)


def cosines_to_a_random_subspace(n, width, trials):
    block = torch.randn(trials, n, width, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.linalg.qr(block).Q[:, 0], dim=1)


@pytest.mark.parametrize(("n", "width"), SIZES)
def test_start_overlap_lies_below_the_quantile_of_the_beta_distribution(n, width):
    with mp.workdps(40):
        square = mp.mpf(start_overlap(n, width)) ** 2
        probability = mp.betainc(mp.mpf(width) / 2, mp.mpf(n - width) / 2, 0, square, regularized=True)
    assert 0 < probability <= bounds.FAILURE * (1 + 1e-9)


@pytest.mark.parametrize(("n", "width"), [s for s in SIZES if s[0] > 2 * s[1]])
def test_start_overlap_is_within_a_third_of_the_quantile(n, width):
    with mp.workdps(40):
        square = (mp.mpf("1.5") * start_overlap(n, width)) ** 2
        probability = mp.betainc(mp.mpf(width) / 2, mp.mpf(n - width) / 2, 0, square, regularized=True)
    assert probability > bounds.FAILURE


@pytest.mark.parametrize(("n", "width"), [(16, 16), (5, 16)])
def test_a_start_that_spans_the_space_misses_nothing(n, width):
    assert start_overlap(n, width) == 1


@pytest.mark.parametrize(("n", "width"), [(3, 2), (5, 4), (12, 4), (40, 4), (200, 16)])
def test_a_random_start_falls_below_its_overlap_as_rarely_as_stated(n, width, monkeypatch):
    monkeypatch.setattr(bounds, "FAILURE", OFTEN)
    trials = 2000
    misses = int((cosines_to_a_random_subspace(n, width, trials) < start_overlap(n, width)).sum())
    assert at_most_often(misses, trials)


@pytest.mark.parametrize("width", [1, 2, 4, 16, 32])
def test_norm_factor_comes_from_below_the_quantile_of_the_chi_square_distribution(width):
    with mp.workdps(40):
        quantile = width / mp.mpf(norm_factor(width)) ** 2
        probability = mp.gammainc(mp.mpf(width) / 2, 0, quantile / 2, regularized=True)
        beyond = mp.gammainc(mp.mpf(width) / 2, 0, quantile, regularized=True)
    assert 0 < probability <= bounds.FAILURE * (1 + 1e-9)
    assert beyond > bounds.FAILURE


@pytest.mark.parametrize("rank", [1, 2, 30])
@pytest.mark.parametrize("width", [2, 16])
def test_norm_factor_bounds_the_frobenius_norm_as_often_as_stated(width, rank, monkeypatch):
    monkeypatch.setattr(bounds, "FAILURE", OFTEN)
    trials = 4000
    images = torch.randn(trials, rank, width, dtype=torch.float64)  # of M = diag(1, ..., 1, 0, ...), any basis
    bound = norm_factor(width) * torch.linalg.matrix_norm(images) / math.sqrt(width)
    misses = int((bound < math.sqrt(rank)).sum())
    assert at_most_often(misses, trials)
    assert misses > 0 or rank > 1  # a single weight is the worst case, and the bound is made for it


@dataclass
class Pairs:
    """base.Ritz of one matrix from eigenpairs of T, the literal formula."""

    values: torch.Tensor
    eigenvectors: torch.Tensor
    coupling: torch.Tensor
    width: int

    @property
    def theta(self):
        return self.values[-1:]

    def reach(self, gaps):
        one = [
            self.coupling
            @ (self.eigenvectors[-self.coupling.shape[1] :] / (self.values[-1] * gap + (self.values[-1] - self.values)))
            @ self.eigenvectors[: self.width].T
            for gap in gaps[0]
        ]
        return torch.stack([torch.linalg.matrix_norm(x) for x in one])[None]


def bound_of(pairs, overlap, noise):
    overlap, noise = (torch.tensor([x], dtype=torch.float64) for x in (overlap, noise))
    return float(excess(pairs, overlap, noise))


def krylov(values, start, products):
    """Ritz pairs and coupling of a block Krylov space of diag(values), the slow and literal way."""
    basis = torch.linalg.qr(start).Q
    newest = basis
    for _ in range(products):
        rest = values[:, None] * newest
        for _ in range(2):
            rest = rest - basis @ (basis.T @ rest)
        newest, coupling = torch.linalg.qr(rest)
        last, basis = basis, torch.cat([basis, newest], dim=1)
    return Pairs(*torch.linalg.eigh(last.T @ (values[:, None] * last)), coupling, start.shape[1])


def soft_edge(n):
    # The eigenvalues of G for a Gaussian matrix with four times as many rows: crowded at the upper end.
    matrix = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.linalg.svdvals(matrix) ** 2


def lonely(n, gap):
    values = torch.ones(n, dtype=torch.float64)
    values[0] = 1 + gap
    return values


OPERATORS = {
    "soft edge": soft_edge(60),
    "one value above a cluster": lonely(60, 0.1),
    "one value far above a cluster": lonely(60, 30.0),
    "one value close above a cluster": lonely(60, 1e-4),
    **{name: make(60, 1e3, torch.Generator().manual_seed(1)) for name, make in SPECTRA.items()},
}


@pytest.mark.parametrize("products", [1, 2, 4])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_largest_eigenvalue_exceeds_the_excess_as_rarely_as_stated(name, products, monkeypatch):
    monkeypatch.setattr(bounds, "FAILURE", OFTEN)
    values, width, trials, misses = OPERATORS[name], 3, 150, 0
    overlap = start_overlap(len(values), width)
    for _ in range(trials):
        pairs = krylov(values, torch.randn(len(values), width, dtype=torch.float64), products)
        misses += bool(pairs.values[-1] * (1 + bound_of(pairs, overlap, 1e-15)) < values.max())
    assert at_most_often(misses, trials)


def test_the_bound_of_a_single_value_above_nothing_fails_about_as_often_as_stated(monkeypatch):
    # Here the excess is exact: the bound fails just when the start misses its overlap, so twice the overlap is noticed.
    monkeypatch.setattr(bounds, "FAILURE", OFTEN)
    values, width, trials = torch.zeros(60, dtype=torch.float64), 3, 300
    values[0] = 1
    misses = {1: 0, 2: 0}
    for _ in range(trials):
        pairs = krylov(values, torch.randn(60, width, dtype=torch.float64), 1)
        for factor in misses:
            overlap = factor * start_overlap(60, width)
            misses[factor] += bool(pairs.values[-1] * (1 + bound_of(pairs, overlap, 1e-15)) < 1)
    assert at_most_often(misses[1], trials)
    assert misses[1] > OFTEN * trials / 4
    assert not at_most_often(misses[2], trials)


@pytest.mark.parametrize("name", list(OPERATORS))
@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-3])
def test_excess_is_where_the_reach_falls_below_the_overlap(name, noise):
    values, width, overlap = OPERATORS[name], 3, 0.05
    pairs = krylov(values, torch.randn(60, width, dtype=torch.float64), 2)
    found = bound_of(pairs, overlap, noise)

    def reach(gap):
        return float(pairs.reach(torch.tensor([[gap]], dtype=torch.float64))) + noise / gap

    assert reach(found) <= overlap * (1 + 1e-6)
    assert found == 1e-16 or reach(found / 1.11) > overlap


def test_more_noise_and_less_overlap_never_tighten_the_bound():
    pairs = krylov(OPERATORS["soft edge"], torch.randn(60, 3, dtype=torch.float64), 3)
    by_noise = [bound_of(pairs, 0.05, noise) for noise in (0.0, 1e-12, 1e-6, 1e-2)]
    by_overlap = [bound_of(pairs, overlap, 0.0) for overlap in (1e-1, 1e-3, 1e-6)]
    assert by_noise == sorted(by_noise)
    assert by_overlap == sorted(by_overlap)
    assert by_noise[0] < by_noise[-1]
    assert by_overlap[0] < by_overlap[-1]


def invariant(*theta):
    values = torch.tensor(theta, dtype=torch.float64)
    eye = torch.eye(len(theta), dtype=torch.float64)
    return Pairs(values, eye, torch.zeros_like(eye), len(theta))


def test_an_invariant_space_leaves_only_the_noise():
    assert bound_of(invariant(0.25, 1.0), 0.1, 0.0) == 1e-16
    assert bound_of(invariant(0.25, 1.0), 0.1, 1e-9) == pytest.approx(1e-8, rel=0.11)


@pytest.mark.parametrize("top", [0.0, -1.0, math.inf, math.nan])
def test_without_a_positive_finite_ritz_value_the_excess_is_infinite(top):
    assert bound_of(invariant(top), 0.1, 0.0) == math.inf


def test_an_excess_beyond_the_widest_is_infinite():
    one = torch.ones((1, 1), dtype=torch.float64)
    assert bound_of(Pairs(one[0], one, one, 1), 0.1 / LARGEST_GAP, 0.0) == math.inf


def test_a_reach_that_is_not_a_number_rules_out_nothing():
    one, broken = torch.ones((1, 1), dtype=torch.float64), torch.full((1, 1), math.nan, dtype=torch.float64)
    assert bound_of(Pairs(one[0], broken, one, 1), 0.1, 0.0) == math.inf


def test_every_matrix_of_a_wave_has_its_own_bound():
    alone = [krylov(OPERATORS[n], torch.randn(60, 3, dtype=torch.float64), 2) for n in ("geometric", "soft edge")]

    class Wave:
        theta = torch.cat([pairs.theta for pairs in alone])

        def reach(self, gaps):
            return torch.cat([pairs.reach(gap[None]) for pairs, gap in zip(alone, gaps, strict=True)])

    overlap, noise = torch.tensor([0.05, 0.01]).double(), torch.tensor([0.0, 1e-9]).double()
    expected = [bound_of(pairs, o, n) for pairs, o, n in zip(alone, [0.05, 0.01], [0.0, 1e-9], strict=True)]
    assert excess(Wave(), overlap, noise).tolist() == pytest.approx(expected, rel=1e-6)
