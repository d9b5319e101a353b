"""Cholesky factors of all matrices of a wave in lockstep, in place: G = L L^T, lower triangles, float64 or float32.

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
    ROW_PAD,
    Expected,
    Instance,
    Problems,
    Tensor,
    field,
    starts_of,
    target_of,
    to_device,
)
from .steps import Steps

BLOCK = tl.constexpr(64)  # columns per step
SUPER = tl.constexpr(256)  # columns between two updates of everything behind them
DEPTH = tl.constexpr(32)  # columns per product on the matrix units
WARPS = 8  # with 4 the tiles alone take all registers
# Where Triton 3.7.1 has float64 matrix instructions. Elsewhere a dot crashes the compiler (sm_100, gfx942) or spills
# kilobytes for plain multiply-adds (sm_89, sm_120), and products are sums of outer products.
WITH_DOT = ("sm_80", "sm_90")
# Relative error of one product of two float32 numbers as TF32 takes them three times: each is split into 11 and 11
# bits, rounded to nearest, so 2^-22 of each operand is lost, and the product of both lower halves, 2^-22, is dropped.
TF32X3_ERROR = 3 * 2.0**-22


def products_of(target: str, dtype: torch.dtype) -> str:
    """How tiles of this dtype are multiplied: the input precision of a dot, or "none" for sums of outer products."""
    if dtype == torch.float64:
        return "ieee" if target in WITH_DOT else "none"
    return "ieee" if target.startswith("gfx") else "tf32x3"


@dataclass(frozen=True)
class Factored:
    """Factors of a wave, in the memory of their Gram matrices.

    packed: (elements,) float64 or float32, see Problems.gram_views; above the diagonal tiles undefined.  inverses: the
    inverses of the diagonal tiles of L, BLOCK columns each, starting at ``starts``, in the same dtype.  info: (w,)
    int32, 0 or 1 + the column whose pivot was not positive.
    """

    packed: Tensor
    inverses: Tensor
    starts: Tensor  # (w,) int64
    info: Tensor


@triton.jit
def gram_place(table, matrix, packed):
    """Of an n x n matrix: where it begins, the distance between its rows, and n."""
    base = packed + field(table, matrix, GRAM, ROW_PAD)
    return base, field(table, matrix, LEADING, ROW_PAD), field(table, matrix, COLUMNS).to(tl.int32)


@triton.jit
def load_square(base, leading, row, column, n, SIDE: tl.constexpr):
    """Entries of an n x n matrix from (row, column) on, zero outside: [SIDE, SIDE]."""
    side = tl.arange(0, SIDE)
    step = leading.to(tl.int32)
    # The padding of the rows is read along, since a mask that ends on a multiple of 16 leaves loads wide.
    inside = (side < n - row)[:, None] & (side < step - column)[None, :]
    tile = tl.load(base + row * leading + column + side[:, None] * step + side[None, :], mask=inside, other=0.0)
    return tl.where((side < n - column)[None, :], tile, 0.0)


@triton.jit
def store_square(base, leading, row, column, n, columns, tile, SIDE: tl.constexpr):
    """The counterpart of load_square, to columns below ``columns``: n, or the padding as well."""
    side = tl.arange(0, SIDE)
    inside = (side < n - row)[:, None] & (side < columns - column)[None, :]
    place = side[:, None] * leading.to(tl.int32) + side[None, :]
    tl.store(base + row * leading + column + place, tile, mask=inside)


@triton.jit
def minus_product(
    total,
    left,
    left_step,
    left_rows,
    right,
    right_step,
    right_rows,
    start,
    stop,
    width,
    above,
    LOWER: tl.constexpr,
    SIDE: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Total - X[:, start..stop] Y[:, start..stop]^T, [SIDE, SIDE]; the range is a multiple of DEPTH.

    X and Y lie at ``left`` and ``right`` with so many rows, a step apart. LOWER: Y counts at and below its diagonal, X
    at and below ``above`` diagonals further right, and no row is read from ``width`` on.
    """
    side = tl.arange(0, SIDE)
    left += side * left_step
    right += side * right_step
    left_inside, right_inside = side < left_rows, side < right_rows
    if PRODUCTS != "none":
        depth = tl.arange(0, DEPTH)
        product = tl.zeros((SIDE, SIDE), total.dtype)
        for k in range(start, stop, DEPTH):
            of_x, of_y = left_inside[:, None], right_inside[:, None]
            if LOWER:
                of_x, of_y = of_x & (k + depth < width)[None, :], of_y & (k + depth < width)[None, :]
            x = tl.load(left[:, None] + (k + depth)[None, :], mask=of_x, other=0.0)
            y = tl.load(right[:, None] + (k + depth)[None, :], mask=of_y, other=0.0)
            if LOWER:  # not by the masks of the loads, which would be narrow then
                x = tl.where((k + depth)[None, :] <= (side + above)[:, None], x, 0.0)
                y = tl.where((k + depth)[None, :] <= side[:, None], y, 0.0)
            product = tl.dot(x, tl.trans(y), product, input_precision=PRODUCTS, out_dtype=total.dtype)
        total -= product
    else:
        for k in range(start, stop):
            of_x, of_y = left_inside, right_inside
            if LOWER:
                of_x, of_y = of_x & (k <= side + above) & (k < width), of_y & (k <= side) & (k < width)
            x = tl.load(left + k, mask=of_x, other=0.0)
            y = tl.load(right + k, mask=of_y, other=0.0)
            total -= x[:, None] * y[None, :]
    return total


@triton.jit
def _update(total, base, leading, row, column, start, stop, n, SIDE: tl.constexpr, PRODUCTS: tl.constexpr):
    """Total - L[row.., start..stop] L[column.., start..stop]^T."""
    step = leading.to(tl.int32)
    left, right = base + row * leading, base + column * leading
    return minus_product(total, left, step, n - row, right, step, n - column, start, stop, 0, 0, False, SIDE, PRODUCTS)


@triton.jit
def _root(x):
    """The square root, rounded to nearest."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _over(x, y):
    """The quotient, rounded to nearest."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit(do_not_specialize=["step"])
def _diagonal_kernel(table, order, packed, inverses, starts, info, step, PRODUCTS: tl.constexpr):
    matrix = tl.load(order + tl.program_id(0))
    if tl.load(info + matrix) == 0:
        base, leading, n = gram_place(table, matrix, packed)
        column = step * BLOCK
        i = tl.arange(0, BLOCK)
        tile = load_square(base, leading, column, column, n, BLOCK)
        start = column // SUPER * SUPER
        tile = _update(tile, base, leading, column, column, start, column, n, BLOCK, PRODUCTS)
        # Past the last column an identity, which factors into itself.
        tile = tl.where((i >= n - column)[:, None] & (i[:, None] == i[None, :]), 1.0, tile)
        factor = tl.zeros((BLOCK, BLOCK), tile.dtype)
        failed = BLOCK + 0 * step
        for j in range(0, BLOCK):
            pivots = tl.sum(tl.where(i[None, :] == j, tile, 0.0), axis=1)  # [BLOCK], column j
            pivot = tl.sum(tl.where(i == j, pivots, 0.0), axis=0)
            positive = (pivot > 0.0) & (pivot < float("inf"))
            failed = tl.where(positive, failed, tl.minimum(failed, j))
            # After a failure nothing counts any more, but infinities would only breed.
            pivots = tl.where(positive, pivots, 0.0)
            root = _root(tl.where(positive, pivot, 1.0))
            line = tl.where(i == j, root, tl.where(i > j, _over(pivots, root), 0.0))
            factor = tl.where(i[None, :] == j, line[:, None], factor)
            tile -= line[:, None] * line[None, :]
        store_square(base, leading, column, column, n, leading.to(tl.int32), factor, BLOCK)
        if failed < BLOCK:
            tl.store(info + matrix, column + failed + 1)
        # The inverse by forward substitution on the identity, a row at a time.
        inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tile.dtype)
        for j in range(0, BLOCK):
            below = tl.sum(tl.where(i[None, :] == j, factor, 0.0), axis=1)  # column j of L
            corner = tl.sum(tl.where(i == j, below, 0.0), axis=0)
            line = _over(tl.sum(tl.where(i[:, None] == j, inverse, 0.0), axis=0), corner)  # row j of the inverse
            inverse = tl.where(i[:, None] == j, line[None, :], inverse)
            inverse -= tl.where(i > j, below, 0.0)[:, None] * line[None, :]
        target = inverses + tl.multiple_of(tl.load(starts + matrix), BLOCK) + column.to(tl.int64) * BLOCK
        tl.store(target + i[:, None] * BLOCK + i[None, :], inverse)


@triton.jit(do_not_specialize=["step"])
def _column_kernel(table, tiles, packed, inverses, starts, info, step, PRODUCTS: tl.constexpr):
    """B <- B D^-T for the rows B below a diagonal tile D.

    By the inverse alone it is off by the condition of D; one correction makes it as good as substitution. What is
    multiplied next waits in memory, in the place of the result: tiles as operands would take more registers than
    there are.
    """
    tile_of = tl.load(tiles + tl.program_id(0))
    matrix = tile_of >> 32
    if tl.load(info + matrix) == 0:
        base, leading, n = gram_place(table, matrix, packed)
        column = step * BLOCK
        row = ((tile_of >> 16) & 0xFFFF).to(tl.int32) * BLOCK
        here, step_down = base + row * leading + column, leading.to(tl.int32)
        inverse = inverses + tl.multiple_of(tl.load(starts + matrix), BLOCK) + column.to(tl.int64) * BLOCK
        diagonal = base + column * leading + column
        tile = load_square(base, leading, row, column, n, BLOCK)
        tile = _update(tile, base, leading, row, column, column // SUPER * SUPER, column, n, BLOCK, PRODUCTS)
        zero = tl.zeros((BLOCK, BLOCK), tile.dtype)
        _put(base, leading, row, column, n, tile)
        solved = -minus_product(
            zero, here, step_down, n - row, inverse, BLOCK, BLOCK, 0, BLOCK, 0, 0, False, BLOCK, PRODUCTS
        )
        _put(base, leading, row, column, n, solved)
        rest = minus_product(
            tile, here, step_down, n - row, diagonal, step_down, BLOCK, 0, BLOCK, BLOCK, BLOCK, True, BLOCK, PRODUCTS
        )
        _put(base, leading, row, column, n, rest)
        solved -= minus_product(
            zero, here, step_down, n - row, inverse, BLOCK, BLOCK, 0, BLOCK, 0, 0, False, BLOCK, PRODUCTS
        )
        tl.debug_barrier()
        store_square(base, leading, row, column, n, leading.to(tl.int32), solved, BLOCK)


@triton.jit
def _put(base, leading, row, column, n, tile):
    """Leave a tile where the whole program reads it, once nobody reads what was there."""
    tl.debug_barrier()
    store_square(base, leading, row, column, n, leading.to(tl.int32), tile, BLOCK)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["panel"])
def _trailing_kernel(table, tiles, packed, info, panel, SIDE: tl.constexpr, PRODUCTS: tl.constexpr):
    tile_of = tl.load(tiles + tl.program_id(0))
    matrix = tile_of >> 32
    if tl.load(info + matrix) == 0:
        base, leading, n = gram_place(table, matrix, packed)
        row, column = ((tile_of >> 16) & 0xFFFF).to(tl.int32) * SIDE, (tile_of & 0xFFFF).to(tl.int32) * SIDE
        tile = load_square(base, leading, row, column, n, SIDE)
        start = panel * SUPER  # as a number of super-panels the compiler knows what it is a multiple of
        tile = _update(tile, base, leading, row, column, start, start + SUPER, n, SIDE, PRODUCTS)
        store_square(base, leading, row, column, n, leading.to(tl.int32), tile, SIDE)


def diagonal_starts(problems: Problems) -> tuple[Tensor, int]:
    """Where the diagonal tiles of every matrix begin in an array that holds them all, (w,) int64; and its length."""
    tiles = -(-problems.n // BLOCK.value)
    starts, total = starts_of(tiles * BLOCK.value**2)
    return to_device(starts, problems.device), total


def side_of(target: str, products: str) -> int:
    """Of tiles behind super-panels: 128 where the matrix units read operands from shared memory, else it spills."""
    return 128 if products == "tf32x3" and target in ("sm_90", "sm_100") else 64


def cholesky(problems: Problems, packed: Tensor, info: Tensor | None = None, steps: Steps | None = None) -> Factored:
    """Factor the lower triangles in ``packed`` (see Problems.gram_views) in place, in their dtype.

    ``info``, (w,) int32, leaves out the matrices where it is not 0, and becomes the result's. ``steps`` of the same
    problems serve again. Costs n^3 / 3 operations and, per matrix, about n^3 / (3 SUPER) numbers read and written.
    2 ceil(n / 64) + ceil(n / 256) launches for the largest n, however many matrices there are. No synchronization:
    read ``info`` when it is needed.
    """
    device = problems.device
    starts, total = diagonal_starts(problems)
    result = Factored(
        packed,
        torch.empty(total, dtype=packed.dtype, device=device),
        starts,
        torch.zeros(len(problems.n), dtype=torch.int32, device=device) if info is None else info,
    )
    target = target_of(device)
    products = products_of(target, packed.dtype)
    steps = steps or Steps.of(problems, BLOCK.value, SUPER.value, side_of(target, products))
    common = (result.packed, result.inverses, result.starts, result.info)
    per_panel = SUPER.value // BLOCK.value
    for step, (diagonals, belows) in enumerate(zip(steps.diagonals, steps.belows, strict=True)):
        launch(
            _diagonal_kernel,
            (diagonals,),
            problems.table,
            steps.order,
            *common,
            step,
            PRODUCTS=products,
            num_warps=WARPS,
        )
        if belows:
            launch(
                _column_kernel,
                (belows,),
                problems.table,
                steps.below,
                *common,
                step,
                PRODUCTS=products,
                num_warps=WARPS,
            )
        panel = step // per_panel
        if (step + 1) % per_panel == 0 and panel < len(steps.behinds):
            launch(
                _trailing_kernel,
                (steps.behinds[panel],),
                problems.table,
                steps.behind,
                result.packed,
                result.info,
                panel,
                SIDE=steps.side,
                PRODUCTS=products,
                num_warps=WARPS,
            )
    return result


def instances(target: str) -> list[Instance]:
    """Everything that ``cholesky`` can ask the compiler for."""
    found = []
    for dtype, name in ((torch.float64, "*fp64"), (torch.float32, "*fp32")):
        products = products_of(target, dtype)
        common = {"table": "*i64", "packed": name, "info": "*i32"}
        inverse = {"inverses": name, "starts": "*i64", "step": "i32"}
        unit = {"ieee": "float64", "tf32x3": "tf32"}.get(products) if name == "*fp64" or products == "tf32x3" else None
        constants = {"PRODUCTS": products}
        behind = {"SIDE": side_of(target, products), **constants}
        # What lies between loops may spill: on sm_80, sm_89 and sm_120 34 registers of a float32 column.
        held = Expected(width=16, ahead=True, stack=96) if unit else None
        column = Expected(width=16, ahead=True, stack=96 if unit == "float64" else 160) if unit else None
        found += [
            Instance(_diagonal_kernel, {**common, **inverse, "order": "*i64"}, constants, WARPS, 3, unit, held),
            Instance(_column_kernel, {**common, **inverse, "tiles": "*i64"}, constants, WARPS, 3, unit, column),
            Instance(_trailing_kernel, {**common, "tiles": "*i64", "panel": "i32"}, behind, WARPS, 3, unit, held),
        ]
    return found
