"""From a wave of weights to intervals: they hold, are as narrow as asked for, and depend on their matrix alone."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import SPECTRA, contains, cosines, gaussian, growing, kappa_of, prescribed, trained_like

from kappa_fast.backends.torch_backend import CHOLESKY64, TorchBackend
from kappa_fast.spectrum import exact, ladder, search, small
from kappa_fast.spectrum.krylov import Extreme
from kappa_fast.spectrum.ladder import resolve
from kappa_fast.spectrum.polish import Triplets
from kappa_fast.spectrum.resolution import Goal, Resolution

BACKEND = TorchBackend(torch.device("cpu"))
SMALL = 32
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.fixture(autouse=True)
def _small_matrices_climb_too(monkeypatch):
    # Which side is small is a matter of speed; what the ladder promises must hold for every size that it may meet.
    monkeypatch.setattr(ladder, "EXACT_BELOW", SMALL)
    monkeypatch.setattr(small, "eligible", lambda shape, goal: False)


def one(weight, goal) -> Resolution:
    (found,) = resolve(BACKEND, [weight], goal)
    return found


def same(first: Resolution, second: Resolution) -> bool:
    """Bit for bit, with nan equal to nan."""
    pairs = zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True)
    return all(a == b or (a != a and b != b) for a, b in pairs)


def reference(weight):
    """Kappa of the stored entries by a float64 SVD, and the relative error that it may have."""
    values = torch.linalg.svdvals(weight.double())
    kappa = float(values[0] / values[-1])
    return kappa, 1e-14 * kappa


def a_wave():
    return [
        trained_like(100, 64).float(),
        gaussian(64, 200).bfloat16(),
        gaussian(90, 90),
        gaussian(10, 4).half(),
        torch.zeros(40, 40),
        torch.full((50, 40), math.nan),
        gaussian(1, 70),
        prescribed("geometric", 96, 48, 1e9).matrix,
        (1e-39 * gaussian(70, 33)).bfloat16(),
        trained_like(80, 80, 1).float(),
        torch.ones(40, 35, dtype=torch.float64),
    ]


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("kappa", [1, 10, 1e3, 1e6, 1e8])
@pytest.mark.parametrize("shape", [(40, 40), (127, 127), (144, 96), (384, 96)])
def test_the_interval_reaches_the_tolerance_and_holds_kappa(shape, kappa, rtol):
    attainable = 1e-13 * kappa  # of a float64 singular value decomposition
    for i, spectrum in enumerate(SPECTRA):
        matrix = prescribed(spectrum, *shape, kappa, seed=i)
        found = one(matrix.matrix, Goal(rtol))
        assert found.status == "ok", matrix.name
        assert found.half_width <= max(rtol, attainable), matrix.name
        assert found.lower <= found.kappa <= found.upper, matrix.name
        assert contains(found.lower, matrix.kappa, found.upper), matrix.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 6), (20, 7), (48, 48), (33, 130), (200, 70)])
def test_every_dtype_is_ranked_by_its_stored_entries(shape, dtype):
    weight = trained_like(*shape).mul(4).to(dtype)
    found = one(weight, Goal(1e-3))
    kappa, error = reference(weight)
    assert found.lower <= kappa * (1 + error)
    assert found.upper >= kappa * (1 - error)
    assert found.kappa == pytest.approx(kappa, rel=1e-3)
    assert found.sigma_max == pytest.approx(float(torch.linalg.svdvals(weight.double())[0]), rel=1e-3)
    assert found.sigma_max / found.sigma_min == pytest.approx(found.kappa, rel=1e-12)


@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    seed=st.integers(0, 10**6),
    certify=st.booleans(),
    rtol=st.sampled_from([0.1, 1e-3]),
)
def test_random_shapes(m, n, seed, certify, rtol):
    weight = gaussian(m, n, seed).float()
    found = one(weight, Goal(rtol, certify=certify))
    kappa, error = reference(weight)
    assert found.status == "ok"
    assert found.lower <= kappa * (1 + error) + 1e-14
    assert found.upper >= kappa * (1 - error) - 1e-14
    assert found.certified or not certify


@pytest.mark.parametrize(
    ("view", "certify"),
    [
        (view, certify)
        for view in ("transposed", "strided", "sliced", "flipped", "expanded")
        for certify in (False, True)
    ],
)
def test_layouts_do_not_matter(view, certify):
    base = trained_like(150, 60).float()
    stored = {
        "transposed": base.T,
        "strided": base.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
        "sliced": torch.cat([base, base], 1)[:, :60],
        "flipped": base.T.contiguous().T,
        "expanded": base[:, :1].expand(150, 60),
    }[view]
    found = one(stored, Goal(1e-3, certify=certify))
    plain = one(stored.clone(memory_format=torch.contiguous_format), Goal(1e-3, certify=certify))
    assert found.status == plain.status
    assert found.kappa == pytest.approx(plain.kappa, rel=1e-3)
    if view == "expanded":
        assert (found.status, found.lower, found.certified) == ("rank_deficient", math.inf, True)
    else:
        kappa, error = reference(base)
        assert found.lower <= kappa * (1 + error)
        assert found.upper >= kappa * (1 - error)


@pytest.mark.parametrize("certify", [False, True])
def test_a_result_does_not_depend_on_the_wave(certify):
    wave, goal = a_wave(), Goal(1e-3, certify=certify)
    alone = [one(weight, goal) for weight in wave]
    assert all(map(same, resolve(BACKEND, wave, goal), alone))
    assert all(map(same, resolve(BACKEND, wave[::-1], goal), alone[::-1]))
    assert all(map(same, resolve(BACKEND, wave * 2, goal), alone * 2))


def test_the_same_input_gives_the_same_result_whatever_the_random_state():
    goal = Goal(1e-4, certify=True)
    first = resolve(BACKEND, a_wave(), goal)
    torch.manual_seed(12345)
    np.random.seed(1)
    assert all(map(same, resolve(BACKEND, a_wave(), goal), first))


def test_nothing_is_left_behind():
    wave = a_wave()
    copies = [weight.clone() for weight in wave]
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    resolve(BACKEND, wave, Goal(1e-4, certify=True))
    for weight, copy in zip(wave, copies, strict=True):
        assert torch.equal(weight.view(torch.uint8), copy.view(torch.uint8))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state


def test_weights_that_require_grad_are_resolved_without_a_graph():
    weight = gaussian(60, 40).requires_grad_()
    found = one(weight, Goal(1e-3, certify=True))
    assert same(found, one(weight.detach(), Goal(1e-3, certify=True)))
    assert weight.requires_grad
    assert weight.grad is None


def test_no_weights_give_no_results():
    assert resolve(BACKEND, [], Goal(1e-2)) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5000, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_single_column_has_kappa_one(shape, dtype):
    weight = gaussian(*shape).to(dtype)
    found = one(weight, Goal(1e-2))
    assert (found.status, found.kappa, found.lower, found.upper, found.certified) == ("ok", 1, 1, 1, True)
    assert found.sigma_max == found.sigma_min == pytest.approx(float(torch.linalg.vector_norm(weight.double())))
    assert found.sensitivity == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("certify", [False, True])
def test_entries_that_are_not_finite_give_no_number(value, certify):
    weight = gaussian(50, 40)
    weight[7, 3] = value
    found = one(weight, Goal(1e-2, certify=certify))
    assert found.status == "non_finite"
    assert math.isnan(found.kappa)
    assert not found.certified


@pytest.mark.parametrize("certify", [False, True])
def test_scaling_by_a_power_of_two_changes_the_singular_values_and_nothing_else(certify):
    weight, goal = trained_like(120, 50), Goal(1e-3, certify=certify)
    plain = one(2.0**-200 * weight, goal)
    for exponent in (-700, 300, 800):
        found = one(2.0**exponent * weight, goal)
        scale = 2.0 ** (exponent + 200)
        known = found.statistics
        known = dataclasses.replace(known, frobenius=known.frobenius / scale)
        ends = dict(sigma_max=found.sigma_max / scale, sigma_min=found.sigma_min / scale)
        back = dataclasses.replace(found, **ends, statistics=known)
        assert same(back, plain)


def test_transposing_changes_nothing_beyond_the_interval():
    for shape in ((60, 60), (130, 60)):
        weight = trained_like(*shape)
        found, turned = one(weight, Goal(1e-4)), one(weight.T.contiguous(), Goal(1e-4))
        assert max(found.lower, turned.lower) <= min(found.upper, turned.upper)


def test_small_matrices_go_to_the_exact_svd_at_once():
    assert one(gaussian(100, SMALL - 1), Goal(1e-2)).method == "svd64"
    assert one(gaussian(100, SMALL + 64), Goal(1e-2)).method != "svd64"


def test_the_cheapest_rung_that_resolves_is_the_one_that_is_named():
    assert one(gaussian(800, 200).float(), Goal(1e-2)).method == "cholesky32"
    assert one(gaussian(800, 200), Goal(1e-2)).method == "cholesky64"
    assert one(gaussian(200, 200).float(), Goal(1e-2)).method == "lu64"
    assert one(prescribed("geometric", 384, 192, 1e4).matrix.float(), Goal(1e-2)).method == "cholesky64"
    assert one(prescribed("geometric", 384, 192, 1e9).matrix, Goal(1e-2)).method == "qr64"
    assert one(prescribed("one small", 192, 192, 1e12).matrix, Goal(1e-9)).method == "svd64"


def test_element_growth_is_noticed_and_leads_to_the_svd():
    weight = growing(128)
    found = one(weight, Goal(1e-2))
    kappa, error = reference(weight)
    assert found.method == "svd64"
    assert found.lower <= kappa * (1 + error)
    assert found.upper >= kappa * (1 - error)


def test_a_breakdown_of_one_matrix_leaves_the_others_on_their_rung():
    singular = torch.zeros(200, 200, dtype=torch.float64)
    singular[0, 0] = 1
    wave = [gaussian(200, 200), singular, gaussian(200, 200, 1)]
    assert [found.status for found in resolve(BACKEND, wave, Goal(1e-2))] == ["ok", "rank_deficient", "ok"]


def test_what_a_factor_cannot_describe_climbs_before_the_others_search_their_ends(monkeypatch):
    together = []
    original = ladder._resolve_with_factors

    def listening(backend, wave, goal):
        together.append([rung.name for rung in wave.factors.rungs])
        original(backend, wave, goal)

    monkeypatch.setattr(ladder, "_resolve_with_factors", listening)
    steep = prescribed("geometric", 120, 60, 1e9).matrix
    found = resolve(BACKEND, [gaussian(120, 60), steep, gaussian(80, 40, 1)], Goal(1e-2))
    assert together == [["cholesky64", "cholesky64", "qr64"]]
    assert [f.method for f in found] == ["cholesky64", "qr64", "cholesky64"]


def test_no_more_matrices_climb_at_a_time_than_there_is_room_for(monkeypatch):
    """All of a wave may have to, and its first rungs are all that it was cut for."""
    sizes = []
    factor = TorchBackend.factor

    def listening(self, operands, rungs):
        sizes.append([rung.name for rung in rungs])
        return factor(self, operands, rungs)

    monkeypatch.setattr(TorchBackend, "factor", listening)
    monkeypatch.setattr(TorchBackend, "need", lambda self, shape, rung: 3 if rung.name == "qr64" else 2)
    steep = [prescribed("geometric", 120, 60, 1e9, seed=seed).matrix for seed in range(5)]
    found = resolve(BACKEND, [*steep, gaussian(80, 40, 1)], Goal(1e-2))
    # Room for half of 12; the first ones beside the one that does not climb, the others when it is done.
    assert sizes == [6 * ["cholesky64"], 2 * ["qr64"], 2 * ["qr64"], ["qr64"]]
    assert [f.method for f in found] == [*(5 * ["qr64"]), "cholesky64"]
    monkeypatch.setattr(TorchBackend, "need", lambda self, shape, rung: 1000 if rung.name == "qr64" else 1)
    assert resolve(BACKEND, [*steep, gaussian(80, 40, 1)], Goal(1e-2)) == found
    assert sizes[4:] == [6 * ["cholesky64"], *(5 * [["qr64"]])]  # one that needs more than there is goes alone


def test_a_matrix_whose_kappa_exceeds_the_cutoff_is_left_as_soon_as_that_is_proven():
    matrix = prescribed("log-uniform", 384, 192, 1e5)
    tight = one(matrix.matrix, Goal(1e-8))
    left = one(matrix.matrix, Goal(1e-8, cutoff=10))
    assert left.lower > 10
    assert contains(left.lower, matrix.kappa, left.upper)
    assert tight.half_width <= left.half_width


def test_a_cutoff_above_kappa_changes_nothing():
    weight = trained_like(200, 100)
    assert same(one(weight, Goal(1e-4)), one(weight, Goal(1e-4, cutoff=1e9)))


def test_a_tighter_goal_never_contradicts_a_looser_one():
    for seed in range(3):
        weight = trained_like(160, 120, seed).float()
        found = [one(weight, Goal(rtol)) for rtol in (1e-1, 1e-2, 1e-4, 1e-6)]
        assert max(f.lower for f in found) <= min(f.upper for f in found)


def test_the_estimate_lies_in_the_interval_after_a_climb():
    # A lower rung may leave a better lower bound than the last one; the estimate must not fall below it.
    for seed in range(40):
        decades = torch.linspace(0, 5, 69, dtype=torch.float64)
        weight = (gaussian(94, 69, seed) * 10**-decades).float()
        for rtol in (5e-2, 1e-3, 1e-5):
            found = one(weight, Goal(rtol))
            assert found.lower <= found.kappa <= found.upper, (seed, rtol)


def test_orthogonal_matrices_have_kappa_one_within_the_interval():
    for n in (8, 36, 200):
        found = one(cosines(n), Goal(1e-6))
        assert found.kappa == pytest.approx(1, abs=1e-12)
        assert 1 <= found.lower <= found.upper <= 1 + 2e-6


def test_what_broke_down_is_seen_to_be_singular_without_singular_vectors(monkeypatch):
    monkeypatch.setattr(exact, "decompose_svd", None)
    monkeypatch.setattr(exact, "_decompose_doubled_gram", None)
    for shape in ((90, 40), (40, 40)):
        weight = (gaussian(shape[0], 39) * 8).round() @ (gaussian(39, 40, 1) * 8).round()
        found = one(weight, Goal(1e-2))
        assert (found.status, found.upper) == ("rank_deficient", math.inf)
        assert 1e12 < found.lower < math.inf


def test_rounding_never_leaves_kappa_below_one():
    unit = torch.ones(1, dtype=torch.float64)
    end = Extreme(1.0, 1e-3, True)
    found = search.interval(CHOLESKY64, 0.0, end, end, Triplets(1 - 2.0**-53, 1.0, 1.0, unit, unit), 0.0)
    assert found.lower == found.kappa == 1 <= found.upper


def test_every_resolved_matrix_has_a_sensitivity_of_its_storage_dtype():
    wide = trained_like(200, 100)
    spacings = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    found = {dtype: one(wide.to(dtype), Goal(1e-4)).sensitivity for dtype in spacings}
    relative = [found[dtype] / spacings[dtype] for dtype in spacings]
    assert relative == pytest.approx([relative[0]] * 3, rel=0.1)
    assert math.isnan(one(torch.zeros(40, 40), Goal(1e-4)).sensitivity)


def test_half_the_width_is_relative_to_kappa_and_infinite_without_one():
    found = one(trained_like(100, 50), Goal(1e-2))
    assert found.half_width == pytest.approx((found.upper - found.lower) / 2 / found.kappa)
    assert one(torch.zeros(4, 4), Goal(1e-2)).half_width == math.inf


def test_a_default_dtype_of_float64_changes_nothing():
    wave, goal = a_wave(), Goal(1e-3, certify=True)
    before = resolve(BACKEND, wave, goal)
    torch.set_default_dtype(torch.float64)
    try:
        after = resolve(BACKEND, wave, goal)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(same, before, after))


def test_deterministic_algorithms_can_be_demanded():
    wave, goal = a_wave(), Goal(1e-3)
    before = resolve(BACKEND, wave, goal)
    torch.use_deterministic_algorithms(True)
    try:
        after = resolve(BACKEND, wave, goal)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(same, before, after))


def test_small_matrices_are_exact_to_the_last_digits():
    for seed in range(20):
        weight = gaussian(7, 5, seed)
        found, kappa = one(weight, Goal(1e-2)), kappa_of(weight)
        assert contains(found.lower, kappa, found.upper)
        assert found.half_width < 1e-12 * found.kappa


def test_an_upper_bound_below_what_the_weights_attain_is_no_bound():
    unit = torch.ones(1, dtype=torch.float64)
    triplets = Triplets(10.0, 1.0, 9.9, unit, unit)
    end = Extreme(4.0, 0.01, True)  # kappa at most 4.04 by both ends, and 9.9 attained
    assert search.interval(CHOLESKY64, 0.0, end, end, triplets, 0.0).upper == math.inf


def test_a_proven_lower_end_overrules_the_upper_end_of_the_rung_before():
    climber = ladder._Climber(0, torch.float64, None, ())
    climber.keep(Resolution("ok", 4.0, 3.9, 4.1, 4.0, 1.0, "cholesky32"), None)
    climber.keep(Resolution("ok", 10.0, 9.9, 10.1, 10.0, 1.0, "cholesky64"), None)
    assert (climber.best.lower, climber.best.kappa, climber.best.upper) == (9.9, 10.0, 10.1)


def test_columns_that_scaling_made_equal_are_not_called_equal():
    weight = torch.eye(3, dtype=torch.float64) * 1e300
    weight[:, 2] = weight[:, 1]
    weight[2, 2] = 5e-324
    found = one(weight, Goal(1e-2))
    assert (found.status, found.certified) == ("rank_deficient", False)
    assert found.lower < math.inf
