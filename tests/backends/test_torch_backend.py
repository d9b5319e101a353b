"""Every operation of the torch backend agrees with its plain float64 twin, for ragged sizes, dtypes and layouts."""

import math
from dataclasses import replace

import pytest
import torch
from spectra import gaussian, graded, growing, prescribed
from torch_operands import BACKEND, UNIT, close, operand, wide

from kappa_fast.backends import get_backend
from kappa_fast.backends.base import Panel, Rung
from kappa_fast.backends.torch_backend import CHOLESKY32, CHOLESKY64, LU64, QR64
from kappa_fast.errors import BackendError
from kappa_fast.spectrum import ladder
from kappa_fast.spectrum.krylov import KrylovBasis

SHAPES = [(33, 33), (127, 33), (129, 127), (513, 129), (700, 513), (1500, 260)]
STORED = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def factored(a, rung):
    factors = BACKEND.factor([a], [rung])
    assert factors.data[0] is not None
    return factors


def panel(*blocks):
    return Panel.pack(blocks)


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_the_torch_backend_goes_by_these_names(name):
    backend = get_backend(name, torch.device("cpu"))
    assert (backend.name, backend.device) == ("torch", torch.device("cpu"))


def test_an_unknown_backend_is_refused_with_the_names_that_work():
    with pytest.raises(BackendError, match="'numpy' is unknown; choose 'auto', 'torch' or 'triton'"):
        get_backend("numpy", torch.device("cpu"))


LAYOUTS = {
    "column-major": lambda w: w.T.contiguous().T,
    "every other column": lambda w: torch.stack([w, torch.zeros_like(w)], dim=2)[:, :, 0],
    "at an odd address": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(9, 9), (30, 7), (7, 30)])
def test_equal_weights_have_equal_digests_and_lie_the_same_way(shape, dtype, layout):
    weight = gaussian(*shape).to(dtype)
    plain, moved = operand(weight), operand(LAYOUTS[layout](weight))
    assert BACKEND.digests([plain]) == BACKEND.digests([moved])
    assert moved.tensor.stride() == plain.tensor.stride()
    assert moved.tensor.data_ptr() % 64 == 0
    assert torch.equal(moved.tensor, plain.tensor)


def test_any_change_of_content_dtype_or_shape_changes_the_digest():
    weight = gaussian(12, 10)
    changed = weight.clone()
    changed[11, 9] = torch.nextafter(changed[11, 9], torch.tensor(9.0).double())
    signed = torch.zeros(12, 10)
    signed[3, 4] = -0.0
    different = [weight, changed, weight.T, weight.view(10, 12), weight.view(6, 20), weight.float(), weight.bfloat16()]
    digests = BACKEND.digests([operand(w) for w in [*different, torch.zeros(12, 10), signed]])
    assert len(set(digests)) == len(digests)
    assert all(len(d) == 32 for d in digests)


@pytest.mark.parametrize("dtype", [*STORED, *FLOAT8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (40, 7), (7, 40)])
def test_a_prepared_matrix_is_tall_and_has_the_values_of_the_weight(shape, dtype):
    weight = gaussian(*shape).to(dtype)
    a = operand(weight)
    assert a.shape == (max(shape), min(shape))
    stored = weight.double()
    assert torch.equal(
        wide(a) * 2.0**a.exponent, stored if a.tensor.shape == shape and shape[0] != shape[1] else stored.T
    )
    assert a.finite
    assert a.exact
    assert a.peak == float(stored.abs().max()) * 2.0**-a.exponent


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 9)])
def test_entries_of_common_size_are_used_where_they_lie(shape):
    weight = gaussian(*shape).float()
    assert operand(weight).tensor.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_columns_of_a_square_matrix_are_contiguous(layout):
    weight = gaussian(9, 9)
    weight = weight.T if layout == "columns" else weight
    assert operand(weight).tensor.stride() == (1, 9)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float64, 1e-300),
        (torch.float64, 1e300),
        (torch.float64, 5e-324),
        (torch.float32, 1e-38),
        (torch.float32, 1e-44),
        (torch.float32, 1e30),
        (torch.bfloat16, 1e-39),
        (torch.bfloat16, 1e37),
        (torch.float16, 6e-8),
    ],
)
def test_extreme_sizes_are_scaled_by_a_power_of_two_without_rounding(dtype, size):
    weight = (gaussian(8, 5).clamp(-3, 3).mul(4).round() * 0.25).mul(size).to(dtype)
    a = operand(weight)
    assert a.exact
    assert 0.5 <= a.peak < 1
    half = a.exponent // 2
    assert torch.equal(wide(a) * 2.0**half * 2.0 ** (a.exponent - half), weight.double())


def test_entries_that_scaling_pushes_out_of_range_are_noticed():
    weight = torch.ones(4, 3, dtype=torch.float64)
    weight[0, 0], weight[1, 1] = 1e300, 1e-300
    assert not operand(weight).exact


def test_narrow_weights_keep_float32_unless_it_cannot_hold_them():
    tiny = torch.full((4, 3), 1e-30, dtype=torch.float32)
    assert operand(tiny).tensor.dtype == torch.float32
    spread = tiny.clone()
    spread[0, 0] = 1e30
    spread[1, 1] = 1e-42
    assert operand(spread).tensor.dtype == torch.float64
    assert operand(spread).exact


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, value) for dtype in [*STORED, torch.float8_e5m2] for value in (math.nan, math.inf, -math.inf)]
    + [(torch.float8_e4m3fn, math.nan)],  # which has no infinity
)
def test_entries_that_are_not_finite_are_noticed(dtype, value):
    weight = gaussian(6, 4)
    weight[2, 3] = value
    assert not operand(weight.to(dtype)).finite


def test_a_weight_that_requires_grad_is_prepared_without_a_graph():
    a = operand(gaussian(6, 4).requires_grad_())
    assert not a.tensor.requires_grad


RUNGS = [CHOLESKY32, CHOLESKY64, QR64, LU64]


@pytest.mark.parametrize(("shape", "rung"), [(s, r) for s in SHAPES for r in RUNGS if (s[0] == s[1]) == (r is LU64)])
def test_product_and_solve_are_those_of_the_gram_matrix(shape, rung):
    n, unit = shape[1], rung.unit_roundoff
    a = operand(prescribed("geometric", *shape, 10).matrix)
    factors, x = factored(a, rung), gaussian(n, 16).to(rung.dtype)
    gram = wide(a).T @ wide(a)
    product, solution = BACKEND.product(factors, panel(x)).data, BACKEND.solve(factors, panel(x)).data
    assert product.dtype == solution.dtype == rung.dtype
    assert close(product, gram @ x.double(), 40 * n, unit)
    assert close(solution, torch.linalg.solve(gram, x.double()), 100 * 40 * n, unit)


@pytest.mark.parametrize(("shape", "rung"), [(s, r) for s in SHAPES for r in RUNGS if (s[0] == s[1]) == (r is LU64)])
def test_departure_measures_how_far_the_factor_is_from_the_matrix(shape, rung):
    a = operand(prescribed("geometric", *shape, 10).matrix)
    factors, x = factored(a, rung), gaussian(shape[1], 16).to(rung.dtype)
    own = BACKEND.departure([a], factors, panel(x)).data
    assert float(own.abs().max()) <= 1000 * math.sqrt(shape[1]) * rung.unit_roundoff * float(x.abs().max())

    # Of 1.5 A instead of A: M = (1.5^power - 1) I.
    other = replace(a, tensor=1.5 * wide(a))
    if rung is LU64:  # keeps the matrix that it applies
        factors = replace(factors, data=((other.tensor, *factors.data[0][1:]),))
    moved = BACKEND.departure([other], factors, panel(x)).data
    assert close(moved, (1.5**rung.power - 1) * x.double(), 1000 * math.sqrt(shape[1]), rung.unit_roundoff)


@pytest.mark.parametrize(("tolerance", "dtype"), [(1e-2, torch.float32), (1e-5, torch.float64)])
def test_products_are_computed_in_float32_only_where_the_tolerance_leaves_room(tolerance, dtype):
    a = operand(prescribed("geometric", 129, 129, 10).matrix.float())
    (rung,) = BACKEND.rungs(a.shape, torch.float32)
    assert rung.product_dtype(tolerance) == dtype
    x = gaussian(129, 16).to(dtype)
    product = BACKEND.product(factored(a, rung), panel(x)).data
    assert product.dtype == dtype
    assert close(product, wide(a).T @ (wide(a) @ x.double()), 40 * 129, UNIT[dtype])


def test_float64_weights_know_no_quick_product():
    (rung,) = BACKEND.rungs((64, 64), torch.float64)
    assert rung.product_dtype(0.5) == torch.float64


def test_a_factorization_that_breaks_down_is_none_and_the_others_go_on():
    singular, sound = torch.zeros(40, 40, dtype=torch.float64), gaussian(40, 40)
    singular[0, 0] = 1
    tall = torch.zeros(60, 40, dtype=torch.float64)
    tall[0, 0] = 1
    for rung, matrices, broken in (
        (LU64, (singular, sound), [True, False]),
        (CHOLESKY64, (tall, gaussian(60, 40)), [True, False]),
        (QR64, (gaussian(60, 40), tall), [False, True]),
    ):
        factors = BACKEND.factor([operand(m) for m in matrices], [rung] * len(matrices))
        assert [f is None for f in factors.data] == broken


def test_a_float32_factor_of_a_matrix_beyond_its_reach_shows_a_large_departure():
    a = operand(prescribed("log-uniform", 192, 96, 1e3).matrix.float())
    factors = BACKEND.factor([a], [CHOLESKY32])
    if factors.data[0] is not None:
        departure = BACKEND.departure([a], factors, panel(torch.randn(96, 16)))
        assert float(torch.linalg.vector_norm(departure.data)) > 1e-3


def test_element_growth_shows_in_the_departure():
    a = operand(growing(56))
    departure = BACKEND.departure([a], factored(a, LU64), panel(gaussian(56, 16)))
    assert float(departure.data.abs().max()) > 0.1


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_apply_multiplies_in_float64_and_measures_the_matrix(shape, stored, turned):
    weight = graded(*shape, 1e3, 1e3).to(stored)
    a = operand(weight.T.contiguous() if turned else weight)
    x = gaussian(shape[1], 12).float()
    images, (norm,) = BACKEND.apply([a], panel(x))
    image = images.data
    assert image.dtype == torch.float64
    error = (image - wide(a) @ x.double()).abs()
    assert bool((error <= shape[1] * 2.0**-53 * (wide(a).abs() @ x.double().abs())).all())
    assert float(norm) == pytest.approx(float(torch.linalg.vector_norm(wide(a))), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_normal_applies_the_gram_matrix(shape, dtype):
    a = operand(gaussian(*shape).float())
    x = gaussian(shape[1], 4).to(dtype)
    image = BACKEND.normal([a], panel(x)).data
    assert image.dtype == dtype
    assert close(image, wide(a).T @ (wide(a) @ x.double()), 20 * math.sqrt(shape[0]), UNIT[dtype])


def extended(basis, block, scale=0.0):
    return BACKEND.extend(panel(basis), panel(block), torch.tensor([scale], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [33, 127, 513])
def test_extend_splits_a_block_into_what_lies_in_the_basis_and_what_does_not(n, dtype):
    basis = torch.linalg.qr(gaussian(n, 20)).Q.to(dtype)
    block = (1e4 * basis.double() @ gaussian(20, 6) + gaussian(n, 6, 1)).to(dtype)
    split, unit = extended(basis, block), UNIT[dtype]
    coefficients, new, coupling = split.coefficients[0], split.new.data.double(), split.coupling[0]
    assert split.new.data.dtype == dtype
    assert coefficients.dtype == coupling.dtype == torch.float64
    assert close(basis.double() @ coefficients + new @ coupling, block.double(), 60, unit)
    assert float((basis.double().T @ new).abs().max()) <= 100 * unit
    assert float((new.T @ new - torch.eye(6, dtype=torch.float64)).abs().max()) <= 100 * unit
    assert float(split.scale) == pytest.approx(float(coefficients.abs().max()))


@pytest.mark.parametrize("share", [1e-3, 1e-7, 1e-11])
def test_what_is_nearly_cancelled_is_still_orthogonal_to_the_basis(share):
    basis = torch.linalg.qr(gaussian(200, 48)).Q
    block = basis @ gaussian(48, 6) + share * gaussian(200, 6, 1)
    new = extended(basis, block).new.data
    assert float((basis.T @ new).abs().max()) <= 1e-14


@pytest.mark.parametrize("rank", [0, 1, 5, 16])
def test_extend_keeps_as_many_directions_as_rise_above_rounding(rank):
    basis = torch.linalg.qr(gaussian(60, 8)).Q
    block = gaussian(60, rank) @ gaussian(rank, 16, 1) + 1e-12 * gaussian(60, 16, 2)
    split = extended(basis, block, 1e6)
    new, coupling = split.new.data, split.coupling[0]
    kept = (coupling != 0).any(dim=1)
    assert int(kept.sum()) == rank
    assert not bool(new[:, ~kept].any())
    assert torch.allclose(new.T @ new, torch.diag(kept.double()), rtol=0, atol=1e-13)
    rest = block - basis @ (basis.T @ block)
    assert float((new @ coupling - rest).abs().max()) < 1e-8
    assert float(split.scale) == 1e6


def test_extend_finds_nothing_in_a_block_that_is_not_finite():
    split = extended(torch.linalg.qr(gaussian(20, 4)).Q, torch.full((20, 4), math.nan, dtype=torch.float64))
    assert not bool(torch.isfinite(split.scale))
    assert not bool(split.new.data.any())
    assert not bool(split.coupling.any())


def test_combine_svd_and_norms_are_those_of_every_block():
    blocks = [gaussian(n, 5, seed=n) for n in (7, 40, 5)]
    wave = panel(*blocks)
    coefficients = gaussian(15, 2).reshape(3, 5, 2)
    left, values, right = BACKEND.svd(wave)
    for i, block in enumerate(blocks):
        assert torch.allclose(BACKEND.combine(wave, coefficients).blocks()[i], block @ coefficients[i])
        assert torch.allclose(BACKEND.norms(wave)[i], torch.linalg.vector_norm(block, dim=0))
        assert torch.allclose(values[i], torch.linalg.svdvals(block))
        assert torch.allclose(left.blocks()[i] * values[i] @ right[i].T, block)
        assert torch.allclose(BACKEND.orthonormalize(wave).blocks()[i].abs(), torch.linalg.qr(block).Q.abs())


def test_a_panel_gives_back_the_blocks_that_went_in():
    blocks = [gaussian(n, 3, seed=n) for n in (4, 1, 9)]
    wave = panel(*blocks)
    assert all(torch.equal(a, b) for a, b in zip(wave.blocks(), blocks, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(wave.take([2, 0]).blocks(), [blocks[2], blocks[0]], strict=True))
    assert wave.take([0, 1, 2]) is wave
    assert torch.equal(wave.take([2, 1, 0]).data, torch.cat(blocks[::-1]))
    assert torch.equal(wave.columns(1).beside(wave.columns(0, 1)).data, wave.data[:, [1, 2, 0]])
    spread = wave.spread(torch.tensor([[1.0], [2.0], [3.0]]))
    assert spread.flatten().tolist() == [1.0] * 4 + [2.0] + [3.0] * 9


@pytest.mark.parametrize("which", [range(0, 60, 2), range(59, -1, -1), [7, 3, *range(20, 58, 2), 4, 5]])
def test_a_panel_gives_back_blocks_from_many_places(which):
    blocks = [gaussian(i % 5 + 1, 3, seed=i) for i in range(60)]
    chosen = panel(*blocks).columns(1).take(list(which))
    assert chosen.rows == tuple(len(blocks[i]) for i in which)
    assert torch.equal(chosen.data, torch.cat([blocks[i][:, 1:] for i in which]))


def lanczos(values, width, blocks, seed=0):
    """Block columns of T and the coupling behind it, for diag(values), by the backend's own steps."""
    wave = KrylovBasis.begin(BACKEND, [len(values)], [b""], torch.float64, width, salt=seed)
    for _ in range(blocks):
        wave.expand(BACKEND, lambda block: Panel(values[:, None] * block.data, block.rows))
    return wave


def test_ritz_is_the_eigendecomposition_of_the_projection():
    values = torch.linspace(0.1, 1, 60, dtype=torch.float64)
    wave = lanczos(values, 4, 3)
    ritz, basis = BACKEND.ritz(wave.columns, wave.coupling), wave.filled.data
    projected = basis.T @ (values[:, None] * basis)
    theta, vectors = torch.linalg.eigh(projected)
    assert float(ritz.theta) == pytest.approx(float(theta[-1]), rel=1e-12)
    span = ritz.vectors(3)[0]
    assert torch.allclose(span @ span.T, vectors[:, -3:] @ vectors[:, -3:].T, rtol=0, atol=1e-9)
    gaps = torch.tensor([[1e-3, 1.0]], dtype=torch.float64)
    for gap, reach in zip(gaps[0], ritz.reach(gaps)[0], strict=True):
        resolvent = torch.linalg.inv(torch.eye(12).double() * theta[-1] * (1 + gap) - projected)
        expected = torch.linalg.matrix_norm(wave.coupling[0] @ resolvent[-4:, :4])
        assert float(reach) == pytest.approx(float(expected), rel=1e-9)


def test_ritz_of_a_projection_that_is_not_finite_is_none():
    column = torch.full((1, 4, 4), math.nan, dtype=torch.float64)
    assert bool(torch.isnan(BACKEND.ritz([column], torch.zeros(1, 4, 4, dtype=torch.float64)).theta))


def binades(a):
    return torch.where(a == 0, 0.0, 2.0 ** a.abs().log2().floor())


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_binades_are_the_literal_sums(shape, stored):
    a = operand(gaussian(*shape).to(stored))
    left, right = gaussian(a.shape[0], 3, 1) ** 2, gaussian(a.shape[1], 3, 2) ** 2
    (sums,) = BACKEND.weighted_binades([a], panel(left), panel(right))
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx(
        torch.einsum("ij,ik,jk->k", binades(wide(a)) ** 2, left, right).tolist(), rel=1e-5
    )


@pytest.mark.parametrize("stored", [*STORED, *FLOAT8])
@pytest.mark.parametrize("shape", [(64, 64), (65, 64), (200, 64), (2000, 64)])
def test_the_ladder_climbs_in_precision_and_its_workspace_covers_the_costliest_factor(shape, stored):
    rungs = BACKEND.rungs(shape, stored)
    assert all(isinstance(rung, Rung) for rung in rungs)
    assert [r.unit_roundoff for r in rungs] == sorted((r.unit_roundoff for r in rungs), reverse=True)
    assert rungs[-1].dtype == torch.float64
    assert all(r.dtype == torch.float64 for r in rungs) or stored != torch.float64
    assert BACKEND.workspace(shape, stored) >= 8 * shape[1] ** 2 + 8 * shape[0] * shape[1]


def test_the_second_departure_of_lu_bounds_a_matrix_that_is_far_from_normal():
    # M = A R^-1 - I is about w u^T with u^T w = 0 beside one small singular value: ||M^2|| says nothing of ||M||.
    n, kappa = 96, 1e12
    values = torch.linspace(1, 0.1, n, dtype=torch.float64)
    values[-1] = 1 / kappa
    a = operand((torch.linalg.qr(gaussian(n, n)).Q * values) @ torch.linalg.qr(gaussian(n, n, 1)).Q)
    factors = factored(a, LU64)
    eye = torch.eye(n, dtype=torch.float64)
    whole = torch.cat([BACKEND.departure([a], factors, panel(eye[:, j : j + 16])).data for j in range(0, n, 16)], dim=1)
    (bound,) = ladder._measure_departures(BACKEND, [ladder._Climber(0, torch.float64, a, (LU64,))], factors, 1e-9)
    size = float(torch.linalg.matrix_norm(whole, 2))
    assert float(torch.linalg.matrix_norm(whole @ whole)) < size**2 / 2
    assert 0.9 * size < bound < 10 * size
