"""Under the interpreter, products with stored weights are float64 products of their exact values."""

import math

import pytest
import torch
from spectra import gaussian

from kappa_fast.kernels import apply as module
from kappa_fast.kernels import twins
from kappa_fast.kernels.apply import Blocks, times, transposed_times
from kappa_fast.kernels.problems import Problems

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = [(1, 1), (31, 7), (64, 64), (65, 33), (200, 130)]


@pytest.fixture(params=[pytest.param(True, id="dot"), pytest.param(False, id="outer products", marks=pytest.mark.slow)])
def products(request, monkeypatch):
    monkeypatch.setattr(module, "WITH_DOT", ("sm_90",) if request.param else ())


def wave(dtype=torch.float32, shapes=SHAPES):
    """Row-major, column-major and strided by turns."""
    made = []
    for seed, (m, n) in enumerate(shapes):
        dense = gaussian(m, n, seed).to(dtype)
        holder = torch.zeros(2 * m, 2 * n).to(dtype)
        holder[::2, ::2].copy_(dense)
        made.append([dense, dense.T.contiguous().T, holder[::2, ::2]][seed % 3])
    return made


def blocks_of(sizes):
    return torch.cat([gaussian(n, 16, 7 + n) for n in sizes])


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_the_weights_are_float64_products(dtype):
    matrices = wave(dtype)
    problems = Problems.of(matrices)
    members = Blocks.of(problems)
    m, n = [a.shape[0] for a in matrices], [a.shape[1] for a in matrices]
    x, y = blocks_of(n), blocks_of(m)
    images, norms = times(problems, members, x)
    back = transposed_times(problems, members, y)
    exact_images, exact_norms = twins.times(problems, members, x)
    assert torch.allclose(norms, exact_norms, rtol=1e-12, atol=0)
    off = (images - exact_images).abs(), (back - twins.transposed_times(problems, members, y)).abs()
    parts = zip(matrices, x.split(n), off[0].split(m), y.split(m), off[1].split(n), strict=True)
    for a, given, image_off, other, back_off in parts:
        bound = 4 * 2.0**-53 * max(a.shape) * a.double().abs()
        assert bool((image_off <= bound @ given.abs()).all())
        assert bool((back_off <= bound.T @ other.abs()).all())


@pytest.mark.parametrize("rows_contiguous", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_entries_read_in_pairs_give_float64_products(dtype, rows_contiguous):
    sizes = [(208, 144), (16, 16), (2064, 80), (144, 144)]  # beyond tiles of 64 and 128, and beyond one chunk of rows
    matrices = [gaussian(m, n, m + n).to(dtype) for m, n in sizes]
    if rows_contiguous:
        matrices = [a.T.contiguous().T for a in matrices]
    matrices[0][3, 5] = torch.finfo(dtype).smallest_normal / 4  # subnormal
    matrices[1][2, 7] = -torch.finfo(dtype).max / 2
    problems = Problems.of(matrices)
    members = Blocks.of(problems)
    assert all(options["PAIRED"] for options, _ in module._launches(problems, members))
    m, n = [a.shape[0] for a in matrices], [a.shape[1] for a in matrices]
    x, y = blocks_of(n), blocks_of(m)
    images, norms = times(problems, members, x)
    without, nothing = times(problems, members, x, squares=False)
    assert torch.equal(images, without)
    assert not nothing.any()
    found = images, transposed_times(problems, members, y), module.binade_times(problems, members, x)
    exact, squares = twins.times(problems, members, x)
    known = exact, twins.transposed_times(problems, members, y), twins.binade_times(problems, members, x)
    assert torch.allclose(norms, squares, rtol=1e-12, atol=0)
    for got, right, lengths in zip(found, known, (m, n, m), strict=True):
        for mine, its in zip(got.split(lengths), right.split(lengths), strict=True):
            assert float((mine - its).abs().max()) <= 1e-13 * float(its.abs().max())


def test_some_members_in_any_order_give_what_all_give():
    matrices = wave() + wave(torch.bfloat16)
    problems = Problems.of(matrices)
    everything, chosen = Blocks.of(problems), [7, 2, 4]
    some = Blocks.of(problems, chosen)
    n, m = [a.shape[1] for a in matrices], [a.shape[0] for a in matrices]
    x, y = blocks_of(n).split(n), blocks_of(m).split(m)
    images, norms = times(problems, everything, torch.cat(x))
    few, few_norms = times(problems, some, torch.cat([x[i] for i in chosen]))
    back = transposed_times(problems, everything, torch.cat(y))
    few_back = transposed_times(problems, some, torch.cat([y[i] for i in chosen]))
    for k, i in enumerate(chosen):
        assert torch.equal(few.split([m[i] for i in chosen])[k], images.split(m)[i])
        assert torch.equal(few_back.split([n[i] for i in chosen])[k], back.split(n)[i])
        assert float(few_norms[k]) == float(norms[i])


def test_long_matrices_are_summed_in_chunks():
    a = gaussian(5000, 3).float()
    problems = Problems.of([a])
    y = gaussian(5000, 16, 1)
    back = transposed_times(problems, Blocks.of(problems), y)
    assert torch.allclose(back, twins.transposed_times(problems, Blocks.of(problems), y), rtol=0, atol=1e-10)


def test_extreme_entries_are_widened_exactly():
    a = torch.tensor([[2.0**-149, 3e38], [1.0, -(2.0**-126)]])
    problems = Problems.of([a])
    image, norms = times(problems, Blocks.of(problems), torch.eye(2, 16, dtype=torch.float64))
    assert torch.equal(image[:, :2], a.double())
    assert math.isfinite(float(norms))


def test_blocks_that_do_not_fit_are_refused():
    problems = Problems.of([gaussian(9, 4).float()])
    members = Blocks.of(problems)
    with pytest.raises(ValueError, match=r"a block must be \(4, 16\), float64 and packed, not \(9, 16\)"):
        times(problems, members, gaussian(9, 16))
    with pytest.raises(ValueError, match=r"a block must be \(9, 16\), float64 and packed"):
        transposed_times(problems, members, gaussian(9, 16).float())
