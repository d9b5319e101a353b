"""No interval misses, proven or not, on the matrices that break numerical software."""

import math

import mpmath as mp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import (
    CLASSICS,
    SINGULAR,
    SPECTRA,
    Known,
    classic,
    contains,
    cosines,
    gaussian,
    graded,
    hilbert,
    kahan,
    kappa_of,
    prescribed,
    vandermonde,
)

from kappa_fast.backends.start import gaussian_block
from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.spectrum import ladder, small
from kappa_fast.spectrum.krylov import WIDTH
from kappa_fast.spectrum.ladder import resolve
from kappa_fast.spectrum.resolution import Goal, Resolution

BACKEND = TorchBackend(torch.device("cpu"))
KAPPAS = [1, 1.5, 10, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15]
SHAPES = [(8, 8), (12, 7), (40, 40), (48, 33), (96, 48), (128, 128), (384, 96)]
BEYOND = 1e13  # float64 may take a matrix with a larger kappa for singular, never one with a smaller
both = pytest.mark.parametrize("certify", [False, True], ids=["estimate", "proof"])


@pytest.fixture(autouse=True, params=["batches", "ladder"])
def _small_matrices_climb_too(monkeypatch, request):
    # The truth is known for small matrices; the ladder must hold for them although batches or an SVD would be faster.
    monkeypatch.setattr(ladder, "EXACT_BELOW", 32)
    if request.param == "ladder":
        monkeypatch.setattr(small, "eligible", lambda shape, goal: False)


@pytest.fixture(autouse=True)
def _the_linear_algebra_library_has_nothing_to_complain_about(capfd):
    yield
    assert capfd.readouterr() == ("", "")  # where libraries report arguments that are not finite


def assert_holds(weight: torch.Tensor, kappa: mp.mpf, goal: Goal, name: str) -> Resolution:
    """The interval of a finite matrix contains its kappa, and what is called singular is not told from it."""
    (found,) = resolve(BACKEND, [weight], goal)
    assert found.status in ("ok", "rank_deficient"), name
    assert contains(found.lower, kappa, found.upper), f"{name}: {mp.nstr(kappa, 17)} is outside of {found}"
    if found.status == "rank_deficient":
        assert kappa > BEYOND, name
        assert found.kappa == found.upper == math.inf, name
        assert not found.certified or kappa == mp.inf, name
    else:
        assert found.lower <= found.kappa <= found.upper, name
        assert found.certified or not goal.certify or kappa > BEYOND / 10, name
    return found


def assert_all_hold(known: Known, certify: bool) -> None:
    for rtol in (1e-1, 1e-3, 1e-6):
        assert_holds(known.matrix, known.kappa, Goal(rtol, certify=certify), f"{known.name}, rtol {rtol}")


@both
@pytest.mark.parametrize("spectrum", list(SPECTRA))
@pytest.mark.parametrize("kappa", KAPPAS)
def test_prescribed_spectra(kappa, spectrum, certify):
    for shape in SHAPES[:4]:
        known = prescribed(spectrum, *shape, kappa, seed=int(kappa) % 97)
        assert_holds(known.matrix, known.kappa, Goal(1e-2, certify=certify), known.name)


@pytest.mark.slow
@both
@pytest.mark.parametrize("spectrum", list(SPECTRA))
@pytest.mark.parametrize("shape", SHAPES)
def test_prescribed_spectra_of_all_shapes_and_seeds(shape, spectrum, certify):
    for i, kappa in enumerate(KAPPAS):
        for seed in range(2):
            assert_all_hold(prescribed(spectrum, *shape, kappa, seed=100 * i + seed), certify)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_prescribed_spectra_in_narrow_dtypes(spectrum, dtype, certify):
    shapes = {
        torch.float32: [(40, 40), (96, 48), (12, 7)],
        torch.float16: [(8, 8), (64, 40)],
        torch.bfloat16: [(8, 8), (24, 8)],
    }
    for shape in shapes[dtype]:
        for kappa in (1, 10, 1e3, 1e5):
            known = prescribed(spectrum, *shape, kappa, dtype=dtype)
            assert_holds(known.matrix, known.kappa, Goal(1e-2, certify=certify), known.name)


@both
@pytest.mark.parametrize("name", list(CLASSICS))
def test_classics(name, certify):
    assert_all_hold(classic(name), certify)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["hilbert 8", "kahan 34", "vandermonde 12", "graded both ways", "cosines 34"])
def test_classics_in_narrow_dtypes(name, dtype):
    weight = CLASSICS[name]().to(dtype)
    kappa = kappa_of(weight)
    for certify in (False, True):
        assert_holds(weight, kappa, Goal(1e-2, certify=certify), f"{name} {dtype}")


@both
@pytest.mark.parametrize("name", list(SINGULAR))
def test_singular_matrices_are_called_rank_deficient(name, certify):
    found = assert_holds(SINGULAR[name](), mp.inf, Goal(1e-2, certify=certify), name)
    assert found.status == "rank_deficient"
    # Proven without arithmetic where a column or row is zero or repeated, else bounded from below only.
    assert (found.lower == math.inf) == found.certified
    assert found.certified == (not name.startswith("rank"))
    assert found.certified or found.lower > 1e11


@both
def test_larger_matrices_beyond_float64_are_called_rank_deficient_with_a_lower_bound(certify):
    for weight in (hilbert(60), hilbert(200), vandermonde(100, 80), kahan(200), graded(100, 80, 1, 1e40)):
        found = assert_holds(weight, mp.inf, Goal(1e-2, certify=certify), str(tuple(weight.shape)))
        assert found.status == "rank_deficient"
        assert not found.certified
        assert 1e11 < found.lower < 1e17


@both
@pytest.mark.parametrize("n", [2, 5, 16, 25, 28, 31, 33, 36])
def test_orthogonal_matrices(n, certify):
    # kappa - 1 is of the size of rounding: here every bound on rounding errors must be right.
    rotation = torch.linalg.qr(gaussian(n, n)).Q
    for matrix in (cosines(n), rotation, rotation.float(), rotation[:, : n - 1]):
        assert_holds(matrix, kappa_of(matrix), Goal(1e-6, certify=certify), f"orthogonal {tuple(matrix.shape)}")


@pytest.mark.slow
def test_orthogonal_matrices_of_all_small_sizes():
    for n in range(2, 37):
        for matrix in (cosines(n), torch.linalg.qr(gaussian(n, n)).Q.float(), torch.linalg.qr(gaussian(3 * n, n)).Q):
            kappa = kappa_of(matrix)
            for certify in (False, True):
                assert_holds(matrix, kappa, Goal(1e-6, certify=certify), f"orthogonal {tuple(matrix.shape)}")


SIZES = [
    (torch.float64, 1e-300),
    (torch.float64, 1e300),
    (torch.float64, 1e-320),
    (torch.float64, 1e-160),
    (torch.float64, 1e160),
    (torch.float32, 1e-38),
    (torch.float32, 1e-42),
    (torch.float32, 1e30),
    (torch.bfloat16, 1e-38),
    (torch.bfloat16, 1e-39),
    (torch.bfloat16, 1e38),
    (torch.float16, 1e-6),
    (torch.float16, 1e4),
]


@both
@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_extreme_sizes(dtype, size, certify):
    for shape in ((8, 8), (40, 33)):
        weight = (gaussian(*shape).clamp(-1, 1) * size).to(dtype)
        found = assert_holds(weight, kappa_of(weight), Goal(1e-3, certify=certify), f"{shape} {dtype} {size}")
        assert found.status == "ok"


@both
def test_singular_values_keep_the_units_of_the_weights(certify):
    for size in (1e-300, 1e-30, 1e30, 1e300):
        weight = gaussian(50, 40) * size
        (found,) = resolve(BACKEND, [weight], Goal(1e-6, certify=certify))
        values = torch.linalg.svdvals(weight / size)
        assert found.sigma_max == pytest.approx(float(values[0]) * size, rel=1e-5)
        assert found.sigma_min == pytest.approx(float(values[-1]) * size, rel=1e-5)


@both
@pytest.mark.parametrize("shape", [(3, 3), (40, 40), (80, 40)])
@pytest.mark.parametrize("smallest", [1e-20, 1e-100, 1e-160, 1e-200, 1e-300, 5e-324])
def test_diagonal_matrices_with_a_kappa_that_float64_squares_cannot_hold(smallest, shape, certify):
    weight = torch.eye(*shape, dtype=torch.float64)
    weight[-1 if shape[0] == shape[1] else shape[1] - 1, shape[1] - 1] = smallest
    assert_holds(weight, 1 / mp.mpf(smallest), Goal(1e-2, certify=certify), f"diagonal {shape} {smallest}")


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diagonal_matrices_in_narrow_dtypes(dtype, certify):
    for decades in (10, 20, 36):
        weight = torch.zeros(160, 50)
        weight[:50] = torch.diag(10.0 ** -torch.linspace(0, decades, 50))
        stored = weight.to(dtype)
        kappa = mp.mpf(float(stored[0, 0])) / mp.mpf(float(stored[49, 49]))
        assert_holds(stored, kappa, Goal(1e-3, certify=certify), f"diagonal {decades} {dtype}")


@both
def test_entries_that_scaling_cannot_keep(certify):
    weight = torch.diag(torch.tensor([1e300, 1.0, 1e-20], dtype=torch.float64))
    assert_holds(weight, mp.mpf(1e300) / mp.mpf(1e-20), Goal(1e-2, certify=certify), "three orders of the range")


@both
def test_rows_of_zeros_do_not_make_a_tall_matrix_singular(certify):
    known = prescribed("geometric", 48, 40, 1e3)
    padded = torch.cat([torch.zeros(30, 40, dtype=torch.float64), known.matrix])
    assert_holds(padded, known.kappa, Goal(1e-3, certify=certify), "padded")


@both
def test_very_tall_matrices(certify):
    known = prescribed("geometric", 48, 40, 1e5)
    tall = known.matrix.repeat(1000, 1)  # every singular value grows by the same factor
    assert_holds(tall, known.kappa, Goal(1e-3, certify=certify), "tall")
    assert_holds(tall[:, :5].float(), kappa_of(known.matrix[:, :5].float()), Goal(1e-3, certify=certify), "thin")


@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    decades=st.floats(0, 14),
    exponent=st.integers(-900, 900),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2]),
    certify=st.booleans(),
)
def test_small_graded_matrices_of_any_shape_and_scale(m, n, seed, decades, exponent, dtype, certify):
    weight = graded(m, n, 10 ** (decades / 2), 10 ** (decades / 2), seed).to(dtype)
    if dtype == torch.float64:
        weight = weight * 2.0**exponent
    assert_holds(weight, kappa_of(weight), Goal(1e-2, certify=certify), f"{(m, n)} {dtype} {seed} {decades}")


@given(
    spectrum=st.sampled_from(list(SPECTRA)),
    m=st.sampled_from([32, 36, 40, 64, 80, 96, 128]),
    n=st.integers(2, 96),
    decades=st.floats(0, 15),
    seed=st.integers(0, 10**6),
    rtol=st.floats(1e-6, 1e-1),
    certify=st.booleans(),
)
def test_prescribed_spectra_of_any_shape(spectrum, m, n, decades, seed, rtol, certify):
    known = prescribed(spectrum, max(m, n), min(m, n), 10**decades, seed=seed)
    assert_holds(known.matrix, known.kappa, Goal(rtol, certify=certify), known.name)


@both
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_nothing_can_be_hidden_from_the_start_blocks_of_other_weights(end, certify):
    # Blocks that depended on the shape alone were known to whoever writes a file: it could hide its extreme vectors.
    n = 100
    starts = torch.cat([gaussian_block(n, WIDTH, salt) for salt in range(4)], dim=1)
    basis = torch.linalg.qr(torch.cat([starts, gaussian(n, n - starts.shape[1])], dim=1)).Q.flip(1)
    values = torch.linspace(2, 1, n, dtype=torch.float64)
    values[0] = 2.6 if end == "top" else 0.7
    weight = (torch.linalg.qr(gaussian(200, n, 1)).Q * values) @ basis.T
    (found,) = resolve(BACKEND, [weight], Goal(1e-2, certify=certify))
    kappa = float(values.max() / values.min())
    assert found.certified == certify
    assert found.lower * (1 - 1e-9) <= kappa <= found.upper * (1 + 1e-9)
