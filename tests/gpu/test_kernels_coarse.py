"""Under the interpreter, residuals of coarse factors are what exact arithmetic says, whatever went wrong before."""

import math

import numpy as np
import pytest
import torch
import triton.language as tl
from launches import counted
from spectra import gaussian, prescribed

from kappa_fast.kernels import cholesky as factors
from kappa_fast.kernels import coarse as module
from kappa_fast.kernels import splits
from kappa_fast.kernels.coarse import ROUNDINGS, coarse_factors
from kappa_fast.kernels.problems import Problems
from kappa_fast.kernels.shifted import Mirrored

U = 2.0**-53


def mirrored(grams):
    """The lower triangles, with NaN above."""
    problems = Problems.of([torch.empty(len(g), len(g)) for g in grams])
    packed = torch.full((problems.gram_elements,), math.nan, dtype=torch.float64)
    for view, g in zip(problems.gram_views(packed), grams, strict=True):
        rows, columns = np.tril_indices(len(g))
        view[rows, columns] = g[rows, columns]
    return Mirrored.of(problems, packed)


def gram(a):
    a = a.double()
    return a.T @ a


def largest(grams):
    return [float(torch.linalg.eigvalsh(g)[-1]) for g in grams]


def true_residual(g, bound, lower):
    """||bound I - G - L L^T||_F and ||L||_F^2, in numbers of 64 bits or more."""
    wide, factor = g.numpy().astype(np.longdouble), lower.numpy().astype(np.longdouble)
    rest = np.longdouble(bound) * np.eye(len(wide)) - wide - factor @ factor.T
    return float(np.sqrt((rest**2).sum())), float((factor**2).sum())


def assert_exact(found, grams, bounds):
    """The residuals are those of the factors that the digits say; returns them, relative to the bounds."""
    squares, sizes = (x.tolist() for x in found.residuals())
    left = []
    for g, bound, lower, square, size in zip(grams, bounds, found.dense(), squares, sizes, strict=True):
        true, total = true_residual(g, bound, lower)
        assert abs(math.sqrt(square) - true) <= (ROUNDINGS + 1) * U * (2 * total + 2 * true)
        assert size == pytest.approx(total, rel=1e-12)
        left.append(true / bound)
    return left


@pytest.fixture
def short_panels(monkeypatch):
    """Two updates behind super-panels at 262 columns, and three rows of tiles."""
    monkeypatch.setattr(factors, "SUPER", tl.constexpr(128))
    monkeypatch.setattr(module, "SUPER", tl.constexpr(128))


@pytest.mark.usefixtures("short_panels")
def test_residuals_are_those_of_exact_arithmetic_and_small_and_leave_the_gram_matrices():
    matrices = [
        gaussian(1, 1, 3),
        gaussian(400, 262, 2),
        1e-12 * prescribed("geometric", 65, 65, 1e3, seed=4).matrix,
        1e8 * gaussian(70, 40, 5) * torch.logspace(-12, 0, 40, dtype=torch.float64),  # columns of all sizes
    ]
    grams = [gram(a) for a in matrices]
    whole = mirrored(grams)
    bounds = [1.0025 * x for x in largest(grams)]
    left = assert_exact(coarse_factors(whole, range(len(grams)), bounds), grams, bounds)
    assert max(left) < 1e-3
    # A second attempt, of some, finds the same matrices.
    again = [1.01 * x for x in largest(grams)]
    assert_exact(coarse_factors(whole, [3, 2], [again[3], again[2]]), [grams[3], grams[2]], [again[3], again[2]])


@pytest.mark.usefixtures("short_panels")
@pytest.mark.parametrize("lost", ["an update", "half the inverses", "a digit", "a part of the diagonal"])
def test_whatever_went_wrong_before_is_in_the_residual(lost, monkeypatch):
    grams = [gram(gaussian(200, 150, 1))]
    bounds = [1.0025 * largest(grams)[0]]
    if lost == "an update":
        original = factors.launch

        def lossy(kernel, *arguments, **options):
            if kernel is not factors._trailing_kernel:
                original(kernel, *arguments, **options)

        monkeypatch.setattr(factors, "launch", lossy)
    if lost == "half the inverses":
        before = factors.factor_diagonals

        def halved(problems, result, *rest):
            before(problems, result, *rest)
            result.inverses.div_(2)

        monkeypatch.setattr(factors, "factor_diagonals", halved)
    found = coarse_factors(mirrored(grams), [0], bounds)
    if lost == "a digit":
        found.digits[0, 140 * 256 + 7] ^= 64
    if lost == "a part of the diagonal":
        found.squares.gram_views(found.narrow)[0][130, 130] *= 1.01
    (left,) = assert_exact(found, grams, bounds)
    assert left > 2e-3


def test_bounds_that_are_too_low_prove_nothing_and_end_no_other():
    grams = [gram(gaussian(90, 70, 1)), gram(gaussian(60, 30, 2)), gram(gaussian(9, 5, 3))]
    tops = largest(grams)
    squares, sizes = coarse_factors(mirrored(grams), [2, 0], [0.9 * tops[2], 1.01 * tops[0]]).residuals()
    assert math.isinf(squares[0])
    assert math.isinf(sizes[0])
    assert math.sqrt(squares[1]) < 1e-3 * tops[0]


def test_a_nan_is_no_proof():
    grams = [gram(gaussian(90, 70, 1)), gram(gaussian(60, 30, 2))]
    bounds = [1.01 * x for x in largest(grams)]
    grams[0][20, 3] = math.nan
    squares, _ = coarse_factors(mirrored(grams), [0, 1], bounds).residuals()
    assert not math.isfinite(squares[0])
    assert math.isfinite(squares[1])


def test_sums_that_would_not_fit_are_refused(monkeypatch):
    assert 2 * 128**2 * splits.BYTE_ROWS < 2**31
    monkeypatch.setattr(module, "BYTE_ROWS", 20)
    whole = mirrored([torch.eye(21, dtype=torch.float64), torch.eye(20, dtype=torch.float64)])
    with pytest.raises(ValueError, match="more than 20 columns are not exact"):
        coarse_factors(whole, [0], [2.0])
    assert math.isfinite(coarse_factors(whole, [1], [2.0]).residuals()[0])


def test_digits_at_their_limits_are_exact():
    # Every entry of N is 127 * 257 units, the largest number that two digits hold, or its opposite.
    n = 130
    whole = mirrored([torch.eye(n, dtype=torch.float64)])
    found = coarse_factors(whole, [0], [4.0])
    (view,) = found.squares.gram_views(found.narrow)
    view.copy_(torch.tril(torch.ones(n, n), -1) * (1 - 2 * (torch.arange(n) % 2)) * (127 * 257 / 2.0**15))
    view.diagonal().fill_(2.0)
    places = found.squares.tiles(-(-found.squares.n // 64))
    module._factor_digits_kernel[(places.total,)](
        found.squares.table, places.owner, places.first, *found._places(), num_warps=8
    )
    (lower,) = found.dense()
    assert torch.equal(torch.tril(lower, -1), torch.tril(view.double(), -1))
    assert_exact(found, [torch.eye(n, dtype=torch.float64)], [4.0])


@pytest.mark.parametrize("count", [2, 5])
def test_the_number_of_launches_does_not_depend_on_how_many_matrices_there_are(count):
    grams = [torch.eye(65, dtype=torch.float64)] * count
    whole = mirrored(grams)
    with counted(run=False) as names:
        coarse_factors(whole, range(count), [2.0] * count).residuals()
    each = ["shift", "diagonal", "column", "diagonal", "factor_digits", "rest", "sum", "sum"]
    assert sorted(names) == sorted(each)
