"""Cholesky factors of all matrices of a wave in lockstep, in place: G = L L^T, lower triangles, float64 or float32.

Left-looking within super-panels of 256 columns, right-looking between them: a plain right-looking panel of 64 columns
would move more bytes than its arithmetic takes. Every step is one launch for all matrices that are still that large:

    diagonal   the tile on the diagonal: its update, its factor and the inverse of that, one program per matrix
    column     the tiles below it: their update, then a product with that inverse and one step of correction
    trailing   after each super-panel, the rest of the triangle: G - L L^T with 256 columns at a time

A pivot that is not positive ends the factorization of its matrix and of no other. docs/kernels.md has the floor.

For proofs the first two also measure the residual M - L L^T of a tile: they hold M minus the products of all columns
before, and subtract those of the 64 columns of the tile. docs/numerics.md, section 6, bounds the rounding of this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import launch
from .problems import (
    Expected,
    Instance,
    Problems,
    Tensor,
    starts_of,
    target_of,
    to_device,
)
from .squares import gram_place, load_square, minus_product, store_square
from .steps import Steps

BLOCK = tl.constexpr(64)  # columns per step
SUPER = tl.constexpr(256)  # columns between two updates of everything behind them
WARPS = 8  # with 4 warps the tiles would take all registers
# Where Triton 3.7.1 has float64 matrix instructions. Elsewhere a dot crashes the compiler (sm_100, gfx942) or spills
# kilobytes for plain multiply-adds (sm_89, sm_120), and products are sums of outer products.
WITH_DOT = ("sm_80", "sm_90")
# Relative error of one product of two float32 numbers as TF32 takes them three times: each is split into 11 and 11
# bits, rounded to nearest, so 2^-22 of each operand is lost, and the product of both lower halves, 2^-22, is dropped.
TF32X3_ERROR = 3 * 2.0**-22


def products_of(target: str, dtype: torch.dtype) -> str:
    """The input precision of the dots that multiply tiles of this dtype, or "none" for sums of outer products."""
    if dtype == torch.float64:
        return "ieee" if target in WITH_DOT else "none"
    return "ieee" if target.startswith("gfx") else "tf32x3"


def coarse_products(products: str) -> str:
    """The input precision behind super-panels of a coarse factor: see cholesky()."""
    return "tf32" if products == "tf32x3" else products


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


@dataclass(frozen=True)
class Residuals:
    """The residuals of factors, by tiles of BLOCK columns of the lower triangles, row by row.

    squares, sizes: (tiles,) float64, sums over a tile of M - L L^T, entries off the diagonal of M twice, and of L;
    infinite where no tile was finished.  first: (w,) int32, where the tiles of every matrix begin.
    """

    squares: Tensor
    sizes: Tensor
    first: Tensor


def residual_roundings(n: int, target: str) -> int:
    """The most roundings of any term of an entry of the residual, see minus_product.

    With a dot a product of SUPER columns from zero, one subtraction for every super-panel, and the columns of its own
    diagonal tile; without one all columns, one after the other.
    """
    if products_of(target, torch.float64) == "none":
        return n + 2
    return SUPER.value + -(-n // SUPER.value) + BLOCK.value + 2


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


@triton.jit
def _keep(squares, sizes, place, rest, factor):
    """Sums over the tile at ``place`` among all tiles: of squares of the residual as given, and of those of L."""
    tl.store(squares + place, tl.sum(tl.sum(rest, axis=1), axis=0))
    tl.store(sizes + place, tl.sum(tl.sum(factor * factor, axis=1), axis=0))


@triton.jit(do_not_specialize=["step"])
def _diagonal_kernel(
    table,
    order,
    packed,
    inverses,
    starts,
    info,
    step,
    squares,
    sizes,
    first,
    PRODUCTS: tl.constexpr,
    MEASURE: tl.constexpr,
):
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
            # After a failure the results are not used, and zeros keep infinities from spreading.
            pivots = tl.where(positive, pivots, 0.0)
            root = _root(tl.where(positive, pivot, 1.0))
            line = tl.where(i == j, root, tl.where(i > j, _over(pivots, root), 0.0))
            factor = tl.where(i[None, :] == j, line[:, None], factor)
            tile -= line[:, None] * line[None, :]
        store_square(base, leading, column, column, n, leading.to(tl.int32), factor, BLOCK)
        if failed < BLOCK:
            tl.store(info + matrix, column + failed + 1)
        elif MEASURE:
            # The rest of the tile is its residual: every column of the factor has been subtracted.
            place = tl.load(first + matrix) + step * (step + 1) // 2 + step
            rest = tl.where(i[:, None] > i[None, :], 2.0, 1.0) * tile * tile
            rest = tl.where(i[:, None] >= i[None, :], rest, 0.0)
            _keep(squares, sizes, place, rest, tl.where((i < n - column)[:, None], factor, 0.0))
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
def _column_kernel(
    table,
    tiles,
    packed,
    inverses,
    starts,
    info,
    step,
    squares,
    sizes,
    first,
    PRODUCTS: tl.constexpr,
    MEASURE: tl.constexpr,
    UPDATE: tl.constexpr,
    CORRECT: tl.constexpr,
):
    """B <- B D^-T for the rows B below a diagonal tile D, after their update, whose products are of precision UPDATE.

    The error of a product with the inverse grows with the condition of D; CORRECT: one correction makes it as small as
    that of substitution. The next operand is stored in the place of the result, since tiles in registers would not fit.
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
        tile = _update(tile, base, leading, row, column, column // SUPER * SUPER, column, n, BLOCK, UPDATE)
        _put(base, leading, row, column, n, tile)
        solved = _solved(here, step_down, n - row, inverse, PRODUCTS)
        _put(base, leading, row, column, n, solved)
        if CORRECT:
            rest = _left(tile, here, step_down, n - row, diagonal, PRODUCTS)
            _put(base, leading, row, column, n, rest)
            solved += _solved(here, step_down, n - row, inverse, PRODUCTS)
            _put(base, leading, row, column, n, solved)
        if MEASURE:
            rest = _left(tile, here, step_down, n - row, diagonal, PRODUCTS)
            block = row // BLOCK
            place = tl.load(first + matrix) + block * (block + 1) // 2 + step
            _keep(squares, sizes, place, 2.0 * rest * rest, solved)


@triton.jit
def _solved(here, step_down, rows, inverse, PRODUCTS: tl.constexpr):
    """The tile at ``here`` times the transposed inverse."""
    zero = tl.zeros((BLOCK, BLOCK), here.dtype.element_ty)
    return -minus_product(zero, here, step_down, rows, inverse, BLOCK, BLOCK, 0, BLOCK, 0, 0, False, BLOCK, PRODUCTS)


@triton.jit
def _left(tile, here, step_down, rows, diagonal, PRODUCTS: tl.constexpr):
    """Tile - X D^T for the tile X at ``here`` and D at ``diagonal``, of which the lower triangle counts."""
    return minus_product(
        tile, here, step_down, rows, diagonal, step_down, BLOCK, 0, BLOCK, BLOCK, BLOCK, True, BLOCK, PRODUCTS
    )


@triton.jit
def _put(base, leading, row, column, n, tile):
    """Store a tile that the whole program reads, after all its threads have read the old values."""
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
    """The starts (w,) int64 of the diagonal tiles of every matrix in an array of all of them, and its length."""
    tiles = -(-problems.n // BLOCK.value)
    starts, total = starts_of(tiles * BLOCK.value**2)
    return to_device(starts, problems.device), total


def side_of(target: str, products: str) -> int:
    """The side of tiles behind super-panels: 128 where matrix units read operands from shared memory; others spill."""
    return 128 if products == "tf32x3" and target in ("sm_90", "sm_100") else 64


def cholesky(
    problems: Problems,
    packed: Tensor,
    info: Tensor | None = None,
    steps: Steps | None = None,
    residuals: Residuals | None = None,
    *,
    coarse: bool = False,
) -> Factored:
    """Factor the lower triangles in ``packed`` (see Problems.gram_views) in place, in their dtype.

    ``coarse``, for float32: updates below diagonal tiles are single products of TF32, and columns are not corrected, so
    entries of L L^T are off by about 2^-11 of the sums they come from, for a third of the work of the matrix units.
    ``info``, (w,) int32, leaves out the matrices where it is not 0, and becomes the result's. ``steps`` of the same
    problems serve again. ``residuals`` are filled in for the tiles that are finished, for float64 and 64 n^2 more
    operations. Costs n^3 / 3 operations and, per matrix, about n^3 / (3 SUPER) numbers read and written.
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
    behind = coarse_products(products) if coarse else products
    per_panel = SUPER.value // BLOCK.value
    for step in range(len(steps.diagonals)):
        factor_diagonals(problems, result, steps, step, residuals)
        finish_columns(problems, result, steps, step, residuals, correct=not coarse)
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
                PRODUCTS=behind,
                num_warps=WARPS,
            )
    return result


def factor_diagonals(
    problems: Problems, result: Factored, steps: Steps, step: int, residuals: Residuals | None = None
) -> None:
    """The diagonal tiles of one step and their inverses, see cholesky(). One launch."""
    launch(
        _diagonal_kernel,
        (steps.diagonals[step],),
        problems.table,
        steps.order,
        *_places(result, step, residuals),
        **_options(result, residuals),
    )


def finish_columns(
    problems: Problems,
    result: Factored,
    steps: Steps,
    step: int,
    residuals: Residuals | None = None,
    *,
    correct: bool = True,
) -> None:
    """The tiles below the diagonal ones of one step, see cholesky(). One launch, or none where there are no tiles."""
    if steps.belows[step]:
        options = _options(result, residuals)
        launch(
            _column_kernel,
            (steps.belows[step],),
            problems.table,
            steps.below,
            *_places(result, step, residuals),
            UPDATE=options["PRODUCTS"] if correct else coarse_products(str(options["PRODUCTS"])),
            CORRECT=correct,
            **options,
        )


def _places(result: Factored, step: int, residuals: Residuals | None) -> tuple[Tensor | int | None, ...]:
    where = (None, None, None) if residuals is None else (residuals.squares, residuals.sizes, residuals.first)
    return (result.packed, result.inverses, result.starts, result.info, step, *where)


def _options(result: Factored, residuals: Residuals | None) -> dict[str, object]:
    products = products_of(target_of(result.packed.device), result.packed.dtype)
    return {"PRODUCTS": products, "MEASURE": residuals is not None, "num_warps": WARPS}


def instances(target: str) -> list[Instance]:
    """Everything that ``cholesky`` can ask the compiler for."""
    found = []
    for dtype, name in ((torch.float64, "*fp64"), (torch.float32, "*fp32")):
        products = products_of(target, dtype)
        common = {"table": "*i64", "packed": name, "info": "*i32"}
        inverse = {"inverses": name, "starts": "*i64", "step": "i32"}
        unit = {"ieee": "float64", "tf32x3": "tf32"}.get(products) if name == "*fp64" or products == "tf32x3" else None
        # What lies between loops may spill: on sm_80, sm_89 and sm_120 34 registers of a float32 column.
        held = Expected(width=16, ahead=True, stack=96) if unit else None
        column = Expected(width=16, ahead=True, stack=96 if unit == "float64" else 160) if unit else None
        for measure in (False, True) if dtype == torch.float64 else (False,):
            types, constants = {**common, **inverse}, {"PRODUCTS": products, "MEASURE": measure}
            types |= {"squares": "*fp64", "sizes": "*fp64", "first": "*i32"} if measure else {}
            found.append(Instance(_diagonal_kernel, {**types, "order": "*i64"}, constants, WARPS, 3, unit, held))
            types = {**types, "tiles": "*i64"}
            for correct in (True, False) if dtype == torch.float32 else (True,):
                update = products if correct else coarse_products(products)
                whole = {**constants, "UPDATE": update, "CORRECT": correct}
                found.append(Instance(_column_kernel, types, whole, WARPS, 3, unit, column))
        types = {**common, "tiles": "*i64", "panel": "i32"}
        for precision in sorted({products, coarse_products(products)}):
            behind = {"SIDE": side_of(target, products), "PRODUCTS": precision}
            found.append(Instance(_trailing_kernel, types, behind, WARPS, 3, unit, held))
    return found
