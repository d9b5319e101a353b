"""Under the interpreter, residuals of shifted factors are what exact arithmetic says, and G survives every attempt."""

import math

import numpy as np
import pytest
import torch
from launches import counted
from spectra import gaussian, prescribed
from test_kernels_gram import digits

from kappa_fast.kernels import cholesky as factors
from kappa_fast.kernels import shifted as module
from kappa_fast.kernels import splits
from kappa_fast.kernels.gram import gram_of_slices, slice_roundings
from kappa_fast.kernels.problems import Problems
from kappa_fast.kernels.quantize import column_peaks, quantize
from kappa_fast.kernels.shifted import Mirrored, residual_roundings

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
@pytest.mark.parametrize("spoil", [pytest.param(0.0, marks=pytest.mark.slow), 1e-9], ids=["factors", "spoilt factors"])
def test_residuals_are_those_of_exact_arithmetic_and_one_attempt_leaves_nothing_for_the_next(spoil, monkeypatch):
    grams = wave()
    found = mirrored(grams)
    original = module.cholesky

    def spoilt(problems, packed, info):
        result = original(problems, packed, info)
        for view in problems.gram_views(packed):
            rows, columns = np.tril_indices(len(view))
            view[rows, columns] *= 1 + spoil
        return result

    monkeypatch.setattr(module, "cholesky", spoilt)
    for sign, shift in ((1, 0.5), (-1, 4e4), (1, 0.25)):
        squares, sizes = found.factored(range(len(grams)), [shift] * len(grams), sign).residuals()
        for n, g, view, square, size in zip(
            SIZES, grams, found.problems.gram_views(found.packed), squares.tolist(), sizes.tolist(), strict=True
        ):
            # The diagonal of M is rounded once, and so is the whole residual a number of times.
            true, total = true_residual(g, shift, sign, view)
            allowed = 2 * (residual_roundings(n) + 1) * U * (2 * total + true)
            assert abs(math.sqrt(square) - true) <= allowed
            assert size == pytest.approx(total, rel=1e-12)
            assert math.sqrt(square) <= 4 * n * U * total or spoil
            assert true > 1e-10 * total / n or not spoil


def test_the_bound_on_roundings_counts_them():
    assert residual_roundings(4096) < 140  # gamma(4096) would cost a factor of five in kappa
    assert residual_roundings(1) >= 64


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
        mirrored(grams).factored(list(range(count)), [0.5] * count, 1).residuals()
    assert sorted(names) == sorted(["mirror", "shift", "diagonal", "column", "diagonal", "residual", "sum", "sum"])


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
