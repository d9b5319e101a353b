"""Products and solves with the Cholesky factors of a wave and thin blocks of right-hand sides, float64.

    lower_product       L X          transposed_product   L^T X
    forward_solve       L^-1 X       backward_solve       L^-T X

Blocks are packed: the rows of all members one after the other, 16 columns each. Only the lower triangle is read, once
per call: everything here is bound by that. Products run a program per 64 rows or columns. A solve is a chain, so it is
one program per matrix that streams the factor; a wave of as many matrices as there are multiprocessors fills the chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cholesky import BLOCK, WITH_DOT, Factored
from .launch import launch
from .problems import COLUMNS, GRAM, LEADING, Instance, Problems, Tensor, field, starts_of, target_of, to_device

WIDTH = tl.constexpr(16)  # columns of a block
DEPTH = tl.constexpr(32)  # of the factor per product on the matrix units
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
    def of(cls, problems: Problems, chosen: Sequence[int] | None = None) -> Members:
        """All matrices, or some of them; built once for as long as the same ones take part."""
        ids = problems.chosen(chosen)
        n = problems.n[ids]
        tiles = -(-n // BLOCK.value)
        order = torch.argsort(n, descending=True, stable=True)
        first = torch.zeros_like(ids)
        first[order], total = starts_of(tiles[order])
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


@triton.jit
def _thin(base, row, n):
    """Rows row.. of a packed block, zero past the last: [BLOCK, WIDTH]."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    return tl.load(base + (row + i)[:, None] * WIDTH + j[None, :], mask=(i < n - row)[:, None], other=0.0)


@triton.jit
def _store_thin(base, row, n, values):
    i, j = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    tl.store(base + (row + i)[:, None] * WIDTH + j[None, :], values, mask=(i < n - row)[:, None])


@triton.jit
def _rows_times(total, factor, leading, x, row, start, stop, n, USE_DOT: tl.constexpr):
    """Total + L[row.., start..stop] X[start..stop], at and below the diagonal only: [BLOCK, WIDTH]."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    line = factor + (row + i) * leading
    inside = i < n - row
    if USE_DOT:
        k = tl.arange(0, DEPTH)
        for place in range(start, stop, DEPTH):
            column = place + k
            lower = inside[:, None] & (column[None, :] <= (row + i)[:, None]) & (column < n)[None, :]
            tile = tl.load(line[:, None] + column[None, :], mask=lower, other=0.0)
            y = tl.load(x + column[:, None] * WIDTH + j[None, :], mask=(column < n)[:, None], other=0.0)
            total = tl.dot(tile, y, total, out_dtype=tl.float64)
    else:
        for place in range(start, tl.minimum(stop, n)):
            column = tl.load(line + place, mask=inside & (row + i >= place), other=0.0)
            total += column[:, None] * tl.load(x + place * WIDTH + j)[None, :]
    return total


@triton.jit
def _columns_times(total, factor, leading, x, column, start, stop, n, USE_DOT: tl.constexpr):
    """Total + L[start..stop, column..]^T X[start..stop], at and below the diagonal only: [BLOCK, WIDTH]."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = i < n - column
    if USE_DOT:
        k = tl.arange(0, DEPTH)
        for place in range(start, stop, DEPTH):
            row = place + k
            lower = inside[None, :] & ((column + i)[None, :] <= row[:, None]) & (row < n)[:, None]
            tile = tl.load(factor + row[:, None] * leading + (column + i)[None, :], mask=lower, other=0.0)
            y = tl.load(x + row[:, None] * WIDTH + j[None, :], mask=(row < n)[:, None], other=0.0)
            total = tl.dot(tl.trans(tile), y, total, out_dtype=tl.float64)
    else:
        for place in range(start, tl.minimum(stop, n)):
            row = tl.load(factor + place * leading + column + i, mask=inside & (column + i <= place), other=0.0)
            total += row[:, None] * tl.load(x + place * WIDTH + j)[None, :]
    return total


@triton.jit
def _product_kernel(table, ids, start, owner, first, packed, x, y, TRANSPOSED: tl.constexpr, USE_DOT: tl.constexpr):
    program = tl.program_id(0)
    member = tl.load(owner + program)
    tile = program - tl.load(first + member)
    matrix = tl.load(ids + member).to(tl.int64)
    n = field(table, matrix, COLUMNS).to(tl.int32)
    leading = tl.multiple_of(field(table, matrix, LEADING), 16)
    factor = packed + field(table, matrix, GRAM)
    begin = tl.load(start + member) * WIDTH
    here = tile * BLOCK
    total = tl.zeros((BLOCK, WIDTH), tl.float64)
    if TRANSPOSED:
        total = _columns_times(total, factor, leading, x + begin, here, here, n, n, USE_DOT)
    else:
        total = _rows_times(total, factor, leading, x + begin, here, 0, here + BLOCK, n, USE_DOT)
    _store_thin(y + begin, here, n, total)


@triton.jit
def _apply_inverse(inverse, right, TRANSPOSED: tl.constexpr, USE_DOT: tl.constexpr):
    """D^-1 B or D^-T B, from the stored inverse (BLOCK, BLOCK) of a diagonal tile."""
    i = tl.arange(0, BLOCK)
    if TRANSPOSED:
        tile = tl.load(inverse + i[None, :] * BLOCK + i[:, None])
    else:
        tile = tl.load(inverse + i[:, None] * BLOCK + i[None, :])
    return _small_product(tile, right, USE_DOT)


@triton.jit
def _small_product(tile, right, USE_DOT: tl.constexpr):
    if USE_DOT:
        return tl.dot(tile, right, out_dtype=tl.float64)
    else:
        i = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, WIDTH), tl.float64)
        for k in range(0, BLOCK):
            column = tl.sum(tl.where(i[None, :] == k, tile, 0.0), axis=1)
            line = tl.sum(tl.where(i[:, None] == k, right, 0.0), axis=0)
            total += column[:, None] * line[None, :]
        return total


@triton.jit
def _solve_kernel(
    table, ids, start, packed, inverses, inverse_starts, x, y, TRANSPOSED: tl.constexpr, USE_DOT: tl.constexpr
):
    """Block substitution down, or up for the transpose; y holds what is solved so far."""
    member = tl.program_id(0)
    matrix = tl.load(ids + member).to(tl.int64)
    n = field(table, matrix, COLUMNS).to(tl.int32)
    leading = tl.multiple_of(field(table, matrix, LEADING), 16)
    factor = packed + field(table, matrix, GRAM)
    begin = tl.load(start + member) * WIDTH
    inverse = inverses + tl.load(inverse_starts + matrix)
    i = tl.arange(0, BLOCK)
    blocks = tl.cdiv(n, BLOCK)
    for step in range(0, blocks):
        block = blocks - 1 - step if TRANSPOSED else step + 0 * blocks
        here = block * BLOCK
        known = tl.zeros((BLOCK, WIDTH), tl.float64)
        if TRANSPOSED:
            known = _columns_times(known, factor, leading, y + begin, here, here + BLOCK, n, n, USE_DOT)
        else:
            known = _rows_times(known, factor, leading, y + begin, here, 0, here, n, USE_DOT)
        right = _thin(x + begin, here, n) - known
        place = inverse + here.to(tl.int64) * BLOCK
        solved = _apply_inverse(place, right, TRANSPOSED, USE_DOT)
        # The inverse alone is off by the condition of the tile; one correction is as good as substitution.
        if TRANSPOSED:
            inside = (i[None, :] >= i[:, None]) & (i < n - here)[None, :]
            tile = tl.load(factor + (here + i)[None, :] * leading + (here + i)[:, None], mask=inside, other=0.0)
        else:
            inside = (i[:, None] >= i[None, :]) & (i < n - here)[:, None]
            tile = tl.load(factor + (here + i)[:, None] * leading + (here + i)[None, :], mask=inside, other=0.0)
        solved += _apply_inverse(place, right - _small_product(tile, solved, USE_DOT), TRANSPOSED, USE_DOT)
        _store_thin(y + begin, here, n, solved)
        tl.debug_barrier()  # the next block reads what other threads of this program have written


def lower_product(problems: Problems, factored: Factored, members: Members, block: Tensor) -> Tensor:
    """L X for packed blocks (rows, 16), float64. Reads n^2 / 2 numbers per member. One launch."""
    return _product(problems, factored, members, block, transposed=False)


def transposed_product(problems: Problems, factored: Factored, members: Members, block: Tensor) -> Tensor:
    """L^T X for packed blocks (rows, 16), float64. Reads n^2 / 2 numbers per member. One launch."""
    return _product(problems, factored, members, block, transposed=True)


def forward_solve(problems: Problems, factored: Factored, members: Members, block: Tensor) -> Tensor:
    """L^-1 X for packed blocks (rows, 16), float64. Reads n^2 / 2 numbers per member. One launch."""
    return _solve(problems, factored, members, block, transposed=False)


def backward_solve(problems: Problems, factored: Factored, members: Members, block: Tensor) -> Tensor:
    """L^-T X for packed blocks (rows, 16), float64. Reads n^2 / 2 numbers per member. One launch."""
    return _solve(problems, factored, members, block, transposed=True)


def _product(problems: Problems, factored: Factored, members: Members, block: Tensor, *, transposed: bool) -> Tensor:
    _check(members, block)
    out = torch.empty_like(block)
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
        USE_DOT=target_of(problems.device) in WITH_DOT,
        num_warps=WARPS,
    )
    return out


def _solve(problems: Problems, factored: Factored, members: Members, block: Tensor, *, transposed: bool) -> Tensor:
    _check(members, block)
    out = torch.empty_like(block)
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
        USE_DOT=target_of(problems.device) in WITH_DOT,
        num_warps=WARPS,
    )
    return out


def _check(members: Members, block: Tensor) -> None:
    expected = (members.rows, WIDTH.value)
    if tuple(block.shape) != expected or block.dtype != torch.float64 or not block.is_contiguous():
        found = f"{tuple(block.shape)}, {block.dtype}, {'packed' if block.is_contiguous() else 'strided'}"
        raise ValueError(f"a block must be {expected}, torch.float64, packed, not {found}")


def instances(target: str) -> list[Instance]:
    """Everything that the launchers of this file can ask the compiler for."""
    use_dot = target in WITH_DOT
    unit = "float64" if use_dot else None
    common = {"table": "*i64", "ids": "*i32", "start": "*i64", "packed": "*fp64", "x": "*fp64", "y": "*fp64"}
    tiles = {"owner": "*i32", "first": "*i32"}
    inverse = {"inverses": "*fp64", "inverse_starts": "*i64"}
    found = []
    for transposed in (False, True):
        constants = {"TRANSPOSED": transposed, "USE_DOT": use_dot}
        found.append(Instance(_product_kernel, common | tiles, constants, WARPS, unit=unit))
        found.append(Instance(_solve_kernel, common | inverse, constants, WARPS, unit=unit))
    return found
