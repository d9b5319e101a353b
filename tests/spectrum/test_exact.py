"""The last rung holds what exact integers and mpmath say, however tall, constant or ill-conditioned a matrix is."""

import math
from fractions import Fraction

import mpmath as mp
import pytest
import torch
from spectra import contains, gaussian, kappa_of, prescribed

from kappa_fast.backends.torch_backend import prepare_one
from kappa_fast.spectrum import doubled, exact

UNIT = 2**60


def exact_kappa(matrix: torch.Tensor) -> mp.mpf:
    """Of entries that are multiples of 2^-60: by their integer Gram matrix, with 60 digits."""
    n = matrix.shape[1]
    columns = [[int(Fraction(x) * UNIT) for x in matrix[:, j].tolist()] for j in range(n)]
    with mp.workdps(60):
        gram = mp.matrix(n, n)
        for i in range(n):
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = sum(x * y for x, y in zip(columns[i], columns[j], strict=True))
        values = sorted(mp.eigsy(gram, eigvals_only=True))
        return mp.sqrt(values[-1] / values[0])


def interval(ends: exact.SpectrumEnds) -> tuple[float, float]:
    low, high = ends.smallest
    return ends.largest[0] / high, ends.largest[1] / low if low > 0 else math.inf


def nearly_constant(m: int, n: int, value: float, step: float) -> torch.Tensor:
    matrix = torch.full((m, n), value, dtype=torch.float64)
    for j in range(1, n):
        matrix[j - 1, j] = round((value + step) * 2**52) / 2**52
    return matrix


@pytest.mark.parametrize(("m", "n"), [(500, 2), (2000, 2), (300, 3), (6000, 2)])
@pytest.mark.parametrize("value", [0.7, 1 / 3, 0.9])
def test_columns_of_one_sign_whose_sums_round_the_same_way(m, n, value):
    matrix = nearly_constant(m, n, value, 2.0**-38 * math.sqrt(m))
    found = exact.decompose(prepare_one(matrix), 1e-2)
    lower, upper = interval(found)
    assert contains(lower, exact_kappa(matrix), upper)
    assert upper / lower < 1.02


@pytest.mark.parametrize("kappa", [1, 1e3, 1e6, 1e8, 1e10, 1e12])
@pytest.mark.parametrize("shape", [(12, 7), (60, 20), (40, 40), (96, 48)])
def test_every_way_holds_kappa_and_is_narrow(shape, kappa):
    known = prescribed("geometric", *shape, kappa)
    a = prepare_one(known.matrix)
    for found in (exact.decompose(a, 1e-2), exact.decompose_svd(a), exact._decompose_doubled_gram(a, 1e-9)):
        lower, upper = interval(found)
        assert contains(lower, known.kappa, upper)
        assert upper / lower - 1 <= 0.02 if kappa < 1e12 else upper / lower < 1.1


@pytest.mark.parametrize("kappa", [1e14, 3e14, 1e15])
@pytest.mark.parametrize("shape", [(30, 9), (9, 9), (60, 5), (36, 33)])
def test_where_one_way_cannot_tell_sigma_n_from_zero_the_other_has_its_say(shape, kappa):
    m, n = shape
    left, right = torch.linalg.qr(gaussian(m, n)).Q, torch.linalg.qr(gaussian(n, n, 1)).Q
    matrix = left * torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64) @ right
    a, true = prepare_one(matrix), kappa_of(matrix)
    found, ways = exact.decompose(a, 1e-3), (exact.decompose_svd(a, 1e-3), exact._decompose_doubled_gram(a, 1e-3))
    lower, upper = interval(found)
    assert contains(lower, true, upper)
    assert upper <= min(interval(way)[1] for way in ways)
    assert found.separated == any(way.separated for way in ways)
    assert found.separated == (found.smallest[0] > 0)
    assert found.separated or kappa * n > 4e15


def test_what_two_ways_prove_is_met():
    vectors = gaussian(4, 2), gaussian(3, 2)
    one, other = exact.SpectrumEnds((1.0, 3.0), (0.0, 0.5)), exact.SpectrumEnds((2.0, 4.0), (0.25, 0.75), *vectors)
    for found in (one.intersected(other), other.intersected(one)):
        assert (found.largest, found.smallest) == ((2.0, 3.0), (0.25, 0.5))
        assert found.left is vectors[0]
        assert found.right is vectors[1]


@pytest.mark.parametrize("shape", [(30, 9), (30, 29), (200, 170)])
def test_what_is_singular_has_no_upper_end(shape):
    m, n = shape
    matrix = (gaussian(m, n - 1) * 8).round() @ (gaussian(n - 1, n, 1) * 8).round()
    for suspected in (False, True):
        found = exact.decompose(prepare_one(matrix), 1e-2, suspected=suspected)
        assert found.smallest[0] == 0
        assert found.left is None
        assert found.largest[0] / found.smallest[1] > 1e11


def test_a_matrix_that_is_not_singular_gets_its_values_though_it_was_suspected():
    known = prescribed("geometric", 192, 192, 1e6)
    lower, upper = interval(exact.decompose(prepare_one(known.matrix), 1e-2, suspected=True))
    assert contains(lower, known.kappa, upper)
    assert upper / lower < 1.02


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50, 6), (9000, 3)])
def test_a_doubled_gram_matrix_is_within_its_error(shape, dtype):
    matrix = gaussian(*shape).to(dtype)
    found, distance = doubled.gram(matrix)
    columns = [[int(Fraction(x) * 2**80) for x in matrix[:, j].tolist()] for j in range(shape[1])]
    error = 0.0
    for i, x in enumerate(columns):
        for j, y in enumerate(columns):
            true = Fraction(sum(p * q for p, q in zip(x, y, strict=True)), 2**160)
            error += float(Fraction(float(found.high[i, j])) + Fraction(float(found.low[i, j])) - true) ** 2
    norm = float(torch.linalg.vector_norm(matrix.double()))
    assert math.sqrt(error) <= found.error + 2 * norm * distance
    assert found.error < 1e-29 * norm**2
    assert distance < 1e-17 * norm


def test_doubled_products_are_within_their_errors():
    matrix, x = gaussian(40, 12) * 10.0 ** torch.linspace(0, -9, 12).double(), doubled.rounded(gaussian(12, 12, 1))
    g, _ = doubled.gram(matrix)
    image = doubled.product(g, x)
    t = doubled.transposed_product(x, image)
    with mp.workdps(80):
        whole = mp.matrix(g.high.tolist()) + mp.matrix(g.low.tolist())
        right = mp.matrix(x.tolist())
        true = right.T * whole * right
        error = mp.norm(mp.matrix(t.high.tolist()) + mp.matrix(t.low.tolist()) - true)
    assert error <= t.error  # which covers that of G, too
    assert t.error < 1e-26 * float(t.high.norm())


def test_a_doubled_residual_sees_what_float64_cannot():
    left, right = gaussian(30, 20), gaussian(20, 20, 1)
    a = left @ right
    with mp.workdps(50):
        true = mp.norm(mp.matrix(a.tolist()) - mp.matrix(left.tolist()) * mp.matrix(right.tolist()))
    found = doubled.residual(a, left, right)
    assert true <= found <= 1.01 * float(true)


def test_the_last_rung_agrees_with_high_precision_on_graded_columns():
    matrix = gaussian(40, 6) * 10.0 ** -torch.arange(0, 12, 2).double()
    lower, upper = interval(exact.decompose(prepare_one(matrix), 1e-2))
    assert contains(lower, kappa_of(matrix), upper)
    assert upper / lower < 1.02
