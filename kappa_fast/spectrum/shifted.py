"""Factors of shifted matrices for the proofs: a Cholesky factorization that measures its own residual as it goes.

For symmetric M and any L, lambda_min(M) >= -||M - L L^T||_2, since L L^T is positive semidefinite. The factorization
subtracts from each block of columns what the columns before it account for, in separate sums of at most ``chunk``
products. What is factored then, B, is M less all earlier columns. So B - X D^T (D the diagonal tile, X the rows below
it) is the residual of these entries as computed, without a product of its own; X and D may be as wrong as they like.

Each term of an entry is rounded at most h = chunk + ceil(n / chunk) + 2 times, so the entry errs by at most
gamma_h (|M| + |L| |L|^T) (Higham, Accuracy and Stability, 2nd ed., section 3.5), and |M| <= |L| |L|^T + |M - L L^T|.
docs/numerics.md, section 6, has the derivation.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..backends.base import Backend, Tensor
from ..backends.moving import accelerated
from ..machine.helping import share
from .rounding import OUT, TINY, U, gamma

PANEL = 128  # columns of a block of a large matrix
# Columns of a block in a batch of matrices with at most so many columns, and beyond. The residual of a diagonal tile
# takes more than its factor, so narrow blocks are faster for small matrices: 64 x 64 takes 33 us with blocks of 24 and
# 49 as a whole, 208 x 208 takes 471 with 48 and 604 with 96. Multiples of 24 suit MKL's products with AVX-512.
BLOCKS = ((32, 32), (128, 24), (639, 48))
WIDE_BLOCK = 288
ROWS = 512  # of a panel that are worked on at a time, by one thread each


def roundings(n: int, chunk: int, before: int = 0) -> int:
    """How often a term of an entry of the residual is rounded at most. before: how often entries of M already are."""
    return min(chunk, n) + math.ceil(n / chunk) + 2 + before


def factor(backend: Backend, matrix: Tensor, chunk: int, before: int = 0) -> float:
    """Factor a symmetric matrix (n, n), float32 or float64, in place: its lower triangle becomes L.

    Only the lower triangle is read; what lies above the diagonal is undefined, before and after.
    before: how many roundings lie between the entries of M and those of ``matrix``.

    Returns a bound on ||M - L L^T||_2 but for underflows; inf where a pivot is not positive.
    """
    if accelerated(matrix.device):
        return _factor_at_once(backend, matrix, chunk, before)
    n, u = matrix.shape[0], float(torch.finfo(matrix.dtype).eps) / 2
    residual = matrix.new_zeros((), dtype=torch.float64)
    squares = torch.zeros_like(residual)
    room = matrix.new_empty((n, min(PANEL, n)))
    for j in range(0, n, PANEL):
        e = min(j + PANEL, n)
        tile = matrix[j:e, j:e]
        _subtract_products(tile, matrix[j:e, :j], matrix[j:e, :j], chunk, room)
        tile, diagonal = torch.tril(tile), torch.tril(tile)
        if not backend.cholesky([diagonal])[0]:
            return math.inf
        matrix[j:e, j:e] = diagonal
        _subtract_products(tile, diagonal, diagonal, chunk, room)
        residual += _squares(torch.tril(tile))
        squares += _squares(diagonal)
        starts = range(e, n, ROWS)
        sums = [(residual, residual)] * len(starts)
        tasks = [partial(_below, sums, i, matrix, (start, j, e), chunk, room) for i, start in enumerate(starts)]
        share(tasks, brief=True)
        for left, size in sums:
            residual += left
            squares += size
    g = gamma(roundings(n, chunk, before), u)
    return _distance(matrix, math.sqrt(2 * float(residual)) * OUT, float(squares) * OUT, g)


def _below(
    sums: list[tuple[Tensor, Tensor]], i: int, matrix: Tensor, place: tuple[int, int, int], chunk: int, room: Tensor
) -> None:
    """Entry i of ``sums`` becomes ||M - L L^T||_F^2 and ||L||_F^2 of up to ROWS rows of a panel below its diagonal
    tile, and matrix[start:, j:e] becomes L. place: (start, j, e).
    """
    start, j, e = place
    stop = min(start + ROWS, matrix.shape[0])
    rest, diagonal = matrix[start:stop, j:e], matrix[j:e, j:e]
    _subtract_products(rest, matrix[start:stop, :j], matrix[j:e, :j], chunk, room[start:stop])
    below = torch.linalg.solve_triangular(diagonal, rest.T, upper=False).T
    _subtract_products(rest, below, diagonal, chunk, room[start:stop])
    sums[i] = _squares(rest), _squares(below)
    rest.copy_(below)


def _factor_at_once(backend: Backend, matrix: Tensor, chunk: int, before: int) -> float:
    """``factor`` for an accelerator: the factor of the whole matrix, and M - L L^T from large products.

    Takes seven times the operations of the factor and about 20 launches, where blocks of columns take hundreds.
    """
    n = matrix.shape[0]
    rest = torch.tril(matrix)
    if not backend.cholesky([matrix])[0]:
        return math.inf
    matrix.tril_()
    room = torch.empty_like(matrix)
    for c in range(0, n, chunk):
        part = matrix[:, c : c + chunk]
        rest -= torch.mm(part, part.T, out=room)
    residual, squares = torch.stack([_squares(rest.tril_()), _squares(matrix)]).tolist()
    g = gamma(roundings(n, chunk, before), float(torch.finfo(matrix.dtype).eps) / 2)
    return _distance(matrix, math.sqrt(2 * residual) * OUT, squares * OUT, g)


def factor_batch(shifted: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Factors L of M = shifted - shift I, and bounds (b,) on ||M - L L^T||_2 with all rounding, inf without a factor.

    shifted: symmetric (b, n, n); its memory becomes that of L, whose entries above the diagonal are undefined. What a
    block column of M leaves after all earlier ones is at hand when it is factored, so its residual costs a product with
    the diagonal block alone. Every entry of M - L L^T is a sum whose terms are rounded n + 2 times at most.
    """
    n = shifted.shape[1]
    diagonal = shifted.diagonal(dim1=1, dim2=2)
    diagonal -= shift[:, None]
    formed = U * diagonal.abs().amax(dim=1)
    left, size = torch.zeros_like(shift), torch.zeros_like(shift)  # ||M - L L^T||_F^2 as computed, and ||L||_F^2
    sound = torch.ones_like(shift, dtype=torch.bool)
    panel = next((columns for most, columns in BLOCKS if n <= most), WIDE_BLOCK)
    for start in range(0, n, panel):
        stop = min(start + panel, n)
        together = n if n <= ROWS else stop  # the rows that are updated with the diagonal tile
        rest = _updated(shifted, (start, together), (start, stop))
        head, tail = rest[:, : stop - start], rest[:, stop - start :]
        d, info = torch.linalg.cholesky_ex(head)
        sound &= info == 0
        left += torch.linalg.matrix_norm(torch.baddbmm(head, d, d.mT, alpha=-1)).square()
        size += torch.linalg.matrix_norm(d).square()
        shifted[:, start:stop, start:stop] = d
        firsts = range(stop, n, ROWS)
        sums = [(left, size)] * len(firsts)
        tasks = [partial(_below_batch, sums, i, shifted, (first, start, stop), tail) for i, first in enumerate(firsts)]
        share(tasks, brief=True)
        for defects, squares in sums:
            left += 2 * defects
            size += squares
    residual = left.sqrt()
    defect = (residual + gamma(n + 2) * (2 * size + residual) + formed) * OUT + TINY
    return shifted, torch.where(sound & torch.isfinite(defect), defect, math.inf)


def _updated(shifted: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """A block of a panel less what the columns before it account for."""
    (first, last), (start, stop) = rows, columns
    block = shifted[:, first:last, start:stop]
    if not start:
        return block
    return torch.baddbmm(block, shifted[:, first:last, :start], shifted[:, start:stop, :start].mT, alpha=-1)


def _below_batch(
    sums: list[tuple[Tensor, Tensor]], i: int, shifted: Tensor, place: tuple[int, int, int], tail: Tensor
) -> None:
    """``_below`` for a batch. place: the first row, and the columns of the panel from start to stop.  tail: its rows
    below the diagonal tile if they are updated, else without rows.
    """
    first, start, stop = place
    last = min(first + ROWS, shifted.shape[1])
    rest = tail if tail.shape[1] else _updated(shifted, (first, last), (start, stop))
    d = shifted[:, start:stop, start:stop]
    below = torch.linalg.solve_triangular(d.mT, rest, upper=True, left=False)
    defect = torch.linalg.matrix_norm(torch.baddbmm(rest, below, d.mT, alpha=-1)).square()
    sums[i] = defect, torch.linalg.matrix_norm(below).square()
    shifted[:, first:last, start:stop] = below


def _distance(factor: Tensor, residual: float, squares: float, g: float) -> float:
    """A bound on ||M - L L^T||_2 from the residual as computed, with entries off by g (|M| + |L| |L|^T)."""
    if not (math.isfinite(residual) and math.isfinite(squares) and g < 0.1):
        return math.inf
    # || |L| |L|^T ||_2 is at most ||L||_F^2, which is close enough for float64.
    size = squares if factor.dtype == torch.float64 else min(squares, _largest_row_sum(factor))
    # ||M - L L^T||_F <= residual + g (2 squares + ||M - L L^T||_F), which is used where it has a factor g.
    whole = (residual + 2 * g * squares) / (1 - g)
    return (residual + g * (2 * size + whole)) * OUT


def _largest_row_sum(factor: Tensor) -> float:
    """The largest row sum of |L| |L|^T, rounded up; || |L| |L|^T ||_2 is no larger. L: the lower triangle."""
    lower = torch.tril(factor).abs_()
    sums = lower @ lower.sum(dim=0)
    slack = 1 + 4 * lower.shape[0] * float(torch.finfo(lower.dtype).eps)  # two sums of n numbers of one sign
    return float(sums.max()) * slack * OUT


def _subtract_products(target: Tensor, left: Tensor, right: Tensor, chunk: int, room: Tensor) -> None:
    """Target -= left right^T in place, in separate sums of at most ``chunk`` products."""
    product = room[: target.shape[0], : target.shape[1]]
    for c in range(0, left.shape[1], chunk):
        torch.mm(left[:, c : c + chunk], right[:, c : c + chunk].T, out=product)
        target -= product


def _squares(x: Tensor) -> Tensor:
    """||X||_F^2, summed in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
