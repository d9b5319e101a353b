"""Proofs on the wave, under the interpreter: they hold against wrong estimates, and no tighter ones are owed."""

import math
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from launches import counted
from spectra import contains, gaussian, prescribed, singular_values, trained_like

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

import triton.language as tl  # noqa: E402

from kappa_fast.backends import triton_proofs  # noqa: E402
from kappa_fast.backends.torch_backend import TorchBackend  # noqa: E402
from kappa_fast.backends.triton_backend import TritonBackend  # noqa: E402
from kappa_fast.kernels import cholesky, coarse, shifted  # noqa: E402
from kappa_fast.spectrum import certify, ladder  # noqa: E402
from kappa_fast.spectrum.certify import certify_wave  # noqa: E402
from kappa_fast.spectrum.ladder import resolve  # noqa: E402
from kappa_fast.spectrum.resolution import Goal, Resolution  # noqa: E402

CPU = torch.device("cpu")
TRITON, TORCH = TritonBackend(CPU), TorchBackend(CPU)


def a_wave():
    """Ragged shapes, four dtypes, kappa from 1 to 1e7; the last is beyond slices by its dtype."""
    return [
        trained_like(70, 33, 1).bfloat16(),
        prescribed("log-uniform", 40, 9, 1e3, seed=2).matrix.float().T,
        prescribed("one small", 20, 20, 1e4, seed=3).matrix.float(),
        prescribed("clustered", 30, 12, 1e7, seed=4).matrix.float(),
        prescribed("geometric", 24, 24, 8, seed=5).matrix.clamp(-400, 400).to(torch.float8_e4m3fn),
        gaussian(50, 8, 6).half(),
        prescribed("geometric", 30, 20, 1e3, seed=7).matrix,
    ]


@cache
def kappas_of_the_wave():
    """Exact to 50 digits, in the order of a_wave()."""
    return kappas(TORCH.prepare(a_wave()))


def kappas(operands):
    found = []
    for a in operands:
        values = singular_values(a.tensor.double())
        found.append(values[0] / values[-1])
    return found


def estimates(operands, high=1.0, low=1.0):
    """The ends that a rung would have found, times factors."""
    made = []
    for a in operands:
        values = torch.linalg.svdvals(a.tensor.double())
        made.append(Resolution("ok", 1.0, 1.0, 1.0, high * float(values[0]), low * float(values[-1]), "some rung"))
    return made


@pytest.fixture
def no_other_proof(monkeypatch):
    """Only what the wave proves counts."""
    monkeypatch.setattr(certify, "certified", lambda backend, a, found, rtol: found)


ENDS = [(1, 1), (1, 3), (0.3, 1), (0.999, 1.001), (3, 0.4), (1e3, 1e-3)]
TRIALS = [(rtol, *ends) for ends in ENDS for rtol in (1e-2, 1e-4)]
AT_ONCE = [(1e-2, 1, 1)]


@pytest.mark.usefixtures("no_other_proof")
@pytest.mark.parametrize(
    ("rtol", "high", "low"),
    [trial if trial in AT_ONCE else pytest.param(*trial, marks=pytest.mark.slow) for trial in TRIALS],
)
def test_no_proof_of_the_wave_misses_whatever_the_estimates_were(rtol, high, low):
    operands = TRITON.prepare(a_wave())
    found = certify_wave(TRITON, operands, estimates(operands, high, low), rtol)
    for entry, kappa in zip(found, kappas_of_the_wave(), strict=True):
        assert not entry.certified or (math.isfinite(entry.upper) and contains(1.0, kappa, entry.upper))
    proven = [entry.certified for entry in found]
    if (high, low) == (1, 1):
        assert proven == [True, True, rtol > 1e-3, False, True, True, False]
        ratios = [float(entry.upper / kappa) for entry, kappa in zip(found, kappas_of_the_wave(), strict=True)]
        assert all(1 <= ratio <= 1 + 1.5 * rtol for ratio, sure in zip(ratios, proven, strict=True) if sure)


@pytest.fixture
def wide_factors(monkeypatch):
    """The signs of the shifted Gram matrices that are factored in float64."""
    signs, original = [], triton_proofs.SliceProducts.residuals

    def residuals(self, chosen, shifts, sign):
        signs.extend([sign] * len(chosen))
        return original(self, chosen, shifts, sign)

    monkeypatch.setattr(triton_proofs.SliceProducts, "residuals", residuals)
    return signs


@pytest.mark.usefixtures("no_other_proof")
def test_the_upper_end_takes_a_coarse_factor_where_rtol_leaves_room_for_it(wide_factors):
    operands = TRITON.prepare([gaussian(70, 33, 1).bfloat16(), trained_like(90, 20, 2).bfloat16()])
    for rtol, upper_ends in ((1e-2, 0), (1e-3, 2)):
        wide_factors.clear()
        found = certify_wave(TRITON, operands, estimates(operands), rtol)
        assert wide_factors.count(1) == 2
        assert wide_factors.count(-1) == upper_ends
        for entry, kappa in zip(found, kappas(operands), strict=True):
            assert entry.certified
            assert contains(1.0, kappa, entry.upper)
            assert entry.upper < float(kappa) * (1 + rtol)


@pytest.mark.slow
@pytest.mark.usefixtures("no_other_proof")
@pytest.mark.parametrize("rtol", [1e-3, 1e-2, 4e-2, 0.4])
def test_a_narrower_rtol_never_proves_less_with_coarse_factors(rtol):
    operands = TRITON.prepare([gaussian(70, 33, 1).bfloat16(), trained_like(90, 20, 2).bfloat16()])
    for high in (1.0, 0.99, 1 - 0.0025 / 2, 0.97):
        narrow, wide = (certify_wave(TRITON, operands, estimates(operands, high), x) for x in (rtol / 10, rtol))
        assert all(x.upper <= y.upper for x, y in zip(narrow, wide, strict=True))


@pytest.mark.usefixtures("no_other_proof")
@pytest.mark.parametrize("planted", [False, True])
def test_a_coarse_factor_that_lost_an_update_proves_nothing_wrong(planted, monkeypatch):
    # G = I + e e^T / 4 has the largest eigenvalue 1 + n / 4, its first 128 columns have 1 + 32. Between these it is the
    # update behind the super-panel alone that breaks a factor down.
    n = 150
    for module in (cholesky, shifted, coarse):
        monkeypatch.setattr(module, "SUPER", tl.constexpr(128))
    original = cholesky.launch

    def lossy(kernel, *arguments, **options):
        if kernel is not cholesky._trailing_kernel or options["PRODUCTS"] != "tf32":
            original(kernel, *arguments, **options)

    monkeypatch.setattr(cholesky, "launch", lossy)
    if planted:  # and a residual that is not measured
        monkeypatch.setattr(
            triton_proofs.SliceProducts, "coarse_residuals", lambda self, chosen, bounds: [(0.0, 1.0)] * len(chosen)
        )
    operands = TRITON.prepare([torch.cat([torch.eye(n), torch.full((1, n), 0.5)]).bfloat16()])
    (found,) = estimates(operands, math.sqrt(0.75), math.sqrt(0.998 / 0.75))
    widening = certify.widenings(1.0)[0]
    assert 33 < found.sigma_max**2 * (1 + widening) < 1 + n / 4
    assert 0.99 < found.sigma_min**2 * (1 - widening) < 1  # so that the lower end makes up for nothing
    (entry,) = certify_wave(TRITON, operands, [found], 1.0)
    assert entry.certified
    assert contains(1.0, math.sqrt(1 + n / 4), entry.upper) != planted


def test_what_the_wave_cannot_prove_is_proved_alone():
    operands = TRITON.prepare(a_wave())
    found = certify_wave(TRITON, operands, estimates(operands), 1e-2)
    alone = certify_wave(TORCH, operands, estimates(operands), 1e-2)
    assert all(entry.certified for entry in found)
    assert [entry.upper for entry in found][3] == alone[3].upper
    assert [entry.upper for entry in found][6] == alone[6].upper


def test_the_distance_of_the_slices_enters_both_ends(monkeypatch):
    """Slices that hold another matrix than the weights and say how far it is."""
    original = triton_proofs._near_grams

    def distant(operands, which, limits, kind, read):
        far = [TORCH.prepare([a.tensor.double() * 1.05])[0].tensor for a in operands]
        moved = [type(a)(x.float(), 0, True, 1.0) for a, x in zip(operands, far, strict=True)]
        found, places = original(moved, which, limits, kind, read)
        extra = torch.stack([torch.linalg.matrix_norm(operands[i].tensor.double()) * 0.05 for i in which])
        return replace(found, squared=(found.squared.sqrt() + extra * (1 + 1e-6)) ** 2), places

    monkeypatch.setattr(triton_proofs, "_near_grams", distant)
    monkeypatch.setattr(certify, "certified", lambda backend, a, found, rtol: found)
    operands = TRITON.prepare([prescribed("geometric", 60, 4, 1.5, seed=1).matrix.float()])
    (kappa,) = kappas(operands)
    (found,) = certify_wave(TRITON, operands, estimates(operands), 0.5)
    assert found.certified
    assert contains(1.0, kappa, found.upper)
    # A matrix 5% larger has the same kappa. Beyond rtol it is the distance: 1.22 and 1.31 if it were added to one end.
    assert found.upper > float(kappa) * 1.38


@pytest.mark.slow
def test_proofs_do_not_depend_on_the_wave():
    operands = TRITON.prepare(a_wave())
    together = certify_wave(TRITON, operands, estimates(operands), 1e-2)
    for i in (0, 2, 5):
        (alone,) = certify_wave(TRITON, [operands[i]], [estimates(operands)[i]], 1e-2)
        assert alone.certified
        assert alone.upper == together[i].upper


def test_rank_takes_them_and_intervals_hold():
    found = resolve(TRITON, a_wave(), Goal(1e-2, certify=True))
    for entry, kappa in zip(found, kappas_of_the_wave(), strict=True):
        assert entry.certified
        assert entry.half_width <= 1e-2
        assert contains(entry.lower, kappa, entry.upper)


@pytest.mark.slow
def test_launches_do_not_depend_on_how_many_matrices_are_proved():
    launches = []
    for count in (2, 9):
        operands = TRITON.prepare([gaussian(20, 6, seed).bfloat16() for seed in range(count)])
        founds = estimates(operands)
        with counted() as names:
            found = certify_wave(TRITON, operands, founds, 1e-2)
        assert all(entry.certified for entry in found)
        launches.append(len(names))
    assert launches[0] == launches[1]


def test_each_level_takes_those_that_are_near_enough():
    weights = [gaussian(60, 8, 1).bfloat16(), gaussian(60, 8, 2).float(), gaussian(60, 8, 3).bfloat16()]
    operands = TRITON.prepare(weights)
    (found,) = TRITON.exact_products(operands, 0, [math.inf] * 3)
    assert found.which == (0, 1, 2)
    assert all(x < 0.5 * found.distances[1] for x in (found.distances[0], found.distances[2]))
    assert found.roundings == [0, 0, 0]
    limits = [2 * found.distances[0], 0.5 * found.distances[1], 2 * found.distances[2]]
    (chosen,) = TRITON.exact_products(operands, 0, limits)
    assert chosen.which == (0, 2)
    assert chosen.distances == [found.distances[0], found.distances[2]]
    assert TRITON.exact_products(operands, 0, [0.0, 0.0, math.nan]) == []
    (closer,) = TRITON.exact_products(operands, 1, limits)
    assert closer.which == (0, 1, 2)
    assert TRITON.exact_products(operands, 3, limits) is None


@pytest.fixture
def products_taken(monkeypatch):
    """The digits and bits of all products that proofs have made, and not found from the first rung."""
    kinds, original = [], triton_proofs._near_grams

    def near(operands, which, limits, kind, read):
        found = original(operands, which, limits, kind, read)
        kinds.extend([kind] * (0 if found is None else len(found[1])))
        return found

    monkeypatch.setattr(triton_proofs, "_near_grams", near)
    return kinds


@pytest.mark.usefixtures("no_other_proof")
def test_proofs_take_the_products_of_the_first_rung_and_no_others(products_taken):
    operands = TRITON.prepare([gaussian(90, 20, 1).bfloat16(), gaussian(60, 12, 2).bfloat16()])
    TRITON.factor(operands, [TRITON.rungs((90, 20), torch.bfloat16, proofs=True)[0]] * 2)
    founds = estimates(operands)
    (alone,) = certify_wave(TRITON, operands[1:], founds[1:], 1e-2)
    assert alone.certified
    assert not products_taken
    (same,) = certify_wave(TRITON, operands[1:], founds[1:], 1e-2)
    assert products_taken == [(2, 8)]
    assert same == alone


@pytest.mark.slow
@pytest.mark.usefixtures("no_other_proof")
def test_the_first_rung_leaves_its_products_to_the_proofs(products_taken, monkeypatch):
    monkeypatch.setattr(ladder, "EXACT_BELOW", 32)
    wave = [trained_like(130, 34, 1).bfloat16(), gaussian(40, 90, 2).bfloat16(), gaussian(60, 40, 3).half()]
    found = resolve(TRITON, wave, Goal(1e-2, certify=True))
    assert [entry.method for entry in found] == ["bytes2", "bytes2", "weights16"]
    assert all(entry.certified for entry in found)
    for entry, a in zip(found, wave, strict=True):
        values = singular_values(a.double())
        assert contains(entry.lower, max(values) / min(values), entry.upper)
    assert products_taken in ([(3, 7)], [(2, 8)])  # of the one in float16
    alone = [resolve(TRITON, [a], Goal(1e-2, certify=True))[0] for a in wave[:1]]
    assert alone == found[:1]


def test_what_the_first_rung_keeps_is_let_go(monkeypatch):
    operands = TRITON.prepare([gaussian(60, 40, 3).bfloat16()])
    rungs = TRITON.rungs((60, 40), torch.bfloat16, proofs=True)
    TRITON.factor(operands, rungs[:1])
    assert set(operands[0].cache) == {"exact"}
    (products,) = TRITON.exact_products(operands, 0, [math.inf])
    assert products.which == (0,)
    assert not operands[0].cache


def test_infinite_distances_prove_nothing():
    operands = TRITON.prepare([gaussian(20, 6, 1).float()])
    (found,) = estimates(operands)
    (products,) = TRITON.exact_products(operands, 1, [math.inf])
    products.distances = [math.inf]
    assert certify._prove_from_products(products, [found], 1e-2) == {}
