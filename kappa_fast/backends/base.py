"""The backend protocol: what the numerics in spectrum/ need from a device.

Every operation takes a wave, given as lists of equal length, one item per matrix, and returns lists. A result for one
matrix must not depend on which others share its wave. spectrum/ never asks which backend it has: what differs between
devices (which factorization is cheapest for a shape, tile sizes, streams) stays behind this protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Tensor = torch.Tensor

# The bound of a Krylov space cannot fall below its rounding over the overlap of its start, about 1e-2 at n = 4096.
QUICK_MARGIN = 1e4


@dataclass(frozen=True)
class Rung:
    """One way to factor a matrix, as R with A = (nearly orthonormal columns) R.

    name: what ``TensorKappa.method`` reports.  dtype: of the factor and of everything done with it.
    quick: a narrower dtype in which products with R^T R may be computed instead, if the factor allows for one.
    power: 2 where the factor comes from a Gram matrix or its like and the departure below bounds squared singular
    values, 1 where it bounds singular values themselves.
    """

    name: str
    kind: str
    dtype: torch.dtype
    power: int
    quick: torch.dtype | None = None

    @property
    def unit_roundoff(self) -> float:
        return float(torch.finfo(self.dtype).eps) / 2

    def product_dtype(self, tolerance: float) -> torch.dtype:
        """What products may be computed in if an eigenvalue is wanted to a relative ``tolerance``."""
        if self.quick is not None and tolerance > QUICK_MARGIN * float(torch.finfo(self.quick).eps):
            return self.quick
        return self.dtype


@dataclass(frozen=True)
class Operand:
    """A matrix made ready: tall, finite, and scaled so that squares of its entries neither overflow nor vanish.

    tensor: shape (m, n) with m >= n, a view of the weight wherever its dtype and scale allow one.
    exponent: the true matrix is ``tensor * 2**exponent``.  finite: False if an entry is NaN or infinite.
    peak: largest absolute entry of ``tensor``.  exact: False if scaling pushed entries below what float64 holds.
    """

    tensor: Tensor
    exponent: int
    finite: bool
    peak: float
    exact: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]


@dataclass(frozen=True)
class Factor:
    """A factorization of an operand by a rung; ``data`` belongs to the backend that made it."""

    rung: Rung
    n: int
    data: Any


class Backend(Protocol):
    """Operations on a wave. n x b blocks are dense; b is small (16 or so)."""

    name: str
    device: torch.device

    def rungs(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Rung, ...]:
        """The ladder for matrices of this shape (m, n), m >= n, and storage dtype, cheapest first."""

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes that the costliest rung of the ladder takes for such a matrix, beside the stored weight."""

    def prepare(self, weights: Sequence[Tensor]) -> list[Operand]:
        """Move to the device, make tall, check for NaN and inf, scale by a power of two where needed."""

    def gram(self, operands: Sequence[Operand], dtype: torch.dtype, chunk: int | None = None) -> list[Tensor]:
        """Lower triangles of A^T A, shape (n, n); above the diagonal undefined.

        With ``chunk`` every entry is summed in runs of at most ``chunk`` products (the proofs count on it).
        """

    def cholesky(self, grams: Sequence[Tensor]) -> list[bool]:
        """Factor G = L L^T in place (lower triangle, zeros above); False where a pivot was not positive."""

    def factor(self, operands: Sequence[Operand], rungs: Sequence[Rung]) -> list[Factor | None]:
        """Factor every operand by its rung; None where the factorization broke down."""

    def product(self, factors: Sequence[Factor], blocks: Sequence[Tensor]) -> list[Tensor]:
        """R^T R X for blocks of shape (n, b), in the dtype of the blocks: the rung's, or its quick one."""

    def solve(self, factors: Sequence[Factor], blocks: Sequence[Tensor]) -> list[Tensor]:
        """(R^T R)^-1 X for blocks of shape (n, b), in the rung's dtype."""

    def departure(
        self, operands: Sequence[Operand], factors: Sequence[Factor], blocks: Sequence[Tensor]
    ) -> list[Tensor]:
        """M X, where M says how far R is from being a factor of A: M = R^-T A^T A R^-1 - I (power 2), or A R^-1 - I."""

    def apply(self, operands: Sequence[Operand], blocks: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
        """A X with every product and sum in float64, blocks (n, b), results (m, b); and ||A||_F to a relative 1e-6."""

    def normal(self, operands: Sequence[Operand], blocks: Sequence[Tensor]) -> list[Tensor]:
        """A^T (A X) in the dtype of the blocks (n, b), float32 or float64."""

    def project(self, bases: Sequence[Tensor], blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Two passes of Gram-Schmidt against orthonormal bases (n, k): coefficients (k, b) and what remains (n, b)."""

    def orthonormalize(self, blocks: Sequence[Tensor], floors: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """W = Q B with Q orthonormal (n, r): directions of W at or below its floor are left out, so r <= b."""

    def weighted_squares(
        self, operands: Sequence[Operand], left: Sequence[Tensor], right: Sequence[Tensor]
    ) -> list[Tensor]:
        """sum_ij A_ij^2 l_ik r_jk for every column k of left (m, k) and right (n, k): shape (k,), float64."""
