"""Products of the stored weights of a wave with thin blocks, every product and sum in float64.

    times                A X, and ||A||_F^2 on the way       transposed_times      A^T Y
    binade_times         the same with 4^floor(log2 |A_ij|) for A_ij

The polish and the departure need these products; reading the weights once bounds their speed. Entries of any storage
dtype are widened exactly; torch works on float64 weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cholesky import WITH_DOT
from .launch import launch
from .pairs import entries, load_pairs
from .problems import (
    COLUMNS,
    INNER_COLUMNS,
    INNER_ROWS,
    INTERPRETED,
    ROWS,
    Expected,
    Instance,
    Problems,
    Storage,
    Tensor,
    field,
    load_tile,
    load_turned,
    on_host,
    starts_of,
    storages,
    stored,
    target_of,
    to_device,
)
from .quantize import launch_options, sum_runs

SIDE = tl.constexpr(64)  # rows, or columns, per program
DEPTH = tl.constexpr(32)  # rows or columns of the weights per product
CHUNK = tl.constexpr(2048)  # rows that one program of the transposed product sums
LANES = tl.constexpr(16)  # columns of a block
WARPS = 4


@dataclass(frozen=True)
class Blocks:
    """The first rows of the packed blocks of the chosen matrices. short: blocks of n rows, long: blocks of m rows."""

    chosen: Tensor
    ids: Tensor
    short_start: Tensor
    long_start: Tensor
    short_rows: int
    long_rows: int

    @classmethod
    def of(cls, problems: Problems, chosen: Sequence[int] | None = None) -> Blocks:
        """All matrices of the wave, or some of them, in the order of their blocks."""
        ids, device = problems.chosen(chosen), problems.device
        (short, short_rows), (long, long_rows) = starts_of(problems.n[ids]), starts_of(problems.m[ids])
        moved = to_device(ids, device, torch.int32), to_device(short, device), to_device(long, device)
        return cls(ids, *moved, short_rows, long_rows)


@triton.jit
def _thin(base, row, end, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK), tl.arange(0, LANES)
    return tl.load(base + (row + i)[:, None] * LANES + j[None, :], mask=(i < end - row)[:, None], other=0.0)


@triton.jit
def _times_kernel(
    table,
    ids,
    owner,
    first,
    short_start,
    long_start,
    x,
    y,
    squares,
    ELEMENT: tl.constexpr,
    FLOAT8: tl.constexpr,
    INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
    USE_DOT: tl.constexpr,
    BARRIER: tl.constexpr,
    PAIRED: tl.constexpr,
    BINADES: tl.constexpr,
    SQUARES: tl.constexpr,
):
    program = tl.program_id(0)
    member = tl.load(owner + program)
    matrix = tl.load(ids + member).to(tl.int64)
    whole = stored(table, matrix, ELEMENT, INNER, ALIGNED)
    _, _, _, m, n = whole
    ALONG: tl.constexpr = 2 if PAIRED and INNER == 1 else 1  # pairs lie along the sums,
    ACROSS: tl.constexpr = 2 if PAIRED and INNER == 0 else 1  # or hold entries of two rows
    row = (program - tl.load(first + member)) * (SIDE * ACROSS)
    block = x + tl.load(short_start + member) * LANES
    total = tl.zeros((LANES, SIDE), tl.float64)
    other = tl.zeros((LANES, SIDE), tl.float64)
    norm = tl.zeros((DEPTH, SIDE), tl.float64)  # summed after the loop: lanes share a row
    for column in range(0, n, DEPTH * ALONG):
        if PAIRED:
            raw = load_pairs(whole, row, column, SIDE, DEPTH, INNER, True)
            a = entries(raw, ELEMENT, FLOAT8, True, False, BINADES, BARRIER)
            b = entries(raw, ELEMENT, FLOAT8, True, True, BINADES, BARRIER)
            if SQUARES:
                norm += a * a + b * b
            if ALONG == 2:
                total = _add_product(total, a, block, column, n, 2, USE_DOT)
                total = _add_product(total, b, block, column + 1, n, 2, USE_DOT)
            else:
                total = _add_product(total, a, block, column, n, 1, USE_DOT)
                other = _add_product(other, b, block, column, n, 1, USE_DOT)
        else:
            raw = load_turned(whole, row, column, SIDE, DEPTH, INNER)
            a = entries(raw, ELEMENT, FLOAT8, False, False, BINADES, BARRIER)
            if SQUARES:
                norm += a * a
            total = _add_product(total, a, block, column, n, 1, USE_DOT)
    target = y + (tl.load(long_start + member) + row) * LANES
    _store_rows(target, m - row, tl.trans(total), ACROSS)
    if ACROSS == 2:
        _store_rows(target + LANES, m - row - 1, tl.trans(other), ACROSS)
    if SQUARES:
        tl.store(squares + program, tl.sum(tl.sum(norm, axis=1), axis=0))


@triton.jit
def _store_rows(target, rows, values, APART: tl.constexpr):
    """Rows 0, APART, 2 APART, .. of a packed block, those before ``rows``."""
    i, j = tl.arange(0, SIDE) * APART, tl.arange(0, LANES)
    tl.store(target + i[:, None] * LANES + j[None, :], values, mask=(i < rows)[:, None])


@triton.jit
def _add_product(total, a, block, place, end, APART: tl.constexpr, USE_DOT: tl.constexpr):
    """Total + X[place, place + APART, ..]^T a, a [DEPTH, SIDE].

    The thin block is the left operand: only so do matrix units find it in shared memory without bank conflicts, and are
    tiles of either direction copied 16 bytes at a time.
    """
    if USE_DOT:
        k, j = tl.arange(0, DEPTH) * APART, tl.arange(0, LANES)
        x = tl.load(block + (place + k)[:, None] * LANES + j[None, :], mask=(k < end - place)[:, None], other=0.0)
        return tl.dot(tl.trans(x), a, total, out_dtype=tl.float64)
    else:
        k, j = tl.arange(0, DEPTH), tl.arange(0, LANES)
        for step in range(0, DEPTH):
            line = tl.load(block + (place + step) * LANES + j, mask=(place + step + 0 * j) < end, other=0.0)
            total += line[:, None] * tl.sum(tl.where(k[:, None] == step, a, 0.0), axis=0)[None, :]
        return total


@triton.jit
def _transposed_kernel(
    table,
    ids,
    owner,
    first,
    long_start,
    part_start,
    y,
    parts,
    ELEMENT: tl.constexpr,
    FLOAT8: tl.constexpr,
    INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
    USE_DOT: tl.constexpr,
    BARRIER: tl.constexpr,
    PAIRED: tl.constexpr,
):
    program = tl.program_id(0)
    member = tl.load(owner + program)
    matrix = tl.load(ids + member).to(tl.int64)
    whole = stored(table, matrix, ELEMENT, INNER, ALIGNED)
    _, _, _, m, n = whole
    item = program - tl.load(first + member)
    ALONG: tl.constexpr = 2 if PAIRED and INNER == 0 else 1  # pairs lie along the sums,
    ACROSS: tl.constexpr = 2 if PAIRED and INNER == 1 else 1  # or hold entries of two columns
    across = tl.cdiv(n, SIDE * ACROSS)
    column, chunk = (item % across) * (SIDE * ACROSS), item // across
    block = y + tl.load(long_start + member) * LANES
    total = tl.zeros((LANES, SIDE), tl.float64)
    other = tl.zeros((LANES, SIDE), tl.float64)
    for row in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, m), DEPTH * ALONG):
        if PAIRED:
            raw = load_pairs(whole, row, column, DEPTH, SIDE, INNER, False)
            a = entries(raw, ELEMENT, FLOAT8, True, False, False, BARRIER)
            b = entries(raw, ELEMENT, FLOAT8, True, True, False, BARRIER)
            if ALONG == 2:
                total = _add_product(total, a, block, row, m, 2, USE_DOT)
                total = _add_product(total, b, block, row + 1, m, 2, USE_DOT)
            else:
                total = _add_product(total, a, block, row, m, 1, USE_DOT)
                other = _add_product(other, b, block, row, m, 1, USE_DOT)
        else:
            raw = load_tile(whole, row, column, DEPTH, SIDE, INNER)
            a = entries(raw, ELEMENT, FLOAT8, False, False, False, BARRIER)
            total = _add_product(total, a, block, row, m, 1, USE_DOT)
    target = parts + (tl.load(part_start + member) + chunk.to(tl.int64) * n + column) * LANES
    _store_rows(target, n - column, tl.trans(total), ACROSS)
    if ACROSS == 2:
        _store_rows(target + LANES, n - column - 1, tl.trans(other), ACROSS)


@triton.jit
def _add_rows_kernel(table, ids, owner, first, short_start, part_start, parts, out):
    """Add the partial results of the chunks of rows, in their order."""
    program = tl.program_id(0)
    member = tl.load(owner + program)
    matrix = tl.load(ids + member).to(tl.int64)
    m, n = field(table, matrix, ROWS), field(table, matrix, COLUMNS)
    row = (program - tl.load(first + member)) * SIDE
    place = tl.load(part_start + member)
    total = tl.zeros((SIDE, LANES), tl.float64)
    for _ in range(0, tl.cdiv(m, CHUNK).to(tl.int32)):
        total += _thin(parts + place * LANES, row, n, SIDE)
        place += n
    i, j = tl.arange(0, SIDE), tl.arange(0, LANES)
    target = out + (tl.load(short_start + member) + row) * LANES + i[:, None] * LANES + j[None, :]
    tl.store(target, total, mask=(i < n - row)[:, None])


def times(problems: Problems, blocks: Blocks, x: Tensor, *, squares: bool = True) -> tuple[Tensor, Tensor]:
    """A X (long rows, 16) for packed X (short rows, 16), float64; and ||A||_F^2 (members,), zeros without ``squares``.

    Two launches per storage class, one without ``squares``.
    """
    return _times(problems, blocks, x, binades=False, squares=squares)


def binade_times(problems: Problems, blocks: Blocks, x: Tensor) -> Tensor:
    """Sums of b_ij^2 x_jk, b_ij = 2^floor(log2 |A_ij|), for packed X (short rows, 16): (long rows, 16), float64.

    b is 0 for zeros and for subnormal numbers of float32. Two launches per storage class.
    """
    return _times(problems, blocks, x, binades=True, squares=False)[0]


def _times(problems: Problems, blocks: Blocks, x: Tensor, *, binades: bool, squares: bool) -> tuple[Tensor, Tensor]:
    _check(x, blocks.short_rows)
    y = torch.empty((blocks.long_rows, LANES.value), dtype=torch.float64, device=x.device)
    norms = torch.zeros(len(blocks.chosen), dtype=torch.float64, device=x.device)
    for options, members in _launches(problems, blocks):
        counts = -(-problems.m[blocks.chosen] // (SIDE.value * _entries_across(options, INNER_ROWS)))
        owner, first, total = _programs(counts, members, problems.device)
        parts = torch.empty(total, dtype=torch.float64, device=x.device) if squares else None
        launch(
            _times_kernel,
            (total,),
            problems.table,
            blocks.ids,
            owner,
            first,
            blocks.short_start,
            blocks.long_start,
            x,
            y,
            parts,
            BINADES=binades,
            SQUARES=squares,
            num_warps=WARPS,
            **options,
        )
        if parts is not None:
            index = to_device(members, problems.device)
            norms[index] = sum_runs(first[index], to_device(counts[members], problems.device, torch.int32), parts)
    return y, norms


def transposed_times(problems: Problems, blocks: Blocks, y: Tensor) -> Tensor:
    """A^T Y (short rows, 16) for packed Y (long rows, 16), float64. A launch per storage class and one to add up."""
    _check(y, blocks.long_rows)
    n, m = problems.n[blocks.chosen], problems.m[blocks.chosen]
    chunks = -(-m // CHUNK.value)
    starts, rows = starts_of(n * chunks)
    part_start = to_device(starts, problems.device)
    parts = torch.empty((rows, LANES.value), dtype=torch.float64, device=y.device)
    for options, members in _launches(problems, blocks):
        across = -(-n // (SIDE.value * _entries_across(options, INNER_COLUMNS)))
        owner, first, total = _programs(chunks * across, members, problems.device)
        launch(
            _transposed_kernel,
            (total,),
            problems.table,
            blocks.ids,
            owner,
            first,
            blocks.long_start,
            part_start,
            y,
            parts,
            num_warps=WARPS,
            **options,
        )
    out = torch.empty((blocks.short_rows, LANES.value), dtype=torch.float64, device=y.device)
    owner, first, total = _programs(-(-n // SIDE.value), on_host(range(len(n))), problems.device)
    launch(
        _add_rows_kernel,
        (total,),
        problems.table,
        blocks.ids,
        owner,
        first,
        blocks.short_start,
        part_start,
        parts,
        out,
        num_warps=WARPS,
    )
    return out


def _launches(problems: Problems, blocks: Blocks) -> list[tuple[dict[str, object], Tensor]]:
    """Members by storage class, with the constants that the kernels are compiled for."""
    use_dot = target_of(problems.device) in WITH_DOT
    found = []
    for storage, positions in problems.classes().items():
        members = torch.isin(blocks.chosen, on_host(positions)).nonzero().flatten()
        if len(members):
            found.append((_options(storage, use_dot, use_dot and not INTERPRETED), members))
    return found


def _options(storage: Storage, use_dot: bool, barrier: bool) -> dict[str, object]:
    paired = use_dot and storage.aligned and storage.dtype in (torch.bfloat16, torch.float16)
    return {**launch_options(storage), "USE_DOT": use_dot, "BARRIER": barrier, "PAIRED": paired}


def _entries_across(options: Mapping[str, object], inner: int) -> int:
    """How many entries lie across the sums in what a kernel reads at once: 2 in pairs along the direction ``inner``."""
    return 2 if options["PAIRED"] and options["INNER"] == inner else 1


def _programs(counts: Tensor, members: Tensor, device: torch.device) -> tuple[Tensor, Tensor, int]:
    programs = counts[members]
    first = torch.zeros_like(counts)
    first[members], total = starts_of(programs)
    owner = torch.repeat_interleave(members, programs)
    return to_device(owner, device, torch.int32), to_device(first, device, torch.int32), total


def _check(block: Tensor, rows: int) -> None:
    expected = (rows, LANES.value)
    if tuple(block.shape) != expected or block.dtype != torch.float64 or not block.is_contiguous():
        raise ValueError(f"a block must be {expected}, float64 and packed, not {tuple(block.shape)}, {block.dtype}")


def instances(target: str) -> list[Instance]:
    """Everything that the launchers of this file can ask the compiler for."""
    use_dot = target in WITH_DOT
    unit = "float64" if use_dot else None
    members = {"table": "*i64", "ids": "*i32", "owner": "*i32", "first": "*i32"}
    long = {"long_start": "*i64", "y": "*fp64"}
    found = []
    for storage in storages():
        constants = _options(storage, use_dot, use_dot)
        types = {**members, **long, "short_start": "*i64", "x": "*fp64"}
        # Without matrix units for float64 the loop reads X a line at a time. Decoding 8 bits spills a little more.
        stack = 48 if storage.float8 else 32
        # Thin blocks are copied 8 bytes at a time, which turns them on the way.
        held = Expected(width=8, ahead=use_dot, stack=stack, spills=4) if storage.aligned else None
        for binades, squares in ((False, True), (False, False), (True, False)):
            options = {**constants, "BINADES": binades, "SQUARES": squares}
            summed = {**types, "squares": "*fp64"} if squares else types
            found.append(Instance(_times_kernel, summed, options, WARPS, unit=unit, expected=held))
        types = {**members, **long, "part_start": "*i64", "parts": "*fp64"}
        found.append(Instance(_transposed_kernel, types, constants, WARPS, unit=unit, expected=held))
    adding = {"short_start": "*i64", "part_start": "*i64", "parts": "*fp64", "out": "*fp64"}
    return [*found, Instance(_add_rows_kernel, members | adding, {}, WARPS)]
