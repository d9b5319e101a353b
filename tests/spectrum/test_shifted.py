"""The bound on ||M - L L^T|| holds against exact arithmetic for whatever a library returns, in both precisions."""

import math
from fractions import Fraction

import pytest
import torch
from spectra import gaussian, hilbert

from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.spectrum import shifted
from kappa_fast.spectrum.rounding import gamma

BACKEND = TorchBackend(torch.device("cpu"))
DTYPES = [torch.float32, torch.float64]


def gram(n, dtype=torch.float64):
    a = gaussian(2 * n, n, n)
    return (a.T @ a).to(dtype)


def exact_residual(matrix, factor):
    """M - L L^T of the lower triangles in rational arithmetic, every entry rounded once."""
    m, rows = matrix.double().tolist(), [[Fraction(x) for x in row] for row in torch.tril(factor).double().tolist()]
    lower = torch.zeros(matrix.shape, dtype=torch.float64)
    for i, left in enumerate(rows):
        for j in range(i + 1):
            lower[i, j] = float(Fraction(m[i][j]) - sum(x * y for x, y in zip(left[: j + 1], rows[j], strict=False)))
    return lower + torch.tril(lower, -1).T


def norm(symmetric):
    return float(torch.linalg.eigvalsh(symmetric).abs().max())


class Odd(TorchBackend):
    """A backend whose Cholesky claims success and returns what ``change`` makes of the factor."""

    def __init__(self, change):
        super().__init__(torch.device("cpu"))
        self.change = change

    def cholesky(self, grams):
        super().cholesky(grams)
        for g in grams:
            g.copy_(self.change(g.clone()))
        return [True] * len(grams)


WAYS = ["blocks of columns", "at once"]


@pytest.fixture(params=WAYS, autouse=True)
def ways(request, monkeypatch):
    """Both ways to a factor: the one of the CPU, and the one of accelerators, which works on the CPU too."""
    monkeypatch.setattr(shifted, "accelerated", lambda _: request.param == "at once")


CHANGES = {
    "none": lambda g: g,
    "relative errors": lambda g: g * (1 + 1e-4 * torch.tril(gaussian(*g.shape, 1)).to(g.dtype)),
    "a lost entry": lambda g: torch.tril(g, -1) + torch.diag(g.diagonal()) * (torch.arange(len(g)) != len(g) // 2),
    "half of it": lambda g: g / 2,
    "unrelated": lambda g: torch.tril(gaussian(*g.shape, 2)).to(g.dtype) + 3 * torch.eye(len(g), dtype=g.dtype),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("ways", "n"),
    [(way, n) for way in WAYS for n in (1, 2, 31, 40)] + [(WAYS[0], 140)],  # of which there are several blocks
    indirect=["ways"],
)
@pytest.mark.parametrize("chunk", [8, 256])
def test_the_residual_of_whatever_a_library_returns_is_within_its_bound(ways, n, change, dtype, chunk):
    matrix = gram(n, dtype)
    factor = matrix.clone()
    bound = shifted.factor(Odd(CHANGES[change]), factor, chunk)
    if not math.isfinite(bound):
        assert change == "a lost entry"  # a zero on the diagonal, by which the rows below were divided
        return
    true = norm(exact_residual(matrix, factor))
    assert true <= bound
    u = torch.finfo(dtype).eps / 2
    assert bound <= 3 * math.sqrt(n) * true + 8 * u * shifted.roundings(n, chunk) * float(
        factor.double().square().sum()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_that_is_all_one_way_is_within_the_bound(dtype):
    n = 60
    matrix = (torch.full((n, n), 1 / 3, dtype=torch.float64) + torch.eye(n, dtype=torch.float64)).to(dtype)
    factor = matrix.clone()
    bound = shifted.factor(BACKEND, factor, 16)
    assert norm(exact_residual(matrix, factor)) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_that_were_rounded_before_count_as_such(dtype):
    n = 30
    exact = gram(n)
    coarse = torch.finfo(dtype).eps * 32 * exact  # by which rounding of a matrix with 5 bits less would be off
    bounds = [shifted.factor(BACKEND, exact.to(dtype, copy=True), 32, before) for before in (0, 1, 200)]
    assert bounds == sorted(set(bounds))
    factor = exact.to(dtype, copy=True)
    assert norm(exact_residual(exact, factor)) > 0
    assert shifted.factor(BACKEND, factor, 32, 200) >= norm(exact_residual(exact + coarse, factor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [80, 300])
def test_only_the_lower_triangle_is_read(dtype, n):
    matrix = gram(n, dtype)
    hidden = torch.tril(matrix) + torch.triu(torch.full_like(matrix, math.nan), 1)
    assert math.isfinite(shifted.factor(BACKEND, matrix, 256))
    assert shifted.factor(BACKEND, hidden, 256) == shifted.factor(BACKEND, gram(n, dtype), 256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [32, 256])
def test_a_factor_of_several_panels_is_that_of_the_library(dtype, chunk):
    n = 400
    matrix = gram(n, dtype)
    factor = matrix.clone()
    bound = shifted.factor(BACKEND, factor, chunk)
    u = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(torch.tril(factor), torch.linalg.cholesky(matrix), rtol=1e4 * u, atol=1e4 * u * n)
    true = norm(matrix.double() - torch.tril(factor).double() @ torch.tril(factor).double().T)
    assert true <= bound <= true + 8 * n * u * shifted.roundings(n, chunk) * norm(matrix.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_sums_make_the_bound_of_a_dominant_diagonal_far_smaller_than_the_trace_would(dtype):
    n = 400
    matrix = (gram(n) * 1e-3 + 10 * torch.eye(n, dtype=torch.float64)).to(dtype)
    u = torch.finfo(dtype).eps / 2
    whole = 2 * gamma(shifted.roundings(n, 256), u) * float(matrix.trace())
    bound = shifted.factor(BACKEND, matrix, 256)
    assert (bound < whole / 10) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrix", [-torch.eye(3), torch.zeros(3, 3), hilbert(40) - 1e-3 * torch.eye(40)])
def test_a_matrix_that_is_not_positive_definite_has_no_factor(matrix, dtype):
    assert shifted.factor(BACKEND, matrix.to(dtype), 256) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entries_that_are_no_numbers_prove_nothing(bad):
    matrix = gram(200)
    matrix[150, 20] = bad
    assert shifted.factor(BACKEND, matrix, 256) == math.inf
