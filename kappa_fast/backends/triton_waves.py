"""What the Triton backend keeps of a wave that its kernels have factored, and the steps that need no backend.

Triton is imported inside the functions: this file is loaded where there may be none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .base import Factors, Panel, Rung, Tensor

if TYPE_CHECKING:
    from kappa_fast.kernels.apply import Blocks
    from kappa_fast.kernels.cholesky import Factored
    from kappa_fast.kernels.panel import Rows
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.quantize import Slices
    from kappa_fast.kernels.ritz import Tridiagonal
    from kappa_fast.kernels.triangular import Members

# Names say where the Gram matrix comes from. The first two are stored and factored in float32, in half the bytes and on
# faster units; blocks are float64 whatever they meet, so that all rungs of a wave go through the same steps.
WEIGHTS16 = Rung("weights16", "weights16", torch.float32, 2, panel=torch.float64)
SLICES = {
    2: Rung("slices2", "slices2", torch.float32, 2, panel=torch.float64),
    3: Rung("slices3", "slices3", torch.float64, 2),
    4: Rung("slices4", "slices4", torch.float64, 2),
}
# Two digits of 8 bits: four products like two slices, exact and near enough to the weights for most proofs, so that the
# Gram matrix is kept for these. That is so for weights of few bits, which lose only what is small in its column.
BYTES = Rung("bytes2", "bytes2", torch.float32, 2, panel=torch.float64)
FEW_BITS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
# Digits of a Gram matrix and bits of each; none: from the weights themselves.
KINDS = {WEIGHTS16.kind: (0, 7), BYTES.kind: (2, 8), **{rung.kind: (k, 7) for k, rung in SLICES.items()}}
KEPT = "exact"  # in Operand.cache: an Exact and a place in it
LANES = 16  # columns of a block in the kernels


@dataclass(frozen=True)
class Wave:
    """Matrices that were factored together, in one dtype."""

    problems: Problems
    factored: Factored


@dataclass(frozen=True)
class Exact:
    """Gram matrices of a wave from whole numbers: Q^T Q for matrices Q near the weights A.

    packed: float64, see Problems.gram_views.  squared: (w,) float64, at least ||A - Q||_2^2.  roundings: (w,), how many
    an entry goes through, see kernels/gram.py.
    """

    problems: Problems
    packed: Tensor
    squared: Tensor
    roundings: Tensor


@dataclass(frozen=True)
class InWave:
    """One matrix of a factored wave: what Factors.data holds."""

    wave: Wave
    position: int


@dataclass(frozen=True)
class Share:
    """Matrices of one Wave that take part in a call, and those that are torch's (``wave`` is None), by position."""

    wave: Wave | None
    members: Members | None
    which: tuple[int, ...]


Operation = Callable[["Wave", "Members", Tensor, Tensor], None]
OfTorch = Callable[[Factors, Panel], Panel]


class TridiagonalRitz:
    """base.Ritz by sections of intervals and inverse iteration, see kernels/ritz.py."""

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


@lru_cache(maxsize=32)  # the same members take part in several calls of a step
def rows_of(counts: tuple[int, ...], device: torch.device) -> Rows:
    """Where the rows of packed blocks lie, for so many rows of each."""
    from kappa_fast.kernels.panel import Rows

    return Rows.of(counts, device)


def tall(weight: Tensor) -> Tensor:
    """A view (m, n) with m >= n."""
    return weight.T if weight.shape[0] < weight.shape[1] else weight


def peaks(problems: Problems) -> Tensor:
    """The largest absolute entry of every matrix, inf or nan if it has such."""
    from kappa_fast.kernels.quantize import column_peaks

    owner = torch.repeat_interleave(problems.n).to(problems.device)
    bits = torch.zeros(len(problems.n), dtype=torch.int32, device=problems.device)
    bits.scatter_reduce_(0, owner, column_peaks(problems), "amax")
    return bits.view(torch.float32)


def fits(tensor: Tensor, rung: Rung) -> bool:
    """Whether a rung reads this: scaling may have widened what prepare() was given."""
    from kappa_fast.kernels.problems import supported

    return tensor.dtype in (torch.bfloat16, torch.float16) if rung is WEIGHTS16 else supported(tensor.dtype)


def factored(
    tensors: Sequence[Tensor], kinds: Sequence[tuple[int, int]], dtype: torch.dtype
) -> tuple[Wave, Exact | None]:
    """Gram matrices from so many digits of so many bits each, ascending (see KINDS), factored in ``dtype``.

    With them those from digits of 8 bits as they were before the factorization, of the matrices that have these.
    """
    from kappa_fast.kernels.cholesky import cholesky
    from kappa_fast.kernels.gram import gram_of_slices, gram_of_weights
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.quantize import column_peaks, quantize

    whole = Problems.of(tensors)
    packed = torch.empty(whole.gram_elements, dtype=dtype, device=whole.device)
    kept: Exact | None = None
    start = 0
    for kind in sorted(set(kinds)):  # what lies together in ``packed``
        count, bits = kind
        alike = Problems.of([a for a, k in zip(tensors, kinds, strict=True) if k == kind])
        out = packed[start : start + alike.gram_elements]
        if count == 0:
            gram_of_weights(alike, out=out)
        elif bits == 8:
            kept = exact(alike, quantize(alike, column_peaks(alike), count, bits=bits))
            out.copy_(kept.packed)
        else:
            gram_of_slices(alike, quantize(alike, column_peaks(alike), count), out)
        start += alike.gram_elements
    return Wave(whole, cholesky(whole, packed)), kept


def exact(problems: Problems, slices: Slices) -> Exact:
    """The Gram matrices of what the slices hold."""
    from kappa_fast.kernels.gram import gram_of_slices, slice_roundings

    packed = gram_of_slices(problems, slices)
    return Exact(problems, packed, slices.residual, slice_roundings(problems, slices.count, slices.bits))


def blocks_of(problems: Problems, chosen: Sequence[int]) -> Blocks:
    """Where the blocks of some matrices of a wave lie, for products with the weights."""
    from kappa_fast.kernels.apply import Blocks

    return Blocks.of(problems, list(chosen))


def padded(blocks: Panel) -> Tensor:
    """Packed blocks with zeros up to LANES columns, as kernels take them: (rows, LANES)."""
    if blocks.width == LANES:
        return blocks.data.contiguous()
    return torch.nn.functional.pad(blocks.data, (0, LANES - blocks.width))


def unpadded(data: Tensor, blocks: Panel) -> Panel:
    """What a kernel gave for ``padded(blocks)``, without the columns that were added."""
    return Panel(data[:, : blocks.width], blocks.rows)
