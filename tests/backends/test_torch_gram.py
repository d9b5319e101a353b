"""Gram matrices and Cholesky factors of the torch backend, and what is kept of them for proofs."""

import math
from dataclasses import replace

import pytest
import torch
from spectra import gaussian
from torch_operands import BACKEND, UNIT, close, operand, wide

from kappa_fast.backends import torch_backend, torch_gram
from kappa_fast.backends.torch_backend import KEPT
from kappa_fast.backends.torch_gram import gram_in_chunks
from kappa_fast.machine.torch_state import undisturbed
from kappa_fast.spectrum import certify, shifted
from kappa_fast.spectrum.resolution import Resolution

SHAPES = [(33, 33), (127, 33), (129, 127), (513, 129), (700, 513), (1500, 260)]
STORED = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gram_matrix_fills_its_lower_triangle(shape, dtype, stored):
    a = operand(gaussian(*shape).to(stored))
    (g,) = BACKEND.gram([a], dtype)
    assert g.dtype == dtype
    assert close(torch.tril(g), torch.tril(wide(a).T @ wide(a)), 4 * math.sqrt(shape[0]), UNIT[dtype])


ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@ONEDNN
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 1), (300, 256), (256, 257), (1030, 600)])
def test_the_gram_matrix_is_the_same_where_onednn_multiplies(shape, turned, stored, monkeypatch):
    monkeypatch.setattr(torch_gram, "by_onednn", lambda: True)
    weight = gaussian(*shape).to(stored)
    weight = weight.T.contiguous().T if turned else weight
    g = torch_gram.gram(weight, torch.float32)
    exact = weight.double().T @ weight.double()
    assert g.dtype == torch.float32
    assert close(torch.tril(g), torch.tril(exact), 4 * math.sqrt(shape[0]), UNIT[torch.float32])


@ONEDNN
@pytest.mark.parametrize("n", [33, 481, 700, 1030])
def test_factors_are_the_same_where_onednn_multiplies(n, monkeypatch):
    monkeypatch.setattr(torch_gram, "by_onednn", lambda: True)
    g = gaussian(n + 20, n)
    g = (g.T @ g + n * torch.eye(n, dtype=torch.float64)).float()
    factor = torch.tril(g) + torch.triu(torch.full_like(g, math.nan), 1)
    assert torch_gram.cholesky(factor)
    assert torch.equal(factor, torch.tril(factor))
    assert close(factor.double() @ factor.double().T, g.double(), 8 * math.sqrt(n), UNIT[torch.float32])
    g[n - 1, n - 1] = -1
    assert not torch_gram.cholesky(g)


@ONEDNN
def test_sums_of_onednn_err_no_more_than_those_of_the_blas(monkeypatch):
    """It adds term by term, and a sum of thousands of terms would err several times as much."""
    a = gaussian(6000, 96).float()
    exact = torch.tril(a.double().T @ a.double())
    errors = []
    for way in (True, False):
        monkeypatch.setattr(torch_gram, "by_onednn", lambda way=way: way)
        errors.append(float(torch.linalg.matrix_norm(torch.tril(torch_gram.gram(a, torch.float32)).double() - exact)))
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("onednn", [pytest.param(True, marks=ONEDNN), False])
def test_many_sums_of_one_sign_do_not_err_more_and_more(onednn, monkeypatch):
    """Every addition of sums of equal entries is rounded the same way: 4096 of them in a row err by 1e-4."""
    monkeypatch.setattr(torch_gram, "by_onednn", lambda: onednn)
    monkeypatch.setattr(torch_gram, "GRAM_CHUNK_BYTES", 4096 * 32 * 4)
    m = 4096 * 256
    worst = 0.0
    for value in (1.0078125, 1.3671875, 1.5859375, 1.9140625):  # multiples of 1/128, so that squares are exact
        a = torch.full((m, 32), value, dtype=torch.bfloat16)
        g = torch.tril(torch_gram.gram(a, torch.float32)).double()
        worst = max(worst, float((g[5, 3] / (m * value * value) - 1).abs()))
    assert worst < 2e-5


@ONEDNN
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_onednn_multiplies_in_full_whatever_the_caller_has_set(scale, monkeypatch):
    """Columns of zeros, columns that differ by a factor of 1e6, and a process that asks for bfloat16 products."""
    monkeypatch.setattr(torch_gram, "by_onednn", lambda: True)
    a = gaussian(600, 300) * torch.logspace(0, -6, 300, dtype=torch.float64) * scale
    a[:, 7] = 0
    a = a.float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"), undisturbed():
            g = torch.tril(torch_gram.gram(a, torch.float32)).double()
    finally:
        torch.set_float32_matmul_precision(before)
    size = a.double().abs()
    assert ((g - torch.tril(a.double().T @ a.double())).abs() <= 600 * UNIT[torch.float32] * (size.T @ size)).all()
    assert (g[:, 7] == 0).all()


@ONEDNN
def test_onednn_multiplies_only_where_the_blas_is_the_slower_one(monkeypatch):
    asked = []
    monkeypatch.setattr(torch_gram, "_add_strips", lambda *given: asked.append(given))
    a = gaussian(60, 40).float()
    for narrow in (False, True):
        monkeypatch.setattr(torch_gram, "mkl_is_narrow", lambda narrow=narrow: narrow)
        torch_gram.gram(a, torch.float32)
        assert len(asked) == narrow
    torch_gram.gram(a, torch.float64)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    torch_gram.gram(a, torch.float32)
    assert len(asked) == 1


@pytest.mark.parametrize("chunk", [7, 32, 1000])
def test_the_gram_matrix_in_chunks_is_the_gram_matrix(chunk):
    a = operand(gaussian(300, 270).bfloat16())
    (g,) = BACKEND.gram([a], torch.float64, chunk=chunk)
    assert close(torch.tril(g), torch.tril(wide(a).T @ wide(a)), 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 33, 127, 513, 700, 1030])
def test_cholesky_factors_in_place_and_clears_what_is_above(n, dtype):
    g = gaussian(n + 20, n)
    g = (g.T @ g + n * torch.eye(n, dtype=torch.float64)).to(dtype)
    factor = torch.tril(g) + torch.triu(torch.full_like(g, math.nan), 1)  # above the diagonal nothing may be read
    assert BACKEND.cholesky([factor]) == [True]
    assert torch.equal(factor, torch.tril(factor))
    assert close(factor.double() @ factor.double().T, g.double(), 8 * math.sqrt(n), UNIT[dtype])


@pytest.mark.parametrize("at", [0, 40, 300, 599])
def test_cholesky_says_where_a_pivot_is_not_positive(at):
    definite = torch.eye(600, dtype=torch.float64)
    indefinite = definite.clone()
    indefinite[at, at] = -1
    assert BACKEND.cholesky([indefinite, definite]) == [False, True]


def test_cholesky_refuses_what_is_not_a_number():
    assert BACKEND.cholesky([torch.full((40, 40), math.nan, dtype=torch.float64)]) == [False]


@pytest.mark.parametrize("n", [1, 5, 128, 129, 300, 520, 700])
@pytest.mark.parametrize("chunk", [31, 256])
def test_blocks_cover_the_lower_triangle_of_a_gram_matrix_in_chunks(n, chunk):
    a = operand(gaussian(n + 9, n))
    (g,) = BACKEND.gram([a], torch.float64, chunk=chunk)
    torch.testing.assert_close(torch.tril(g), torch.tril(wide(a).T @ wide(a)), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_a_gram_matrix_is_kept_for_the_proof_once(dtype, turned):
    weight = gaussian(400, 150).to(dtype)
    a = operand(weight.T if turned else weight)
    usual, first = (BACKEND.rungs(a.shape, dtype, proofs=proofs)[0] for proofs in (False, True))
    assert first.name == usual.name
    assert (usual.gram, first.gram) == (None, torch.float64)
    BACKEND.factor([a], [usual])
    assert KEPT not in a.cache
    (factor,) = BACKEND.factor([a], [first]).data
    (kept,) = BACKEND.gram([a], torch.float64, chunk=256)
    assert KEPT not in a.cache
    (anew,) = BACKEND.gram([a], torch.float64, chunk=256)
    assert kept is not anew
    assert torch.equal(torch.tril(kept), torch.tril(anew))
    assert factor.dtype == first.dtype
    error = torch.linalg.matrix_norm(factor.double() @ factor.double().T - wide(a).T @ wide(a))
    assert error <= 1e3 * torch.finfo(first.dtype).eps * torch.linalg.matrix_norm(kept)


def test_a_kept_gram_matrix_serves_the_next_rung_but_no_other_sums():
    a = operand(gaussian(400, 150).float())
    narrow, following, _ = BACKEND.rungs(a.shape, torch.float32, proofs=True)
    BACKEND.factor([a], [narrow])
    before = a.cache[KEPT][1].clone()
    (factor,) = BACKEND.factor([a], [following]).data
    assert factor.dtype == torch.float64
    assert torch.equal(a.cache[KEPT][1], before)
    BACKEND.gram([a], torch.float64, chunk=64)
    assert KEPT not in a.cache


@pytest.mark.parametrize("shape", [(400, 150), (200, 64)], ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_a_proof_takes_the_gram_matrix_that_was_kept_for_it(shape, large, monkeypatch):
    for module in (torch_backend, torch_gram, certify, shifted):
        monkeypatch.setattr(module, "accelerated", lambda _: large)
    made = []
    monkeypatch.setattr(torch_backend, "gram_in_chunks", lambda *given: made.append(given[2]) or gram_in_chunks(*given))
    a = operand(gaussian(*shape).float())
    BACKEND.factor([a], [BACKEND.rungs(a.shape, torch.float32, proofs=True)[0]])
    values = torch.linalg.svdvals(wide(a)).tolist()
    kappa = values[0] / values[-1]
    found = Resolution("ok", kappa, kappa, 2 * kappa, values[0], values[-1], "test")
    assert certify.certified(BACKEND, a, found, 1e-2).certified
    assert made == [min(shape[0], 1 << 15 if large else 256)]


def test_nothing_is_kept_of_what_cannot_be_proven():
    a = replace(operand(gaussian(400, 150).float()), exact=False)
    BACKEND.factor([a], [BACKEND.rungs(a.shape, torch.float32, proofs=True)[0]])
    assert KEPT not in a.cache


def test_kept_gram_matrices_count_as_memory():
    for shape, more in (((400, 150), 8 * 150**2), ((150, 150), 0)):
        plain, proven = (BACKEND.workspace(shape, torch.float32, proofs=proofs) for proofs in (False, True))
        assert proven == plain + more


def test_a_proof_at_once_counts_as_memory_on_an_accelerator(monkeypatch):
    """82 n^2 bytes were measured for a square matrix of float64 with kappa 1e9 that is prepared already."""
    monkeypatch.setattr(torch_backend, "accelerated", lambda _: True)
    n = 150
    plain, proven = (BACKEND.workspace((n, n), torch.float64, proofs=proofs) for proofs in (False, True))
    assert plain == 8 * n * n + 28 * n * n
    assert proven >= 8 * n * n + 82 * n * n


@pytest.mark.parametrize("shape", [(90, 40), (700, 600)], ids=str)
@pytest.mark.parametrize("chunk", [64, 4096])
def test_gram_matrices_and_factors_from_large_products_are_those_of_small_ones(shape, chunk, monkeypatch):
    monkeypatch.setattr(torch_gram, "accelerated", lambda _: True)
    a = gaussian(*shape, 5)
    exact = a.T @ a
    for found in (torch_gram.gram(a, torch.float64), torch_gram.gram_in_chunks(a, torch.float64, chunk)):
        assert torch.allclose(torch.tril(found), torch.tril(exact), rtol=0, atol=1e-12 * float(exact.abs().max()))
    factor = exact + torch.eye(shape[1], dtype=torch.float64)
    wanted = torch.linalg.cholesky(factor)
    assert torch_gram.cholesky(factor)
    assert torch.allclose(factor, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
