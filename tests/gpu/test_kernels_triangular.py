"""Under the interpreter, products and solves of a wave are those of each factor, and no worse than the library's."""

import math

import numpy as np
import pytest
import torch
from launches import counted
from spectra import gaussian, prescribed

from kappa_fast.kernels import cholesky as factors
from kappa_fast.kernels import triangular as module
from kappa_fast.kernels.cholesky import Factored
from kappa_fast.kernels.problems import Problems
from kappa_fast.kernels.triangular import Members, backward_solve, forward_solve, lower_product, transposed_product

SIZES = [16, 31, 64, 65, 130, 257]
OPERATIONS = {
    lower_product: lambda lower, x: lower @ x,
    transposed_product: lambda lower, x: lower.T @ x,
    forward_solve: lambda lower, x: torch.linalg.solve_triangular(lower, x, upper=False),
    backward_solve: lambda lower, x: torch.linalg.solve_triangular(lower.T, x, upper=True),
}


@pytest.fixture(params=[pytest.param(True, id="dot"), pytest.param(False, id="outer products", marks=pytest.mark.slow)])
def products(request, monkeypatch):
    chosen = ("sm_90",) if request.param else ()
    monkeypatch.setattr(factors, "WITH_DOT", chosen)
    monkeypatch.setattr(module, "WITH_DOT", chosen)


def wave(lowers):
    """A factored wave whose factors are given; above the diagonal lies NaN."""
    problems = Problems.of([torch.empty(lower.shape) for lower in lowers])
    packed = torch.full((problems.gram_elements,), math.nan, dtype=torch.float64)
    starts, total = factors.diagonal_starts(problems)
    inverses = torch.zeros(total, dtype=torch.float64)
    for view, lower, start in zip(problems.gram_views(packed), lowers, starts.tolist(), strict=True):
        rows, columns = np.tril_indices(lower.shape[0])
        view[rows, columns] = lower[rows, columns]
        for column in range(0, lower.shape[0], 64):
            tile = torch.eye(64, dtype=torch.float64)
            part = lower[column : column + 64, column : column + 64]
            tile[: len(part), : len(part)] = torch.linalg.inv(part)
            inverses[start + 64 * column :][: 64 * 64] = tile.flatten()
    return problems, Factored(packed, inverses, starts, torch.zeros(len(lowers), dtype=torch.int32)), lowers


def lower_of(n, kappa=10.0, seed=0):
    matrix = prescribed("geometric", n, n, kappa, seed=seed).matrix.double()
    return torch.linalg.cholesky(matrix.T @ matrix)


def blocks_of(sizes):
    return [gaussian(n, 16, seed=n) for n in sizes]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_every_block_is_multiplied_or_solved_with_its_own_factor(operation):
    sizes = SIZES if module.WITH_DOT else [31, 65]  # the interpreter takes a step at a time
    problems, found, lowers = wave([lower_of(n, seed=n) for n in sizes])
    blocks = blocks_of(sizes)
    result = operation(problems, found, Members.of(problems), torch.cat(blocks))
    for got, lower, x in zip(result.split(sizes), lowers, blocks, strict=True):
        expected = OPERATIONS[operation](lower, x)
        assert torch.allclose(got, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


@pytest.mark.parametrize("with_dot", [True, False], ids=["widened", "float32"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_a_float32_factor_meets_the_same_blocks(operation, with_dot, monkeypatch):
    sizes = [65, 150]
    problems, found, lowers = wave([lower_of(n, seed=n) for n in sizes])
    monkeypatch.setattr(module, "WITH_DOT", ("sm_90",) if with_dot else ())
    narrow = Factored(found.packed.float(), found.inverses.float(), found.starts, found.info)
    blocks = blocks_of(sizes)
    result = operation(problems, narrow, Members.of(problems), torch.cat(blocks))
    # Widened, only the inverses of diagonal tiles are rounded, and one correction squares what that does.
    error = 1e-10 if with_dot else 1e-5
    for got, lower, x in zip(result.split(sizes), lowers, blocks, strict=True):
        expected = OPERATIONS[operation](lower.float().double(), x)
        assert torch.allclose(got, expected, rtol=0, atol=error * float(expected.abs().max()))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_blocks_may_lie_among_others_in_one_panel(operation):
    sizes = [65, 33]
    problems, found, _ = wave([lower_of(n, seed=n) for n in sizes])
    blocks = blocks_of(sizes)
    alone = operation(problems, found, Members.of(problems), torch.cat(blocks)).split(sizes)
    between = torch.zeros(20, 16).double()
    panel = torch.cat([between, blocks[1], between, blocks[0]])
    out = torch.full_like(panel, 7.0)
    members = Members.of(problems, None, torch.tensor([73, 20]), len(panel))
    assert operation(problems, found, members, panel, out) is out
    assert torch.equal(out[20:53], alone[1])
    assert torch.equal(out[73:], alone[0])
    assert bool((out[:20] == 7).all() and (out[53:73] == 7).all())


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_some_members_in_any_order_give_what_all_give(operation):
    problems, found, _ = wave([lower_of(n, seed=n) for n in SIZES])
    blocks = blocks_of(SIZES)
    together = operation(problems, found, Members.of(problems), torch.cat(blocks)).split(SIZES)
    chosen = [4, 0, 3]
    some = operation(problems, found, Members.of(problems, chosen), torch.cat([blocks[i] for i in chosen]))
    for got, i in zip(some.split([SIZES[i] for i in chosen]), chosen, strict=True):
        assert torch.equal(got, together[i])


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("operation", [forward_solve, backward_solve], ids=lambda f: f.__name__)
def test_a_tile_with_a_large_inverse_is_solved_as_well_as_by_the_library(operation):
    growing = torch.eye(100, dtype=torch.float64)
    growing[:64, :64] -= 0.25 * torch.tril(torch.ones(64, 64, dtype=torch.float64), -1)
    growing[64:, :64] = gaussian(36, 64)
    problems, found, (lower,) = wave([growing])
    matrix = lower if operation is forward_solve else lower.T
    x = matrix @ gaussian(100, 16)  # the solution is small, the products with the inverse that make it are not

    def residual(y):
        return float((matrix @ y - x).abs().max() / (matrix.abs() @ y.abs()).max())

    ours = residual(operation(problems, found, Members.of(problems), x))
    assert ours <= 2 * residual(OPERATIONS[operation](lower, x)) + 8 * 2.0**-53


def test_blocks_of_another_shape_or_dtype_are_refused():
    problems, found, _ = wave([lower_of(20)])
    members = Members.of(problems)
    for block in (gaussian(20, 15), gaussian(21, 16), gaussian(20, 16).float(), gaussian(16, 20).T):
        with pytest.raises(ValueError, match=r"a block must be \(20, 16\), torch.float64, packed, not"):
            lower_product(problems, found, members, block)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_one_launch_serves_any_number_of_matrices(operation):
    nothing = torch.empty(0)
    factored = Factored(nothing, nothing, nothing, nothing)
    for copies in (3, 30):
        problems = Problems.of([torch.empty(n, n) for n in [20, 200] * copies])
        members, blocks = Members.of(problems), torch.zeros(220 * copies, 16).double()
        with counted(run=False) as launches:
            operation(problems, factored, members, blocks)
        assert len(launches) == 1
