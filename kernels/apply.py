"""Products of the stored weights of a wave with thin blocks, every product and sum in float64.

    times                A X, and ||A||_F^2 on the way       transposed_times      A^T Y
    binade_times         the same with 4^floor(log2 |A_ij|) for A_ij

The polish and the departure need these products; reading the weights once bounds their speed. Entries of any storage
dtype are widened exactly; torch works on float64 weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cholesky import WITH_DOT
from .launch import launch
from .problems import (
    COLUMNS,
    INTERPRETED,
    ROWS,
    Expected,
    Instance,
    Problems,
    Tensor,
    as_float,
    field,
    load_tile,
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
def _widen(x, BARRIER: tl.constexpr):
    """float32 as float64. Triton 3.6 and 3.7 crash on, or miscompile, a plain cast right before a float64 dot."""
    if BARRIER:
        return tl.inline_asm_elementwise("cvt.f64.f32 $0, $1;", "=d,f", [x], dtype=tl.float64, is_pure=False, pack=1)
    else:
        return x.to(tl.float64)


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
    BINADES: tl.constexpr,
):
    program = tl.program_id(0)
    member = tl.load(owner + program)
    matrix = tl.load(ids + member).to(tl.int64)
    whole = stored(table, matrix, ELEMENT, INNER, ALIGNED)
    _, _, _, m, n = whole
    row = (program - tl.load(first + member)) * SIDE
    block = x + tl.load(short_start + member) * LANES
    total = tl.zeros((SIDE, LANES), tl.float64)
    norm = tl.zeros((SIDE, DEPTH), tl.float64)  # summed after the loop: lanes share a row
    i, j = tl.arange(0, SIDE), tl.arange(0, LANES)
    for column in range(0, n, DEPTH):
        narrow = as_float(load_tile(whole, row, column, SIDE, DEPTH, INNER), FLOAT8)
        if BINADES:  # the exponent bits alone are a power of two, or 0 for 0 and subnormal numbers
            narrow = (narrow.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        a = _widen(narrow, BARRIER)
        if BINADES:
            a *= a
        else:
            norm += a * a
        total = _add_product(total, a, block, column, n, USE_DOT)
    target = y + (tl.load(long_start + member) + row) * LANES + i[:, None] * LANES + j[None, :]
    tl.store(target, total, mask=(i < m - row)[:, None])
    if not BINADES:
        tl.store(squares + program, tl.sum(tl.sum(norm, axis=1), axis=0))


@triton.jit
def _add_product(total, a, block, place, end, USE_DOT: tl.constexpr):
    """Total + a X[place..], a [SIDE, DEPTH]."""
    if USE_DOT:
        return tl.dot(a, _thin(block, place, end, DEPTH), total, out_dtype=tl.float64)
    else:
        k, j = tl.arange(0, DEPTH), tl.arange(0, LANES)
        for step in range(0, DEPTH):
            line = tl.load(block + (place + step) * LANES + j, mask=(place + step + 0 * j) < end, other=0.0)
            total += tl.sum(tl.where(k[None, :] == step, a, 0.0), axis=1)[:, None] * line[None, :]
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
):
    program = tl.program_id(0)
    member = tl.load(owner + program)
    matrix = tl.load(ids + member).to(tl.int64)
    whole = stored(table, matrix, ELEMENT, INNER, ALIGNED)
    _, _, _, m, n = whole
    item = program - tl.load(first + member)
    across = tl.cdiv(n, SIDE)
    column, chunk = (item % across) * SIDE, item // across
    block = y + tl.load(long_start + member) * LANES
    total = tl.zeros((SIDE, LANES), tl.float64)
    for row in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, m), DEPTH):
        a = as_float(load_tile(whole, row, column, DEPTH, SIDE, INNER), FLOAT8)
        total = _add_product(total, _widen(tl.trans(a), BARRIER), block, row, m, USE_DOT)
    i, j = tl.arange(0, SIDE), tl.arange(0, LANES)
    target = parts + (tl.load(part_start + member) + chunk.to(tl.int64) * n + column) * LANES
    tl.store(target + i[:, None] * LANES + j[None, :], total, mask=(i < n - column)[:, None])


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


def times(problems: Problems, blocks: Blocks, x: Tensor) -> tuple[Tensor, Tensor]:
    """A X (long rows, 16) for packed X (short rows, 16), float64; and ||A||_F^2 (members,).

    Two launches per storage class.
    """
    return _times(problems, blocks, x, binades=False)


def binade_times(problems: Problems, blocks: Blocks, x: Tensor) -> Tensor:
    """Sums of b_ij^2 x_jk, b_ij = 2^floor(log2 |A_ij|), for packed X (short rows, 16): (long rows, 16), float64.

    b is 0 for zeros and for subnormal numbers of float32. Two launches per storage class.
    """
    return _times(problems, blocks, x, binades=True)[0]


def _times(problems: Problems, blocks: Blocks, x: Tensor, *, binades: bool) -> tuple[Tensor, Tensor]:
    _check(x, blocks.short_rows)
    y = torch.empty((blocks.long_rows, LANES.value), dtype=torch.float64, device=x.device)
    counts = -(-problems.m[blocks.chosen] // SIDE.value)
    norms = torch.zeros(len(blocks.chosen), dtype=torch.float64, device=x.device)
    for options, members in _launches(problems, blocks):
        owner, first, total = _programs(counts, members, problems.device)
        squares = torch.empty(total, dtype=torch.float64, device=x.device)
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
            squares,
            BINADES=binades,
            num_warps=WARPS,
            **options,
        )
        index = to_device(members, problems.device)
        norms[index] = sum_runs(first[index], to_device(counts[members], problems.device, torch.int32), squares)
    return y, norms


def transposed_times(problems: Problems, blocks: Blocks, y: Tensor) -> Tensor:
    """A^T Y (short rows, 16) for packed Y (long rows, 16), float64. A launch per storage class and one to add up."""
    _check(y, blocks.long_rows)
    n, m = problems.n[blocks.chosen], problems.m[blocks.chosen]
    chunks, across = -(-m // CHUNK.value), -(-n // SIDE.value)
    starts, rows = starts_of(n * chunks)
    part_start = to_device(starts, problems.device)
    parts = torch.empty((rows, LANES.value), dtype=torch.float64, device=y.device)
    for options, members in _launches(problems, blocks):
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
    owner, first, total = _programs(across, on_host(range(len(n))), problems.device)
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
    common = {"USE_DOT": use_dot, "BARRIER": use_dot and not INTERPRETED}
    found = []
    for storage, positions in problems.classes().items():
        members = torch.isin(blocks.chosen, on_host(positions)).nonzero().flatten()
        if len(members):
            found.append(({**launch_options(storage), **common}, members))
    return found


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
        constants = {**launch_options(storage), "USE_DOT": use_dot, "BARRIER": use_dot}
        types = {**members, **long, "short_start": "*i64", "x": "*fp64", "squares": "*fp64"}
        # Without matrix units for float64 the loop reads X a line at a time. Decoding 8 bits spills a little more.
        stack = 48 if storage.float8 else 32
        held = Expected(width=16 if use_dot else 8, ahead=use_dot, stack=stack, spills=4) if storage.aligned else None
        for binades in (False, True):
            options = {**constants, "BINADES": binades}
            found.append(Instance(_times_kernel, types, options, WARPS, unit=unit, expected=held))
        types = {**members, **long, "part_start": "*i64", "parts": "*fp64"}
        found.append(Instance(_transposed_kernel, types, constants, WARPS, unit=unit, expected=held))
    adding = {"short_start": "*i64", "part_start": "*i64", "parts": "*fp64", "out": "*fp64"}
    return [*found, Instance(_add_rows_kernel, members | adding, {}, WARPS)]
