"""The values of a factored wave, and helper functions, for triton_backend.py and triton_proofs.py.

Functions import Triton themselves, since this file is also loaded where Triton is not installed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .base import Factors, Operand, Panel, Rung, Tensor
from .moving import stream_of

if TYPE_CHECKING:
    from kappa_fast.kernels.apply import Blocks
    from kappa_fast.kernels.cholesky import Factored
    from kappa_fast.kernels.panel import Rows
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.quantize import Slices
    from kappa_fast.kernels.ritz import Tridiagonal
    from kappa_fast.kernels.triangular import Members

# The names say how the Gram matrix is computed. Rungs in float32 take half the memory and faster units; blocks are
# float64 for all rungs, so that all matrices of a wave take the same steps.
WEIGHTS16 = Rung("weights16", "weights16", torch.float32, 2, panel=torch.float64)
SLICES = {
    2: Rung("slices2", "slices2", torch.float32, 2, panel=torch.float64),
    3: Rung("slices3", "slices3", torch.float64, 2),
    4: Rung("slices4", "slices4", torch.float64, 2),
}
# Two digits of 8 bits take four products, as two slices do. Their Gram matrix is exact and, for weights of few bits,
# near enough to the weights' for most proofs: only entries that are small in their column are rounded.
BYTES = Rung("bytes2", "bytes2", torch.float32, 2, panel=torch.float64)
FEW_BITS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
# By kind of rung: the number of digits of its Gram matrix (0: products of the weights themselves) and the bits of each.
KINDS = {WEIGHTS16.kind: (0, 7), BYTES.kind: (2, 8), **{rung.kind: (k, 7) for k, rung in SLICES.items()}}
TABLE = "table"  # the key in the cache of the first operand of the Problems of some operands
KEPT = "exact"  # the key in Operand.cache of an ExactGrams and a place in it
LANES = 16  # columns of a block in the kernels
LOG_UNIT = 2.0**-32  # of logarithms of pivots: 2^21 of them, each below 2^10, are summed in 64 bits


@dataclass(frozen=True)
class Wave:
    """Matrices that were factored together, in one dtype."""

    problems: Problems
    factored: Factored


@dataclass(frozen=True)
class ExactGrams:
    """Gram matrices of a wave from integer products: Q^T Q for matrices Q near the weights A.

    packed: float64, see Problems.gram_views.  squared: (w,) float64, at least ||A - Q||_2^2.  roundings: (w,), the
    number of times that an entry is rounded, see kernels/gram.py.
    """

    problems: Problems
    packed: Tensor
    squared: Tensor
    roundings: Tensor


@dataclass(frozen=True)
class InWave:
    """One matrix of a factored wave, an item of Factors.data."""

    wave: Wave
    position: int


@dataclass(frozen=True)
class WaveShare:
    """The positions of the matrices of one Wave, or (``wave`` is None) of those that torch has factored."""

    wave: Wave | None
    members: Members | None
    which: tuple[int, ...]


WaveOperation = Callable[["Wave", "Members", Tensor, Tensor], None]
TorchOperation = Callable[[Factors, Panel], Panel]


class TridiagonalRitz:
    """base.Ritz by multisection and inverse iteration, see kernels/ritz.py."""

    def __init__(self, t: Tridiagonal, floor: Tensor | None = None) -> None:
        from kappa_fast.kernels.ritz import largest_eigenvalue

        self._t = t
        self.theta = largest_eigenvalue(t, floor)

    def reach(self, gaps: Tensor) -> Tensor:
        from kappa_fast.kernels.ritz import reach

        return reach(self._t, self.theta[:, None] * (1 + gaps))

    def vectors(self, count: int) -> Tensor:
        from kappa_fast.kernels.ritz import leading_vectors

        return leading_vectors(self._t, self.theta)[:, :, -count:]


def rows_of(counts: tuple[int, ...], device: torch.device) -> Rows:
    """The layout of packed blocks with ``counts`` rows."""
    return _rows_of(counts, device, stream_of(device))


@lru_cache(maxsize=32)  # several operations of a step have the same counts
def _rows_of(counts: tuple[int, ...], device: torch.device, _: int) -> Rows:
    from kappa_fast.kernels.panel import Rows

    return Rows.of(counts, device)


def tall(weight: Tensor) -> Tensor:
    """A view (m, n) with m >= n."""
    return weight.T if weight.shape[0] < weight.shape[1] else weight


def peaks_of(problems: Problems) -> Tensor:
    """The largest absolute entry of every matrix; inf or nan if the matrix has such an entry."""
    from kappa_fast.kernels.quantize import column_peaks

    owner = torch.repeat_interleave(problems.n).to(problems.device)
    bits = torch.zeros(len(problems.n), dtype=torch.int32, device=problems.device)
    bits.scatter_reduce_(0, owner, column_peaks(problems), "amax")
    return bits.view(torch.float32)


def problems_of(operands: Sequence[Operand]) -> Problems:
    """The table of the operands, made once for the operations on the same ones."""
    from kappa_fast.kernels.problems import Problems

    tensors = [a.tensor for a in operands]
    held: Problems | None = operands[0].cache.get(TABLE)
    if held is None or len(held.matrices) != len(tensors) or not all(map(operator.is_, held.matrices, tensors)):
        operands[0].cache[TABLE] = held = Problems.of(tensors)
    return held


def can_read(tensor: Tensor, rung: Rung) -> bool:
    """Whether the kernels of a rung can read this dtype, which is wider than the weight's if prepare() scaled it."""
    from kappa_fast.kernels.problems import supported

    return tensor.dtype in (torch.bfloat16, torch.float16) if rung is WEIGHTS16 else supported(tensor.dtype)


def factor_grams(
    tensors: Sequence[Tensor], kinds: Sequence[tuple[int, int]], dtype: torch.dtype
) -> tuple[Wave, ExactGrams | None]:
    """Factor the Gram matrices of some kinds (see KINDS), ascending, in ``dtype``.

    Also returns the unfactored Gram matrices of the kinds with 8 bits, if there are any.
    """
    from kappa_fast.kernels.cholesky import cholesky
    from kappa_fast.kernels.gram import gram_of_slices, gram_of_weights
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.quantize import column_peaks, quantize

    whole = Problems.of(tensors)
    packed = torch.empty(whole.gram_elements, dtype=dtype, device=whole.device)
    kept: ExactGrams | None = None
    start = 0
    for kind in sorted(set(kinds)):  # the matrices of one kind are adjacent in ``packed``
        count, bits = kind
        alike = Problems.of([a for a, k in zip(tensors, kinds, strict=True) if k == kind])
        out = packed[start : start + alike.gram_elements]
        if count == 0:
            gram_of_weights(alike, out=out)
        elif bits == 8:
            kept = exact_grams(alike, quantize(alike, column_peaks(alike), count, bits=bits), out)
        else:
            gram_of_slices(alike, quantize(alike, column_peaks(alike), count), out)
        start += alike.gram_elements
    return Wave(whole, cholesky(whole, packed)), kept


def exact_grams(problems: Problems, slices: Slices, copy: Tensor | None = None) -> ExactGrams:
    """The Gram matrices of the integer matrices that the slices hold; ``copy``: packed, for their lower triangles."""
    from kappa_fast.kernels.gram import gram_of_slices, slice_roundings

    packed = gram_of_slices(problems, slices, copy=copy)
    return ExactGrams(problems, packed, slices.residual, slice_roundings(problems, slices.count, slices.bits))


def volumes_of(wave: Wave, positions: Sequence[int]) -> Tensor:
    """The sums of log l_ii and of its absolute values for the matrices at ``positions`` of a wave: (w, 2), float64.

    Sums of whole numbers, in units of LOG_UNIT: their order, which the wave decides, does not change them.
    """
    from kappa_fast.kernels.problems import on_host, to_device

    packed, device, chosen = wave.factored.packed, wave.problems.device, on_host(positions)
    starts, steps = wave.problems.gram_places()
    counts = wave.problems.n[chosen]
    before = counts.cumsum(0) - counts  # diagonal entries of the matrices before
    # The place of entry j of matrix i is start + step j; j counts on from the matrices before.
    origin, steps = starts[chosen] - steps[chosen] * before, steps[chosen]
    total = int(counts.sum())
    table = to_device(torch.stack([origin, steps, counts]), device)
    owner = torch.arange(len(chosen), device=device).repeat_interleave(table[2], output_size=total)
    places = table[0][owner] + table[1][owner] * torch.arange(total, device=device) + packed.storage_offset()
    flat = packed.as_strided((packed.storage_offset() + packed.numel(),), (1,), 0)
    units = (flat[places].to(torch.float64).log() / LOG_UNIT).round().to(torch.int64)
    sums = torch.zeros((2, len(positions)), dtype=torch.int64, device=device)
    sums[0].index_add_(0, owner, units)
    sums[1].index_add_(0, owner, units.abs())
    return sums.T.to(torch.float64) * LOG_UNIT


def blocks_of(problems: Problems, chosen: Sequence[int]) -> Blocks:
    """The layout of the blocks of some matrices of a wave, for products with the weights."""
    from kappa_fast.kernels.apply import Blocks

    return Blocks.of(problems, list(chosen))


def padded(blocks: Panel) -> Tensor:
    """Packed blocks padded with zeros to the LANES columns that kernels take: (rows, LANES)."""
    if blocks.width == LANES:
        return blocks.data.contiguous()
    return torch.nn.functional.pad(blocks.data, (0, LANES - blocks.width))


def unpadded(data: Tensor, blocks: Panel) -> Panel:
    """The result of a kernel for ``padded(blocks)`` without the added columns."""
    return Panel(data[:, : blocks.width], blocks.rows)
