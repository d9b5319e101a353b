"""The backend protocol: what the numerics in spectrum/ need from a device.

Every operation takes a whole wave: its operands or factors as sequences, its thin blocks packed into one ``Panel``,
what is small as one tensor on the device with a row for every matrix. A result for one matrix must not depend on which
others share its wave. spectrum/ never asks which backend it has: what differs between devices (which factorization is
cheapest for a shape, tile sizes, streams) stays behind this protocol. Only ``read``, ``prepare``, ``factor`` and
``cholesky`` make the host wait for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

Tensor = torch.Tensor

DROP = 16.0  # directions below DROP u of the operator's norm are rounding, not information
# The bound of a Krylov space cannot fall below its rounding over the overlap of its start, about 1e-2 at n = 4096.
QUICK_MARGIN = 1e4
# Of what a wave takes on its first rungs, those that climb at a time may take as much beside it: few do.
CLIMBING = 0.5
FEW_RUNS = 16  # of rows, up to which they are copied one by one


@dataclass(frozen=True)
class Rung:
    """One way to factor a matrix, as R with A = (nearly orthonormal columns) R.

    name: what ``TensorKappa.method`` reports.  dtype: of the factor, and what is done with it rounds no more than that.
    quick: a narrower dtype in which products with R^T R may be computed instead, if the factor allows for one.
    panel: the dtype of blocks that meet the factor, if not its own.
    power: 2 where the factor comes from a Gram matrix or its like and the departure below bounds squared singular
    values, 1 where it bounds singular values themselves.
    """

    name: str
    kind: str
    dtype: torch.dtype
    power: int
    quick: torch.dtype | None = None
    panel: torch.dtype | None = None

    @property
    def blocks(self) -> torch.dtype:
        """The dtype of blocks that meet the factor."""
        return self.panel or self.dtype

    @property
    def unit_roundoff(self) -> float:
        return float(torch.finfo(self.dtype).eps) / 2

    def product_dtype(self, tolerance: float) -> torch.dtype:
        """What products may be computed in if an eigenvalue is wanted to a relative ``tolerance``."""
        if self.quick is not None and tolerance > QUICK_MARGIN * float(torch.finfo(self.quick).eps):
            return self.quick
        return self.blocks

    def product_error(self, tolerance: float) -> float:
        """The relative rounding error of such a product."""
        quick = self.product_dtype(tolerance) == self.quick
        return float(torch.finfo(self.quick if quick and self.quick else self.dtype).eps)


@dataclass(frozen=True)
class Operand:
    """A matrix made ready: tall, finite, and scaled so that squares of its entries neither overflow nor vanish.

    tensor: shape (m, n) with m >= n, a view of the weight wherever its dtype and scale allow one.
    exponent: the true matrix is ``tensor * 2**exponent``.  finite: False if an entry is NaN or infinite.
    peak: largest absolute entry of ``tensor``.  exact: False if scaling pushed entries below what float64 holds.
    turned: whether ``tensor`` is the transpose of the weight.
    cache: what the backend likes to keep from one operation for a later one.
    """

    tensor: Tensor
    exponent: int
    finite: bool
    peak: float
    exact: bool = True
    turned: bool = False
    cache: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]


@dataclass(frozen=True)
class Panel:
    """One thin block for every matrix of a wave, all of one width, packed row after row.

    data: shape (sum of rows, width), row-major.  rows: how many of them belong to each matrix.
    """

    data: Tensor
    rows: tuple[int, ...]

    @classmethod
    def pack(cls, blocks: Sequence[Tensor]) -> Panel:
        """Blocks of shape (rows, width), copied unless there is only one."""
        return cls(blocks[0] if len(blocks) == 1 else torch.cat(list(blocks)), tuple(b.shape[0] for b in blocks))

    def blocks(self) -> Sequence[Tensor]:
        """Views of shape (rows, width), one for each matrix."""
        blocks: Sequence[Tensor] = torch.split(self.data, list(self.rows))
        return blocks

    def take(self, which: Sequence[int]) -> Panel:
        """The blocks of some matrices; itself if they are all of them in order."""
        if list(which) == list(range(len(self.rows))):
            return self
        if not which:
            return Panel(self.data[:0], ())
        ends = list(itertools.accumulate(self.rows))
        runs: list[list[int]] = []  # of neighbours, which need no block of their own each
        for i in which:
            if runs and runs[-1][1] == ends[i] - self.rows[i]:
                runs[-1][1] = ends[i]
            else:
                runs.append([ends[i] - self.rows[i], ends[i]])
        rows = tuple(self.rows[i] for i in which)
        if len(runs) > FEW_RUNS:
            return Panel(self.data.index_select(0, self._lines(runs)), rows)
        parts = [self.data[start:stop] for start, stop in runs]
        return Panel(parts[0] if len(which) == 1 else torch.cat(parts), rows)

    def _lines(self, runs: list[list[int]]) -> Tensor:
        """The rows of some runs, one after the other."""
        bounds = torch.tensor(runs, device="cpu")
        lengths = bounds[:, 1] - bounds[:, 0]
        total = int(lengths.sum())
        shifts = (bounds[:, 0] + lengths - lengths.cumsum(0)).to(self.data.device)  # from its place here to that there
        lengths = lengths.to(self.data.device)
        places = torch.arange(total, device=self.data.device)
        return places + shifts.repeat_interleave(lengths, output_size=total)

    def columns(self, start: int, stop: int | None = None) -> Panel:
        """Some columns of every block, as a view."""
        return Panel(self.data[:, start:stop], self.rows)

    def beside(self, other: Panel) -> Panel:
        """The blocks of both, side by side."""
        return Panel(torch.cat([self.data, other.data], dim=1), self.rows)

    def to(self, dtype: torch.dtype) -> Panel:
        return Panel(self.data.to(dtype), self.rows)

    def spread(self, values: Tensor) -> Tensor:
        """One row of values (matrices, k) for every row of the panel: shape (sum of rows, k)."""
        if len(self.rows) == 1:
            return values.expand(self.rows[0], -1)
        counts = torch.tensor(self.rows, device=values.device)
        return values.repeat_interleave(counts, dim=0, output_size=self.data.shape[0])

    @property
    def width(self) -> int:
        return self.data.shape[1]


@dataclass(frozen=True)
class Factors:
    """Factorizations of a wave, each by a rung of its own; blocks that meet them have one dtype.

    data: one item per matrix, which belongs to the backend that made it; None where the factorization broke down.
    cache: what the backend likes to keep with this selection of matrices.
    """

    rungs: tuple[Rung, ...]
    ns: tuple[int, ...]
    data: tuple[Any, ...]
    cache: dict[str, Any] = field(default_factory=dict, compare=False)

    def take(self, which: Sequence[int]) -> Factors:
        """The factors of some matrices; itself if they are all of them in order."""
        if len(which) == len(self.ns) and list(which) == list(range(len(self.ns))):
            return self
        rungs, ns, data = self.rungs, self.ns, self.data
        return Factors(tuple(rungs[i] for i in which), tuple(ns[i] for i in which), tuple(data[i] for i in which))

    def beside(self, other: Factors) -> Factors:
        """Both waves as one."""
        return Factors(self.rungs + other.rungs, self.ns + other.ns, self.data + other.data)

    @property
    def blocks(self) -> torch.dtype:
        """The dtype of blocks that meet them."""
        return self.rungs[0].blocks


class Extension(NamedTuple):
    """A block split by a basis V: block = V coefficients + new coupling, ``new`` orthonormal and orthogonal to V.

    coefficients (w, k, b), coupling (w, b, b), float64; scale (w,): the largest coefficient met so far.
    A direction left out is a zero column of ``new`` and a zero row of ``coupling``.
    """

    coefficients: Tensor
    new: Panel
    coupling: Tensor
    scale: Tensor


class Ritz(Protocol):
    """Eigenpairs of a wave's projected operators T of order k. theta (w,): the largest, nan if T is not finite."""

    theta: Tensor

    def reach(self, gaps: Tensor) -> Tensor:
        """||B E^T (lambda - T)^-1 E_1||_F at lambda = theta (1 + gap), for gaps (w, p): shape (w, p), see bounds.py."""

    def vectors(self, count: int) -> Tensor:
        """Orthonormal (w, k, min(count, k)) that span the eigenvectors of the largest values, the largest last."""


class ExactProducts(Protocol):
    """G = fl(Q^T Q) for matrices Q near the operands, ||A - Q||_2 <= distance, kept for proofs (spectrum/certify.py).

    which: the operands that it covers, by position; everything else has one item for each of these.
    traces: of G, float64.  roundings: h with |G - Q^T Q| <= gamma(h) |Q|^T |Q| entry by entry.
    """

    which: tuple[int, ...]
    distances: Sequence[float]
    traces: Sequence[float]
    roundings: Sequence[int]

    def residuals(self, chosen: Sequence[int], shifts: Sequence[float], sign: int) -> list[tuple[float, float]]:
        """||M - L L^T||_F and ||L||_F^2 for M = sign (G - shift I), for places ``chosen`` in ``which``, L its factor.

        Infinite where the factorization broke down, or was found not to be one. Entries of the residual go through
        ``residual_roundings(place)``, those of the diagonal of M through one more.
        """

    def residual_roundings(self, place: int) -> int:
        """See residuals()."""


def dense_projection(columns: Sequence[Tensor]) -> Tensor:
    """T as (w, k, k) from its block columns as Backend.ritz takes them; only the upper triangle counts."""
    w, k, _ = columns[-1].shape
    upper = columns[-1].new_zeros((w, k, k))
    for column in columns:
        stop, width = column.shape[1:]
        upper[:, :stop, stop - width : stop] = column
    upper = torch.triu(upper)
    return upper + torch.triu(upper, 1).mT


class Backend(Protocol):
    """Operations on a wave of w matrices. Blocks are thin: b is 16 or less."""

    name: str
    device: torch.device

    @property
    def counts(self) -> dict[str, int]:
        """Since this backend was made: "launches" of kernels of ours, and "reads" for which the host waited."""

    @property
    def side_by_side(self) -> bool:
        """Whether a matrix is best worked on alone, by one thread of many, rather than in a wave."""

    def rungs(self, shape: tuple[int, int], dtype: torch.dtype, *, proofs: bool = False) -> tuple[Rung, ...]:
        """The ladder for matrices of this shape (m, n), m >= n, and storage dtype, cheapest first.

        With ``proofs`` by what it costs together with these: ``factor`` may keep products for ``exact_products``.
        """

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype, *, proofs: bool = False) -> int:
        """Bytes that such a matrix takes in a wave beside the stored weight, and with ``proofs`` that its proof takes.

        Where a wave has many matrices, they are counted on their first rung, and CLIMBING of that for those that climb.
        """

    def need(self, shape: tuple[int, int], rung: Rung) -> int:
        """Bytes that such a matrix takes on a rung beside the stored weight, from its Gram matrix to the polish."""

    def prepare(self, weights: Sequence[Tensor]) -> list[Operand]:
        """Move to the device, make tall, check for NaN and inf, scale by a power of two where needed."""

    def digests(self, operands: Sequence[Operand]) -> list[bytes]:
        """What seeds the start blocks of every operand: it depends on shape, dtype and entries alone.

        Of a cryptographic kind, since whoever can build weights with a digest that was known before can hide their
        extreme vectors from the start blocks.
        """

    def gaussian(self, ns: Sequence[int], seeds: Sequence[bytes], width: int, salt: int, dtype: torch.dtype) -> Panel:
        """Standard Gaussian blocks (n, width), each from the digest of its matrix; ``salt`` tells several apart."""

    def gram(self, operands: Sequence[Operand], dtype: torch.dtype, chunk: int | None = None) -> list[Tensor]:
        """Lower triangles of A^T A, shape (n, n); above the diagonal undefined.

        With ``chunk`` every entry is summed in runs of at most ``chunk`` products (the proofs count on it).
        """

    def cholesky(self, grams: Sequence[Tensor]) -> list[bool]:
        """Factor G = L L^T in place (lower triangle, zeros above); False where a pivot was not positive."""

    def exact_products(
        self, operands: Sequence[Operand], level: int, limits: Sequence[float]
    ) -> Sequence[ExactProducts] | None:
        """Products for proofs, from level 0 on each closer to the weights than the one before; None past the last.

        They may leave operands out: those which are ``limits`` or further away at this level, for which they prove
        nothing. A backend without any leaves its proofs to ``gram`` and ``cholesky``.
        """

    def factor(self, operands: Sequence[Operand], rungs: Sequence[Rung]) -> Factors:
        """Factor every operand by its rung."""

    def product(self, factors: Factors, blocks: Panel) -> Panel:
        """R^T R X for blocks (n, b), in the dtype of the blocks: that of the factors, or their quick one."""

    def solve(self, factors: Factors, blocks: Panel) -> Panel:
        """(R^T R)^-1 X for blocks (n, b), in the dtype of the blocks."""

    def departure(
        self, operands: Sequence[Operand], factors: Factors, blocks: Panel, *, transposed: bool = False
    ) -> Panel:
        """M X or M^T X, where M, the departure, is the residual of the factorization: how far R is from a factor of A.

        M = R^-T A^T A R^-1 - I for a rung of power 2, which is symmetric, and A R^-1 - I for one of power 1.
        """

    def apply(self, operands: Sequence[Operand], blocks: Panel) -> tuple[Panel, Tensor]:
        """A X with every product and sum in float64, blocks (n, b), results (m, b); and ||A||_F to a relative 1e-6."""

    def normal(self, operands: Sequence[Operand], blocks: Panel) -> Panel:
        """A^T (A X) in the dtype of the blocks (n, b), float32 or float64."""

    def orthonormalize(self, blocks: Panel) -> Panel:
        """An orthonormal basis of the columns of every block, in their dtype; for blocks of full rank."""

    def extend(self, bases: Panel, blocks: Panel, scale: Tensor) -> Extension:
        """Split blocks (n, b) by orthonormal bases (n, k), to working precision.

        Directions below DROP u of ``scale``, the largest coefficient met so far, or of the largest in these blocks,
        are rounding and left out.
        """

    def combine(self, bases: Panel, coefficients: Tensor) -> Panel:
        """V C for coefficients (w, k, j), in the dtype of the bases."""

    def svd(self, blocks: Panel) -> tuple[Panel, Tensor, Tensor]:
        """U (m, b), singular values (w, b) descending, V (w, b, b) of blocks (m, b) in float64."""

    def norms(self, blocks: Panel) -> Tensor:
        """Lengths of all columns, float64: shape (w, b)."""

    def ritz(self, columns: Sequence[Tensor], coupling: Tensor, floor: Tensor | None = None) -> Ritz:
        """Eigenpairs of T, whose block columns j (from the top down to the diagonal block) have shape (w, (j+1) b, b).

        coupling: B of H V = V T + Q B E^T, shape (w, b, b).
        floor (w,): theta of a leading part of T, than which the largest eigenvalue is no smaller (but for the rounding
        of theta), nan where there is none. It may save work and changes theta by no more than its accuracy.
        """

    def weighted_binades(self, operands: Sequence[Operand], left: Panel, right: Panel) -> Tensor:
        """sum_ij b_ij^2 l_ik r_jk, b_ij = 2^floor(log2 |A_ij|), 0 where A_ij is 0 or subnormal in float32.

        For every column k of left (m, k) and right (n, k): shape (w, k), float64, to a relative 1e-5.
        """

    def read(self, values: Tensor) -> list[Any]:
        """Numbers for the host, nested as the tensor is; the one place where it waits for the device, and counted."""
