"""Block Krylov finds the largest eigenvalue from below, and its excess covers what is above."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from spectra import SPECTRA, hadamard

from kappa_fast.backends.base import Factors, Panel, Rung
from kappa_fast.backends.start import gaussian_block
from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.spectrum import bounds
from kappa_fast.spectrum.krylov import WIDTH, Extreme, largest

OFTEN = 0.1  # a failure probability that a simulation can see
BACKEND = TorchBackend(torch.device("cpu"))


@dataclass
class Counting:
    """An operator on dense symmetric matrices that counts its products with each of them."""

    products: dict[int, int]

    def __call__(self, factors, panel):
        for matrix in factors.data:
            self.products[id(matrix)] = self.products.get(id(matrix), 0) + 1
        # As backends do: libraries round differently for blocks that lie otherwise.
        return Panel.pack([m @ x.contiguous() for m, x in zip(factors.data, panel.blocks(), strict=True)])


def wave(matrices) -> Factors:
    rung = Rung("test", "dense", matrices[0].dtype, 2)
    return Factors((rung,) * len(matrices), tuple(m.shape[0] for m in matrices), tuple(matrices))


def constant(noise):
    return lambda which, theta: torch.full_like(theta, noise)


def find(matrices, tolerance=1e-3, noise=None, salt=0) -> list[Extreme]:
    return find_vectors(matrices, tolerance, noise, salt)[0]


def find_vectors(matrices, tolerance=1e-3, noise=None, salt=0) -> tuple[list[Extreme], Panel]:
    factors = wave(matrices)
    noise = noise or constant(2 * factors.rungs[0].unit_roundoff)
    return largest(BACKEND, Counting({}), factors, [b""] * len(matrices), noise, tolerance, salt=salt)


def symmetric(values: torch.Tensor) -> torch.Tensor:
    """A dense symmetric matrix with these eigenvalues, to rounding."""
    n = len(values)
    basis = hadamard(n)
    assert basis is not None
    basis = basis.double() / math.sqrt(n)
    return (basis * values) @ basis.T


def spectrum(name: str, n: int = 192, kappa: float = 1e4) -> torch.Tensor:
    return SPECTRA[name](n, kappa, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_the_largest_eigenvalue_lies_between_theta_and_theta_plus_excess(name, tolerance, dtype):
    (found,) = find([symmetric(spectrum(name)).to(dtype)], tolerance)
    slack = 64 * float(torch.finfo(dtype).eps)
    assert found.converged == (found.excess <= tolerance)
    assert found.theta <= 1 + slack
    assert found.theta * (1 + found.excess) >= 1 - slack


@pytest.mark.parametrize("name", list(SPECTRA))
def test_the_tolerance_is_reached_for_every_kind_of_spectrum(name):
    (found,) = find([symmetric(spectrum(name))], 1e-3)
    assert found.converged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_last_vector_belongs_to_the_largest_eigenvalue(dtype):
    matrix = symmetric(spectrum("geometric")).to(dtype)
    (found,), vectors = find_vectors([matrix], 1e-5)
    assert vectors.data.shape == (192, WIDTH)
    assert vectors.data.dtype == dtype
    vector = vectors.data[:, -1].double()
    assert float(torch.linalg.vector_norm(vector)) == pytest.approx(1, abs=1e-5)
    assert float(vector @ matrix.double() @ vector) == pytest.approx(found.theta, rel=1e-5)


def test_the_basis_of_ritz_vectors_is_orthonormal():
    _, vectors = find_vectors([symmetric(spectrum("log-uniform", kappa=1e12))], 1e-8)
    gram = vectors.data.T @ vectors.data
    assert torch.allclose(gram, torch.eye(gram.shape[0], dtype=gram.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 16, 40])
def test_a_space_that_becomes_invariant_ends_with_the_exact_value(rank):
    values = torch.zeros(96, dtype=torch.float64)
    values[:rank] = torch.linspace(2, 1, rank)
    (found,) = find([symmetric(values)], 1e-9)
    assert found.converged
    assert found.theta == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("n", [32, 33, 40, 48, 100])
def test_a_space_that_fills_everything_leaves_only_rounding(n):
    matrix = torch.randn(n, n, dtype=torch.float64)
    matrix = matrix @ matrix.T
    (found,) = find([matrix], 1e-10)
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    assert found.theta == pytest.approx(top, rel=1e-11)
    assert found.theta * (1 + found.excess) >= top * (1 - 1e-14)


def test_the_identity_takes_one_product():
    counting = Counting({})
    matrix = torch.eye(200, dtype=torch.float64)
    (found,), _ = largest(BACKEND, counting, wave([matrix]), [b""], constant(1e-15), 1e-6, salt=0)
    assert found.converged
    assert found.theta == pytest.approx(1, rel=1e-13)
    assert counting.products[id(matrix)] <= 2


def test_every_matrix_of_a_wave_stops_on_its_own():
    hard, easy = (symmetric(spectrum(name)) for name in ("arithmetic", "one large"))
    counting = Counting({})
    largest(BACKEND, counting, wave([hard, easy]), [b"", b""], constant(1e-15), 1e-4, salt=0)
    assert counting.products[id(easy)] < counting.products[id(hard)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_result_does_not_depend_on_the_wave(dtype):
    matrices = [symmetric(spectrum(name)).to(dtype) for name in SPECTRA]
    matrices += [matrices[0][:100, :100], matrices[1][:33, :33]]
    alone = [find_vectors([m]) for m in matrices]
    together, vectors = find_vectors(matrices)
    backwards, reversed_ = find_vectors(matrices[::-1])
    assert [found for (found,), _ in alone] == together == backwards[::-1]
    for (_, one), *others in zip(alone, vectors.blocks(), reversed(reversed_.blocks()), strict=True):
        assert all(torch.equal(one.data, other) for other in others)


@pytest.mark.parametrize("noise", [1e-12, 1e-6, 1e-2])
def test_noise_of_the_operator_keeps_the_excess_from_becoming_smaller(noise):
    (found,) = find([symmetric(spectrum("one large"))], 1e-15, noise=constant(noise))
    assert noise < found.excess < 1e3 * noise
    assert not found.converged


def test_noise_is_asked_for_by_position_and_value():
    asked: dict[int, set[float]] = {0: set(), 1: set()}

    def noise(which, theta):
        for i, value in zip(which, theta.tolist(), strict=True):
            asked[i].add(value)
        return torch.full_like(theta, 1e-15)

    first, second = find([2 * symmetric(spectrum("one large")), symmetric(spectrum("one large"))], noise=noise)
    assert max(asked[0]) == pytest.approx(first.theta) == pytest.approx(2)
    assert max(asked[1]) == pytest.approx(second.theta) == pytest.approx(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_operator_that_is_not_finite_bounds_nothing(value):
    matrix = symmetric(spectrum("geometric"))
    matrix[3, 4] = value
    broken, sound = find([matrix, symmetric(spectrum("geometric"))])
    assert not broken.converged
    assert broken.excess == math.inf
    assert sound.converged


@pytest.mark.parametrize("exponent", [-60, 60])
def test_the_excess_does_not_depend_on_the_scale(exponent):
    matrix = symmetric(spectrum("geometric"))
    (plain,), (scaled,) = find([matrix]), find([matrix * 2.0**exponent])
    assert scaled.theta == plain.theta * 2.0**exponent
    assert scaled.excess == plain.excess


@pytest.mark.parametrize(
    "values",
    [spectrum("arithmetic", 96), spectrum("clustered", 96), torch.tensor([1.0] + [0.9] * 95).double()],
    ids=["arithmetic", "clustered", "one above a cluster"],
)
def test_the_bound_fails_as_rarely_as_stated(values, monkeypatch):
    monkeypatch.setattr(bounds, "FAILURE", OFTEN)
    drawn = "kappa_fast.backends.torch_backend.gaussian_block"
    monkeypatch.setattr(drawn, lambda n, width, *_: torch.randn(n, width, dtype=torch.float64))
    trials = 60
    found = find([torch.diag(values)] * trials, 3e-2)  # the start has no preferred direction, so any basis will do
    misses = sum(f.theta * (1 + f.excess) < float(values.max()) for f in found)
    assert misses <= OFTEN * trials + 4 * math.sqrt(OFTEN * trials)
    assert any(f.excess > 1e-9 for f in found) or values[1] == values[-1]


def test_start_blocks_depend_on_their_arguments_alone():
    again = gaussian_block(50, 16, 1, b"a")
    torch.manual_seed(99)
    assert torch.equal(gaussian_block(50, 16, 1, b"a"), again)
    others = [gaussian_block(50, 16, 0, b"a"), gaussian_block(50, 16, 2, b"a"), gaussian_block(50, 16, 1, b"b")]
    assert not any(torch.equal(other, again) for other in others)
    assert not torch.equal(gaussian_block(51, 16, 1, b"a")[:50], again)


def test_start_blocks_look_gaussian():
    block = gaussian_block(20_000, 16, 0)
    assert abs(float(block.mean())) < 0.01
    assert float(block.var()) == pytest.approx(1, abs=0.01)
    assert float((block**4).mean()) == pytest.approx(3, abs=0.05)


def test_start_blocks_leave_the_global_random_state_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    gaussian_block(64, 16, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


class Watched(TorchBackend):
    """Keeps what every look was told and what it found."""

    looks: list[tuple[torch.Tensor, torch.Tensor]]

    def ritz(self, columns, coupling, floor=None):
        found = super().ritz(columns, coupling, floor)
        self.looks.append((floor.clone(), found.theta))
        return found


def test_every_look_starts_from_what_the_last_one_at_that_matrix_found():
    backend = Watched(torch.device("cpu"))
    backend.looks = []
    matrices = [symmetric(spectrum(name)) for name in ("geometric", "log-uniform", "arithmetic")]
    largest(backend, Counting({}), wave(matrices), [b""] * 3, constant(1e-15), 1e-8, salt=0)
    known: set[float] = set()
    for floors, thetas in backend.looks:
        for floor, theta in zip(floors.tolist(), thetas.tolist(), strict=True):
            assert math.isnan(floor) if len(known) < len(matrices) else floor in known
            assert not floor > theta * (1 + 1e-14)
        known |= set(thetas.tolist())
    assert len(backend.looks) > 3
    assert len({len(floors) for floors, _ in backend.looks}) > 1
