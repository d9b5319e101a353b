"""Under the interpreter, eigenvalues and resolvents of block tridiagonal operators are those of dense algebra."""

import math

import pytest
import torch
from spectra import gaussian
from tridiagonal import SPECTRA, a_wave, dense

from kappa_fast.kernels import twins
from kappa_fast.kernels.ritz import (
    Tridiagonal,
    eigh_in_batches,
    largest_eigenvalue,
    leading_vectors,
    reach,
    svd_in_batches,
)

THREE = pytest.param(3, marks=pytest.mark.slow)


@pytest.mark.parametrize("blocks", [1, pytest.param(2, marks=pytest.mark.slow), THREE])
def test_theta_is_an_upper_bound_of_the_largest_eigenvalue_to_ten_digits(blocks):
    t = Tridiagonal.of(*a_wave(blocks))
    exact = torch.linalg.eigvalsh(dense(t))[:, -1]
    assert torch.equal(exact, twins.largest_eigenvalue(t))
    error = largest_eigenvalue(t) / exact - 1
    assert float(error.min()) > -1e-14
    assert float(error.max()) < 1e-10


@pytest.mark.parametrize(
    "closeness", [0.0, 1e-10, 1.0, *(pytest.param(each, marks=pytest.mark.slow) for each in (1e-4, 0.5))]
)
def test_a_floor_changes_how_theta_is_found_and_not_what_it_is(closeness):
    t = Tridiagonal.of(*a_wave(2))
    exact = torch.linalg.eigvalsh(dense(t))[:, -1]
    floor = exact * (1 - closeness)
    floor[1] = math.nan
    error = largest_eigenvalue(t, floor) / exact - 1
    assert float(error.min()) > -1e-14
    assert float(error.max()) < 1e-10


@pytest.mark.parametrize("blocks", [1, THREE])
def test_reach_is_the_last_row_of_the_resolvent(blocks):
    t = Tridiagonal.of(*a_wave(blocks))
    theta = largest_eigenvalue(t)
    gaps = torch.tensor([1e-6, 1e-3, 0.1, 1.0, 30.0], dtype=torch.float64).expand(t.members, -1)
    values = theta[:, None] * (1 + gaps)
    found = reach(t, values)
    for i, full in enumerate(dense(t)):
        for value, got in zip(values[i], found[i].tolist(), strict=True):
            shifted = value * torch.eye(len(full), dtype=torch.float64) - full
            start = torch.eye(len(full), 16, dtype=torch.float64)
            want = float(torch.linalg.matrix_norm(t.coupling[i] @ torch.linalg.solve(shifted, start)[-16:]))
            assert got == pytest.approx(want, rel=1e-6, abs=1e-11 * want + 1e-17)


def test_many_values_take_several_programs_and_one_below_the_spectrum_is_not_a_number():
    t = Tridiagonal.of(*a_wave(2, ("even",)))
    theta = float(largest_eigenvalue(t))
    values = torch.linspace(1.01, 3, 37, dtype=torch.float64)[None] * theta
    found = reach(t, values)
    assert torch.equal(found[:, ::9], reach(t, values[:, ::9].contiguous()))
    assert (found[0, :-1] > found[0, 1:]).all()
    assert math.isnan(float(reach(t, torch.tensor([[0.9 * theta]], dtype=torch.float64))))


@pytest.mark.parametrize(
    ("blocks", "names"), [(2, ("steep",)), pytest.param(3, tuple(SPECTRA), marks=pytest.mark.slow)]
)
def test_leading_vectors_are_orthonormal_and_hold_those_of_dense_algebra(blocks, names):
    t = Tridiagonal.of(*a_wave(blocks, names))
    found = leading_vectors(t, largest_eigenvalue(t))
    want = torch.linalg.eigh(dense(t))[1][:, :, -16:]
    assert float((found.mT @ found - torch.eye(16)).abs().max()) < 1e-13
    for name, x, y in zip(names, found, want, strict=True):
        assert abs(float(x[:, -1] @ y[:, -1])) == pytest.approx(1, abs=1e-4), name
        if name != "lonely":  # beside an eigenvalue of 1e7 the others are not known to float64
            assert float((1 - torch.linalg.vector_norm(x.T @ y[:, -4:], dim=0)).max()) < 5e-2, name


def test_what_is_not_finite_has_no_eigenvalue_and_harms_no_other():
    columns, coupling = a_wave(2, ("even", "steep"))
    columns[1][0, 3, 2] = math.nan
    t = Tridiagonal.of(columns, coupling)
    theta = largest_eigenvalue(t)
    assert math.isnan(float(theta[0]))
    alone = Tridiagonal.of([c[1:] for c in columns], coupling[1:])
    assert torch.equal(theta[1:], largest_eigenvalue(alone))
    assert torch.equal(leading_vectors(t, theta)[1:], leading_vectors(alone, theta[1:]))


def test_a_negative_operator_has_no_largest_eigenvalue_to_speak_of():
    columns, coupling = a_wave(1, ("even",))
    assert math.isnan(float(largest_eigenvalue(Tridiagonal.of([-columns[0]], coupling))))


def test_batches_of_the_library_leave_out_what_is_not_finite():
    matrices = torch.stack([gaussian(16, 16, 1), gaussian(16, 16, 2)])
    matrices = matrices + matrices.mT
    broken = matrices.clone()
    broken[0, 0, 0] = math.inf
    values, vectors = eigh_in_batches(broken)
    assert torch.allclose(vectors[1] @ torch.diag(values[1]) @ vectors[1].T, matrices[1])
    assert not vectors[0].any()
    u, s, v = svd_in_batches(broken)
    assert torch.allclose(u[1] @ torch.diag(s[1]) @ v[1].T, matrices[1])
    assert s[0].isnan().all()
