"""Gram matrices and Cholesky factors for torch_backend.py: the lower triangle alone, in blocks that stay in cache.

The blocks are the same however many threads share them, and one thread computes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..machine.helping import share
from ..machine.processor import mkl_is_narrow
from .base import Tensor
from .moving import accelerated

# Columns of a tile of the lower triangle, a multiple of 24, as MKL's products with AVX-512 have them: at 2048 x 2048 on
# one thread 0.59 of the full product in float64 and in float32, where 256 columns take 0.96 and 0.59.
TILE = 288
# Columns of a factor that are computed, and of what is behind them that are updated, at a time: at 1024 columns 0.8 of
# the time of 256 and 512 in float32, 0.7 in float64; at 2048 columns 0.8 in both.
PANEL, UPDATE = 240, 96
# Rows of a strip of the lower triangle, and terms of a sum, where oneDNN multiplies: it adds one term after the other,
# so that sums of 256 err as much as MKL's of any length do, 1024 or 2048 columns, and longer ones up to three times as
# much. They take 0.54 of MKL's time at 2048 columns on one thread of an EPYC, and all terms in one sum take 0.5.
STRIP, TERMS = 256, 256
# So many sums are added up on their own before they are added to the matrix: where all entries have one sign, each
# addition is rounded the same way, and after 2048 of them one after the other the matrix was off by 5e-5.
PARTS = 16
GRAM_CHUNK_BYTES = 32 << 20
GRAM_ROOM_BYTES = 1 << 30  # the same on an accelerator
# Sides of the blocks of a chunked Gram matrix, so that partial sums stay in cache, multiples of 24 as TILE is. 2048
# columns on one thread: 0.79 of the time of 512 and 128.
SIDE, LEAST_SIDE = 480, 96


def row_chunks(a: Tensor, limit: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a (m, n) that take up to ``limit`` bytes each, ``itemsize`` for an entry."""
    m, n = a.shape
    limit = 256 * limit if accelerated(a.device) else limit
    rows = max(16, min(m, limit // max(1, n * itemsize)))
    for start in range(0, m, rows):
        yield start, min(start + rows, m)


def gram(a: Tensor, dtype: torch.dtype) -> Tensor:
    """The lower triangle of A^T A (n, n); some entries above it are filled too."""
    n = a.shape[1]
    g = a.new_zeros((n, n), dtype=dtype)
    strips = _in_strips(g)
    for start, stop in row_chunks(a, GRAM_CHUNK_BYTES, dtype.itemsize):
        if strips:
            _add_strips(g, a[start:stop])
            continue
        rows = a[start:stop].to(dtype)
        if accelerated(a.device):
            g.addmm_(rows.T, rows)
            continue
        share([partial(_add_tile, g, rows, j) for j in range(0, n, TILE)])
    return g


def _add_tile(g: Tensor, rows: Tensor, j: int) -> None:
    # Not by addmm_: it may add the sums of a few hundred terms to g one after the other.
    g[j:, j : j + TILE] += torch.mm(rows[:, j:].T, rows[:, j : j + TILE])


def by_onednn() -> bool:
    """Whether float32 products on the CPU are oneDNN's. The answer depends on processor and settings, on no time."""
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return mkl_is_narrow() and built_in and bool(torch.backends.mkldnn.enabled)


def _in_strips(g: Tensor) -> bool:
    return g.dtype == torch.float32 and not accelerated(g.device) and by_onednn()


def _add_strips(g: Tensor, rows: Tensor) -> None:
    parts = list(torch.split(rows, TERMS))
    share([partial(_turn, parts, i, g.dtype) for i in range(len(parts))])
    share([partial(_add_strip, g, parts, j) for j in _longest_first(g.shape[0])])


def _turn(parts: list[Tensor], i: int, dtype: torch.dtype) -> None:
    parts[i] = parts[i].to(dtype).T.contiguous()


def _longest_first(n: int) -> Iterator[int]:
    """The first rows of strips of the lower triangle, so that no thread ends with the longest."""
    return reversed(range(0, n, STRIP))


def _add_strip(g: Tensor, parts: list[Tensor], j: int, sign: int = 1) -> None:
    """Add the sum of X X^T over the X (n, k) of ``parts``, or subtract it: STRIP rows up to their diagonal tile.

    A layer of torch whose input is in oneDNN's layout is computed by oneDNN.
    """
    e = min(j + STRIP, g.shape[0])
    for first in range(0, len(parts), PARTS):
        products = (
            torch.nn.functional.linear(x[j:e].to_mkldnn(), x[:e]).to_dense() for x in parts[first : first + PARTS]
        )
        total = next(products)
        for product in products:
            total += product
        g[j:e, :e].add_(total, alpha=sign)


def gram_in_chunks(a: Tensor, dtype: torch.dtype, chunk: int) -> Tensor:
    """The same, every entry summed in runs of at most ``chunk`` products."""
    # A product that accumulates into g may add its terms to g one by one, which rounds early terms m times; a sum of
    # separate products rounds each term at most chunk + m / chunk times in any library.
    m, n = a.shape
    g = a.new_zeros((n, n), dtype=dtype)
    blocks, limit = sorted(_lower_blocks(0, n), key=lambda block: -g[block].numel()), GRAM_CHUNK_BYTES
    if accelerated(a.device):
        blocks, limit = [(slice(0, n), slice(0, n))], GRAM_ROOM_BYTES
    step = max(1, limit // (n * dtype.itemsize * chunk)) * chunk
    for start in range(0, m, step):
        wide = a[start : start + step].to(dtype)
        share([partial(_add_in_chunks, g[block], wide[:, block[0]], wide[:, block[1]], chunk) for block in blocks])
    return g


def _add_in_chunks(g: Tensor, left: Tensor, right: Tensor, chunk: int) -> None:
    room = torch.empty_like(g)
    for first in range(0, left.shape[0], chunk):
        g += torch.mm(left[first : first + chunk].T, right[first : first + chunk], out=room)


def _lower_blocks(start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Blocks (rows, columns) of SIDE at most that cover the lower triangle between ``start`` and ``stop``, and little
    above it."""
    if stop - start <= LEAST_SIDE:
        yield slice(start, stop), slice(start, stop)
        return
    middle = start + max(LEAST_SIDE, (stop - start) // 2 // LEAST_SIDE * LEAST_SIDE)
    yield from _lower_blocks(start, middle)
    for i in range(middle, stop, SIDE):
        for j in range(start, middle, SIDE):
            yield slice(i, min(i + SIDE, stop)), slice(j, min(j + SIDE, middle))
    yield from _lower_blocks(middle, stop)


def cholesky(g: Tensor) -> bool:
    """Factor g (n, n) = L L^T in place from its lower triangle, zeros above; False where a pivot is not positive."""
    n = g.shape[0]
    panel = PANEL if n > 2 * PANEL and not accelerated(g.device) else n
    strips = _in_strips(g)
    for j in range(0, n, panel):
        e = min(j + panel, n)
        block, info = torch.linalg.cholesky_ex(g[j:e, j:e])
        if int(info) != 0:
            return False
        g[j:e, j:e] = block
        g[j:e, e:] = 0
        if e < n:
            below = torch.linalg.solve_triangular(block.T, g[e:, j:e], upper=True, left=False)
            g[e:, j:e] = below
            behind = g[e:, e:]
            if strips:
                share([partial(_add_strip, behind, [below], j, -1) for j in _longest_first(n - e)], brief=True)
            else:
                share([partial(_subtract_tile, behind, below, j) for j in range(0, n - e, UPDATE)], brief=True)
    return True


def _subtract_tile(g: Tensor, x: Tensor, j: int) -> None:
    g[j:, j : j + UPDATE].addmm_(x[j:], x[j : j + UPDATE].T, alpha=-1)
