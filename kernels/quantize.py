"""Weights -> nested int8 slices: A = Q diag(s) + D with Q integer, s powers of two, and ||D||_F known.

    Q = Q_1 2^21 + Q_2 2^14 + Q_3 2^7 + Q_4,   digits in [-64, 63], the first in [-64, 64]

The first k digits are the best approximation with 7 k bits to within half a unit, so a slice can be added later without
changing the earlier ones. Where 16 bits suffice, Q = Q_1 2^8 + Q_2 with two digits in [-128, 127]; for 16-bit weights D
is sparse then, so that ||D||_1 ||D||_inf is a good bound of ||D||_2^2.

Slices are stored transposed, (n, pitch) with the contracted dimension contiguous: the int8 matrix instructions of
Hopper take no other order. docs/kernels.md has the bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import launch
from .norms import LineSums
from .norms import instances as norm_instances
from .problems import (
    COLUMNS,
    FIRST_COLUMN,
    PAD,
    PITCH,
    ROWS,
    SLICE,
    Expected,
    Instance,
    Problems,
    Storage,
    Tensor,
    TileMap,
    as_float,
    field,
    load_tile,
    locate,
    on_host,
    storages,
    stored,
    to_device,
)

DIGIT_BITS = tl.constexpr(7)
MAX_SLICES = 4
TOP_EXPONENT = tl.constexpr(27)  # |Q| <= 2^27
BYTE_EXPONENT = tl.constexpr(15)  # |Q| < 2^15 for two digits of 8 bits
# and no larger than 127 * 257, or the first digit were 128: the mantissa bits of (127 * 257 + 1/2) / 2^14.
BYTE_LIMIT = tl.constexpr(8322816)


@dataclass(frozen=True)
class Tile:
    """rows x columns of a matrix per program; memory bounds the speed of both kernels for any numbers."""

    rows: int
    columns: int
    num_warps: int


PEAK_TILE = Tile(32, 128, 4)
PEAK_STRIPE = tl.constexpr(1024)  # rows per program: one atomic per column and stripe
SLICE_TILE = Tile(128, 32, 4)  # 128 rows of one column are a whole cache line of a slice


@triton.jit
def _peaks_kernel(
    table,
    owner,
    first,
    peaks,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ELEMENT: tl.constexpr,
    FLOAT8: tl.constexpr,
    INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    matrix, tile = locate(owner, first)
    whole = stored(table, matrix, ELEMENT, INNER, ALIGNED)
    _, _, _, m, n = whole
    across = tl.cdiv(n, BN)
    column = (tile % across) * BN
    columns = column + tl.arange(0, BN)
    start = (tile // across) * PEAK_STRIPE
    stop = tl.minimum(start + PEAK_STRIPE, m)
    largest = tl.zeros((BM, BN), tl.int32)
    for row in range(start, stop, BM):
        a = as_float(load_tile(whole, row, column, BM, BN, INNER), FLOAT8)
        # Without its sign bit a float has the order of its bits, in which NaN comes after infinity.
        largest = tl.maximum(largest, a.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    place = field(table, matrix, FIRST_COLUMN) + columns
    tl.atomic_max(peaks + place, tl.max(largest, axis=0), mask=columns < n)


@triton.jit
def column_shift(peaks, place, inside, BITS: tl.constexpr):
    """The p of a column, s = 2^-p: its entries times 2^p are no larger than Q may be, see the top of this file."""
    return shift_below(tl.load(peaks + place, mask=inside, other=0), BITS)


@triton.jit
def shift_below(bits, BITS: tl.constexpr):
    """See column_shift, from the bits of the largest entry."""
    if BITS == 8:
        return -(bits >> 23) - ((bits & 0x7FFFFF) >= BYTE_LIMIT).to(tl.int32) + (BYTE_EXPONENT + 126)
    else:
        return -(bits >> 23) + (TOP_EXPONENT + 126)


def column_exponents(peaks: Tensor, bits: int) -> Tensor:
    """-p of every column, see column_shift, in plain torch."""
    if bits == 8:
        return (peaks >> 23) + ((peaks & 0x7FFFFF) >= BYTE_LIMIT.value).to(torch.int32) - (BYTE_EXPONENT.value + 126)
    return (peaks >> 23) - (TOP_EXPONENT.value + 126)


@triton.jit
def power_of_two(exponent):
    """2^exponent as float64, for exponents of normal numbers."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _digit(q):
    """The lowest balanced digit, and the rest without it."""
    digit = ((q + 64) & 127) - 64
    return digit, (q - digit) >> DIGIT_BITS


@triton.jit
def scaled_integer(a, shift):
    """float32 entries times 2^shift, rounded to the nearest integer: int32."""
    # In two steps, since 2^shift alone may be beyond float32.
    half = shift >> 1
    x = a * _power(half) * _power(shift - half)
    # From 2^23 on every float32 is an integer, which adding 0.5 could change.
    return tl.where(tl.abs(x) >= 8388608.0, x, tl.floor(x + 0.5)).to(tl.int32)


@triton.jit
def two_bytes(q):
    """Digits in [-128, 127] of q = d1 2^8 + d2."""
    d2 = ((q + 128) & 255) - 128
    return (q - d2) >> 8, d2


@triton.jit
def _digits_kernel(
    table,
    owner,
    first,
    peaks,
    slices,
    residuals,
    slice_bytes: tl.int64,
    by_row,
    row_starts,
    by_column,
    column_starts,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ELEMENT: tl.constexpr,
    FLOAT8: tl.constexpr,
    INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    matrix, tile = locate(owner, first)
    whole = stored(table, matrix, ELEMENT, INNER, ALIGNED)
    _, _, _, m, n = whole
    pitch = field(table, matrix, PITCH, PAD)
    across = tl.cdiv(n, BN)
    column, row = (tile % across) * BN, (tile // across) * BM
    columns = column + tl.arange(0, BN)
    shift = column_shift(peaks, field(table, matrix, FIRST_COLUMN) + columns, columns < n, BITS)  # [BN]
    a = as_float(load_tile(whole, row, column, BM, BN, INNER), FLOAT8)
    q = scaled_integer(a, shift[None, :])  # [BM, BN]
    if BITS == 8:
        d1, d2 = two_bytes(q)
    else:
        d4, q3 = _digit(q)
        d3, q2 = _digit(q3)
        d2, d1 = _digit(q2)
    if BITS == 8:
        kept = q
    elif HIGH == 1:
        kept = d1 << 21
    elif HIGH == 2:
        kept = q2 << 14
    elif HIGH == 3:
        kept = q3 << 7
    else:
        kept = q
    # In float64, since squares of a column with entries from 1 to 1e-30 would underflow in float32.
    rest = a.to(tl.float64) * power_of_two(shift)[None, :] - kept.to(tl.float64)  # exact
    squares = tl.sum(rest * rest, axis=0)  # [BN]
    total = tl.sum(squares * power_of_two(-2 * shift), axis=0) * (1.0 + 1e-9)
    tl.store(residuals + tl.program_id(0), total)
    if BITS == 8:
        sizes = tl.abs(rest) * power_of_two(-shift)[None, :]
        rows = row + tl.arange(0, BM)
        line = by_row + tl.load(row_starts + matrix) + (tile % across).to(tl.int64) * m + rows
        tl.store(line, tl.sum(sizes, axis=1), mask=rows < m)
        line = by_column + tl.load(column_starts + matrix) + (tile // across).to(tl.int64) * n + columns
        tl.store(line, tl.sum(sizes, axis=0), mask=columns < n)
    target = slices + field(table, matrix, SLICE, PAD) + column.to(tl.int64) * pitch + row
    target += tl.arange(0, BN)[:, None] * pitch.to(tl.int32) + tl.arange(0, BM)[None, :]
    inside = (columns < n)[:, None]  # pitch is a multiple of BM
    if LOW <= 1:
        tl.store(target, tl.trans(d1.to(tl.int8)), mask=inside)
    if LOW <= 2 and HIGH >= 2:
        tl.store(target + 1 * slice_bytes, tl.trans(d2.to(tl.int8)), mask=inside)
    if LOW <= 3 and HIGH >= 3:
        tl.store(target + 2 * slice_bytes, tl.trans(d3.to(tl.int8)), mask=inside)
    if HIGH >= 4:
        tl.store(target + 3 * slice_bytes, tl.trans(d4.to(tl.int8)), mask=inside)


@triton.jit
def _power(exponent):
    """2^exponent as float32, for exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sum_kernel(first, counts, parts, sums, BLOCK: tl.constexpr):
    """Sums of runs, always in the same order: one program per matrix."""
    matrix = tl.program_id(0)
    start, count = tl.load(first + matrix), tl.load(counts + matrix)
    total = tl.zeros((BLOCK,), tl.float64)
    for offset in range(0, count, BLOCK):
        inside = offset + tl.arange(0, BLOCK)
        total += tl.load(parts + start + inside, mask=inside < count, other=0.0)
    tl.store(sums + matrix, tl.sum(total, axis=0))


def launch_options(storage: Storage) -> dict[str, object]:
    """The constants that the kernels which read stored weights are compiled for."""
    return {
        "ELEMENT": storage.element,
        "FLOAT8": storage.float8,
        "INNER": storage.inner,
        "ALIGNED": storage.aligned,
    }


def instances(target: str) -> list[Instance]:
    """Everything that the launchers of this file can ask the compiler for."""
    common = {"table": "*i64", "owner": "*i32", "first": "*i32", "peaks": "*i32"}
    found = []
    for storage in storages():
        tile = PEAK_TILE
        constants = {"BM": tile.rows, "BN": tile.columns, **launch_options(storage)}
        held = Expected(width=16, registers=128) if storage.aligned else None
        found.append(Instance(_peaks_kernel, common, constants, tile.num_warps, expected=held))
        tile = SLICE_TILE
        sevens = {**common, "slices": "*i8", "residuals": "*fp64", "slice_bytes": "i64"}
        lines = {"by_row": "*fp64", "row_starts": "*i64", "by_column": "*fp64", "column_starts": "*i64"}
        for low, high, bits in ((1, 1, 7), (1, 2, 7), (1, 3, 7), (1, 4, 7), (3, 3, 7), (4, 4, 7), (1, 2, 8)):
            types = {**sevens, **lines} if bits == 8 else sevens
            constants = {"LOW": low, "HIGH": high, "BITS": bits, "BM": tile.rows, "BN": tile.columns}
            constants |= launch_options(storage)
            # AMD branches around masked loads, which looks like loops. Triton 3.9 spills two registers on sm_80 and
            # six on sm_100, and 3.6 takes 229 for sums over lines. Where float8 is decoded, 3.7 spills four, among
            # 2320 instructions, on sm_120.
            spills = 6 if target in ("sm_100", "sm_103") else 4 if storage.float8 else 2
            limits = {"width": 16, "registers": 232 if bits == 8 else 168, "stack": 4 * spills, "spills": spills}
            held = Expected(**limits) if storage.aligned and target != "gfx942" else None
            found.append(Instance(_digits_kernel, types, constants, tile.num_warps, expected=held))
    sums = {"first": "*i32", "counts": "*i32", "parts": "*fp64", "sums": "*fp64"}
    return [*found, Instance(_sum_kernel, sums, {"BLOCK": 256}, 4), *norm_instances()]


def column_peaks(problems: Problems) -> Tensor:
    """Bits of the largest absolute entry of every column, int32 (columns,); 0x7F800000 and above: not finite.

    One launch per storage class. Reads every weight once.
    """
    peaks = torch.zeros(problems.columns, dtype=torch.int32, device=problems.device)
    tile = PEAK_TILE
    counts = -(-problems.n // tile.columns) * -(-problems.m // PEAK_STRIPE.value)
    for storage, chosen in problems.classes().items():
        tiles = problems.tiles(counts, chosen)
        launch(
            _peaks_kernel,
            (tiles.total,),
            problems.table,
            tiles.owner,
            tiles.first,
            peaks,
            BM=tile.rows,
            BN=tile.columns,
            num_warps=tile.num_warps,
            **launch_options(storage),
        )
    return peaks


@dataclass(frozen=True)
class Slices:
    """data: (k, bytes of one slice) int8.  peaks: see column_peaks.  bits: of a digit, 7 or 8.

    residual: at least ||D||_2^2 (w,) float64, namely ||D||_F^2, or with 8 bits ||D||_1 ||D||_inf if that is smaller,
    rounded up.
    """

    data: Tensor
    peaks: Tensor
    residual: Tensor
    bits: int = DIGIT_BITS.value

    @property
    def count(self) -> int:
        return self.data.shape[0]

    def dense(self, problems: Problems) -> list[Tensor]:
        """Q diag(s) of every matrix, (m, n) float64 on the host, put together digit by digit: slow, for checks."""
        data, table = self.data.cpu().to(torch.float64), problems.table.tolist()
        exponents = column_exponents(self.peaks.cpu(), self.bits)
        last = 1 if self.bits == 8 else MAX_SLICES - 1  # of the digits that Q has
        found = []
        for row in table:
            m, n, pitch, start, first = (row[f.value] for f in (ROWS, COLUMNS, PITCH, SLICE, FIRST_COLUMN))
            digits = data[:, start : start + n * pitch].view(-1, n, pitch)[..., :m]
            q = sum(digit * 2.0 ** (self.bits * (last - k)) for k, digit in enumerate(digits))
            found.append(torch.ldexp(q, exponents[first : first + n, None]).T)
        return found


def quantize(
    problems: Problems, peaks: Tensor, slices: int, earlier: Slices | None = None, bits: int = DIGIT_BITS.value
) -> Slices:
    """The first ``slices`` (1 to 4) digits of every matrix; those that ``earlier`` holds are taken from there.

    bits: 7, or 8 for two slices. Entries must be finite. One launch per storage class and one for the sums, two more
    for 8 bits; reads every weight once and writes one byte per weight and new slice.

    Raises:
        ValueError: the number of slices of 8 bits is not two, or earlier ones are given.
    """
    if bits == 8 and (slices != 2 or earlier is not None):
        raise ValueError(f"8 bits need two slices and no earlier ones, not {slices}")
    data = torch.empty((slices, problems.slice_bytes), dtype=torch.int8, device=problems.device)
    low = 1
    if earlier is not None:
        data[: earlier.count] = earlier.data
        low = earlier.count + 1
    tile = SLICE_TILE
    across, down = -(-problems.n // tile.columns), -(-problems.m // tile.rows)
    rows = LineSums.of(problems, problems.m, across) if bits == 8 else None
    columns = LineSums.of(problems, problems.n, down) if bits == 8 else None
    lines = [x for sums in (rows, columns) for x in ((sums.parts, sums.starts) if sums else (None, None))]
    residual = torch.zeros(len(problems.m), dtype=torch.float64, device=problems.device)
    for storage, chosen in problems.classes().items():
        tiles = problems.tiles(across * down, chosen)
        parts = torch.empty(tiles.total, dtype=torch.float64, device=problems.device)
        launch(
            _digits_kernel,
            (tiles.total,),
            problems.table,
            tiles.owner,
            tiles.first,
            peaks,
            data,
            parts,
            problems.slice_bytes,
            *lines,
            BITS=bits,
            LOW=low,
            HIGH=slices,
            BM=tile.rows,
            BN=tile.columns,
            num_warps=tile.num_warps,
            **launch_options(storage),
        )
        _add_runs(problems, tiles, across * down, chosen, parts, residual)
    if rows and columns:
        residual = torch.minimum(residual, rows.largest(problems) * columns.largest(problems) * (1 + 1e-9))
    return Slices(data, peaks, residual, bits)


def sum_runs(starts: Tensor, lengths: Tensor, parts: Tensor) -> Tensor:
    """Sums of runs of ``parts``, (runs,) float64, each in an order that depends on its length alone. One launch."""
    sums = torch.empty(len(starts), dtype=torch.float64, device=parts.device)
    launch(_sum_kernel, (len(starts),), starts, lengths, parts, sums, BLOCK=256, num_warps=4)
    return sums


def _add_runs(
    problems: Problems, tiles: TileMap, counts: Tensor, chosen: Sequence[int], parts: Tensor, sums: Tensor
) -> None:
    index = to_device(on_host(chosen), problems.device)
    lengths = to_device(counts[list(chosen)], problems.device, torch.int32)
    sums[index] = sum_runs(tiles.first[index], lengths, parts)
