"""Cholesky factors of all matrices of a wave in lockstep, float64, in place: G = L L^T, lower triangles.

Left-looking within super-panels of 256 columns, right-looking between them: a plain right-looking panel of 64 columns
would move more bytes than its arithmetic takes. Every step is one launch for all matrices that are still that large:

    diagonal   the tile on the diagonal: its update, its factor and the inverse of that, one program per matrix
    column     the tiles below it: their update, then a product with that inverse and one step of correction
    trailing   after each super-panel, the rest of the triangle: G - L L^T with 256 columns at a time

A pivot that is not positive ends the factorization of its matrix and of no other. docs/kernels.md has the floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import launch
from .problems import (
    COLUMNS,
    GRAM,
    LEADING,
    Instance,
    Problems,
    Tensor,
    field,
    locate,
    starts_of,
    target_of,
    to_device,
    triangular,
)

BLOCK = tl.constexpr(64)  # columns per step
SUPER = tl.constexpr(256)  # columns between two updates of everything behind them
WARPS = 8  # of the kernels below the diagonal: with 4 the addresses alone spill
# Where Triton 3.7.1 has float64 matrix instructions. Elsewhere a dot crashes the compiler (sm_100, gfx942) or spills
# kilobytes for plain multiply-adds (sm_89, sm_120), and products are sums of outer products.
WITH_DOT = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Factored:
    """Factors of a wave, in the memory of their Gram matrices.

    packed: (elements,) float64, see Problems.gram_views; above the diagonal tiles undefined.  inverses: the inverses of
    the diagonal tiles of L, BLOCK columns each, starting at ``starts``.  info: (w,) int32, 0 or 1 + the column whose
    pivot was not positive.
    """

    packed: Tensor
    inverses: Tensor
    starts: Tensor  # (w,) int64
    info: Tensor


@triton.jit
def _tile(base, leading, row, column, n, SIDE: tl.constexpr):
    """Entries of an n x n matrix from (row, column) on, zero outside: [SIDE, SIDE]."""
    side = tl.arange(0, SIDE)
    inside = (side < n - row)[:, None] & (side < n - column)[None, :]
    place = side[:, None] * leading.to(tl.int32) + side[None, :]
    return tl.load(base + row * leading + column + place, mask=inside, other=0.0)


@triton.jit
def _minus_product(total, base, leading, row, column, start, stop, n, SIDE: tl.constexpr, USE_DOT: tl.constexpr):
    """Total - L[row.., start..stop] L[column.., start..stop]^T, [SIDE, SIDE]; the range is a multiple of BLOCK."""
    side = tl.arange(0, SIDE)
    left = base + row * leading + side * leading
    right = base + column * leading + side * leading
    left_inside, right_inside = side < n - row, side < n - column
    if USE_DOT:
        depth = tl.arange(0, 32)
        product = tl.zeros((SIDE, SIDE), tl.float64)
        for k in range(start, stop, 32):
            x = tl.load(left[:, None] + (k + depth)[None, :], mask=left_inside[:, None], other=0.0)
            y = tl.load(right[:, None] + (k + depth)[None, :], mask=right_inside[:, None], other=0.0)
            product = tl.dot(x, tl.trans(y), product, out_dtype=tl.float64)
        total -= product
    else:
        for k in range(start, stop):
            x = tl.load(left + k, mask=left_inside, other=0.0)
            y = tl.load(right + k, mask=right_inside, other=0.0)
            total -= x[:, None] * y[None, :]
    return total


@triton.jit(do_not_specialize=["step"])
def _diagonal_kernel(table, active, packed, inverses, starts, info, step, USE_DOT: tl.constexpr):
    matrix = tl.load(active + tl.program_id(0)).to(tl.int64)
    if tl.load(info + matrix) == 0:
        n = field(table, matrix, COLUMNS).to(tl.int32)
        leading = tl.multiple_of(field(table, matrix, LEADING), 16)
        base = packed + field(table, matrix, GRAM)
        column = step * BLOCK
        i = tl.arange(0, BLOCK)
        tile = _tile(base, leading, column, column, n, BLOCK)
        start = column // SUPER * SUPER
        tile = _minus_product(tile, base, leading, column, column, start, column, n, BLOCK, USE_DOT)
        # Past the last column an identity, which factors into itself.
        tile = tl.where((i >= n - column)[:, None] & (i[:, None] == i[None, :]), 1.0, tile)
        factor = tl.zeros((BLOCK, BLOCK), tl.float64)
        failed = BLOCK + 0 * step
        for j in range(0, BLOCK):
            pivots = tl.sum(tl.where(i[None, :] == j, tile, 0.0), axis=1)  # [BLOCK], column j
            pivot = tl.sum(tl.where(i == j, pivots, 0.0), axis=0)
            positive = (pivot > 0.0) & (pivot < float("inf"))
            failed = tl.where(positive, failed, tl.minimum(failed, j))
            # After a failure nothing counts any more, but infinities would only breed.
            pivots = tl.where(positive, pivots, 0.0)
            root = tl.sqrt(tl.where(positive, pivot, 1.0))
            line = tl.where(i == j, root, tl.where(i > j, pivots / root, 0.0))
            factor = tl.where(i[None, :] == j, line[:, None], factor)
            tile -= line[:, None] * line[None, :]
        inside = (i < n - column)[:, None] & (i < n - column)[None, :]
        place = i[:, None] * leading.to(tl.int32) + i[None, :]
        tl.store(base + column * leading + column + place, factor, mask=inside)
        if failed < BLOCK:
            tl.store(info + matrix, column + failed + 1)
        # The inverse by forward substitution on the identity, a row at a time.
        inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64)
        for j in range(0, BLOCK):
            below = tl.sum(tl.where(i[None, :] == j, factor, 0.0), axis=1)  # column j of L
            corner = tl.sum(tl.where(i == j, below, 0.0), axis=0)
            line = tl.sum(tl.where(i[:, None] == j, inverse, 0.0), axis=0) / corner  # row j of the inverse
            inverse = tl.where(i[:, None] == j, line[None, :], inverse)
            inverse -= tl.where(i > j, below, 0.0)[:, None] * line[None, :]
        target = inverses + tl.load(starts + matrix) + column.to(tl.int64) * BLOCK
        tl.store(target + i[:, None] * BLOCK + i[None, :], inverse)


@triton.jit(do_not_specialize=["step"])
def _column_kernel(table, owner, first, packed, inverses, starts, info, step, USE_DOT: tl.constexpr):
    matrix, item = locate(owner, first)
    if tl.load(info + matrix) == 0:
        n = field(table, matrix, COLUMNS).to(tl.int32)
        leading = tl.multiple_of(field(table, matrix, LEADING), 16)
        base = packed + field(table, matrix, GRAM)
        column = step * BLOCK
        row = column + (item + 1) * BLOCK
        i = tl.arange(0, BLOCK)
        tile = _tile(base, leading, row, column, n, BLOCK)
        tile = _minus_product(tile, base, leading, row, column, column // SUPER * SUPER, column, n, BLOCK, USE_DOT)
        place = i[:, None] * BLOCK + i[None, :]
        inverse = tl.load(inverses + tl.load(starts + matrix) + column.to(tl.int64) * BLOCK + place)
        diagonal = _tile(base, leading, column, column, n, BLOCK)
        diagonal = tl.where(i[:, None] >= i[None, :], diagonal, 0.0)
        # B D^-T by the inverse alone is off by the condition of D; one correction makes it as good as substitution.
        solved = _times_transposed(tile, inverse, USE_DOT)
        rest = tile - _times_transposed(solved, diagonal, USE_DOT)
        solved += _times_transposed(rest, inverse, USE_DOT)
        inside = (i < n - row)[:, None] & (i < n - column)[None, :]
        tl.store(base + row * leading + column + i[:, None] * leading.to(tl.int32) + i[None, :], solved, mask=inside)


@triton.jit
def _times_transposed(x, y, USE_DOT: tl.constexpr):
    """X Y^T of two [BLOCK, BLOCK] tiles."""
    if USE_DOT:
        return tl.dot(x, tl.trans(y), out_dtype=tl.float64)
    else:
        i = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, BLOCK), tl.float64)
        for k in range(0, BLOCK):
            left = tl.sum(tl.where(i[None, :] == k, x, 0.0), axis=1)
            right = tl.sum(tl.where(i[None, :] == k, y, 0.0), axis=1)
            total += left[:, None] * right[None, :]
        return total


@triton.jit(do_not_specialize=["start"])
def _trailing_kernel(table, owner, first, packed, info, start, SIDE: tl.constexpr, USE_DOT: tl.constexpr):
    matrix, item = locate(owner, first)
    if tl.load(info + matrix) == 0:
        n = field(table, matrix, COLUMNS).to(tl.int32)
        leading = tl.multiple_of(field(table, matrix, LEADING), 16)
        base = packed + field(table, matrix, GRAM)
        r, c = triangular(item)
        row, column = start + SUPER + r * SIDE, start + SUPER + c * SIDE
        tile = _tile(base, leading, row, column, n, SIDE)
        tile = _minus_product(tile, base, leading, row, column, start, start + SUPER, n, SIDE, USE_DOT)
        side = tl.arange(0, SIDE)
        inside = (side < n - row)[:, None] & (side < n - column)[None, :]
        place = side[:, None] * leading.to(tl.int32) + side[None, :]
        tl.store(base + row * leading + column + place, tile, mask=inside)


def diagonal_starts(problems: Problems) -> tuple[Tensor, int]:
    """Where the diagonal tiles of every matrix begin in an array that holds them all, (w,) int64; and its length."""
    tiles = -(-problems.n // BLOCK.value)
    starts, total = starts_of(tiles * BLOCK.value**2)
    return to_device(starts, problems.device), total


def cholesky(problems: Problems, packed: Tensor, info: Tensor | None = None) -> Factored:
    """Factor the lower triangles in ``packed`` (see Problems.gram_views) in place.

    ``info``, (w,) int32, leaves out the matrices where it is not 0, and becomes the result's. Costs n^3 / 3 operations
    and, per matrix, about 8 n^3 / (3 SUPER) bytes. 2 ceil(n / 64) + ceil(n / 256) launches for the largest n, however
    many matrices there are. No synchronization: read ``info`` when it is needed.
    """
    blocks = -(-problems.n // BLOCK.value)
    device = problems.device
    starts, total = diagonal_starts(problems)
    result = Factored(
        packed,
        torch.empty(total, dtype=torch.float64, device=device),
        starts,
        torch.zeros(len(blocks), dtype=torch.int32, device=device) if info is None else info,
    )
    use_dot = target_of(device) in WITH_DOT
    per_super = SUPER.value // BLOCK.value
    for step in range(max(blocks.tolist(), default=0)):
        _factor_column(problems, result, blocks, step, use_dot)
        if (step + 1) % per_super == 0:
            _update_rest(problems, result, (step + 1) * BLOCK.value, use_dot)
    return result


def _factor_column(problems: Problems, result: Factored, blocks: Tensor, step: int, use_dot: bool) -> None:
    active = (blocks > step).nonzero().flatten()
    common = (result.packed, result.inverses, result.starts, result.info, step)
    launch(
        _diagonal_kernel,
        (len(active),),
        problems.table,
        to_device(active, problems.device, torch.int32),
        *common,
        USE_DOT=use_dot,
        num_warps=4,
    )
    below = (blocks > step + 1).nonzero().flatten()
    if len(below):
        tiles = problems.tiles(blocks - step - 1, below)
        launch(
            _column_kernel,
            (tiles.total,),
            problems.table,
            tiles.owner,
            tiles.first,
            *common,
            USE_DOT=use_dot,
            num_warps=WARPS,
        )


def _update_rest(problems: Problems, result: Factored, column: int, use_dot: bool) -> None:
    rest = (problems.n > column).nonzero().flatten()
    if not len(rest):
        return
    across = -(-(problems.n - column).clamp(min=0) // BLOCK.value)
    tiles = problems.tiles(across * (across + 1) // 2, rest)
    launch(
        _trailing_kernel,
        (tiles.total,),
        problems.table,
        tiles.owner,
        tiles.first,
        result.packed,
        result.info,
        column - SUPER.value,
        SIDE=BLOCK.value,
        USE_DOT=use_dot,
        num_warps=WARPS,
    )


def instances(target: str) -> list[Instance]:
    """Everything that ``cholesky`` can ask the compiler for."""
    places = {"table": "*i64", "packed": "*fp64", "info": "*i32"}
    tiles = {"owner": "*i32", "first": "*i32"}
    inverse = {"inverses": "*fp64", "starts": "*i64", "step": "i32"}
    use_dot = target in WITH_DOT
    unit = "float64" if use_dot else None
    return [
        Instance(_diagonal_kernel, {**places, **inverse, "active": "*i32"}, {"USE_DOT": use_dot}, 4, unit=unit),
        Instance(_column_kernel, {**places, **inverse, **tiles}, {"USE_DOT": use_dot}, WARPS, unit=unit),
        Instance(
            _trailing_kernel,
            {**places, **tiles, "start": "i32"},
            {"SIDE": BLOCK.value, "USE_DOT": use_dot},
            WARPS,
            unit=unit,
        ),
    ]
