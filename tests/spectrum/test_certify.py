"""Every piece of a proof holds against exact arithmetic, whatever estimates or factors it was given."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import cache

import mpmath as mp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import SPECTRA, contains, cosines, gaussian, graded, hilbert, prescribed, singular_values

from kappa_fast.backends import torch_gram
from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.spectrum import certify, shifted
from kappa_fast.spectrum.certify import (
    certified,
    chunk_rows,
    gram_with_error,
    largest_eigenvalue,
    norm_bound,
    preconditioned_smallest,
    smallest_eigenvalue,
)
from kappa_fast.spectrum.ladder import resolve
from kappa_fast.spectrum.resolution import Goal, Resolution
from kappa_fast.spectrum.rounding import gamma

BACKEND = TorchBackend(torch.device("cpu"))


def operand(matrix):
    return BACKEND.prepare([matrix])[0]


def exactly(matrix):
    """Rows of exact fractions."""
    return [[Fraction(x) for x in row] for row in matrix.tolist()]


def exact_difference(computed, left, right):
    """The matrix computed - left right^T, entries rounded once from the exact value; only on and below the diagonal."""
    c, a, b = exactly(computed), exactly(left), exactly(right)
    entries = [
        [float(c[i][j] - sum(x * y for x, y in zip(a[i], b[j], strict=True))) for j in range(i + 1)]
        for i in range(len(c))
    ]
    full = torch.zeros(computed.shape, dtype=torch.float64)
    for i, row in enumerate(entries):
        full[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
    return full + torch.tril(full, -1).T


def norm(symmetric):
    return float(torch.linalg.eigvalsh(symmetric).abs().max())


def eigenvalues(symmetric):
    with mp.workdps(50):
        return sorted(mp.eigsy(mp.matrix(symmetric.tolist()), eigvals_only=True))


def test_gamma_bounds_the_compounded_rounding_of_a_sum():
    for k in (1, 5, 1000, 10**6):
        compounded = (1 + Fraction(2) ** -53) ** min(k, 1000) - 1
        assert Fraction(gamma(k)) >= compounded * (1 - Fraction(2) ** -50)
        assert gamma(k) == pytest.approx(k * 2.0**-53)


@pytest.mark.parametrize("m", [1, 31, 32, 1000, 4096, 30522, 10**6])
def test_chunks_keep_the_number_of_roundings_near_its_least(m):
    k = chunk_rows(m)
    assert 32 <= k <= 256
    assert k + m / k <= max(65, 2.2 * math.sqrt(m), 1.1 * (256 + m / 256))


@pytest.mark.parametrize(
    "matrix",
    [
        gaussian(300, 3),
        torch.full((700, 3), 1 / 3, dtype=torch.float64),  # every sum is rounded the same way
        (1 + torch.arange(600).double().reshape(200, 3) * 2.0**-30),
        graded(200, 4, 1e8, 1e6),
        1e-150 * gaussian(60, 3),  # squares underflow: scaled first
        gaussian(40, 5).bfloat16(),
    ],
    ids=["gaussian", "thirds", "cancelling low bits", "graded", "tiny", "bfloat16"],
)
def test_the_error_of_the_gram_matrix_is_within_its_bound(matrix):
    a = operand(matrix)
    product = gram_with_error(BACKEND, a)
    columns = a.tensor.double().T
    assert norm(exact_difference(product.lower, columns, columns)) <= product.error
    assert product.trace >= float(sum(x * x for row in exactly(columns) for x in row))


@pytest.mark.parametrize("m", [100, 3000])
def test_the_bound_on_the_error_of_the_gram_matrix_is_small(m):
    product = gram_with_error(BACKEND, operand(gaussian(m, 8)))
    assert product.error <= (2 * math.sqrt(m) + 60) * 2.0**-53 * product.trace


@pytest.mark.parametrize("shift", [0.0, 0.5, 0.9, 0.999999, 1.0, 1.000001, 2.0])
def test_a_proven_smallest_eigenvalue_never_exceeds_the_true_one(shift):
    a = operand(graded(30, 8, 3, 10))
    product = gram_with_error(BACKEND, a)
    true = singular_values(a.tensor)[-1] ** 2
    proven = smallest_eigenvalue(BACKEND, product, shift * float(true))
    assert mp.mpf(proven) <= true
    if shift < 1:
        assert proven >= shift * float(true) - 10 * product.error
    if shift > 1:
        assert proven == -math.inf


@pytest.mark.parametrize("bound", [0.5, 0.999999, 1.0, 1.000001, 1.1, 3.0])
def test_a_proven_largest_eigenvalue_never_falls_below_the_true_one(bound):
    a = operand(graded(30, 8, 3, 10))
    product = gram_with_error(BACKEND, a)
    true = singular_values(a.tensor)[0] ** 2
    proven = largest_eigenvalue(BACKEND, product, bound * float(true))
    assert mp.mpf(proven) >= true
    if bound > 1:
        assert proven <= bound * float(true) * (1 + 1e-13) + 10 * product.error
    if bound < 1:
        assert proven == math.inf


@pytest.mark.parametrize("estimate", [1e-3, 0.5, 0.99, 1.0, 1.01, 5.0])
def test_the_norm_is_bounded_from_above_whatever_the_estimate(estimate):
    a = operand(gaussian(50, 10))
    product = gram_with_error(BACKEND, a)
    true = singular_values(a.tensor)[0]
    proven = norm_bound(BACKEND, product, estimate * float(true), 1e-3)
    assert mp.mpf(proven) >= true
    assert proven <= math.sqrt(product.trace) * 1.001
    if estimate == 1:
        assert proven <= float(true) * (1 + 1e-3)


NEARLY_FLAT = {
    "graded": lambda: graded(30, 8, 3, 10),
    "one sign": lambda: torch.full((30, 12), 1 / 3, dtype=torch.float64) + 0.01 * gaussian(30, 12),
    "orthogonal": lambda: cosines(16),
    "gaussian": lambda: gaussian(30, 20),
}


@cache
def squared_norm(kind):
    """The largest eigenvalue of the Gram matrix, to 50 digits."""
    return singular_values(NEARLY_FLAT[kind]())[0] ** 2


@pytest.mark.parametrize("bound", [0.5, 0.999, 0.999999, 1.0, 1.000001, 1.001, 1.1, 3.0])
@pytest.mark.parametrize("kind", NEARLY_FLAT)
@pytest.mark.parametrize("scale", [2.0**-18, 1.0, 2.0**19])
def test_a_largest_eigenvalue_proven_in_float32_never_falls_below_the_true_one(kind, bound, scale):
    a = operand(NEARLY_FLAT[kind]() * scale)
    product = gram_with_error(BACKEND, a)
    true = squared_norm(kind) * scale**2 * mp.mpf(4) ** -a.exponent
    proven = certify._largest_in_float32(BACKEND, product, bound * float(true))
    assert mp.mpf(proven) >= true
    if bound > 1.0001:
        assert proven <= bound * float(true) * (1 + 2e-4)
    if bound < 0.9999:
        assert proven == math.inf


def test_a_proof_in_float32_is_left_out_where_torch_may_use_less(monkeypatch):
    product = gram_with_error(BACKEND, operand(gaussian(50, 10)))
    assert math.isfinite(certify._largest_in_float32(BACKEND, product, product.trace))
    monkeypatch.setattr(certify, "is_exact", lambda: False)
    assert certify._largest_in_float32(BACKEND, product, product.trace) == math.inf


@pytest.mark.parametrize("bound", [1e-40, 1e-16, 1e31, 1e300, math.inf, math.nan])
def test_a_proof_in_float32_is_left_out_beyond_its_range(bound):
    product = gram_with_error(BACKEND, operand(gaussian(50, 10)))
    assert certify._largest_in_float32(BACKEND, product, bound) == math.inf


@pytest.mark.parametrize(("count", "limit", "chunk"), [(5632, 1e-9, 256), (5632, 3.5e-11, 256), (5632, 2.6e-11, 128)])
def test_sums_are_as_long_as_their_error_allows(count, limit, chunk):
    size = 1e3
    assert certify.chunk_for(count, size, limit) == chunk
    assert gamma(chunk + math.ceil(count / chunk) + 2) * size <= limit


def test_sums_have_the_best_length_where_no_error_is_small_enough():
    assert certify.chunk_for(5632, 1e3, 0.0) == chunk_rows(5632)
    assert certify.chunk_for(5632, math.inf, 1.0) == chunk_rows(5632)


class Sloppy(TorchBackend):
    """A backend whose Cholesky claims success and returns a factor that is wrong by a relative ``error``."""

    def __init__(self, error):
        super().__init__(torch.device("cpu"))
        self.error = error

    def cholesky(self, grams):
        sound = super().cholesky(grams)
        for g in grams:
            g.mul_(1 + self.error)
        return [True] * len(sound)


@pytest.mark.parametrize("error", [1e-12, 1e-6, 1e-3, 0.5])
def test_a_proof_survives_a_library_that_factors_wrongly(error):
    matrix = prescribed("log-uniform", 60, 40, 100)
    (found,) = resolve(BACKEND, [matrix.matrix], Goal(1e-2))
    proven = certified(Sloppy(error), operand(matrix.matrix), replace(found, **scaled(matrix.matrix, found)), 1e-2)
    assert proven.certified  # the preconditioned product needs a factor for norms only, where the trace will do
    assert contains(proven.lower, matrix.kappa, proven.upper)
    assert (proven.half_width <= 1e-2) == (error < 0.1)


def scaled(matrix, found):
    """Singular values in the units of the operand, which certified() works in."""
    factor = 2.0 ** -operand(matrix).exponent
    return {"sigma_max": found.sigma_max * factor, "sigma_min": found.sigma_min * factor}


@pytest.mark.parametrize("kappa", [1, 10, 1e4, 1e7, 1e10, 1e12, 1e14])
@pytest.mark.parametrize("spectrum", ["geometric", "one small", "clustered"])
def test_the_preconditioned_bound_never_exceeds_the_smallest_singular_value(spectrum, kappa):
    a = operand(prescribed(spectrum, 24, 24, kappa).matrix)
    true = singular_values(a.tensor)[-1]
    proven = preconditioned_smallest(BACKEND, a, float(true), 1e-3)
    assert mp.mpf(proven) <= true
    if kappa <= 1e10:
        assert proven >= float(true) * (1 - 1e-2)


@pytest.mark.parametrize("kappa", [1e2, 1e5, 1e7, 1e9])
@pytest.mark.parametrize("spectrum", ["geometric", "one small", "clustered"])
@pytest.mark.parametrize("off", [0.0, 1e-9, 1e-3], ids=str)
def test_a_factor_of_the_gram_matrix_preconditions_or_is_replaced(spectrum, kappa, off):
    """Off: the Gram matrix is wrong by so much of its norm, which the proof must not believe."""
    a = operand(prescribed(spectrum, 24, 24, kappa).matrix)
    true = singular_values(a.tensor)[-1]
    product = gram_with_error(BACKEND, a)
    product.lower.diagonal().add_(off * product.trace)
    proven = preconditioned_smallest(BACKEND, a, float(true), 1e-3, product)
    assert mp.mpf(proven) <= true
    assert proven >= float(true) * (1 - 1e-2)


def test_the_factor_of_a_good_gram_matrix_saves_the_qr(monkeypatch):
    a = operand(prescribed("geometric", 24, 24, 1e4).matrix)
    true = float(singular_values(a.tensor)[-1])
    product = gram_with_error(BACKEND, a)
    monkeypatch.setattr(torch.linalg, "qr", lambda *_, **__: pytest.fail("QR is not needed"))
    assert true * (1 - 1e-3) <= preconditioned_smallest(BACKEND, a, true, 1e-3, product) <= true


@pytest.fixture
def large_products(monkeypatch):
    """Proofs as on an accelerator, on the CPU: sums as long as their error allows, and factors at once."""
    for module in (certify, shifted, torch_gram):
        monkeypatch.setattr(module, "accelerated", lambda _: True)


@pytest.mark.usefixtures("large_products")
@pytest.mark.parametrize("kappa", [1, 10, 1e4, 1e7, 1e10, 1e12, 1e14])
@pytest.mark.parametrize("shape", [(24, 24), (90, 40), (300, 257)], ids=str)
def test_proofs_from_large_products_hold(shape, kappa):
    matrix = prescribed("geometric", *shape, kappa)
    a = operand(matrix.matrix)
    (found,) = resolve(BACKEND, [matrix.matrix], Goal(1e-2))
    proven = certified(BACKEND, a, replace(found, certified=False, **scaled(matrix.matrix, found)), 1e-2)
    if kappa <= 1e10:
        assert proven.certified
        assert proven.half_width <= 1e-2
    if proven.certified:
        assert contains(proven.lower, matrix.kappa, proven.upper)


@pytest.mark.parametrize("lie", [1e-6, 0.1, 0.999, 1.001, 10.0, 1e6])
def test_the_preconditioned_bound_survives_a_wrong_estimate(lie):
    a = operand(hilbert(8))
    true = singular_values(a.tensor)[-1]
    assert mp.mpf(preconditioned_smallest(BACKEND, a, lie * float(true), 1e-3)) <= true


@pytest.mark.parametrize(
    "matrix",
    [
        torch.ones(40, 33, dtype=torch.float64),
        hilbert(33),
        torch.diag(torch.tensor([1.0, 1e-200, 0.0], dtype=torch.float64)),
    ],
    ids=["constant", "hilbert 33", "zero on the diagonal"],
)
def test_what_float64_cannot_tell_from_singular_is_not_bounded_from_below(matrix):
    a = operand(matrix)
    assert preconditioned_smallest(BACKEND, a, 1e-17, 1e-3) == 0
    # As with an estimate that is a lie, with which the Gram matrix seems to be near enough.
    assert preconditioned_smallest(BACKEND, a, 1.0, 1e-3, gram_with_error(BACKEND, a)) == 0


@given(
    spectrum=st.sampled_from(list(SPECTRA)),
    shape=st.sampled_from([(8, 8), (12, 5), (40, 32), (36, 36)]),
    decades=st.integers(0, 13),
    high=st.floats(0.05, 20),
    low=st.floats(0.05, 20),
    rtol=st.sampled_from([1e-1, 1e-2, 1e-6]),
    large=st.booleans(),
)
def test_a_proof_holds_even_if_the_estimates_were_wrong(spectrum, shape, decades, high, low, rtol, large):
    matrix = prescribed(spectrum, *shape, 10.0**decades)
    a = operand(matrix.matrix)
    values = torch.linalg.svdvals(a.tensor)
    sigma_max, sigma_min = high * float(values[0]), low * float(values[-1])
    lie = Resolution("ok", 1.0, 1.0, 1.0, sigma_max, sigma_min, "lie")
    with pytest.MonkeyPatch.context() as patch:
        for module in (certify, shifted, torch_gram):
            patch.setattr(module, "accelerated", lambda _: large)
        proven = certified(BACKEND, a, lie, rtol)
    assert proven.certified or decades > 8
    assert contains(proven.lower, matrix.kappa, proven.upper) or not proven.certified


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("kappa", [1, 10, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(192, 192), (256, 192), (400, 192)])
def test_proofs_are_as_tight_as_asked_for_up_to_a_million(shape, kappa, rtol):
    matrix = prescribed("log-uniform", *shape, kappa)
    (found,) = resolve(BACKEND, [matrix.matrix], Goal(rtol, certify=True))
    assert found.certified
    assert found.half_width <= rtol
    assert contains(found.lower, matrix.kappa, found.upper)


@pytest.mark.parametrize("kappa", [1e8, 1e9, 1e10])
def test_proofs_reach_one_percent_up_to_ten_billion(kappa):
    matrix = prescribed("geometric", 192, 192, kappa)
    (found,) = resolve(BACKEND, [matrix.matrix], Goal(1e-2, certify=True))
    assert found.certified
    assert found.half_width <= 1e-2
    assert contains(found.lower, matrix.kappa, found.upper)


def test_orthogonal_matrices_are_proven_to_lie_next_to_one():
    (found,) = resolve(BACKEND, [cosines(200)], Goal(1e-4, certify=True))
    assert found.certified
    assert 1 <= found.lower <= found.upper <= 1 + 2e-4


def test_without_a_proof_the_estimate_stays_as_it_was(monkeypatch):
    matrix = prescribed("geometric", 40, 40, 10).matrix
    (found,) = resolve(BACKEND, [matrix], Goal(1e-2))
    monkeypatch.setattr(certify, "preconditioned_smallest", lambda *_: 0.0)
    monkeypatch.setattr(certify, "smallest_eigenvalue", lambda *_: -math.inf)
    assert certified(BACKEND, operand(matrix), found, 1e-2) is found


def test_entries_that_scaling_pushed_out_of_range_bar_a_proof():
    matrix = torch.eye(40, dtype=torch.float64) + 0.1 * gaussian(40, 40)
    matrix[3, 5] = 1e-300
    matrix *= 1e150
    matrix[7, 8] = 1e-200
    a = operand(matrix)
    assert not a.exact
    (found,) = resolve(BACKEND, [matrix], Goal(1e-2, certify=True))
    assert found.status == "ok"
    assert not found.certified
