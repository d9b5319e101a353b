"""Under the interpreter, slices rebuild the weights as promised, and the residual is what they leave out."""

import math

import pytest
import torch
from launches import counted
from spectra import gaussian

from kappa_fast.kernels.problems import PAD, Problems, Storage, to_device
from kappa_fast.kernels.quantize import column_peaks, quantize

SIZES = [(1, 1), (2, 1), (31, 31), (33, 2), (127, 33), (129, 127), (257, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def wave(dtype=torch.float32, scale=1.0):
    """Ragged sizes, row-major, column-major, strided and offset views of one dtype."""
    made = []
    for seed, (m, n) in enumerate(SIZES):
        dense = (scale * gaussian(m, n, seed)).to(dtype)
        made.append([dense, dense.T.contiguous().T, _strided(dense)][seed % 3])
    return made


def _strided(dense):
    m, n = dense.shape
    holder = torch.zeros((2 * m + 1, 3 * n + 2), dtype=torch.float32).to(dense.dtype)
    view = holder[1::2, 2::3][:m, :n]
    view.copy_(dense)
    return view


def exponents(peaks):
    """The p of every column, from its largest entry: the literal definition."""
    return [27 - max(math.frexp(float(x))[1], -126) for x in peaks.view(torch.float32)]


def rebuilt(problems, slices):
    """The first k digits as a float64 matrix each, in units of the weights."""
    places = problems.table[:, 7].tolist()
    starts = problems.table[:, 5].tolist()
    shift = exponents(slices.peaks)
    found = []
    for i, (m, n) in enumerate(zip(problems.m.tolist(), problems.n.tolist(), strict=True)):
        pitch = -(-m // PAD.value) * PAD.value
        size = n * pitch
        total = torch.zeros((n, pitch), dtype=torch.float64)
        for k in range(slices.count):
            digits = slices.data[k, places[i] : places[i] + size].view(n, pitch)
            assert not bool(digits[:, m:].any())  # the padding adds nothing to a product
            total += digits.double() * 2.0 ** (7 * (3 - k))
        scale = torch.tensor([2.0 ** -shift[starts[i] + j] for j in range(n)], dtype=torch.float64)
        found.append((total[:, :m] * scale[:, None]).T)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_peaks_are_the_bits_of_the_largest_entries(dtype):
    matrices = wave(dtype)
    peaks = column_peaks(Problems.of(matrices)).view(torch.float32)
    expected = torch.cat([a.float().abs().amax(dim=0) for a in matrices])
    assert torch.equal(peaks, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [*DTYPES[:3], torch.float8_e5m2])
def test_what_is_not_finite_shows_in_the_peak_of_its_column_alone(dtype, value):
    weight = gaussian(70, 5).float()
    weight[66, 3] = value
    peaks = column_peaks(Problems.of([weight.to(dtype)]))
    assert (peaks >= 0x7F800000).tolist() == [False, False, False, True, False]


def test_every_code_of_float8_is_decoded():
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        row = codes.view(dtype)[None, :]
        column = row.T.contiguous()  # one column per code: its peak is the code's absolute value
        for matrix in (row.expand(1, -1).contiguous(), column.T):
            peaks = column_peaks(Problems.of([matrix])).view(torch.float32)
            assert torch.equal(peaks.nan_to_num(-1), row.float().abs()[0].nan_to_num(-1))


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_the_nearest_numbers_with_so_many_digits(dtype, slices):
    matrices = wave(dtype)
    problems = Problems.of(matrices)
    found = quantize(problems, column_peaks(problems), slices)
    for a, q in zip(matrices, rebuilt(problems, found), strict=True):
        peak = a.float().abs().amax(dim=0).double()
        unit = 2.0 ** (torch.floor(torch.log2(peak)) + 1) * 2.0 ** (1 - 7 * slices)  # of the last digit
        assert bool(((a.double() - q).abs() <= 0.51 * unit).all())


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_what_the_slices_leave_out_rounded_up(dtype, slices):
    matrices = wave(dtype)
    problems = Problems.of(matrices)
    found = quantize(problems, column_peaks(problems), slices)
    for a, q, residual in zip(matrices, rebuilt(problems, found), found.residual.tolist(), strict=True):
        exact = float((a.double() - q).square().sum())
        assert exact <= residual <= exact * 1.0003


def test_digits_are_balanced_and_their_sums_fit_int8():
    # The largest digits: one below a power of two, and the powers themselves.
    matrix = torch.tensor([[1 - 2.0**-24, 1.0, -1.0, 63.5, -64.5], [0.99, 0.5, 0.4961, 64.0, 64.0]]).float()
    problems = Problems.of([torch.cat([matrix, matrix, matrix])])
    data = quantize(problems, column_peaks(problems), 4).data
    assert int(data[0].max()) <= 64
    assert int(data.min()) >= -64
    assert int(data[1:].max()) <= 63
    for i in range(4):
        for j in range(i):
            assert (
                -128 <= int((data[i].int() + data[j].int()).min()) <= int((data[i].int() + data[j].int()).max()) <= 127
            )


def test_a_slice_can_be_added_later():
    matrices = wave()
    problems = Problems.of(matrices)
    peaks = column_peaks(problems)
    at_once = quantize(problems, peaks, 4)
    grown = quantize(problems, peaks, 2)
    for count in (3, 4):
        grown = quantize(problems, peaks, count, grown)
    assert torch.equal(grown.data, at_once.data)
    assert torch.equal(grown.residual, at_once.residual)


@pytest.mark.parametrize("scale", [2.0**-140, 1e-38, 1e-30, 1e30, 1e38])
def test_extreme_scales_neither_overflow_nor_vanish(scale):
    matrices = [(gaussian(40, 7) * scale).clamp(-3e38, 3e38).float()]
    problems = Problems.of(matrices)
    found = quantize(problems, column_peaks(problems), 4)
    (q,) = rebuilt(problems, found)
    a = matrices[0].double()
    assert float((a - q).abs().max()) <= 2.0**-27 * max(float(a.abs().max()), 2.0**-126)


def test_columns_of_very_different_size_keep_their_digits():
    matrix = (gaussian(64, 9) * 10.0 ** torch.linspace(-30, 30, 9)).float()
    problems = Problems.of([matrix])
    (q,) = rebuilt(problems, quantize(problems, column_peaks(problems), 4))
    error = (matrix.double() - q).abs().amax(dim=0) / matrix.double().abs().amax(dim=0)
    assert float(error.max()) <= 2.0**-26


@pytest.mark.parametrize("top", [2.0**127, 1.0])
def test_the_smallest_entries_beside_the_largest_still_count_in_the_residual(top):
    matrix = torch.tensor([[top, top], [2.0**-100, 2.0**-149]])
    problems = Problems.of([matrix])
    residual = float(quantize(problems, column_peaks(problems), 4).residual)
    exact = 2.0**-200 + 2.0**-298
    assert exact <= residual <= exact * 1.0003


def test_zero_columns_and_zero_matrices_stay_zero():
    matrix = gaussian(40, 5).float()
    matrix[:, 2] = 0
    matrices = [matrix, torch.zeros(33, 4)]
    problems = Problems.of(matrices)
    found = quantize(problems, column_peaks(problems), 2)
    first, second = rebuilt(problems, found)
    assert not bool(first[:, 2].any())
    assert not bool(second.any())
    assert float(found.residual[1]) == 0


def test_a_wave_of_mixed_storage_gives_what_each_matrix_gives_alone():
    matrices = [a for dtype in DTYPES for a in wave(dtype)[2:5]]
    together = Problems.of(matrices)
    found = quantize(together, column_peaks(together), 3)
    for i, matrix in enumerate(matrices):
        alone = Problems.of([matrix])
        one = quantize(alone, column_peaks(alone), 3)
        place = int(together.table[i, 7])
        assert torch.equal(one.data, found.data[:, place : place + alone.slice_bytes])
        assert float(one.residual) == float(found.residual[i])


def test_weights_are_read_where_they_lie_and_not_changed():
    matrices = wave(torch.bfloat16)
    copies = [a.clone() for a in matrices]
    problems = Problems.of(matrices)
    assert [int(x) for x in problems.table[:, 0]] == [a.data_ptr() for a in matrices]
    quantize(problems, column_peaks(problems), 2)
    assert all(torch.equal(a, b) for a, b in zip(matrices, copies, strict=True))


def test_storage_tells_what_loads_can_be_vectors():
    dense = torch.zeros(64, 32)
    assert Storage.of(dense) == Storage(torch.float32, 1, True)
    assert Storage.of(dense.T) == Storage(torch.float32, 0, True)
    assert not Storage.of(dense[:, 1:17]).aligned
    assert not Storage.of(dense[:, :17]).aligned
    assert Storage.of(dense[:, ::2]).inner == 2


@pytest.mark.slow
def test_hundreds_of_matrices_take_as_many_launches_as_three():
    for copies in (3, 200):
        problems = Problems.of([gaussian(5, 3, seed).float() for seed in range(copies)])
        with counted() as launches:
            quantize(problems, column_peaks(problems), 2)
        assert launches == ["peaks", "digits", "sum"]


def test_a_map_of_tiles_gives_every_matrix_its_own_and_the_longest_first():
    problems = Problems.of([torch.zeros(m, 2) for m in (3, 9, 5)])
    tiles = problems.tiles(torch.tensor([2, 1, 3]))
    assert tiles.owner.tolist() == [1, 2, 2, 2, 0, 0]
    assert tiles.first.tolist() == [4, 0, 1]
    assert tiles.total == 6
    assert to_device(torch.arange(3), torch.device("cpu")).tolist() == [0, 1, 2]


def bytes_of(problems):
    """Q of two digits of 8 bits, put together literally, in units of the weights; and all first digits."""
    found = quantize(problems, column_peaks(problems), 2, bits=8)
    values, firsts = [], []
    for i, (m, n) in enumerate(zip(problems.m.tolist(), problems.n.tolist(), strict=True)):
        pitch, place, start = (int(problems.table[i, k]) for k in (6, 7, 5))
        first, second = (found.data[k, place : place + n * pitch].view(n, pitch)[:, :m].T.double() for k in (0, 1))
        peaks = found.peaks.view(torch.float32)[start : start + n].double()
        # The largest power of two with which no entry is rounded beyond 127 * 257.
        p = 15 - torch.frexp(peaks).exponent
        p = torch.where(torch.floor(torch.ldexp(peaks, p) + 0.5) > 127 * 257, p - 1, p)
        values.append(torch.ldexp(256 * first + second, -p))
        firsts.append(first)
    return found, values, firsts


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_digits_of_eight_bits_are_the_nearest_numbers_and_say_how_far_they_are(dtype):
    matrices = wave(dtype)
    problems = Problems.of(matrices)
    found, values, _ = bytes_of(problems)
    for a, q, dense, residual in zip(matrices, values, found.dense(problems), found.residual.tolist(), strict=True):
        left = (a.double() - q).abs()
        peak = a.float().abs().amax(dim=0).double()
        assert torch.equal(q, dense)
        assert bool((left <= 1.01 * peak * 2.0**-15).all())
        exact = min(float(left.square().sum()), float(left.sum(dim=0).max() * left.sum(dim=1).max()))
        assert exact <= residual <= exact * (1 + 1e-8)
        assert float(torch.linalg.matrix_norm(a.double() - q, 2)) ** 2 <= residual * (1 + 1e-12)


def test_few_entries_of_bfloat16_are_left_out_and_the_bound_sees_that():
    matrix = gaussian(700, 300, 3).bfloat16()
    problems = Problems.of([matrix])
    found, (q,), _ = bytes_of(problems)
    left = matrix.double() - q
    assert int((left != 0).sum()) < 0.05 * left.numel()
    assert float(found.residual) < 0.2 * float(left.square().sum())


def test_digits_of_eight_bits_stay_in_their_range_at_the_largest_entries():
    # 127 * 257 is the largest number of two digits: what would round beyond it takes a smaller power of two.
    edges = [32639, 32639.25, 32639.5, 32640, 32767, 32768, 16384, 1]
    rows = torch.tensor([edges, [-x for x in edges]], dtype=torch.float64)
    for scale in (1.0, 2.0**-100, 2.0**50):
        for row in (rows * scale).float().split(1):  # one entry a column
            problems = Problems.of([row])
            _, (q,), (first,) = bytes_of(problems)
            assert float(first.min()) >= -128
            assert float(first.max()) <= 127
            assert bool(((row.double() - q).abs() <= 2.0**-14 * row.double().abs()).all())


def test_bytes_come_in_twos():
    problems = Problems.of([gaussian(8, 4).float()])
    peaks = column_peaks(problems)
    with pytest.raises(ValueError, match="8 bits need two slices and no earlier ones, not 3"):
        quantize(problems, peaks, 3, bits=8)
    with pytest.raises(ValueError, match="8 bits need two slices and no earlier ones"):
        quantize(problems, peaks, 2, quantize(problems, peaks, 1), bits=8)


def test_the_bound_of_a_matrix_does_not_depend_on_its_wave():
    long, short = gaussian(600, 40, 1).bfloat16(), gaussian(90, 33, 2).bfloat16()
    found = []
    for wave_ in ([long], [short, long, short]):
        problems = Problems.of(wave_)
        found.append(quantize(problems, column_peaks(problems), 2, bits=8).residual[len(wave_) // 2])
    assert torch.equal(*found)
