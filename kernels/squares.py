"""Square tiles of packed n x n matrices, for cholesky.py and shifted.py: reads, writes, products of rows of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from .problems import COLUMNS, GRAM, LEADING, ROW_PAD, field

DEPTH = tl.constexpr(32)  # columns per product on the matrix units


@triton.jit
def gram_place(table, matrix, packed):
    """The address of an n x n matrix, the distance between its rows, and n."""
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
def _to_tf32(x):
    """float32 rounded to the nearest TF32: the matrix units cut off the lower bits, and all errors had one sign."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


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
            if PRODUCTS == "tf32":
                x, y = _to_tf32(x), _to_tf32(y)
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
