"""Statistics beside kappa: as float64 SVDs and mpmath have them, intervals that hold, and Gaussians at zero."""

from __future__ import annotations

import dataclasses
import math
import random

import mpmath as mp
import pytest
import torch
from packing import minilm
from spectra import CLASSICS, SINGULAR, SPECTRA, gaussian, prescribed, singular_values, trained_like

from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.backends.triton_backend import TritonBackend
from kappa_fast.results.statistics import OF_SPECTRUM, Statistics
from kappa_fast.spectrum import ladder, small
from kappa_fast.spectrum.ladder import resolve
from kappa_fast.spectrum.resolution import Goal, Resolution
from kappa_fast.spectrum.statistics import by_shape, gaussian_flatness

CPU = torch.device("cpu")
BACKEND = TorchBackend(CPU)
GOAL = Goal(1e-2)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WITHOUT_GRAM = ("lu64", "qr64")


def one(weight: torch.Tensor) -> Resolution:
    (found,) = resolve(BACKEND, [weight], GOAL)
    return found


def flatness_of(values: list[mp.mpf]) -> mp.mpf:
    with mp.workdps(60):
        squares = mp.fsum(x * x for x in values) / len(values)
        return mp.fsum(mp.log(x) for x in values) / len(values) - mp.log(squares) / 2


def assert_right(found: Resolution, values: torch.Tensor, name: str, width: float = 3e-3) -> None:
    """``values``: all singular values by a float64 SVD, whose mean logarithm may err by 1e-9."""
    known, n = found.statistics, len(values)
    squares = values.square()
    flatness = float(values.log().mean() - squares.mean().log() / 2)
    assert known.flatness_lower - 1e-9 <= flatness <= known.flatness_upper + 1e-9, (name, flatness, known)
    assert known.flatness_upper - known.flatness_lower <= width, (name, found)
    assert known.flatness == pytest.approx(flatness, abs=5e-5), name
    assert known.frobenius == pytest.approx(float(squares.sum().sqrt()), rel=1e-6), name
    assert known.stable_rank == pytest.approx(float(squares.sum() / squares[0]), rel=GOAL.rtol), name
    assert known.demmel == pytest.approx(float(squares.sum().sqrt() / values[-1]), rel=GOAL.rtol), name
    assert (known.participation_ratio is None) == (found.method in WITHOUT_GRAM), name
    if known.participation_ratio is not None:
        ratio = float(squares.sum() ** 2 / squares.square().sum())
        assert known.participation_ratio == pytest.approx(ratio, rel=1e-5), name
        assert 1 <= known.participation_ratio <= n * (1 + 1e-9), name


@pytest.mark.parametrize("seed", range(20))
def test_statistics_are_those_of_the_singular_values_in_any_shape(seed):
    chosen = random.Random(seed)
    shape = chosen.randint(2, 320), chosen.randint(2, 320) if seed % 4 else chosen.randint(2, 30)
    dtype = DTYPES[seed % 3]
    weight = (trained_like if seed % 2 else gaussian)(*shape, seed).to(dtype)
    found = one(weight)
    assert found.status == "ok"
    assert_right(found, torch.linalg.svdvals(weight.double()), str((shape, dtype)))
    assert found.statistics.flatness_by_shape == by_shape(found.statistics.flatness, shape)


def of_minilm(dtype: torch.dtype) -> list[Resolution]:
    weights = [w.to(dtype) for w in minilm().values() if w.ndim == 2 and w.numel() < 10**6 and min(w.shape) > 2]
    assert len(weights) > 30
    found = resolve(BACKEND, weights, GOAL)
    for i, (weight, one) in enumerate(zip(weights, found, strict=True)):
        assert_right(one, torch.linalg.svdvals(weight.double()), str(i))
    return found


def moved(before: list[float], after: list[float]) -> tuple[float, float]:
    """Median and largest change, as shares of the deviation of the values before."""
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (before, after))
    change = (a - b).abs() / a.std()
    return float(change.median()), float(change.max())


def test_on_a_trained_model_statistics_are_right_and_rounding_moves_all_but_those_of_sigma_n_little():
    before, after = of_minilm(torch.float32), of_minilm(torch.bfloat16)
    for name, most in [("stable_rank", 0.02), ("flatness", 0.02), ("flatness_by_shape", 0.006), ("frobenius", 0.001)]:
        lists = [[getattr(found.statistics, name) for found in founds] for founds in (before, after)]
        assert moved(*lists)[1] < most, name
    square = [(a.kappa, b.kappa) for a, b in zip(before, after, strict=True) if a.method == "lu64"]
    changes = torch.tensor([abs(math.log(b / a)) for a, b in square])
    assert changes.median() > 0.03
    assert changes.max() > 1


@pytest.mark.parametrize("name", CLASSICS)
@pytest.mark.parametrize("small", [True, False])
def test_the_interval_of_the_flatness_holds_on_matrices_that_break_software(name, small, monkeypatch):
    if small:
        monkeypatch.setattr(ladder, "EXACT_BELOW", 32)
    weight = CLASSICS[name]()
    found, values = one(weight), singular_values(weight)
    known, flatness = found.statistics, flatness_of(values)
    assert known.flatness_lower <= flatness <= known.flatness_upper, (mp.nstr(flatness, 17), known)
    assert known.frobenius == pytest.approx(float(mp.sqrt(mp.fsum(x * x for x in values))), rel=1e-6)
    if found.status == "ok":
        assert known.flatness_upper - known.flatness_lower < 0.1


def test_both_ends_of_a_tall_matrix_tell_its_flatness_where_its_gram_matrix_does_not():
    weight = prescribed("geometric", 971, 2, 2e8, seed=4).matrix
    found = one(weight)
    flatness = flatness_of(singular_values(weight))
    assert found.statistics.flatness_lower <= flatness <= found.statistics.flatness_upper
    assert found.statistics.flatness_upper - found.statistics.flatness_lower < 2 * GOAL.rtol
    assert abs(found.statistics.flatness - float(flatness)) < GOAL.rtol


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("kappa", [1, 1e4, 1e11])
@pytest.mark.parametrize("shape", [(12, 7), (34, 33), (33, 33)])
def test_the_interval_of_the_flatness_holds_for_any_spectrum(spectrum, kappa, shape, monkeypatch):
    monkeypatch.setattr(ladder, "EXACT_BELOW", 32)
    weight = prescribed(spectrum, *shape, kappa, seed=3).matrix
    found = one(weight)
    flatness = flatness_of(singular_values(weight))
    assert found.statistics.flatness_lower <= flatness <= found.statistics.flatness_upper, found
    assert found.statistics.flatness_upper - found.statistics.flatness_lower < 1e-2, found


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(40, 20), (34, 34)])
@pytest.mark.parametrize("wrong", [0.0, 1e-9, 1e-4])
def test_a_wrong_factor_or_wrong_eigenvalues_widen_the_interval_of_small_matrices(spectrum, shape, wrong, monkeypatch):
    """LAPACK is not trusted: the residual of the factor that the determinant comes from is measured."""
    weight = prescribed(spectrum, *shape, 100.0, seed=5).matrix
    flatness = flatness_of(singular_values(weight))
    real, eigenvalues, calls = torch.linalg.cholesky_ex, torch.linalg.eigvalsh, []

    def factor(matrix, **options):
        found = real(matrix, **options)
        if not calls:  # the first panel of the factor that is not shifted
            found.L[:, 3, 3] *= 1 + wrong
        calls.append(1)
        return found

    def spoiled(matrix, **options):
        return eigenvalues(matrix, **options) * (1 + wrong)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", factor)
    monkeypatch.setattr(torch.linalg, "eigvalsh", spoiled)
    (operand,) = BACKEND.prepare([weight])
    (found,) = small.resolve_small([operand], [weight.dtype], GOAL)
    assert calls
    if found is None:
        assert wrong  # it is left to the ladder
        return
    known = found.statistics
    assert known.flatness_lower <= flatness <= known.flatness_upper, (mp.nstr(flatness, 17), known)
    assert found.lower <= 100 * (1 + 1e-9)
    width = known.flatness_upper - known.flatness_lower
    assert width < 1e-7 or wrong
    assert width >= wrong / len(weight.T)  # as much as the pivot moved the estimate


@pytest.mark.parametrize("kappa", [1.0, 100.0, 1e4, 1e7])
@pytest.mark.parametrize("shape", [(40, 20), (34, 34), pytest.param((60, 50), marks=pytest.mark.slow)])
def test_small_matrices_have_the_same_flatness_without_both_ends(kappa, shape):
    weights = [prescribed(spectrum, *shape, kappa, seed=7).matrix for spectrum in SPECTRA]
    goal = Goal(1e-2, ends=False, statistics=("flatness",))
    operands = BACKEND.prepare(weights)
    founds = small.resolve_small(operands, [torch.float64] * len(weights), goal)
    if kappa <= 100:
        assert None not in founds
    for weight, operand, found in zip(weights, operands, founds, strict=True):
        if found is None:
            continue
        assert (found.status, found.method) == ("bounded", "gram64")
        known, flatness = found.statistics, flatness_of(singular_values(weight))
        assert known.flatness_lower <= flatness <= known.flatness_upper, (mp.nstr(flatness, 17), known)
        assert known.flatness_upper - known.flatness_lower < 1e-2
        assert (known.stable_rank, known.demmel) == (None, None)
        norm = math.ldexp(float(torch.linalg.matrix_norm(weight)), -operand.exponent)
        assert known.frobenius == pytest.approx(norm, rel=1e-9)
        assert known.participation_ratio == pytest.approx(one(weight).statistics.participation_ratio, rel=1e-6)
    alone = [small.resolve_small([operand], [torch.float64], goal)[0] for operand in operands]
    assert [f and f.statistics for f in alone] == [f and f.statistics for f in founds]


def test_where_the_factor_fails_a_small_matrix_is_left_to_the_ladder(monkeypatch):
    weight = trained_like(60, 30)
    real, calls = small.factor_batch, []

    def failing(shifted, shift):
        factor, defect = real(shifted, shift)
        calls.append(1)
        return factor, defect + (math.inf if len(calls) == 1 else 0.0)

    monkeypatch.setattr(small, "factor_batch", failing)
    assert small.resolve_small(BACKEND.prepare([weight]), [weight.dtype], GOAL) == [None]


@pytest.mark.parametrize("name", SINGULAR)
def test_a_singular_matrix_has_a_flatness_of_minus_infinity(name):
    weight = SINGULAR[name]()
    found = one(weight)
    assert found.status == "rank_deficient"
    known = found.statistics
    assert known.flatness == known.flatness_lower == known.flatness_by_shape == -math.inf
    assert known.flatness_upper <= 0
    assert known.demmel == math.inf
    assert known.frobenius == pytest.approx(float(torch.linalg.matrix_norm(weight)), rel=1e-6)
    values = torch.linalg.svdvals(weight)
    for given, exact in [
        (known.stable_rank, values.square().sum() / values[0].square()),
        (known.participation_ratio, values.square().sum() ** 2 / values.pow(4).sum()),
    ]:
        assert given is None or given == pytest.approx(float(exact), rel=GOAL.rtol)


def test_a_vector_is_flat_and_what_is_not_finite_has_no_statistics():
    found = one(torch.tensor([[3.0], [4.0]]))
    flat = dict.fromkeys(("flatness", "flatness_lower", "flatness_upper"), 0.0)
    assert found.statistics == Statistics(frobenius=5.0, stable_rank=1.0, participation_ratio=1.0, demmel=1.0, **flat)
    assert one(torch.full((20, 20), math.nan)).statistics == Statistics()


def test_statistics_do_not_depend_on_the_wave():
    weights = [
        trained_like(200, 180).float(),
        gaussian(200, 200).bfloat16(),
        gaussian(700, 170).float(),
        gaussian(30, 20),
    ]
    together = resolve(BACKEND, weights, GOAL)
    assert [one(weight).statistics for weight in weights] == [found.statistics for found in together]
    backwards = resolve(BACKEND, weights[::-1], GOAL)
    assert [found.statistics for found in backwards] == [found.statistics for found in together[::-1]]


def test_scaling_changes_the_norm_alone():
    weight = trained_like(120, 50)
    found, scaled = one(weight), one(2.0**400 * weight)
    assert scaled.statistics.frobenius == pytest.approx(2.0**400 * found.statistics.frobenius, rel=1e-12)
    for item in dataclasses.fields(Statistics):
        if item.name not in ("frobenius", *OF_SPECTRUM):
            given = getattr(scaled.statistics, item.name)
            assert given == pytest.approx(getattr(found.statistics, item.name), rel=1e-9), item.name


@pytest.mark.parametrize("shape", [(40, 24), (300, 200), (60, 60)])
def test_only_what_exceeds_the_largest_number_is_infinite(shape):
    weight = trained_like(*shape)
    weight *= 2.0**1020 / float(weight.abs().max())
    found, small_one = one(weight).statistics, one(weight * 2.0**-1000).statistics
    exact = mp.sqrt(mp.fsum(mp.mpf(x) ** 2 for x in weight.flatten().tolist()))
    largest = mp.mpf(2) ** 1024
    assert found.frobenius == (math.inf if exact >= largest else pytest.approx(float(exact), rel=1e-6))
    for name in ("stable_rank", "demmel", "flatness", "flatness_by_shape"):
        assert getattr(found, name) == pytest.approx(getattr(small_one, name), rel=1e-9), name


@pytest.mark.slow
def test_both_backends_have_the_same_flatness(monkeypatch):
    monkeypatch.setattr(ladder, "EXACT_BELOW", 32)
    weights = [trained_like(150, 40, 1).bfloat16(), gaussian(140, 48, 3).float(), gaussian(70, 70, 4).float()]
    backend = TritonBackend(CPU)
    found = resolve(backend, weights, GOAL)
    for weight, other in zip(weights, found, strict=True):
        values = torch.linalg.svdvals(weight.double())
        flatness = float(values.log().mean() - values.square().mean().log() / 2)
        assert other.statistics.flatness_lower <= flatness <= other.statistics.flatness_upper, other
        assert other.statistics.flatness_upper - other.statistics.flatness_lower < 5e-3
        assert other.statistics == resolve(backend, [weight], GOAL)[0].statistics


# The mean and the deviation of gaussian_flatness, by digits and definitions of mpmath.
@pytest.mark.parametrize("shape", [(16, 16), (30, 16), (5000, 20), (512, 512), (4096, 1024)])
def test_the_moments_of_a_gaussian_are_those_of_its_wishart_matrix(shape):
    m, n = shape
    with mp.workdps(40):
        halves = [mp.mpf(m - i) / 2 for i in range(n)]
        logs = mp.fsum(mp.digamma(x) for x in halves) + n * mp.log(2)  # of the determinant
        trace = mp.digamma(mp.mpf(m * n) / 2) + mp.log(2)
        mean = (logs / n - trace + mp.log(n)) / 2
        variance = (mp.fsum(mp.psi(1, x) for x in halves) / n**2 - mp.psi(1, mp.mpf(m * n) / 2)) / 4
        assert gaussian_flatness(*shape) == pytest.approx((float(mean), float(mp.sqrt(variance))), rel=1e-9)
    assert gaussian_flatness(n, m) == gaussian_flatness(m, n)


def standardized(shape: tuple[int, int], draws: int) -> torch.Tensor:
    """The flatness by shape of so many Gaussian matrices, by a float64 Cholesky factor of A^T A or by LU."""
    generator = torch.Generator().manual_seed(sum(shape))
    n, found = min(shape), []
    for _ in range(draws):
        weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
        log_volume = torch.linalg.slogdet(weight if len(set(shape)) == 1 else weight.T @ weight).logabsdet
        log_volume = log_volume / n / (1 if len(set(shape)) == 1 else 2)
        found.append(by_shape(float(log_volume - weight.square().sum().div(n).log() / 2), shape))
    return torch.tensor(found, dtype=torch.float64)


def assert_standard(found: torch.Tensor) -> None:
    """Mean 0 and deviation 1, each within four standard errors (that of a deviation for kurtosis up to 4.2)."""
    draws = len(found)
    assert abs(float(found.mean())) < 4 / math.sqrt(draws)
    assert abs(float(found.std()) - 1) < 4 * math.sqrt(0.8 / draws)


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (48, 48), (300, 20), (96, 64)])
def test_the_flatness_by_shape_of_1000_gaussians_has_mean_0_and_deviation_1(shape):
    assert_standard(standardized(shape, 1000))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "draws"), [((256, 256), 1000), ((1024, 384), 400), ((1024, 1024), 100), ((4096, 1024), 60)]
)
def test_the_flatness_by_shape_of_large_gaussians_has_mean_0_and_deviation_1(shape, draws):
    assert_standard(standardized(shape, draws))
