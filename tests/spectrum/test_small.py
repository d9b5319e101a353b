"""Small matrices in batches: intervals hold exact truths, whatever LAPACK says, and do not depend on the batch."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import contains, gaussian, hilbert, kappa_of, prescribed

from kappa_fast.backends.torch_backend import TorchBackend, prepare_one
from kappa_fast.spectrum import shifted, small
from kappa_fast.spectrum.ladder import resolve
from kappa_fast.spectrum.resolution import Goal

BACKEND = TorchBackend(torch.device("cpu"))
GOAL = Goal(1e-2, certify=True)


def founds(weights, goal=GOAL):
    return small.resolve_small([prepare_one(w) for w in weights], [w.dtype for w in weights], goal)


def holds(weight, found, slack=1e-12):
    """Against a float64 SVD, for matrices whose kappa it has to 12 digits."""
    s = torch.linalg.svdvals(weight.double())
    return contains(found.lower * (1 - slack), float(s[0] / s[-1]), found.upper * (1 + slack))


@pytest.mark.parametrize(
    ("m", "n"), [(2, 2), (17, 16), (64, 64), (40, 200), (300, 33), (130, 130), (2000, 16), (700, 384)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_intervals_hold_what_a_float64_svd_says(m, n, dtype):
    weights = [gaussian(m, n, seed).to(dtype) for seed in range(3)]
    results = founds(weights)
    assert sum(found is not None for found in results) >= 2
    for weight, found in zip(weights, results, strict=True):
        if found is not None:
            s = torch.linalg.svdvals(weight.double())
            assert contains(found.lower * (1 - 1e-9), float(s[0] / s[-1]), found.upper * (1 + 1e-9))
            assert found.half_width <= GOAL.rtol
            assert found.kappa == pytest.approx(float(s[0] / s[-1]), rel=2e-3)
            assert found.certified


@pytest.mark.parametrize("kappa", [1, 10, 1e3, 1e5])
@pytest.mark.parametrize("spectrum", ["geometric", "arithmetic", "one small", "one large", "clustered"])
@pytest.mark.parametrize("shape", [(12, 7), (40, 40), (96, 48), (256, 256)])
def test_prescribed_spectra_are_held_or_left_to_the_ladder(spectrum, shape, kappa):
    known = prescribed(spectrum, *shape, kappa)
    (found,) = founds([known.matrix])
    assert found is not None or kappa == 1e5 or (kappa >= 1e3 and shape[1] >= 200)
    if found is not None:
        assert contains(found.lower, known.kappa, found.upper)


@pytest.mark.parametrize(
    "weight",
    [
        torch.eye(24, dtype=torch.float64),
        torch.eye(256, dtype=torch.float64),
        torch.linalg.qr(gaussian(300, 240, 3).double()).Q,
        torch.ones(20, 20, dtype=torch.float64) + torch.eye(20, dtype=torch.float64),
        torch.diag(torch.logspace(0, 3, 24, dtype=torch.float64)),
        torch.diag(torch.logspace(0, 2, 250, dtype=torch.float64)),
        2.0**-900 * gaussian(30, 20, 1).double(),
        2.0**900 * gaussian(30, 20, 2).double(),
    ],
)
def test_clusters_diagonals_and_scales(weight):
    (found,) = resolve(BACKEND, [weight], GOAL)
    peak = weight.abs().max()
    s = torch.linalg.svdvals(weight / peak)
    assert found.status == "ok"
    assert contains(found.lower * (1 - 1e-12), float(s[0] / s[-1]), found.upper * (1 + 1e-12))


def test_singular_and_hopeless_matrices_are_left_to_the_ladder():
    twice = gaussian(30, 20, 1)
    twice[:, 3] = twice[:, 7]
    assert founds([twice, hilbert(14), torch.ones(8, 8)]) == [None, None, None]


@given(st.integers(0, 2**31), st.integers(2, 8), st.integers(0, 8), st.floats(-8, 0))
@settings(max_examples=40, deadline=None)
def test_exact_truth_of_graded_matrices(seed, n, more, depth):
    scale = torch.logspace(0, depth, n, dtype=torch.float64)
    weight = (gaussian(n + more, n, seed).double() * scale).to(torch.float32)
    (found,) = founds([weight])
    if found is not None:
        assert contains(found.lower, kappa_of(weight), found.upper)


@pytest.mark.parametrize("n", [5, 40, 130])
def test_bounds_on_the_residual_hold_exactly(n):
    a = gaussian(n + 3, n, n)
    g = a.T @ a
    shift = torch.linalg.eigvalsh(g)[:1] * 0.9
    factor, defect = shifted.factor_batch(g[None].clone(), shift)
    exact = [[Fraction(x) for x in row] for row in torch.tril(factor[0]).tolist()]
    squares = 0.0
    for i in range(n):
        for j in range(i + 1):
            value = Fraction(float(g[i, j])) - (Fraction(float(shift)) if i == j else 0)
            value -= sum(x * y for x, y in zip(exact[i][: j + 1], exact[j][: j + 1], strict=True))
            squares += (1 if i == j else 2) * float(value) ** 2
    assert math.sqrt(squares) <= float(defect) <= 1e-11 * float(g.trace())


def test_a_wrong_factor_proves_nothing_wrong(monkeypatch):
    honest = torch.linalg.cholesky_ex

    def wrong(matrix):
        result = honest(matrix)
        return type(result)((result.L * (1 + 1e-3), result.info))

    weights = [gaussian(48, 32, seed).double() for seed in range(4)]
    monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
    for weight, found in zip(weights, founds(weights), strict=True):
        assert found is None or holds(weight, found)


@pytest.mark.parametrize("error", [-0.3, -1e-2, 1e-2, 0.3])
@pytest.mark.parametrize("end", [0, -1])
def test_wrong_eigenvalues_prove_nothing_wrong(monkeypatch, error, end):
    honest = torch.linalg.eigvalsh

    def wrong(matrix):
        theta = honest(matrix)
        theta[:, end] *= 1 + error
        return theta

    weights = [gaussian(48, 32, seed).double() for seed in range(4)]
    monkeypatch.setattr(torch.linalg, "eigvalsh", wrong)
    for weight, found in zip(weights, founds(weights), strict=True):
        assert found is None or holds(weight, found)


def test_a_start_that_misses_the_vectors_is_noticed(monkeypatch):
    weight = torch.diag(torch.cat([torch.tensor([0.5]), torch.linspace(1, 2, 255)])).double()
    start = torch.eye(256, dtype=torch.float64)[:, 1:9]  # the vector of sigma_n is not in it, nor that of sigma_1
    monkeypatch.setattr(small, "_start", lambda n, width: start[:, :width].clone())
    assert founds([weight]) == [None]
    (found,) = resolve(BACKEND, [weight], GOAL)
    assert found.method != small.METHOD
    assert contains(found.lower, 4.0, found.upper)


@pytest.mark.parametrize(("m", "n"), [(64, 64), (24, 40), (128, 16), (33, 33), (256, 256), (40, 24)])
def test_every_matrix_has_the_same_bits_in_every_batch(m, n):
    weights = [gaussian(m, n, seed) * (0.1 + seed) for seed in range(9)]
    weights[4][:, 0] = weights[4][:, 1] + 1e-6 * weights[4][:, 0]
    together = founds(weights)
    assert founds(weights[::-1])[::-1] == together
    for i, weight in enumerate(weights):
        assert founds([weight]) == [together[i]]
        padded = torch.zeros((m, n + 3), dtype=weight.dtype)[:, 3:].copy_(weight)
        assert founds([padded]) == [together[i]]
    assert sum(found is not None for found in together) >= 7


def test_a_wide_weight_has_the_interval_of_its_transpose():
    weight = gaussian(40, 100, 5)
    (wide,), (tall,) = founds([weight]), founds([weight.T.contiguous()])
    assert wide.kappa == pytest.approx(tall.kappa, rel=1e-12)
    assert wide.sensitivity == pytest.approx(tall.sensitivity, rel=1e-4)


def test_sensitivity_is_that_of_the_ladder(monkeypatch):
    weight = gaussian(300, 170, 6).float()
    (found,) = founds([weight])
    monkeypatch.setattr(small, "eligible", lambda shape, goal: False)
    (other,) = resolve(BACKEND, [weight], GOAL)
    assert other.method == "cholesky32"
    assert found.sensitivity == pytest.approx(other.sensitivity, rel=1e-3)


def test_a_small_rtol_is_reached_by_eigenvalues():
    weights = [gaussian(300, 256, seed) for seed in range(2)]
    for weight, found in zip(weights, founds(weights, Goal(1e-8)), strict=True):
        assert found.half_width <= 1e-8
        assert holds(weight, found)
        assert not found.certified


def test_broken_zero_and_singular_neighbors_of_one_shape_change_no_bit():
    sound = [gaussian(48, 32, seed) for seed in range(3)]
    broken, infinite, singular = gaussian(48, 32, 7), gaussian(48, 32, 8), gaussian(48, 32, 9)
    broken[3, 4], infinite[5, 6] = float("nan"), float("-inf")
    singular[:, 2] = singular[:, 30]
    wave = [broken, sound[0], torch.zeros(48, 32, dtype=torch.float64), sound[1], singular, infinite, sound[2]]
    found = resolve(BACKEND, wave, GOAL)
    statuses = [each.status for each in found]
    assert statuses == ["non_finite", "ok", "rank_deficient", "ok", "rank_deficient", "non_finite", "ok"]
    assert [found[1], found[3], found[6]] == [resolve(BACKEND, [weight], GOAL)[0] for weight in sound]
    assert all(holds(weight, each) for weight, each in zip(sound, (found[1], found[3], found[6]), strict=True))
    assert found[4].kappa == found[4].lower == math.inf
