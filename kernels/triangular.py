"""Products and solves with the Cholesky factors of a wave and thin blocks of right-hand sides.

    lower_product       L X          transposed_product   L^T X
    forward_solve       L^-1 X       backward_solve       L^-T X

Blocks are packed, float64 for factors of any dtype, 16 columns each. Only the lower triangle is read, once per call;
this bounds the speed, and a float32 factor has half the bytes. A float32 factor is widened to float64 if the target has
matrix units for that; otherwise products are float32.

Products run a program per 64 rows or columns. The steps of a solve depend on each other, so one program per matrix
streams the factor; a wave of as many matrices as there are multiprocessors uses the whole chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cholesky import BLOCK, WITH_DOT, Factored
from .launch import launch
from .pairs import widen
from .problems import INTERPRETED, Expected, Instance, Problems, Tensor, starts_of, target_of, to_device
from .squares import gram_place

WIDTH = tl.constexpr(16)  # columns of a block
DEPTH = tl.constexpr(32)  # rows or columns of the factor per product on the matrix units
WARPS = 4


@dataclass(frozen=True)
class Members:
    """Matrices of a wave that take part in a call, in the order of their blocks.

    ids (a,) int32; start (a,) int64: first row of each block; tile_owner, tile_first: a program per 64 rows, the
    largest matrices first. rows: of all blocks together.
    """

    ids: Tensor
    start: Tensor
    tile_owner: Tensor
    tile_first: Tensor
    tiles: int
    rows: int
    count: int

    @classmethod
    def of(
        cls,
        problems: Problems,
        chosen: Sequence[int] | None = None,
        start: Tensor | None = None,
        rows: int | None = None,
    ) -> Members:
        """All matrices, or some of them; callers keep the result for later calls with the same matrices.

        Their blocks follow each other, or begin at the rows ``start`` (a,), int64 on the host, of a panel of ``rows``
        rows, which may have blocks of other matrices too.
        """
        ids = problems.chosen(chosen)
        n = problems.n[ids]
        tiles = -(-n // BLOCK.value)
        order = torch.argsort(n, descending=True, stable=True)
        first = torch.zeros_like(ids)
        first[order], total = starts_of(tiles[order])
        if start is None or rows is None:
            start, rows = starts_of(n)
        device = problems.device
        return cls(
            to_device(ids, device, torch.int32),
            to_device(start, device),
            to_device(torch.repeat_interleave(order, tiles[order]), device, torch.int32),
            to_device(first, device, torch.int32),
            total,
            rows,
            len(ids),
        )


def arithmetic_of(target: str, dtype: torch.dtype) -> dict[str, object]:
    """The type in which factors of this dtype are multiplied with blocks on this target, and whether by a dot."""
    with_dot = target in WITH_DOT
    if dtype == torch.float64:
        return {"WORK": tl.float64, "USE_DOT": with_dot, "BARRIER": False}
    return {"WORK": tl.float64 if with_dot else tl.float32, "USE_DOT": True, "BARRIER": with_dot and not INTERPRETED}


@triton.jit
def _as_work(tile, WORK: tl.constexpr, BARRIER: tl.constexpr):
    """Entries of a factor in the type of the arithmetic."""
    if tile.dtype == WORK:
        return tile
    else:
        return widen(tile, False, BARRIER)


@triton.jit
def _thin(base, row, n):
    """Rows row.. of a packed block, zero past the last: [BLOCK, WIDTH]."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    return tl.load(base + (row + i)[:, None] * WIDTH + j[None, :], mask=(i < n - row)[:, None], other=0.0)


@triton.jit
def _store_thin(base, row, n, values):
    i, j = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    tl.store(base + (row + i)[:, None] * WIDTH + j[None, :], values.to(tl.float64), mask=(i < n - row)[:, None])


@triton.jit
def _rows_times(
    total,
    factor,
    leading,
    x,
    row,
    start,
    stop,
    n,
    LOWER: tl.constexpr,
    WORK: tl.constexpr,
    USE_DOT: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """Total + X[start..stop]^T L[row.., start..stop]^T, [WIDTH, BLOCK]. LOWER: the range holds the diagonal.

    The thin block is the left operand, see apply._add_product.
    """
    i, j = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    step = leading.to(tl.int32)
    line = factor + row * leading + i * step
    inside = i < n - row
    if USE_DOT:
        k = tl.arange(0, DEPTH)
        for place in range(start, stop, DEPTH):
            column = place + k
            wanted = inside[None, :]
            if LOWER:
                wanted = wanted & (column < step)[:, None]
            tile = tl.load(line[None, :] + column[:, None], mask=wanted, other=0.0)
            if LOWER:  # not by the mask, which would make narrow loads
                tile = tl.where(column[:, None] <= (row + i)[None, :], tile, 0.0)
            y = tl.load(x + column[:, None] * WIDTH + j[None, :], mask=(column < n)[:, None], other=0.0).to(WORK)
            total = tl.dot(tl.trans(y), _as_work(tile, WORK, BARRIER), total, input_precision="ieee", out_dtype=WORK)
    else:
        for place in range(start, tl.minimum(stop, n)):
            column = tl.load(line + place, mask=inside & (row + i >= place), other=0.0)
            total += tl.load(x + place * WIDTH + j)[:, None] * column[None, :]
    return total


@triton.jit
def _columns_times(
    total,
    factor,
    leading,
    x,
    column,
    start,
    stop,
    n,
    LOWER: tl.constexpr,
    WORK: tl.constexpr,
    USE_DOT: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """Total + X[start..stop]^T L[start..stop, column..], [WIDTH, BLOCK]. LOWER: the range holds the diagonal."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    step = leading.to(tl.int32)
    if USE_DOT:
        k = tl.arange(0, DEPTH)
        for place in range(start, stop, DEPTH):
            row = place + k
            # The padding of the rows is read too: it gives further columns of the result, which are not stored.
            wanted = (i < step - column)[None, :] & (row < n)[:, None]
            tile = tl.load(factor + place * leading + column + k[:, None] * step + i[None, :], mask=wanted, other=0.0)
            if LOWER:
                tile = tl.where((column + i)[None, :] <= row[:, None], tile, 0.0)
            y = tl.load(x + row[:, None] * WIDTH + j[None, :], mask=(row < n)[:, None], other=0.0).to(WORK)
            total = tl.dot(tl.trans(y), _as_work(tile, WORK, BARRIER), total, input_precision="ieee", out_dtype=WORK)
    else:
        inside = i < n - column
        for place in range(start, tl.minimum(stop, n)):
            row = tl.load(factor + place * leading + column + i, mask=inside & (column + i <= place), other=0.0)
            total += tl.load(x + place * WIDTH + j)[:, None] * row[None, :]
    return total


@triton.jit
def _product_kernel(
    table,
    ids,
    start,
    owner,
    first,
    packed,
    x,
    y,
    TRANSPOSED: tl.constexpr,
    WORK: tl.constexpr,
    USE_DOT: tl.constexpr,
    BARRIER: tl.constexpr,
):
    program = tl.program_id(0)
    member = tl.load(owner + program)
    tile = program - tl.load(first + member)
    factor, leading, n = gram_place(table, tl.load(ids + member).to(tl.int64), packed)
    begin = tl.load(start + member) * WIDTH
    here = tile * BLOCK
    below = here + BLOCK
    x += begin
    total = tl.zeros((WIDTH, BLOCK), WORK)
    if TRANSPOSED:
        total = _columns_times(total, factor, leading, x, here, here, below, n, True, WORK, USE_DOT, BARRIER)
        total = _columns_times(total, factor, leading, x, here, below, n, n, False, WORK, USE_DOT, BARRIER)
    else:
        total = _rows_times(total, factor, leading, x, here, 0, here, n, False, WORK, USE_DOT, BARRIER)
        total = _rows_times(total, factor, leading, x, here, here, below, n, True, WORK, USE_DOT, BARRIER)
    _store_thin(y + begin, here, n, tl.trans(total))


@triton.jit
def _small_product(
    tile, right, TRANSPOSED: tl.constexpr, WORK: tl.constexpr, USE_DOT: tl.constexpr, BARRIER: tl.constexpr
):
    """D B or D^T B for a tile D [BLOCK, BLOCK]."""
    if TRANSPOSED:
        tile = tl.trans(tile)
    if USE_DOT:
        return tl.dot(_as_work(tile, WORK, BARRIER), right, input_precision="ieee", out_dtype=WORK)
    else:
        i = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, WIDTH), WORK)
        for k in range(0, BLOCK):
            column = tl.sum(tl.where(i[None, :] == k, tile, 0.0), axis=1)
            line = tl.sum(tl.where(i[:, None] == k, right, 0.0), axis=0)
            total += column[:, None] * line[None, :]
        return total


@triton.jit
def _solve_kernel(
    table,
    ids,
    start,
    packed,
    inverses,
    inverse_starts,
    x,
    y,
    TRANSPOSED: tl.constexpr,
    WORK: tl.constexpr,
    USE_DOT: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """Block substitution down, or up for the transpose; y holds what is solved so far."""
    member = tl.program_id(0)
    matrix = tl.load(ids + member).to(tl.int64)
    factor, leading, n = gram_place(table, matrix, packed)
    begin = tl.load(start + member) * WIDTH
    x += begin
    y += begin
    inverse = inverses + tl.multiple_of(tl.load(inverse_starts + matrix), BLOCK)
    i = tl.arange(0, BLOCK)
    square = i[:, None] * BLOCK + i[None, :]
    place = i[:, None] * leading.to(tl.int32) + i[None, :]
    lower = i[:, None] >= i[None, :]
    blocks = tl.cdiv(n, BLOCK)
    for step in range(0, blocks):
        block = blocks - 1 - step if TRANSPOSED else step + 0 * blocks
        here = block * BLOCK
        known = tl.zeros((WIDTH, BLOCK), WORK)
        if TRANSPOSED:
            known = _columns_times(known, factor, leading, y, here, here + BLOCK, n, n, False, WORK, USE_DOT, BARRIER)
        else:
            known = _rows_times(known, factor, leading, y, here, 0, here, n, False, WORK, USE_DOT, BARRIER)
        right = _thin(x, here, n).to(WORK) - tl.trans(known)
        inverted = tl.load(inverse + here.to(tl.int64) * BLOCK + square)
        solved = _small_product(inverted, right, TRANSPOSED, WORK, USE_DOT, BARRIER)
        # The error of the inverse grows with the condition of the tile; one correction makes it that of substitution.
        inside = (i < n - here)[:, None] & (i < leading.to(tl.int32) - here)[None, :]
        tile = tl.load(factor + here * leading + here + place, mask=inside, other=0.0)
        rest = right - _small_product(tl.where(lower, tile, 0.0), solved, TRANSPOSED, WORK, USE_DOT, BARRIER)
        solved += _small_product(inverted, rest, TRANSPOSED, WORK, USE_DOT, BARRIER)
        _store_thin(y, here, n, solved)
        tl.debug_barrier()  # the next block reads what other threads of this program have written


def lower_product(
    problems: Problems, factored: Factored, members: Members, block: Tensor, out: Tensor | None = None
) -> Tensor:
    """L X for packed blocks (rows, 16), float64, into ``out`` if given. One launch, n^2 / 2 numbers read."""
    return _product(problems, factored, members, block, out, transposed=False)


def transposed_product(
    problems: Problems, factored: Factored, members: Members, block: Tensor, out: Tensor | None = None
) -> Tensor:
    """L^T X for packed blocks (rows, 16), float64, into ``out`` if given. One launch, n^2 / 2 numbers read."""
    return _product(problems, factored, members, block, out, transposed=True)


def forward_solve(
    problems: Problems, factored: Factored, members: Members, block: Tensor, out: Tensor | None = None
) -> Tensor:
    """L^-1 X for packed blocks (rows, 16), float64, into ``out`` if given. One launch, n^2 / 2 numbers read."""
    return _solve(problems, factored, members, block, out, transposed=False)


def backward_solve(
    problems: Problems, factored: Factored, members: Members, block: Tensor, out: Tensor | None = None
) -> Tensor:
    """L^-T X for packed blocks (rows, 16), float64, into ``out`` if given. One launch, n^2 / 2 numbers read."""
    return _solve(problems, factored, members, block, out, transposed=True)


def _product(
    problems: Problems, factored: Factored, members: Members, block: Tensor, out: Tensor | None, *, transposed: bool
) -> Tensor:
    _check(members, block)
    out = torch.empty_like(block) if out is None else out
    launch(
        _product_kernel,
        (members.tiles,),
        problems.table,
        members.ids,
        members.start,
        members.tile_owner,
        members.tile_first,
        factored.packed,
        block,
        out,
        TRANSPOSED=transposed,
        num_warps=WARPS,
        **arithmetic_of(target_of(problems.device), factored.packed.dtype),
    )
    return out


def _solve(
    problems: Problems, factored: Factored, members: Members, block: Tensor, out: Tensor | None, *, transposed: bool
) -> Tensor:
    _check(members, block)
    out = torch.empty_like(block) if out is None else out
    launch(
        _solve_kernel,
        (members.count,),
        problems.table,
        members.ids,
        members.start,
        factored.packed,
        factored.inverses,
        factored.starts,
        block,
        out,
        TRANSPOSED=transposed,
        num_warps=WARPS,
        **arithmetic_of(target_of(problems.device), factored.packed.dtype),
    )
    return out


def _check(members: Members, block: Tensor) -> None:
    expected = (members.rows, WIDTH.value)
    if tuple(block.shape) != expected or block.dtype != torch.float64 or not block.is_contiguous():
        found = f"{tuple(block.shape)}, {block.dtype}, {'packed' if block.is_contiguous() else 'strided'}"
        raise ValueError(f"a block must be {expected}, torch.float64, packed, not {found}")


def instances(target: str) -> list[Instance]:
    """Everything that the launchers of this file can ask the compiler for."""
    tiles = {"owner": "*i32", "first": "*i32"}
    found = []
    for dtype, name in ((torch.float64, "*fp64"), (torch.float32, "*fp32")):
        arithmetic = arithmetic_of(target, dtype)
        unit = "float64" if arithmetic["WORK"] == tl.float64 and arithmetic["USE_DOT"] else None
        common = {"table": "*i64", "ids": "*i32", "start": "*i64", "packed": name, "x": "*fp64", "y": "*fp64"}
        inverse = {"inverses": name, "inverse_starts": "*i64"}
        for transposed in (False, True):
            constants = {"TRANSPOSED": transposed, **arithmetic}
            if name == "*fp32":  # whatever this process runs on
                constants["BARRIER"] = arithmetic["WORK"] == tl.float64
            # Thin blocks are copied 8 bytes at a time, which turns them on the way.
            held = Expected(width=8, ahead=True) if unit else None
            found.append(Instance(_product_kernel, common | tiles, constants, WARPS, 3, unit, held))
            held = Expected(width=8, ahead=True, stack=384) if unit else None  # spilled between loops
            found.append(Instance(_solve_kernel, common | inverse, constants, WARPS, 3, unit, held))
    return found
