"""Proofs of the upper end: coarse float32 factors of bound I - G, and their residuals from exact products.

lambda_max(G) <= bound + ||bound I - G - L L^T||_F for any L, and a bound above the largest eigenvalue leaves room for a
residual. So L is a coarse factor in float32, whose rows are then rounded to 16 bits, and the residual of what came of
it is measured anew, in integers, by products that take a tenth of the time of a float64 factor:

    L = N + D,   N = diag(2^-p_i) (N_1 2^8 + N_2) strictly below the diagonal, digits in [-128, 127],   D diagonal

    shift     bound I - G, rounded to float32, beside G
    cholesky  as in cholesky.py, coarse
    digits    the two digits of N, row by row
    rest      bound I - G - N N^T - N D - D^2 by tiles: only the sums of its squares are kept

N N^T is exact in float64, as are N D and D^2, so an entry of the residual is rounded three times at most, however
coarse the factor is. docs/numerics.md, section 6, has the proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cholesky import BLOCK, SUPER, cholesky, products_of, side_of
from .gram import BYTE_TILES, byte_sums
from .launch import launch
from .problems import (
    FIRST_COLUMN,
    INTERPRETED,
    PAD,
    PITCH,
    SLICE,
    Expected,
    Instance,
    Problems,
    Tensor,
    field,
    locate,
    on_host,
    target_of,
    to_device,
    triangular,
)
from .quantize import Slices, column_shift, power_of_two, scaled_integer, shift_below, sum_runs, two_bytes
from .shifted import Mirrored
from .splits import BYTE_ROWS, triangular_tiles
from .squares import gram_place, load_square
from .steps import Steps

ROUNDINGS = 4  # of an entry of the residual: more than its three differences
DIGIT_WARPS = 8
PART = tl.constexpr(32)  # columns of a tile whose residual is in registers


@triton.jit
def _below(base, leading, row, column, n):
    """Entries of the factor strictly below the diagonal, zero elsewhere: [BLOCK, BLOCK]."""
    i = tl.arange(0, BLOCK)
    tile = load_square(base, leading, row, column, n, BLOCK)
    return tl.where((column + i)[None, :] < (row + i)[:, None], tile, 0.0)


@triton.jit
def _factor_digits_kernel(table, owner, first, narrow, info, peaks, digits, slice_bytes: tl.int64):
    """The digits of BLOCK rows of a factor, and the bits of the largest entry of each row.

    Zeros follow up to the next multiple of PAD columns behind the diagonal, where products of tiles stop.
    """
    matrix, block = locate(owner, first)
    if tl.load(info + matrix) == 0:
        base, leading, n = gram_place(table, matrix, narrow)
        row = block * BLOCK
        i = tl.arange(0, BLOCK)
        largest = tl.zeros((BLOCK, BLOCK), tl.int32)
        for column in range(0, row + BLOCK, BLOCK):
            tile = _below(base, leading, row, column, n)
            largest = tl.maximum(largest, tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        peak = tl.max(largest, axis=1)
        tl.store(peaks + field(table, matrix, FIRST_COLUMN) + row + i, peak, mask=i < n - row)
        shift = shift_below(peak, 8)[:, None]
        pitch = field(table, matrix, PITCH, PAD)
        target = digits + field(table, matrix, SLICE, PAD) + row.to(tl.int64) * pitch
        place = i[:, None] * pitch.to(tl.int32) + i[None, :]
        inside = (i < n - row)[:, None]
        for column in range(0, tl.cdiv(row + BLOCK, PAD) * PAD, BLOCK):
            high, low = two_bytes(scaled_integer(_below(base, leading, row, column, n), shift))
            tl.store(target + column + place, high.to(tl.int8), mask=inside)
            tl.store(target + column + slice_bytes + place, low.to(tl.int8), mask=inside)


@triton.jit
def _gram_part(base, leading, kept, rows, columns, n, ON_DIAGONAL: tl.constexpr):
    """Entries of G at and below the diagonal from what shifted.py mirrored; past row n undefined: [rows, columns]."""
    i, j = rows[:, None], columns[None, :]
    place = base + columns.to(tl.int64)[None, :] * leading + i
    if ON_DIAGONAL:  # tiles of BLOCK columns there were put aside
        inside = (i >= j) & (i < n)
        apart = i // BLOCK != j // BLOCK
        within = kept + (j // BLOCK * BLOCK + j % BLOCK) * BLOCK + i % BLOCK
        part = tl.load(place, mask=inside & apart, other=0.0)
        return part + tl.load(within, mask=inside & (i // BLOCK == j // BLOCK), other=0.0)
    else:  # the padding is read along, which leaves loads wide
        return tl.load(place, mask=i < leading.to(tl.int32), other=0.0)


@triton.jit
def _sums_of_rest(
    leading,
    n,
    base,
    kept,
    digits,
    slice_bytes,
    pitch,
    row_unit,
    diagonal,
    bound,
    r,
    c,
    SIDE: tl.constexpr,
    ON_DIAGONAL: tl.constexpr,
):
    """Sums of squares of the residual of a tile and of its factor, PART columns at a time."""
    rows = r * SIDE + tl.arange(0, SIDE)
    squares = tl.zeros((SIDE,), tl.float64)
    sizes = tl.zeros((SIDE,), tl.float64)
    for start in range(0, SIDE, PART):
        columns = c * SIDE + start + tl.arange(0, PART)
        i, j = rows[:, None], columns[None, :]
        inside = (i >= j) & (i < n)
        place = rows.to(tl.int64)[:, None] * pitch + j
        entry = tl.load(digits + place, mask=i < n, other=0).to(tl.int32) * 256
        entry += tl.load(digits + slice_bytes + place, mask=i < n, other=0)
        corner = tl.load(diagonal + columns.to(tl.int64) * (leading + 1), mask=columns < n, other=0.0).to(tl.float64)
        entries = entry.to(tl.float64) * row_unit[:, None]
        rest = -_gram_part(base, leading, kept, rows, columns, n, ON_DIAGONAL)
        if ON_DIAGONAL:
            on = inside & (i == j)
            entries = tl.where(on, corner[None, :], entries)
            rest += tl.where(on, bound, 0.0)
        product = rows.to(tl.int64)[:, None] * leading + j
        rest -= tl.load(base + product, mask=inside if ON_DIAGONAL else i < n, other=0.0)
        rest = tl.where(inside, rest - entries * corner[None, :], 0.0)
        if ON_DIAGONAL:
            squares += tl.sum(tl.where(on, 1.0, 2.0) * rest * rest, axis=1)
        else:
            squares += tl.sum(2.0 * rest * rest, axis=1)
        sizes += tl.sum(entries * entries, axis=1)
    return tl.sum(squares, axis=0), tl.sum(sizes, axis=0)


@triton.jit
def _rest_kernel(
    table,
    owner,
    first,
    narrow,
    info,
    peaks,
    digits,
    slice_bytes: tl.int64,
    packed,
    kept,
    starts,
    bounds,
    squares,
    sizes,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sums over a tile of squares of the residual, entries off the diagonal twice, and of the factor.

    N N^T goes through the lower triangle of G, which shifted.py leaves for that: tiles in registers would not fit.
    """
    matrix, item = locate(owner, first)
    if tl.load(info + matrix) == 0:
        base, leading, n = gram_place(table, matrix, packed)
        pitch = field(table, matrix, PITCH, PAD).to(tl.int32)
        r, c = triangular(item)
        digits += field(table, matrix, SLICE, PAD)
        # Right of the diagonal the rows of the second operand are zero.
        high, middle, low = byte_sums(digits, slice_bytes, pitch, r, c, n, (c + 1) * SIDE, SIDE, DEPTH)
        side = tl.arange(0, SIDE)
        rows, columns = r * SIDE + side, c * SIDE + side
        first_row = field(table, matrix, FIRST_COLUMN)
        row_unit = power_of_two(-column_shift(peaks, first_row + rows, rows < n, 8))
        column_unit = power_of_two(-column_shift(peaks, first_row + columns, columns < n, 8))
        total = low.to(tl.float64) + middle.to(tl.float64) * 256.0 + high.to(tl.float64) * 65536.0
        total = total * row_unit[:, None] * column_unit[None, :]
        step = leading.to(tl.int32)
        place = base + (r * SIDE).to(tl.int64) * leading + c * SIDE + side[:, None] * step + side[None, :]
        tl.store(place, total, mask=(rows[:, None] >= columns[None, :]) & (rows < n)[:, None])
        tl.debug_barrier()  # the other threads of this program read it
        kept += tl.multiple_of(tl.load(starts + matrix), BLOCK)
        diagonal, _, _ = gram_place(table, matrix, narrow)
        bound = tl.load(bounds + matrix)
        if r == c:
            square, size = _sums_of_rest(
                leading, n, base, kept, digits, slice_bytes, pitch, row_unit, diagonal, bound, r, c, SIDE, True
            )
        else:
            square, size = _sums_of_rest(
                leading, n, base, kept, digits, slice_bytes, pitch, row_unit, diagonal, bound, r, c, SIDE, False
            )
        tl.store(squares + tl.program_id(0), square)
        tl.store(sizes + tl.program_id(0), size)


@dataclass(frozen=True)
class Coarse:
    """Factors L = N + D of bound I - G for the chosen matrices of a wave.

    squares: the factors as a wave of n x n matrices, whose slices are those of N.  narrow: float32, packed, of which
    only the diagonals count.  digits: (2, bytes of a slice) int8, row by row.  peaks: (columns,) int32, bits of the
    largest entry of every row of N.  info: see Factored.  bounds: (w,) float64.
    """

    whole: Mirrored
    chosen: tuple[int, ...]
    bounds: Tensor
    squares: Problems
    narrow: Tensor
    info: Tensor
    peaks: Tensor
    digits: Tensor

    def residuals(self) -> tuple[Tensor, Tensor]:
        """||bound I - G - L L^T||_F^2 and ||L||_F^2 as computed, (chosen,) float64; infinite where there is no L.

        An entry of the residual is rounded at most ROUNDINGS times. Overwrites the lower triangles of ``whole``. Three
        launches; no synchronization.
        """
        whole, chosen, device = self.whole, list(self.chosen), self.narrow.device
        tile = BYTE_TILES[target_of(device)]
        counts = triangular_tiles(self.squares.n, tile.side)
        tiles = self.squares.tiles(counts, chosen)
        rests = torch.full((tiles.total,), torch.inf, dtype=torch.float64, device=device)
        sizes = rests.clone()
        launch(
            _rest_kernel,
            (tiles.total,),
            self.squares.table,
            tiles.owner,
            tiles.first,
            *self._places(),
            whole.packed,
            whole.kept,
            whole.starts,
            self.bounds,
            rests,
            sizes,
            SIDE=tile.side,
            DEPTH=tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        first = tiles.first[to_device(on_host(chosen), device)]
        lengths = to_device(counts[chosen], device, torch.int32)
        return sum_runs(first, lengths, rests), sum_runs(first, lengths, sizes)

    def dense(self) -> list[Tensor]:
        """L of the chosen, (n, n) float64 on the host, put together digit by digit: slow, for checks."""
        unused = torch.empty(0, device="cpu")
        rows = Slices(self.digits, self.peaks, unused, 8).dense(self.squares)
        views = self.squares.gram_views(self.narrow.cpu().to(torch.float64))
        return [torch.tril(rows[i].T, -1) + torch.diag(views[i].diagonal()) for i in self.chosen]

    def _places(self) -> tuple[Tensor | int, ...]:
        return self.narrow, self.info, self.peaks, self.digits, self.squares.slice_bytes


def coarse_factors(whole: Mirrored, chosen: Sequence[int], bounds: Sequence[float]) -> Coarse:
    """Factor bound I - G of the chosen matrices, 4 n^2 bytes each and 2 n^2 for the digits; G is only read.

    Launches as in cholesky() and two more; no synchronization.

    Raises:
        ValueError: a matrix has more than BYTE_ROWS columns, whose products would not be exact.
    """
    problems, device = whole.problems, whole.problems.device
    if int(problems.n[list(chosen)].max()) > BYTE_ROWS:
        raise ValueError(f"products of more than {BYTE_ROWS} columns are not exact")
    bound = torch.zeros(len(problems.n), dtype=torch.float64, device="cpu")
    bound[list(chosen)] = torch.tensor(list(bounds), dtype=torch.float64, device="cpu")
    closed = torch.ones_like(bound, dtype=torch.int32)
    closed[list(chosen)] = 0
    moved, info = to_device(bound, device), to_device(closed, device)
    # Sums above the diagonal are read by nobody, but numpy warns where memory holds no numbers.
    narrow = (torch.zeros if INTERPRETED else torch.empty)(problems.gram_elements, dtype=torch.float32, device=device)
    whole.shift_into(narrow, chosen, moved, to_device(torch.full_like(bound, -1.0), device))
    target = target_of(device)
    steps = Steps.of(problems, BLOCK.value, SUPER.value, side_of(target, products_of(target, torch.float32)))
    cholesky(problems, narrow, info, steps, coarse=True)
    squares = Problems.of(problems.gram_views(narrow))
    peaks = torch.zeros(squares.columns, dtype=torch.int32, device=device)
    digits = torch.empty((2, squares.slice_bytes), dtype=torch.int8, device=device)
    found = Coarse(whole, tuple(chosen), moved, squares, narrow, info, peaks, digits)
    blocks = squares.tiles(-(-squares.n // BLOCK.value), chosen)
    places = (squares.table, blocks.owner, blocks.first)
    launch(_factor_digits_kernel, (blocks.total,), *places, *found._places(), num_warps=DIGIT_WARPS)
    return found


def instances(target: str) -> list[Instance]:
    """Everything that ``Coarse`` can ask the compiler for, without the kernels of other files."""
    common = {"table": "*i64", "owner": "*i32", "first": "*i32", "narrow": "*fp32", "info": "*i32", "peaks": "*i32"}
    common |= {"digits": "*i8", "slice_bytes": "i64"}
    rest = {"packed": "*fp64", "kept": "*fp64", "starts": "*i64", "bounds": "*fp64", "squares": "*fp64"}
    tile = BYTE_TILES[target]
    constants = {"SIDE": tile.side, "DEPTH": tile.depth}
    held = Expected(width=16, ahead=True, stack=1408)  # Triton 3.6 spills behind the loop, 3.7 and 3.9 16 bytes
    types = {**common, **rest, "sizes": "*fp64"}
    return [
        Instance(_factor_digits_kernel, common, {}, DIGIT_WARPS, expected=Expected(width=16, registers=168)),
        Instance(_rest_kernel, types, constants, tile.num_warps, tile.num_stages, "int8", held),
    ]
