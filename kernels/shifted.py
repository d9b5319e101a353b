"""Cholesky factors of shifted Gram matrices for proofs, and how far their products are from what was factored.

A proof factors sign (G - t I) for several t, and the residual needs G again after each. The lower triangle, where the
factor will be, is therefore mirrored above the diagonal once: G costs no second copy, only its diagonal tiles do.

    mirror     G's lower tiles, transposed, above the diagonal; its diagonal tiles aside
    shift      sign (G - t I) into the lower triangle
    cholesky   as in cholesky.py, of the matrices that are still open
    residual   ||M - L L^T||_F^2 and ||L||_F^2 by tiles, summed in an order that depends on the size alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cholesky import (
    BLOCK,
    WARPS,
    cholesky,
    diagonal_starts,
    gram_place,
    load_square,
    minus_product,
    products_of,
    store_square,
)
from .launch import launch
from .problems import (
    Instance,
    Problems,
    Tensor,
    locate,
    starts_of,
    target_of,
    to_device,
    triangular,
)
from .quantize import sum_runs
from .splits import triangular_tiles


@triton.jit
def _mirror_kernel(table, owner, first, packed, kept, starts):
    matrix, item = locate(owner, first)
    base, leading, n = gram_place(table, matrix, packed)
    r, c = triangular(item)
    row, column = r * BLOCK, c * BLOCK
    i = tl.arange(0, BLOCK)
    tile = load_square(base, leading, row, column, n, BLOCK)
    if r == c:
        full = tl.where(i[:, None] >= i[None, :], tile, tl.trans(tile))
        target = kept + tl.multiple_of(tl.load(starts + matrix), BLOCK) + column.to(tl.int64) * BLOCK
        tl.store(target + i[:, None] * BLOCK + i[None, :], full)
    else:
        store_square(base, leading, column, row, n, leading.to(tl.int32), tl.trans(tile), BLOCK)


@triton.jit
def _shifted_tile(base, leading, kept, r, c, n, shift, sign):
    """Tile (r, c) of sign (G - shift I), r >= c, from what was mirrored: zero outside."""
    row, column = r * BLOCK, c * BLOCK
    i = tl.arange(0, BLOCK)
    if r == c:
        tile = tl.load(kept + column.to(tl.int64) * BLOCK + i[:, None] * BLOCK + i[None, :])
        tile = tl.where((i[:, None] == i[None, :]) & (i < n - row)[:, None], tile - shift, tile)
    else:
        tile = tl.trans(load_square(base, leading, column, row, n, BLOCK))
    return tile * sign


@triton.jit
def _shift_kernel(table, owner, first, packed, kept, starts, shifts, signs):
    matrix, item = locate(owner, first)
    base, leading, n = gram_place(table, matrix, packed)
    r, c = triangular(item)
    kept += tl.multiple_of(tl.load(starts + matrix), BLOCK)
    tile = _shifted_tile(base, leading, kept, r, c, n, tl.load(shifts + matrix), tl.load(signs + matrix))
    store_square(base, leading, r * BLOCK, c * BLOCK, n, n, tile, BLOCK)


@triton.jit
def _residual_kernel(
    table, owner, first, packed, kept, starts, info, shifts, signs, squares, sizes, PRODUCTS: tl.constexpr
):
    """Per tile, entries off the diagonal counted twice; infinite where the factorization broke down."""
    matrix, item = locate(owner, first)
    square = tl.full((), float("inf"), tl.float64)
    size = tl.full((), float("inf"), tl.float64)
    if tl.load(info + matrix) == 0:
        base, leading, n = gram_place(table, matrix, packed)
        r, c = triangular(item)
        row, column = r * BLOCK, c * BLOCK
        i = tl.arange(0, BLOCK)
        place = kept + tl.multiple_of(tl.load(starts + matrix), BLOCK)
        rest = _shifted_tile(base, leading, place, r, c, n, tl.load(shifts + matrix), tl.load(signs + matrix))
        left, right, step = base + row * leading, base + column * leading, leading.to(tl.int32)
        zero = tl.zeros((BLOCK, BLOCK), tl.float64)
        for start in range(0, column, BLOCK):  # each partial sum from zero: roundings grow with BLOCK + n / BLOCK
            rest += minus_product(
                zero,
                left,
                step,
                n - row,
                right,
                step,
                n - column,
                start,
                start + BLOCK,
                0,
                0,
                False,
                BLOCK,
                PRODUCTS,
            )
        lower = i[:, None] >= i[None, :]
        left, right, width = left + column, right + column, step - column
        rest += minus_product(
            zero, left, step, n - row, right, step, n - column, 0, BLOCK, width, row - column, True, BLOCK, PRODUCTS
        )
        factor = load_square(base, leading, row, column, n, BLOCK)
        factor = tl.where(lower | (r != c), factor, 0.0)
        once = (i[:, None] == i[None, :]) & (r == c)
        rest = tl.where(lower | (r != c), rest, 0.0)
        square = tl.sum(tl.sum(tl.where(once, 1.0, 2.0) * rest * rest, axis=1), axis=0)
        size = tl.sum(tl.sum(factor * factor, axis=1), axis=0)
    tl.store(squares + tl.program_id(0), square)
    tl.store(sizes + tl.program_id(0), size)


def residual_roundings(n: int) -> int:
    """How many roundings an entry of the residual goes through: BLOCK products from zero, then the partial sums."""
    return BLOCK.value + -(-n // BLOCK.value) + 4


@dataclass(frozen=True)
class Mirrored:
    """The Gram matrices of a wave, kept above the diagonal of ``packed``; the lower triangles are scratch.

    kept: their diagonal tiles, BLOCK columns each, starting at ``starts``.
    """

    problems: Problems
    packed: Tensor
    kept: Tensor
    starts: Tensor

    @classmethod
    def of(cls, problems: Problems, packed: Tensor) -> Mirrored:
        """Takes ``packed`` over (lower triangles, see Problems.gram_views): one launch."""
        starts, total = diagonal_starts(problems)
        kept = torch.empty(total, dtype=torch.float64, device=problems.device)
        tiles = problems.tiles(triangular_tiles(problems.n, BLOCK.value))
        launch(
            _mirror_kernel,
            (tiles.total,),
            problems.table,
            tiles.owner,
            tiles.first,
            packed,
            kept,
            starts,
            num_warps=WARPS,
        )
        return cls(problems, packed, kept, starts)

    def traces(self) -> Tensor:
        """The trace of every Gram matrix, (w,) float64: a sum of terms of one sign."""
        lines = self.kept.view(-1, BLOCK.value, BLOCK.value).diagonal(dim1=1, dim2=2)
        lines = lines.contiguous().view(-1)  # reshape() alone leaves the stride where there is one tile
        tiles = -(-self.problems.n // BLOCK.value)
        starts, _ = starts_of(tiles * BLOCK.value)
        counts = to_device(tiles * BLOCK.value, lines.device, torch.int32)
        return sum_runs(to_device(starts, lines.device, torch.int32), counts, lines)

    def factored(self, chosen: Sequence[int], shifts: Sequence[float], sign: float) -> Shifted:
        """Cholesky's method of M = sign (G - shift I) for the chosen, in the lower triangles.

        Launches as in cholesky() and one more; no synchronization.
        """
        w, device = len(self.problems.n), self.problems.device
        shift = torch.zeros(w, dtype=torch.float64, device="cpu")
        shift[list(chosen)] = torch.tensor(list(shifts), dtype=torch.float64, device="cpu")
        signs = torch.full_like(shift, float(sign))
        closed = torch.ones_like(shift, dtype=torch.int32)
        closed[list(chosen)] = 0
        tiles = self.problems.tiles(triangular_tiles(self.problems.n, BLOCK.value), chosen)
        places = (self.problems.table, tiles.owner, tiles.first, self.packed, self.kept, self.starts)
        moved = to_device(shift, device), to_device(signs, device)
        launch(_shift_kernel, (tiles.total,), *places, *moved, num_warps=WARPS)
        info = cholesky(self.problems, self.packed, to_device(closed, device)).info
        return Shifted(self, tuple(chosen), *moved, info)


@dataclass(frozen=True)
class Shifted:
    """Factors of the chosen matrices of a wave, each of M = sign (G - shift I); good until the next are made.

    shifts, signs: float64, one of each for every matrix of the wave. info: int32, as cholesky() leaves it.
    """

    whole: Mirrored
    chosen: tuple[int, ...]
    shifts: Tensor
    signs: Tensor
    info: Tensor

    def residuals(self) -> tuple[Tensor, Tensor]:
        """||M - L L^T||_F^2 and ||L||_F^2 as computed, (chosen,) float64; infinite where the method broke down.

        An entry of the residual is subject to ``residual_roundings``. Three launches; no synchronization.
        """
        whole, problems, chosen = self.whole, self.whole.problems, list(self.chosen)
        counts = triangular_tiles(problems.n, BLOCK.value)
        tiles = problems.tiles(counts, chosen)
        places = (problems.table, tiles.owner, tiles.first, whole.packed, whole.kept, whole.starts)
        squares = torch.empty(tiles.total, dtype=torch.float64, device=problems.device)
        sizes = torch.empty_like(squares)
        products = products_of(target_of(problems.device), torch.float64)
        launch(
            _residual_kernel,
            (tiles.total,),
            *places,
            self.info,
            self.shifts,
            self.signs,
            squares,
            sizes,
            PRODUCTS=products,
            num_warps=WARPS,
        )
        first, lengths = tiles.first[chosen], to_device(counts[chosen], problems.device, torch.int32)
        return sum_runs(first, lengths, squares), sum_runs(first, lengths, sizes)


def instances(target: str) -> list[Instance]:
    """Everything that ``Mirrored`` can ask the compiler for, beside cholesky.py and the sums of quantize.py."""
    places = {"table": "*i64", "owner": "*i32", "first": "*i32", "packed": "*fp64", "kept": "*fp64", "starts": "*i64"}
    shifted = {**places, "shifts": "*fp64", "signs": "*fp64"}
    products = products_of(target, torch.float64)
    unit = "float64" if products == "ieee" else None
    sums = {"info": "*i32", "squares": "*fp64", "sizes": "*fp64"}
    return [
        Instance(_mirror_kernel, places, {}, WARPS),
        Instance(_shift_kernel, shifted, {}, WARPS),
        Instance(_residual_kernel, {**shifted, **sums}, {"PRODUCTS": products}, WARPS, unit=unit),
    ]
