"""Under the interpreter, residuals of shifted factors are what exact arithmetic says, and G survives every attempt."""

import math

import numpy as np
import pytest
import torch
import triton.language as tl
from exact_digits import digits
from launches import counted
from spectra import gaussian, prescribed

from kappa_fast.kernels import cholesky as factors
from kappa_fast.kernels import shifted as module
from kappa_fast.kernels import splits, twins
from kappa_fast.kernels.cholesky import residual_roundings
from kappa_fast.kernels.gram import gram_of_slices, slice_roundings
from kappa_fast.kernels.problems import Problems
from kappa_fast.kernels.quantize import column_peaks, quantize
from kappa_fast.kernels.shifted import Mirrored

U = 2.0**-53
SIZES = [1, 2, 64, 65, 130]


@pytest.fixture(params=[pytest.param(True, id="dot"), pytest.param(False, id="outer products", marks=pytest.mark.slow)])
def products(request, monkeypatch):
    monkeypatch.setattr(factors, "WITH_DOT", ("sm_90",) if request.param else ())


def mirrored(grams):
    """The lower triangles, with NaN above."""
    problems = Problems.of([torch.empty(len(g), len(g)) for g in grams])
    packed = torch.full((problems.gram_elements,), math.nan, dtype=torch.float64)
    for view, g in zip(problems.gram_views(packed), grams, strict=True):
        rows, columns = np.tril_indices(len(g))
        view[rows, columns] = g[rows, columns]
    return Mirrored.of(problems, packed)


def wave():
    """Eigenvalues from 1 to 10^4."""
    made = [prescribed("geometric", n, n, 100, seed=n).matrix if n > 1 else gaussian(1, 1, 3) for n in SIZES]
    made = [x / float(torch.linalg.svdvals(x)[-1]) for x in made]
    return [x.T @ x for x in made]


def true_residual(gram, shift, sign, lower):
    """||sign (G - shift I) - L L^T||_F and ||L||_F^2, in numbers of 64 bits or more."""
    wide, factor = gram.numpy().astype(np.longdouble), np.tril(lower.numpy()).astype(np.longdouble)
    rest = sign * (wide - np.longdouble(shift) * np.eye(len(wide))) - factor @ factor.T
    return float(np.sqrt((rest**2).sum())), float((factor**2).sum())


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("panel", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_residuals_are_those_of_exact_arithmetic_and_one_attempt_leaves_nothing_for_the_next(panel, monkeypatch):
    monkeypatch.setattr(factors, "SUPER", tl.constexpr(panel))  # a second one is updated behind the first
    monkeypatch.setattr(module, "SUPER", tl.constexpr(panel))
    grams = wave()
    found = mirrored(grams)
    for sign, shift in ((1, 0.5), (-1, 4e4)):
        made = found.factored(range(len(grams)), [shift] * len(grams), sign)
        squares, sizes = made.residuals()
        assert made.deviations(squares, sizes).max() <= 1
        for n, g, view, square, size in zip(
            SIZES, grams, found.problems.gram_views(found.packed), squares.tolist(), sizes.tolist(), strict=True
        ):
            # The diagonal of M is rounded once, and so is the whole residual a number of times.
            true, total = true_residual(g, shift, sign, view)
            allowed = (residual_roundings(n, "sm_90") + 1) * U * (2 * total + true)
            assert abs(math.sqrt(square) - true) <= allowed
            assert size == pytest.approx(total, rel=1e-12)
            assert math.sqrt(square) <= 4 * n * U * total
            assert square > 0 or n == 1


def spoilt(monkeypatch, kernel, change):
    """After every launch of a kernel ``change(factored, step, residuals)`` is made."""
    original = getattr(factors, kernel)

    def launcher(problems, result, steps, step, residuals=None, **options):
        original(problems, result, steps, step, residuals, **options)
        change(result, step, residuals)

    monkeypatch.setattr(factors, kernel, launcher)


def test_columns_that_are_finished_with_a_wrong_inverse_leave_what_they_should(monkeypatch):
    # With half the inverse the product is B D^-T / 2, and the correction makes it 3/4: a quarter of B is left.
    spoilt(monkeypatch, "factor_diagonals", lambda result, step, residuals: result.inverses.div_(2))
    (g,) = (x.T @ x for x in [gaussian(200, 130, 1)])
    found = mirrored([g])
    made = found.factored([0], [1.0], 1)
    square, size = (float(x) for x in made.residuals())
    (view,) = found.problems.gram_views(found.packed)
    true, total = true_residual(g, 1.0, 1, view)
    assert true > 0.1 * float(torch.linalg.matrix_norm(g[64:, :64]))
    assert math.sqrt(square) == pytest.approx(true, rel=1e-12)
    assert size == pytest.approx(total, rel=1e-12)


def test_an_update_that_is_skipped_is_no_residual_but_a_deviation(monkeypatch):
    monkeypatch.setattr(factors, "SUPER", tl.constexpr(128))
    monkeypatch.setattr(module, "SUPER", tl.constexpr(128))
    original = factors.launch

    def lossy(kernel, *arguments, **options):
        if kernel is not factors._trailing_kernel:
            original(kernel, *arguments, **options)

    monkeypatch.setattr(factors, "launch", lossy)
    g = gaussian(400, 140, 1)
    g = g.T @ g
    found = mirrored([g])
    made = found.factored([0], [1.0], 1)
    squares, sizes = made.residuals()
    (view,) = found.problems.gram_views(found.packed)
    true, total = true_residual(g, 1.0, 1, view)
    assert float(squares.sqrt()) < 1e-12 * total < 1e-2 * true
    assert float(made.deviations(squares, sizes)) > 1e6


def test_one_wrong_entry_of_a_factor_is_a_deviation(monkeypatch):
    g = gaussian(300, 70, 1)
    g = g.T @ g
    spoilt(monkeypatch, "finish_columns", lambda result, step, residuals: result.packed[66 * 80 + 3].mul_(1 + 1e-6))
    made = mirrored([g]).factored([0], [1.0], 1)
    squares, sizes = made.residuals()
    assert float(made.deviations(squares, sizes)) > 10


def test_the_bound_on_roundings_counts_them():
    assert residual_roundings(4096, "sm_90") < 340  # gamma(4096) would cost a factor of three in kappa
    assert residual_roundings(4096, "sm_100") > 4096  # one column after the other
    assert residual_roundings(1, "sm_90") >= 64


def test_what_is_not_finished_has_no_residual(monkeypatch):
    original = factors.launch

    def lossy(kernel, *arguments, **options):
        if kernel is not factors._column_kernel:
            original(kernel, *arguments, **options)

    monkeypatch.setattr(factors, "launch", lossy)
    squares, sizes = mirrored([wave()[3]]).factored([0], [0.5], 1).residuals()
    assert math.isinf(squares[0])
    assert math.isinf(sizes[0])


def test_the_twin_measures_the_same():
    grams = wave()[2:4]
    found = mirrored(grams)
    made = found.factored([0, 1], [0.5, 0.5], 1)
    twin = factors.Residuals(
        torch.full_like(made.by_tile.squares, math.inf), made.by_tile.sizes.clone(), made.by_tile.first
    )
    for view, g in zip(found.problems.gram_views(found.packed), grams, strict=True):
        view.copy_(g - 0.5 * torch.eye(len(g), dtype=torch.float64))
    twins.cholesky(found.problems, found.packed, None, None, twin)
    assert torch.allclose(twin.sizes, made.by_tile.sizes, rtol=1e-9)
    assert twin.squares.sqrt().max() < 1e-13 * twin.sizes.sum()


def test_an_indefinite_matrix_ends_no_other_and_those_left_out_stay_closed():
    grams = wave()[2:5]
    found = mirrored(grams)
    squares, sizes = found.factored([2, 0], [0.5, 2.0], 1).residuals()  # the smallest eigenvalue is 1
    assert math.isfinite(squares[0])
    assert math.isinf(squares[1])
    assert math.isinf(sizes[1])
    squares, _ = found.factored([1, 0], [0.5, 0.5], 1).residuals()
    assert torch.isfinite(squares).all()


def test_a_nan_is_no_proof():
    grams = wave()[2:4]
    grams[0][20, 3] = math.nan
    squares, _ = mirrored(grams).factored([0, 1], [0.5, 0.5], 1).residuals()
    assert not math.isfinite(squares[0])
    assert math.isfinite(squares[1])


@pytest.mark.parametrize("alone", [None, 0, 2, 4])
def test_traces_are_sums_of_the_diagonal(alone):
    grams = wave() if alone is None else [wave()[alone]]
    for trace, g in zip(mirrored(grams).traces().tolist(), grams, strict=True):
        assert trace == pytest.approx(float(g.trace()), rel=1e-14)


@pytest.mark.parametrize("count", [3, 30])
def test_the_number_of_launches_does_not_depend_on_how_many_matrices_there_are(count):
    grams = [torch.eye(65, dtype=torch.float64)] * count
    with counted(run=False) as names:
        made = mirrored(grams).factored(list(range(count)), [0.5] * count, 1)
        made.deviations(*made.residuals())
    once = ["mirror", "gaussian", "product", "inner", "add_chunks", "inner", "add_chunks"]
    each = ["shift", "diagonal", "column", "diagonal", "sum", "sum", "product", "inner", "add_chunks", "sum"]
    assert sorted(names) == sorted([*once, *each])


@pytest.mark.parametrize("slices", [3, 4])
def test_slices_round_no_more_than_their_bound_says(slices, monkeypatch):
    monkeypatch.setattr(splits, "SPLIT_ROWS", 128)
    monkeypatch.setattr(splits, "FULL_CHIP", 3)
    wide = gaussian(700, 9, 1) * torch.exp2(torch.arange(700, dtype=torch.float64) % 25 - 20)[:, None]
    problems = Problems.of([wide.float(), gaussian(129, 5, 2).float(), torch.ones(300, 3)])
    found = quantize(problems, column_peaks(problems), slices)
    packed = gram_of_slices(problems, found)
    roundings = slice_roundings(problems, slices)
    assert roundings[0] >= 9.3 * 2 * 5 > roundings[1] / 3  # three splits
    exponents = 153 - (found.peaks.numpy().astype(np.int64) >> 23) - 7 * (4 - slices)
    for i, (q, view) in enumerate(zip(digits(problems, found), problems.gram_views(packed), strict=True)):
        start = int(problems.table[i, 5])
        p = exponents[start : start + q.shape[1]]
        scaled = np.ldexp(view.numpy(), p[:, None] + p[None, :])
        exact = q.astype(object).T @ q.astype(object)
        size = abs(q).astype(object).T @ abs(q).astype(object)
        for row in range(q.shape[1]):
            for column in range(row + 1):
                error = abs(int(scaled[row, column]) - exact[row, column])
                assert error <= float(roundings[i]) * U * float(size[row, column])
