"""Under the interpreter, the integer Gram matrix is exact and the float one as good as the library's."""

import math

import numpy as np
import pytest
import torch
from exact_digits import digits
from launches import counted
from spectra import gaussian

from kappa_fast.kernels import gram as module
from kappa_fast.kernels import splits
from kappa_fast.kernels.gram import Tile, gram_of_slices, gram_of_weights, slice_roundings
from kappa_fast.kernels.problems import Problems, target_of
from kappa_fast.kernels.quantize import Slices, column_peaks, quantize
from kappa_fast.kernels.splits import triangular_tiles

HERE = target_of(torch.device("cpu"))  # whose tiles the interpreter takes
SIZES = [(1, 1), (2, 1), (31, 31), (33, 2), (127, 33), (129, 127), (257, 129), (130, 130)]


def wave(dtype=torch.float32):
    """Ragged sizes, row-major and column-major by turns."""
    made = []
    for seed, (m, n) in enumerate(SIZES):
        dense = gaussian(m, n, seed).to(dtype)
        made.append(dense if seed % 2 else dense.T.contiguous().T)
    return made


def integers(problems, slices, packed):
    """The results in units of the last digit of both factors: what must be an integer."""
    exponents = 153 - (slices.peaks.numpy().astype(np.int64) >> 23) - 7 * (4 - slices.count)
    found = []
    for i, view in enumerate(problems.gram_views(packed)):
        start = int(problems.table[i, 5])
        p = exponents[start : start + view.shape[0]]
        found.append(np.ldexp(view.numpy(), p[:, None] + p[None, :]))
    return found


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_the_gram_matrix_of_the_digits_is_exact(slices):
    problems = Problems.of(wave())
    found = quantize(problems, column_peaks(problems), slices)
    packed = torch.full((problems.gram_elements,), float("nan"), dtype=torch.float64)
    gram_of_slices(problems, found, packed)
    for q, result in zip(digits(problems, found), integers(problems, found, packed), strict=True):
        exact = np.tril(q.T @ q)  # below 2^63: 28 bits twice and 257 rows
        if slices < 4:  # m 4^(7k-1) is below 2^53: every sum is a float64
            assert (np.tril(result) == exact).all()
        else:
            assert np.allclose(np.tril(result), exact.astype(np.float64), rtol=2.0**-51, atol=2.0**-51 * exact.max())


def test_the_gram_matrix_of_two_bytes_is_exact(monkeypatch):
    monkeypatch.setattr(splits, "SPLIT_ROWS", 128)
    monkeypatch.setattr(splits, "FULL_CHIP", 2)
    problems = Problems.of([*wave()[2:4], wave()[6], gaussian(400, 5, 3).float()])
    slices = quantize(problems, column_peaks(problems), 2, bits=8)
    packed = gram_of_slices(problems, slices)
    assert not slice_roundings(problems, 2, 8).any()
    for q, view in zip(slices.dense(problems), problems.gram_views(packed), strict=True):
        unit = torch.where(q == 0, math.inf, q.abs()).amin()
        scale = 2.0 ** (40 - math.frexp(float(unit))[1])  # makes integers of all entries
        whole = np.frompyfunc(int, 1, 1)((q * scale).numpy())
        exact = whole.T @ whole
        rows, columns = np.tril_indices(len(view))
        assert all(
            int(x) == y for x, y in zip((view * scale**2).numpy()[rows, columns], exact[rows, columns], strict=True)
        )


def test_the_float32_copy_is_the_result_rounded_also_of_matrices_that_are_split(monkeypatch):
    monkeypatch.setattr(splits, "SPLIT_ROWS", 128)
    monkeypatch.setattr(splits, "FULL_CHIP", 2)
    problems = Problems.of([gaussian(700, 9, 1).bfloat16(), gaussian(140, 130, 2).bfloat16()])
    assert module.split_counts(problems, 128, 8).tolist() == [2, 1]
    copy = torch.full((problems.gram_elements,), math.nan)
    found = gram_of_slices(problems, quantize(problems, column_peaks(problems), 2, bits=8), copy=copy)
    for rounded, view in zip(problems.gram_views(copy), problems.gram_views(found), strict=True):
        assert torch.equal(torch.tril(rounded), torch.tril(view).float())


def test_the_longest_columns_of_the_largest_bytes_do_not_saturate(monkeypatch):
    longest = 65537
    monkeypatch.setitem(module.SLICE_TILES[HERE], 2, Tile(16, 128, 4, 2))
    monkeypatch.setattr(splits, "FULL_CHIP", 1)  # split for no other reason
    problems = Problems.of([torch.empty(longest, 1)])
    data = torch.zeros(2, problems.slice_bytes, dtype=torch.int8)
    data[:, :longest] = -128
    found = Slices(data, torch.tensor([126 << 23], dtype=torch.int32), torch.zeros(1, dtype=torch.float64), 8)
    assert 2 * longest * 128**2 > 2**31
    assert float(gram_of_slices(problems, found)[0]) * 2.0**30 == longest * (128 * 257) ** 2


@pytest.mark.parametrize("slices", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_slice_more_adds_to_what_was_there(slices):
    problems = Problems.of(wave()[4:])
    peaks = column_peaks(problems)
    at_once = gram_of_slices(problems, quantize(problems, peaks, slices))
    grown = gram_of_slices(problems, quantize(problems, peaks, slices - 1))
    gram_of_slices(problems, quantize(problems, peaks, slices), grown, low=slices)
    for first, second in zip(problems.gram_views(at_once), problems.gram_views(grown), strict=True):
        assert torch.equal(torch.tril(first), torch.tril(second))


def test_adding_slices_to_nothing_is_refused():
    problems = Problems.of([gaussian(8, 4).float()])
    found = quantize(problems, column_peaks(problems), 3)
    with pytest.raises(ValueError, match="needs the result for the earlier slices"):
        gram_of_slices(problems, found, low=3)


def test_the_longest_columns_of_the_largest_digits_do_not_saturate(monkeypatch):
    # Every digit is 64: an int32 that took 2 products of 262145 rows would be beyond 2^31.
    longest = 262145
    monkeypatch.setitem(module.SLICE_TILES[HERE], 2, Tile(16, 128, 4, 2))
    monkeypatch.setattr(splits, "FULL_CHIP", 1)  # split for no other reason
    problems = Problems.of([torch.empty(longest, 1)])
    data = torch.zeros(2, problems.slice_bytes, dtype=torch.int8)
    data[:, :longest] = 64
    found = Slices(data, torch.tensor([126 << 23], dtype=torch.int32), torch.zeros(1, dtype=torch.float64))
    (q,) = digits(problems, found)
    (result,) = integers(problems, found, gram_of_slices(problems, found))
    assert 2 * longest * 64**2 > 2**31
    assert (np.tril(result) == np.tril(q.T @ q)).all()


@pytest.mark.parametrize(
    ("rows", "least"),
    [
        pytest.param(16383, None, marks=pytest.mark.slow),
        pytest.param(16384, None, marks=pytest.mark.slow),
        (383, 128),
        (384, 128),
    ],
)
def test_long_matrices_are_split_by_their_shape_alone(rows, least, monkeypatch):
    if least is not None:
        monkeypatch.setattr(splits, "SPLIT_ROWS", least)
    for slices in (2, 3, 4):
        monkeypatch.setitem(module.SLICE_TILES[HERE], slices, Tile(16, 128, 4, 2))
    long, short = gaussian(rows, 3).float(), gaussian(40, 3, 1).float()
    alone, together = Problems.of([long]), Problems.of([short, long, short])
    results = []
    for problems in (alone, together):
        found = quantize(problems, column_peaks(problems), 4)
        results.append(problems.gram_views(gram_of_slices(problems, found))[-1 if problems is alone else 1])
    assert torch.equal(torch.tril(results[0]), torch.tril(results[1]))
    exact = long.double().T @ long.double()
    assert torch.allclose(torch.tril(results[0]), torch.tril(exact), rtol=0, atol=1e-7 * rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bit_weights_are_as_good_as_the_librarys_in_float32(dtype):
    matrices = wave(dtype)
    holder = torch.zeros(300, 200, dtype=dtype)
    matrices.append(holder[::2, 1::3][:140, :60].copy_(gaussian(140, 60)))
    problems = Problems.of(matrices)
    packed = torch.full((problems.gram_elements,), float("nan"), dtype=torch.float64)
    gram_of_weights(problems, out=packed)
    for a, result in zip(matrices, problems.gram_views(packed), strict=True):
        exact = torch.tril(a.double().T @ a.double())
        library = torch.tril(a.float().T @ a.float()).double()
        floor = 2.0**-24 * float(exact.abs().max())
        assert float((torch.tril(result) - exact).abs().max()) <= 2 * float((library - exact).abs().max()) + 4 * floor


def test_parts_are_added_up_before_a_float32_result_is_rounded(monkeypatch):
    monkeypatch.setattr(splits, "SPLIT_ROWS", 128)
    monkeypatch.setattr(splits, "FULL_CHIP", 5)
    problems = Problems.of([gaussian(700, 9, 1).bfloat16(), gaussian(140, 130, 2).bfloat16()])
    assert module.split_counts(problems, 128).tolist() == [5, 1]
    wide, narrow = (torch.full((problems.gram_elements,), math.nan, dtype=d) for d in (torch.float64, torch.float32))
    for out in (wide, narrow):
        gram_of_weights(problems, out=out)
    for rounded, view in zip(problems.gram_views(narrow), problems.gram_views(wide), strict=True):
        # Twice: the first part lies in the result while the others are computed.
        assert torch.allclose(torch.tril(rounded).double(), torch.tril(view), rtol=2.0**-23, atol=0)


def test_only_the_chosen_matrices_are_multiplied():
    matrices = wave(torch.bfloat16)[4:7]
    problems = Problems.of(matrices)
    packed = torch.full((problems.gram_elements,), float("nan"), dtype=torch.float64)
    gram_of_weights(problems, [0, 2], packed)
    done = [bool(torch.isfinite(torch.tril(view)).all()) for view in problems.gram_views(packed)]
    assert done == [True, False, True]


def test_products_of_float32_weights_are_refused():
    problems = Problems.of([gaussian(8, 4).float()])
    with pytest.raises(TypeError, match="use gram_of_slices"):
        gram_of_weights(problems)


def test_thirty_matrices_take_as_many_launches_as_three():
    found = []
    for copies in (3, 30):
        problems = Problems.of([gaussian(40, 30, seed).bfloat16() for seed in range(copies)])
        slices = quantize(problems, column_peaks(problems), 4)
        with counted() as launches:
            gram_of_slices(problems, slices)
            gram_of_weights(problems)
        found.append(launches)
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_triangular_tiles_are_counted_with_the_diagonal():
    assert triangular_tiles(torch.tensor([1, 128, 129, 4096]), 128).tolist() == [1, 1, 3, 528]
