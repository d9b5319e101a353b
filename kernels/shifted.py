"""Cholesky factors of shifted Gram matrices for proofs, with their residuals and an independent check.

A proof factors sign (G - t I) for several t, and G is needed again after each. The lower triangle, where the factor
will be, is therefore mirrored above the diagonal once: G costs no second copy, only its diagonal tiles do.

    mirror     G's lower tiles, transposed, above the diagonal; its diagonal tiles and its diagonal aside
    shift      M = sign (G - t I) into the lower triangle
    cholesky   as in cholesky.py, of the matrices that are still open, with ||M - L L^T||_F^2 and ||L||_F^2 by tiles
    check      x^T M x against ||L^T x||^2 for 16 Gaussian x, by other kernels

The residual assumes that the updates of the factorization compute the sums that the code says. The check does not
assume that: it finds gross errors of any of these kernels, though not small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cholesky import (
    BLOCK,
    SUPER,
    WARPS,
    Factored,
    Residuals,
    cholesky,
    diagonal_starts,
    products_of,
    residual_roundings,
    side_of,
)
from .launch import launch
from .panel import Rows, inner
from .problems import (
    FIRST_COLUMN,
    Instance,
    Problems,
    Tensor,
    TileMap,
    field,
    locate,
    on_host,
    starts_of,
    target_of,
    to_device,
    triangular,
)
from .quantize import sum_runs
from .splits import triangular_tiles
from .squares import gram_place, load_square, store_square
from .start import gaussian_blocks
from .steps import Steps
from .triangular import Members, lower_product, transposed_product

U = 2.0**-53


@triton.jit
def _mirror_kernel(table, owner, first, packed, kept, starts, diagonals):
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
        entries = tl.sum(tl.where(i[:, None] == i[None, :], tile, 0.0), axis=1)
        tl.store(diagonals + field(table, matrix, FIRST_COLUMN) + column + i, entries, mask=i < n - column)
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
def _shift_kernel(table, owner, first, packed, kept, starts, shifts, signs, out):
    """M = sign (G - shift I) into the lower triangles of ``out``, which may be ``packed`` itself, in its dtype."""
    matrix, item = locate(owner, first)
    base, leading, n = gram_place(table, matrix, packed)
    r, c = triangular(item)
    kept += tl.multiple_of(tl.load(starts + matrix), BLOCK)
    tile = _shifted_tile(base, leading, kept, r, c, n, tl.load(shifts + matrix), tl.load(signs + matrix))
    base, _, _ = gram_place(table, matrix, out)
    store_square(base, leading, r * BLOCK, c * BLOCK, n, n, tile.to(out.dtype.element_ty), BLOCK)


@dataclass(frozen=True)
class Probes:
    """Gaussian blocks, and their quadratic forms with the Gram matrices of a wave.

    x: (rows, 16), packed.  lengths, forms: x^T x and x^T G x for every column, (w, 16) float64.
    """

    rows: Rows
    x: Tensor
    lengths: Tensor
    forms: Tensor

    @classmethod
    def of(cls, problems: Problems, packed: Tensor, diagonals: Tensor) -> Probes:
        """Probes for the lower triangles in ``packed`` and their diagonals, (columns,): six launches."""
        rows = Rows.of(problems.n.tolist(), problems.device)
        x = gaussian_blocks(rows, problems.n.tolist())  # fixed keys, since errors of kernels do not depend on them
        none = torch.empty(0, device=problems.device)
        below = lower_product(problems, Factored(packed, none, none, none), Members.of(problems), x)
        forms = _columns(inner(rows, x, 2 * below - diagonals[:, None] * x))
        return cls(rows, x, _columns(inner(rows, x, x)), forms)


def _columns(products: Tensor) -> Tensor:
    """The diagonals of X^T Y for every matrix."""
    return products.diagonal(dim1=1, dim2=2)


@dataclass(frozen=True)
class Mirrored:
    """The Gram matrices of a wave, kept above the diagonal of ``packed``; the lower triangles are scratch.

    kept: their diagonal tiles, BLOCK columns each, starting at ``starts``.  diagonals: (columns,).
    """

    problems: Problems
    packed: Tensor
    kept: Tensor
    starts: Tensor
    diagonals: Tensor
    probes: Probes
    steps: Steps

    @classmethod
    def of(cls, problems: Problems, packed: Tensor) -> Mirrored:
        """Takes ``packed`` over (lower triangles, see Problems.gram_views): seven launches."""
        device = problems.device
        starts, total = diagonal_starts(problems)
        kept = torch.empty(total, dtype=torch.float64, device=device)
        diagonals = torch.empty(problems.columns, dtype=torch.float64, device=device)
        tiles = problems.tiles(triangular_tiles(problems.n, BLOCK.value))
        places = (problems.table, tiles.owner, tiles.first, packed, kept, starts, diagonals)
        launch(_mirror_kernel, (tiles.total,), *places, num_warps=WARPS)
        target = target_of(device)
        steps = Steps.of(problems, BLOCK.value, SUPER.value, side_of(target, products_of(target, torch.float64)))
        return cls(problems, packed, kept, starts, diagonals, Probes.of(problems, packed, diagonals), steps)

    def traces(self) -> Tensor:
        """The trace of every Gram matrix, (w,) float64: a sum of terms of one sign."""
        n, device = self.problems.n, self.problems.device
        starts, _ = starts_of(n)
        return sum_runs(to_device(starts, device, torch.int32), to_device(n, device, torch.int32), self.diagonals)

    def shift_into(self, out: Tensor, chosen: Sequence[int], shifts: Tensor, signs: Tensor) -> TileMap:
        """Write sign (G - shift I) of the chosen into the lower triangles of ``out``, float64 or float32.

        shifts, signs: (w,) float64. Returns the tiles of BLOCK columns. One launch.
        """
        problems = self.problems
        tiles = problems.tiles(triangular_tiles(problems.n, BLOCK.value), chosen)
        places = (problems.table, tiles.owner, tiles.first, self.packed, self.kept, self.starts)
        launch(_shift_kernel, (tiles.total,), *places, shifts, signs, out, num_warps=WARPS)
        return tiles

    def factored(self, chosen: Sequence[int], shifts: Sequence[float], sign: float) -> Shifted:
        """Cholesky's method of M = sign (G - shift I) for the chosen, in the lower triangles.

        Launches as in cholesky() and one more; no synchronization.
        """
        problems, w, device = self.problems, len(self.problems.n), self.problems.device
        shift = torch.zeros(w, dtype=torch.float64, device="cpu")
        shift[list(chosen)] = torch.tensor(list(shifts), dtype=torch.float64, device="cpu")
        signs = torch.full_like(shift, float(sign))
        closed = torch.ones_like(shift, dtype=torch.int32)
        closed[list(chosen)] = 0
        moved = to_device(shift, device), to_device(signs, device)
        tiles = self.shift_into(self.packed, chosen, *moved)
        squares = torch.full((tiles.total,), torch.inf, dtype=torch.float64, device=device)
        residuals = Residuals(squares, squares.clone(), tiles.first)
        factors = cholesky(problems, self.packed, to_device(closed, device), self.steps, residuals)
        return Shifted(self, tuple(chosen), *moved, factors, residuals)


@dataclass(frozen=True)
class Shifted:
    """Factors of the chosen matrices of a wave, each of M = sign (G - shift I); the next factors overwrite them.

    shifts, signs: float64, one of each for every matrix of the wave.
    """

    whole: Mirrored
    chosen: tuple[int, ...]
    shifts: Tensor
    signs: Tensor
    factors: Factored
    by_tile: Residuals

    def residuals(self) -> tuple[Tensor, Tensor]:
        """||M - L L^T||_F^2 and ||L||_F^2 as computed, (chosen,) float64; infinite where the method broke down.

        An entry of the residual is subject to ``residual_roundings``. Two launches; no synchronization.
        """
        chosen, device = list(self.chosen), self.whole.problems.device
        counts = triangular_tiles(self.whole.problems.n, BLOCK.value)
        first = self.by_tile.first[to_device(on_host(chosen), device)]
        lengths = to_device(counts[chosen], device, torch.int32)
        return sum_runs(first, lengths, self.by_tile.squares), sum_runs(first, lengths, self.by_tile.sizes)

    def deviations(self, squares: Tensor, sizes: Tensor) -> Tensor:
        """|x^T M x - ||L^T x||^2| over the difference that residuals and rounding allow: (chosen,) float64.

        At most 1 unless some kernel computes a wrong result, nan where the method broke down. An error E of a 2-norm
        100 times as large as allowed stays below 1 for all 16 columns with probability 1e-12 at most
        (docs/numerics.md, section 6). ``squares``, ``sizes`` as residuals() gave them. Three launches.
        """
        whole, problems, chosen = self.whole, self.whole.problems, list(self.chosen)
        probes, target = whole.probes, target_of(problems.device)
        starts, rows = starts_of(problems.n)
        members = Members.of(problems, chosen, starts[chosen], rows)
        image = transposed_product(problems, self.factors, members, probes.x, torch.zeros_like(probes.x))
        places = to_device(on_host(chosen), problems.device)
        found = _columns(inner(probes.rows, image, image))[places]
        lengths, shifts, signs = probes.lengths[places], self.shifts[places, None], self.signs[places, None]
        wanted = signs * (probes.forms[places] - shifts * lengths)
        # Of the residual; of products of n terms and sums of n of them, on both sides.
        roundings = [2 * U * (residual_roundings(n, target) + 2 * n + 8) for n in problems.n[chosen].tolist()]
        relative = to_device(torch.tensor(roundings, dtype=torch.float64, device="cpu"), problems.device)
        total = whole.traces()[places] + self.shifts[places].abs() + sizes
        allowed = lengths * (squares.sqrt() + relative * total)[:, None]
        return ((found - wanted).abs() / allowed).amax(dim=1)


def instances(target: str) -> list[Instance]:
    """Everything that ``Mirrored`` can ask the compiler for, without the kernels of other files."""
    places = {"table": "*i64", "owner": "*i32", "first": "*i32", "packed": "*fp64", "kept": "*fp64", "starts": "*i64"}
    return [
        Instance(_mirror_kernel, {**places, "diagonals": "*fp64"}, {}, WARPS),
        *(
            Instance(_shift_kernel, {**places, "shifts": "*fp64", "signs": "*fp64", "out": out}, {}, WARPS)
            for out in ("*fp64", "*fp32")
        ),
    ]
