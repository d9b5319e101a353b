"""The plain twins of the kernels take what these take, and are right themselves."""

import inspect
import math

import pytest
import torch
from spectra import gaussian
from tridiagonal import a_wave, dense

from kappa_fast.kernels import apply, cholesky, gram, orthogonal, panel, quantize, ritz, triangular, twins
from kappa_fast.kernels.problems import Problems
from kappa_fast.kernels.ritz import Tridiagonal

FILES = (quantize, gram, cholesky, triangular, panel, orthogonal, ritz, apply)
NAMES = [name for name, f in vars(twins).items() if inspect.isfunction(f) and f.__module__ == twins.__name__]
PUBLIC = [name for name in NAMES if name[0] != "_"]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_twin_takes_what_its_kernel_takes(name):
    (original,) = [
        vars(file)[name] for file in FILES if getattr(vars(file).get(name), "__module__", "") == file.__name__
    ]
    assert inspect.signature(getattr(twins, name)) == inspect.signature(original)


def test_the_digits_are_those_of_the_kernels():
    matrices = [gaussian(70, 33).float(), gaussian(40, 40, 1).bfloat16().T, torch.zeros(3, 2), 1e-40 * torch.ones(4, 2)]
    problems = Problems.of(matrices)
    peaks = quantize.column_peaks(problems)
    assert torch.equal(twins.column_peaks(problems), peaks)
    for count, bits in ((1, 7), (2, 7), (4, 7), (2, 8)):
        found, twin = (room.quantize(problems, peaks, count, None, bits) for room in (quantize, twins))
        for made, wanted in zip(found.dense(problems), twin.dense(problems), strict=True):
            assert torch.equal(made, wanted)
        assert torch.allclose(found.residual, twin.residual, rtol=1e-12, atol=0)


def test_the_gram_matrices_are_products_of_what_the_digits_say():
    matrices = [gaussian(60, 20).bfloat16(), gaussian(30, 30, 1).bfloat16()]
    problems = Problems.of(matrices)
    slices = twins.quantize(problems, twins.column_peaks(problems), 4)
    for packed in (twins.gram_of_slices(problems, slices), twins.gram_of_weights(problems)):
        for a, view in zip(matrices, problems.gram_views(packed), strict=True):
            assert torch.allclose(torch.tril(view), torch.tril(a.double().T @ a.double()), rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="use gram_of_slices"):
        twins.gram_of_weights(Problems.of([gaussian(3, 2).float()]))
    with pytest.raises(ValueError, match="needs the result for the earlier slices"):
        twins.gram_of_slices(problems, slices, low=3)


def test_a_factor_is_one_and_a_failure_is_told():
    good = gaussian(90, 70)
    problems = Problems.of([torch.empty(70, 70), torch.empty(5, 5)])
    packed = torch.zeros(problems.gram_elements, dtype=torch.float64)
    first, second = problems.gram_views(packed)
    first.copy_(good.T @ good)
    second.copy_(torch.diag(torch.tensor([1.0, 1, -1, 1, 1])))
    found = twins.cholesky(problems, packed)
    lower = torch.tril(first)
    assert found.info.tolist() == [0, 3]
    assert torch.allclose(lower @ lower.T, good.T @ good)
    tiles = found.inverses[: 2 * 64 * 64].view(2, 64, 64)
    assert torch.allclose(tiles[0] @ lower[:64, :64], torch.eye(64, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(tiles[1, :6, :6] @ lower[64:, 64:], torch.eye(6, dtype=torch.float64), atol=1e-12)


def test_a_basis_spans_what_is_long_enough():
    w = gaussian(40, 16)
    w[:, 3] = w[:, 4]
    q, b = twins.orthonormalized(panel.Rows.of([40], w.device), w, torch.tensor([1e-9]))
    assert torch.allclose(q @ b, w, atol=1e-12)
    lengths = (q.T @ q).diagonal()
    assert torch.allclose(q.T @ q, torch.diag(lengths), atol=1e-12)
    assert lengths.round().sum() == 15


def test_ritz_values_are_those_of_dense_algebra():
    t = Tridiagonal.of(*a_wave(2))
    full = dense(t)
    theta = twins.largest_eigenvalue(t)
    vectors = twins.leading_vectors(t, theta)[:, :, -1:]
    assert torch.allclose(full @ vectors, theta[:, None, None] * vectors, rtol=0, atol=1e-6 * float(theta.max()))
    values = theta[:, None] * torch.tensor([0.5, 1.5], dtype=torch.float64)
    found = twins.reach(t, values)
    assert bool(torch.isnan(found[:, 0]).all())
    assert torch.allclose(found[:, 1], ritz.reach(t, values)[:, 1], rtol=1e-9)
    assert math.isnan(float(twins.largest_eigenvalue(Tridiagonal(-t.diagonal, 0 * t.upper, t.coupling))[0]))
