"""What is measured with the weights themselves: lower bounds that hold to the last bit, and the effect of rounding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import SPECTRA, contains, gaussian, kappa_of, prescribed, trained_like

from kappa_fast.backends.base import Panel
from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.spectrum.polish import BOTTOM_WIDTH, TOP_WIDTH, Triplets, polish, ratio_bound, sensitivities

BACKEND = TorchBackend(torch.device("cpu"))


def blocks(operand, contamination=0.0, seed=0, width=16):
    """Right singular vectors as polish takes them: the wanted one last, for the top and for the bottom."""
    vectors = torch.linalg.svd(operand.tensor.double(), full_matrices=False)[2].T
    vectors = vectors + contamination * gaussian(*vectors.shape, seed)
    return vectors.flip(1)[:, -width:], vectors[:, -width:]


def polished(matrix, contamination=0.0, seed=0) -> Triplets:
    operands = BACKEND.prepare([matrix])
    top, bottom = blocks(operands[0], contamination, seed)
    return polish(BACKEND, operands, Panel.pack([top]), Panel.pack([bottom]))[0]


def small_matrices(trials):
    """Small dense matrices with exactly known kappa: every spectrum, kappa from 1 to 1e12, a seed per trial."""
    names = list(SPECTRA)
    for i in range(trials):
        m, n = [(4, 4), (8, 8), (12, 8), (8, 5), (20, 12)][i % 5]
        yield prescribed(names[i % 6], m, n, 10.0 ** (i % 13), seed=i)


def test_the_lower_bound_never_exceeds_kappa_where_the_bare_ratio_often_does():
    trials, overshoots = 1200, 0
    for matrix in small_matrices(trials):
        found = polished(matrix.matrix)
        assert contains(found.lower, matrix.kappa, math.inf), matrix.name
        overshoots += found.sigma_max / found.sigma_min > matrix.kappa
    assert overshoots > trials / 10  # without the terms for rounding it would not be a bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_lower_bound_never_exceeds_kappa_of_the_stored_entries(dtype):
    for seed in range(25):
        matrix = (gaussian(6, 4, seed) * 10.0 ** -torch.arange(4)).to(dtype)
        assert contains(polished(matrix).lower, kappa_of(matrix), math.inf)


@given(
    st.integers(2, 6), st.integers(0, 4), st.integers(0, 10**6), st.floats(0, 2), st.sampled_from([0.0, 1.0, 6.0, 12.0])
)
def test_any_vectors_give_a_lower_bound(n, extra, seed, contamination, decades):
    matrix = gaussian(n + extra, n, seed) * 10.0 ** -torch.linspace(0, decades, n, dtype=torch.float64)
    found = polished(matrix, contamination, seed + 1)
    assert found.lower >= 1
    assert contains(found.lower, kappa_of(matrix), math.inf)


@pytest.mark.parametrize("kappa", [1, 10, 1e4, 1e8])
@pytest.mark.parametrize("shape", [(32, 32), (48, 40), (100, 33)])
def test_good_vectors_give_kappa_and_a_bound_within_rounding_of_it(shape, kappa):
    matrix = prescribed("log-uniform", *shape, kappa)
    found = polished(matrix.matrix)
    exact, rounding = float(matrix.kappa), 100 * shape[0] * 2.0**-53 * float(matrix.kappa)
    assert found.sigma_max / found.sigma_min == pytest.approx(exact, rel=rounding)
    assert found.lower >= exact * (1 - rounding)


@pytest.mark.parametrize("contamination", [1e-3, 1e-5, 1e-7])
def test_errors_of_the_vectors_enter_squared(contamination):
    matrix = prescribed("geometric", 64, 48, 100)
    found = polished(matrix.matrix, contamination)
    error = abs(found.sigma_max / found.sigma_min / float(matrix.kappa) - 1)
    assert error <= 100**2 * 48 * contamination**2 + 1e-12


def test_the_measured_value_never_exceeds_kappa_beyond_rounding():
    # Rayleigh-Ritz values lie inside the spectrum: contaminated vectors give too small a kappa, never too large a one.
    for seed in range(20):
        matrix = prescribed("clustered", 24, 20, 1e4, seed=seed)
        found = polished(matrix.matrix, contamination=1e-2, seed=seed)
        assert 1 <= found.sigma_max / found.sigma_min <= float(matrix.kappa) * (1 + 1e-9)


def test_the_triplets_are_singular_triplets_of_the_matrix():
    (operand,) = BACKEND.prepare([prescribed("log-uniform", 40, 40, 1e3).matrix])
    matrix, (top, bottom) = operand.tensor, blocks(operand)
    (found,) = polish(BACKEND, [operand], Panel.pack([top]), Panel.pack([bottom]))
    for j, sigma in enumerate((found.sigma_max, found.sigma_min)):
        u, v = found.left[:, j], found.right[:, j]
        assert float(torch.linalg.vector_norm(u)) == pytest.approx(1, rel=1e-12)
        assert float(torch.linalg.vector_norm(v)) == pytest.approx(1, rel=1e-12)
        assert float(torch.linalg.vector_norm(matrix @ v - sigma * u)) <= 1e-12 * found.sigma_max
        assert float(torch.linalg.vector_norm(matrix.T @ u - sigma * v)) <= 1e-11 * found.sigma_max


def test_vectors_of_lower_precision_are_measured_in_float64():
    operands = BACKEND.prepare([prescribed("geometric", 64, 48, 100).matrix])
    top, bottom = (block.float() for block in blocks(operands[0]))
    (found,) = polish(BACKEND, operands, Panel.pack([top]), Panel.pack([bottom]))
    assert found.right.dtype == found.left.dtype == torch.float64
    assert found.sigma_max / found.sigma_min == pytest.approx(100, rel=1e-9)


def test_fewer_vectors_than_are_worth_measuring_are_enough():
    operands = BACKEND.prepare([prescribed("geometric", 8, 8, 10).matrix])
    top, bottom = blocks(operands[0], width=1)
    (found,) = polish(BACKEND, operands, Panel.pack([top]), Panel.pack([bottom]))
    assert top.shape[1] < min(TOP_WIDTH, BOTTOM_WIDTH)
    assert found.lower == pytest.approx(10, rel=1e-6)


def bound(reached_max, reached_min, norm=1.0, shape=(4, 4), length=1.0):
    return ratio_bound(shape, norm, (reached_max, reached_min), (length, length), 1)


def test_a_ratio_below_one_is_raised_to_one():
    assert bound(1.0, 2.0) == 1


def test_nothing_reached_at_the_bottom_still_bounds_kappa_from_below():
    # ||A v|| = 0 as computed only says that sigma_n is below the rounding of the product.
    assert 1e14 < bound(1.0, 0.0) < 1e16


def test_the_length_of_the_vectors_is_divided_out():
    assert bound(3.0, 1.5, length=1.5) == pytest.approx(bound(2.0, 1.0), rel=1e-12)


def test_larger_matrices_cost_the_bound_more_rounding():
    bounds = [bound(1.0, 1e-8, shape=(n, n)) for n in (4, 400, 40_000)]
    assert bounds == sorted(bounds, reverse=True)
    assert all(b < 1e8 for b in bounds)


def measured_over_predicted(matrices, dtype):
    """For every matrix: the change of log kappa when it is rounded to ``dtype``, over the predicted deviation."""
    wide = torch.stack(matrices).double()
    found = [polished(w) for w in wide]
    predicted = sensitivities(BACKEND, BACKEND.prepare(list(wide)), [dtype] * len(found), found)

    def logarithms(w):
        values = torch.linalg.svdvals(w)
        return (values[:, 0] / values[:, -1]).log()

    changes = logarithms(wide.to(dtype).double()) - logarithms(wide)
    return changes / torch.tensor(predicted, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [lambda seed: 0.02 * gaussian(60, 32, seed).float(), lambda seed: trained_like(64, 48, seed).float()],
    ids=["random", "trained-like"],
)
def test_sensitivity_is_the_deviation_of_kappa_under_actual_rounding(make, dtype):
    ratios = measured_over_predicted([make(seed) for seed in range(300)], dtype)
    assert 1 / 1.25 < float(ratios.square().mean().sqrt()) < 1.25
    assert float(ratios.abs().max()) < 6


@pytest.mark.parametrize(
    ("dtype", "size", "least"),
    [
        (torch.float16, 2e-4, 0.8),
        (torch.float16, 6e-5, 0.65),  # about the smallest normal number, where the sum of both counts most twice
        (torch.float16, 2e-5, 0.8),
        (torch.float16, 2e-6, 0.8),
        (torch.float8_e4m3fn, 0.02, 0.65),
    ],
)
def test_sensitivity_knows_that_subnormal_numbers_have_one_spacing(dtype, size, least):
    ratios = measured_over_predicted([size * gaussian(60, 32, seed).float() for seed in range(100)], dtype)
    assert least < float(ratios.square().mean().sqrt()) < 1.25


def test_sensitivity_knows_subnormal_numbers_where_the_operand_was_scaled():
    tiny = torch.ldexp(gaussian(40, 30), torch.tensor(-140)).float()
    (operand,) = BACKEND.prepare([tiny])
    assert operand.exponent != 0
    (value,) = sensitivities(BACKEND, [operand], [torch.float32], [polished(tiny)])
    sigmas = torch.linalg.svdvals(tiny.double())
    expected = 2.0**-149 / math.sqrt(12) * math.hypot(1 / float(sigmas[0]), 1 / float(sigmas[-1]))
    assert value == pytest.approx(expected, rel=1e-4)


def test_sensitivity_is_the_deviation_for_square_matrices_where_first_order_is_valid():
    ratios = measured_over_predicted([gaussian(24, 24, seed).float() for seed in range(300)], torch.float16)
    assert 1 / 1.5 < float(ratios.square().mean().sqrt()) < 1.5


def test_sensitivity_follows_the_spacing_of_the_dtype():
    matrix = gaussian(40, 30)
    operands, found = BACKEND.prepare([matrix]), polished(matrix)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    values = [sensitivities(BACKEND, operands, [dtype], [found])[0] for dtype in dtypes]
    spacings = [torch.finfo(dtype).eps for dtype in dtypes]
    assert [v / values[0] for v in values] == pytest.approx([s / spacings[0] for s in spacings])


def test_sensitivity_does_not_depend_on_the_scale_of_the_weights():
    matrix = gaussian(40, 30)
    plain, scaled = (
        sensitivities(BACKEND, BACKEND.prepare([w]), [torch.float32], [polished(w)])[0]
        for w in (matrix, 2.0**-60 * matrix)
    )
    assert scaled == pytest.approx(plain, rel=1e-6)


def test_sensitivity_is_the_literal_double_sum():
    matrix = gaussian(12, 7)
    found = polished(matrix)
    gradient = torch.outer(found.left[:, 0], found.right[:, 0]) / found.sigma_max  # of log kappa
    gradient -= torch.outer(found.left[:, 1], found.right[:, 1]) / found.sigma_min
    eps = torch.finfo(torch.bfloat16).eps
    spacings = eps * 2.0 ** matrix.abs().log2().floor()
    expected = math.sqrt(float((gradient * spacings).square().sum()) / 12)
    (value,) = sensitivities(BACKEND, BACKEND.prepare([matrix]), [torch.bfloat16], [found])
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mantissas", [(1.0, 1.05), (1.4, 1.45), (1.9, 1.95)])
def test_sensitivity_takes_the_exponent_of_every_entry(mantissas):
    # An average over mantissas would be off by 1.36 at one end and by 0.72 at the other.
    def make(seed):
        wide = gaussian(60, 32, seed)
        low, high = mantissas
        within = low + (high - low) * torch.rand(wide.shape, generator=torch.Generator().manual_seed(seed))
        return (torch.sign(wide) * within * 2.0 ** wide.abs().log2().floor()).float()

    ratios = measured_over_predicted([make(seed) for seed in range(300)], torch.float16)
    assert 1 / 1.1 < float(ratios.square().mean().sqrt()) < 1.1
