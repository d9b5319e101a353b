"""Under the interpreter, factors of a wave are as good as the library's, and one that fails ends no other."""

import math

import numpy as np
import pytest
import torch
import triton.language as tl
from launches import counted
from spectra import gaussian, prescribed

from kappa_fast.kernels import cholesky as module
from kappa_fast.kernels.cholesky import BLOCK, cholesky
from kappa_fast.kernels.problems import Problems

SIZES = [1, 2, 31, 63, 64, 65, 129, 257, 330]


def definite(n, kappa=1e3, seed=0):
    """A^T A with condition number kappa^2, float64."""
    a = gaussian(n, n, seed) if n < 2 else prescribed("geometric", n, n, kappa, seed=seed).matrix.double()
    return a.T @ a


def packed_of(grams, dtype=torch.float64):
    """Problems of these sizes and their lower triangles, with NaN everywhere else."""
    problems = Problems.of([torch.empty(g.shape[0], g.shape[0]) for g in grams])
    packed = torch.full((problems.gram_elements,), math.nan, dtype=dtype)
    for view, g in zip(problems.gram_views(packed), grams, strict=True):
        rows, columns = np.tril_indices(g.shape[0])
        view[rows, columns] = g[rows, columns].to(dtype)
    return problems, packed


def factor(grams, dtype=torch.float64):
    problems, packed = packed_of(grams, dtype)
    found = cholesky(problems, packed)
    return [torch.tril(view) for view in problems.gram_views(packed)], found


@pytest.fixture(params=[pytest.param(True, id="dot"), pytest.param(False, id="outer products", marks=pytest.mark.slow)])
def products(request, monkeypatch):
    monkeypatch.setattr(module, "WITH_DOT", ("sm_90",) if request.param else ())


@pytest.mark.usefixtures("products")
def test_factors_of_ragged_sizes_are_as_good_as_the_librarys():
    grams = [definite(n, seed=n) for n in SIZES]
    factors, found = factor(grams)
    assert found.info.tolist() == [0] * len(SIZES)
    for g, lower in zip(grams, factors, strict=True):
        library = torch.linalg.cholesky(g)
        floor = 2.0**-53 * float(g.abs().max())
        ours, theirs = (float((x @ x.T - g).abs().max()) for x in (lower, library))
        assert ours <= 2 * theirs + 8 * floor


def assert_as_good_as_the_library(grams, dtype):
    factors, found = factor(grams, dtype)
    assert not found.info.any()
    assert found.inverses.dtype == dtype
    for g, lower in zip(grams, factors, strict=True):
        library = torch.linalg.cholesky(g.to(dtype)).double()
        floor = float(torch.finfo(dtype).eps) * float(g.abs().max())
        ours, theirs = (float((x @ x.T - g).abs().max()) for x in (lower.double(), library))
        assert ours <= 2 * theirs + 4 * floor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_super_panels_after_the_first_go_where_they_belong(dtype, monkeypatch):
    # Three of them: two updates behind them, the second of which once went to wrong addresses.
    monkeypatch.setattr(module, "SUPER", tl.constexpr(128))
    assert_as_good_as_the_library([definite(n, 30.0, seed=n) for n in (290, 64)], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_program_of_600_columns_does_its_part(dtype):
    assert_as_good_as_the_library([definite(n, 30.0, seed=n) for n in (600, 290, 64)], dtype)


def test_tf32_taken_three_times_is_off_by_no_more_than_is_said():
    # What the interpreter multiplies in float32 is split by a device, see TF32X3_ERROR.
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(200_000, generator=generator, dtype=torch.float32) + 1 for _ in range(2))

    def tf32(values):  # to nearest, ties away from zero
        return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def split(values):
        high = tf32(values)
        return high.double(), tf32(values - high).double()

    (x1, x2), (y1, y2) = split(x), split(y)
    exact = x.double() * y.double()
    worst = float(((x1 * y1 + x1 * y2 + x2 * y1 - exact).abs() / exact).max())
    assert module.TF32X3_ERROR / 8 <= worst <= module.TF32X3_ERROR


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("growth", [0.2, 0.25])
def test_a_diagonal_tile_with_a_large_inverse_loses_nothing(growth):
    # The inverse of such a tile has entries up to (1 + growth)^62: without the step of correction the rows below, which
    # are products with it, would be off by that much.
    truth = torch.eye(130, dtype=torch.float64)
    truth[:64, :64] -= growth * torch.tril(torch.ones(64, 64, dtype=torch.float64), -1)
    truth[64:, :64] = gaussian(66, 64)
    g = truth @ truth.T
    (lower,), found = factor([g])
    assert int(found.info) == 0
    library = torch.linalg.cholesky(g)
    ours, theirs = (float((x @ x.T - g).abs().max()) for x in (lower, library))
    assert ours <= 2 * theirs + 8 * 2.0**-53 * float(g.abs().max())


SLOW_PIVOTS = [pytest.param(at, marks=pytest.mark.slow) for at in (1, 63, 100)]


@pytest.mark.parametrize("at", [0, 64, 199, *SLOW_PIVOTS])
def test_the_first_pivot_that_is_not_positive_is_named(at):
    g = torch.eye(200, dtype=torch.float64)
    g[at, at] = -1
    g[199, 199] = -1
    _, found = factor([definite(70), g, definite(130)])
    assert found.info.tolist() == [0, at + 1, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter computes with
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_what_is_no_pivot_is_no_success(value):
    g = definite(80)
    g[70, 70] = value
    _, found = factor([g])
    assert int(found.info) == 71


def test_a_factor_does_not_depend_on_its_wave():
    grams = [definite(n, seed=n) for n in (65, 140, 20)]
    alone = [factor([g])[0][0] for g in grams]
    for order in ([0, 1, 2], [2, 0, 1]):
        together, _ = factor([grams[i] for i in order])
        for i, lower in zip(order, together, strict=True):
            assert torch.equal(lower, alone[i])


def test_the_inverses_are_those_of_the_diagonal_tiles():
    grams = [definite(n, 30, seed=n) for n in (64, 150)]
    factors, found = factor(grams)
    for lower, start in zip(factors, found.starts.tolist(), strict=True):
        for step in range(0, lower.shape[0], BLOCK.value):
            tile = lower[step : step + 64, step : step + 64]
            offset = start + step * 64
            inverse = found.inverses[offset : offset + 64 * 64].view(64, 64)[: tile.shape[0], : tile.shape[0]]
            eye = torch.eye(tile.shape[0], dtype=torch.float64)
            assert torch.allclose(inverse @ tile, eye, rtol=0, atol=1e-11)


def test_launches_depend_on_the_largest_size_alone():
    for copies in (3, 30):
        problems, packed = packed_of([torch.eye(n, dtype=torch.float64) for n in [600, 64, 130] * copies])
        with counted(run=False) as launches:
            cholesky(problems, packed)
        # Ten columns of tiles, nine with something below, two super-panels.
        assert sorted(launches) == ["column"] * 9 + ["diagonal"] * 10 + ["trailing"] * 2
