"""The backend protocol: the operations that spectrum/ needs from a device, and the values that they exchange.

Every operation takes a whole wave: its operands or factors as sequences, its thin blocks packed into one ``Panel``,
small values as one tensor on the device with a row for every matrix. The result for one matrix must not depend on the
other matrices of its wave. Only ``read``, ``prepare``, ``factor`` and ``cholesky`` make the host wait for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from .moving import moved

Tensor = torch.Tensor

DROP = 16.0  # a direction below DROP u of the operator's norm is rounding error and left out
# The bound of a Krylov space cannot fall below its rounding error over the overlap of its start, 1e-2 at n = 4096.
QUICK_MARGIN = 1e4
# The memory for matrices that climb at one time, as a share of the memory of all first rungs of the wave: few climb.
CLIMBING = 0.5
EXPONENT = 0x7F800000  # these bits of a float32 are the largest power of two below its absolute value, or 0
NORM_TILE = 256  # columns whose squares are summed at a time
FEW_RUNS = 16  # up to so many runs of rows are copied one by one


@dataclass(frozen=True)
class Rung:
    """One way to factor a matrix, as R with A = (nearly orthonormal columns) R.

    name: the value of ``TensorKappa.method``.  dtype: the dtype of the factor, in which operations with it round.
    quick: a narrower dtype in which products with R^T R may be computed instead, or None.
    panel: the dtype of blocks that are multiplied by or solved with the factor, if it is not that of the factor.
    power: 2 if the departure (see Backend.departure) bounds errors of squared singular values, as for a factor of a
    Gram matrix; 1 if it bounds errors of the singular values themselves.
    gram: float64 if the Gram matrix is computed in it whatever the dtype of the factor, and kept for the proof.
    """

    name: str
    kind: str
    dtype: torch.dtype
    power: int
    quick: torch.dtype | None = None
    panel: torch.dtype | None = None
    gram: torch.dtype | None = None

    @property
    def blocks(self) -> torch.dtype:
        """The dtype of blocks that are multiplied by or solved with the factor."""
        return self.panel or self.dtype

    @property
    def unit_roundoff(self) -> float:
        return float(torch.finfo(self.dtype).eps) / 2

    def product_dtype(self, tolerance: float) -> torch.dtype:
        """The dtype in which products may be computed if an eigenvalue is wanted to a relative ``tolerance``."""
        if self.quick is not None and tolerance > QUICK_MARGIN * float(torch.finfo(self.quick).eps):
            return self.quick
        return self.blocks

    def product_error(self, tolerance: float) -> float:
        """The relative rounding error of such a product."""
        quick = self.product_dtype(tolerance) == self.quick
        return float(torch.finfo(self.quick if quick and self.quick else self.dtype).eps)


@dataclass(frozen=True)
class Operand:
    """A tall matrix whose entries are scaled so that their squares neither overflow nor vanish.

    tensor: shape (m, n) with m >= n, a view of the weight wherever its dtype and scale allow one.
    exponent: the true matrix is ``tensor * 2**exponent``.  finite: False if an entry is NaN or infinite.
    peak: largest absolute entry of ``tensor``.  exact: False if scaling rounded entries that float64 cannot hold.
    turned: whether ``tensor`` is the transpose of the weight.
    cache: values that the backend keeps for its later operations.
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

    data: shape (sum of rows, width), row-major.  rows: the number of rows of each matrix.
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
        """The blocks of the matrices at the positions ``which``; ``self`` if these are all in order."""
        if list(which) == list(range(len(self.rows))):
            return self
        if not which:
            return Panel(self.data[:0], ())
        ends = list(itertools.accumulate(self.rows))
        runs: list[list[int]] = []  # first and last row of blocks that are adjacent and wanted
        for i in which:
            if runs and runs[-1][1] == ends[i] - self.rows[i]:
                runs[-1][1] = ends[i]
            else:
                runs.append([ends[i] - self.rows[i], ends[i]])
        rows = tuple(self.rows[i] for i in which)
        if len(runs) > FEW_RUNS:
            return Panel(self.data.index_select(0, self._row_indices(runs)), rows)
        parts = [self.data[start:stop] for start, stop in runs]
        return Panel(parts[0] if len(which) == 1 else torch.cat(parts), rows)

    def _row_indices(self, runs: list[list[int]]) -> Tensor:
        """The indices of the rows of some runs, one after the other."""
        bounds = torch.tensor(runs, device="cpu")
        lengths = bounds[:, 1] - bounds[:, 0]
        total, device = int(lengths.sum()), self.data.device
        shifts = moved(bounds[:, 0] + lengths - lengths.cumsum(0), device)  # old minus new position of a run
        places = torch.arange(total, device=device)
        return places + shifts.repeat_interleave(moved(lengths, device), output_size=total)

    def columns(self, start: int, stop: int | None = None) -> Panel:
        """The columns from ``start`` to ``stop`` of every block, as a view."""
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
        counts = moved(torch.tensor(self.rows, device="cpu"), values.device)
        return values.repeat_interleave(counts, dim=0, output_size=self.data.shape[0])

    @property
    def width(self) -> int:
        return self.data.shape[1]


@dataclass(frozen=True)
class Factors:
    """Factorizations of a wave, each by a rung of its own; all their blocks have one dtype.

    data: one item per matrix in the backend's own form; None where the factorization broke down.
    cache: values that the backend keeps for its later operations on these matrices.
    """

    rungs: tuple[Rung, ...]
    ns: tuple[int, ...]
    data: tuple[Any, ...]
    cache: dict[str, Any] = field(default_factory=dict, compare=False)

    def take(self, which: Sequence[int]) -> Factors:
        """The factors of the matrices at the positions ``which``; ``self`` if these are all in order."""
        if len(which) == len(self.ns) and list(which) == list(range(len(self.ns))):
            return self
        rungs, ns, data = self.rungs, self.ns, self.data
        return Factors(tuple(rungs[i] for i in which), tuple(ns[i] for i in which), tuple(data[i] for i in which))

    def beside(self, other: Factors) -> Factors:
        """The factors of both waves as one wave."""
        return Factors(self.rungs + other.rungs, self.ns + other.ns, self.data + other.data)

    @property
    def blocks(self) -> torch.dtype:
        """The dtype of blocks that are multiplied by or solved with the factors."""
        return self.rungs[0].blocks


class Extension(NamedTuple):
    """A block split by a basis V: block = V @ coefficients + new @ coupling, ``new`` orthonormal and orthogonal to V.

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
    """G = fl(Q^T Q) for matrices Q near the operands, ||A - Q||_2 <= distance, for the proofs in spectrum/certify.py.

    which: the positions of the operands that these products cover; the other attributes have one item for each.
    traces: those of G, float64.  roundings: h with |G - Q^T Q| <= gamma(h) |Q|^T |Q| entry by entry.
    """

    which: tuple[int, ...]
    distances: Sequence[float]
    traces: Sequence[float]
    roundings: Sequence[int]
    coarse_roundings: int

    def residuals(self, chosen: Sequence[int], shifts: Sequence[float], sign: int) -> list[tuple[float, float]]:
        """||M - L L^T||_F and ||L||_F^2, M = sign (G - shift I), L its factor, for the places ``chosen`` in ``which``.

        Both are infinite where the factorization broke down or a check found it wrong. Entries of the residual are
        rounded ``residual_roundings(place)`` times, and the diagonal of M once more.
        """

    def residual_roundings(self, place: int) -> int:
        """How often an entry of the residual is rounded, see residuals()."""

    def coarse_residuals(self, chosen: Sequence[int], bounds: Sequence[float]) -> list[tuple[float, float]]:
        """As residuals() of M = bound I - G, for a cheaper L whose residual is a small part of ``bound``.

        Entries of the residual are rounded ``coarse_roundings`` times, and the diagonal of M once more.
        """


def dense_projection(columns: Sequence[Tensor]) -> Tensor:
    """T as (w, k, k) from the upper triangles of its block columns, which are those of Backend.ritz."""
    w, k, _ = columns[-1].shape
    upper = columns[-1].new_zeros((w, k, k))
    for column in columns:
        stop, width = column.shape[1:]
        upper[:, :stop, stop - width : stop] = column
    upper = torch.triu(upper)
    return upper + torch.triu(upper, 1).mT


def symmetric_norm(g: Tensor) -> Tensor:
    """||G||_F of a symmetric matrix from its lower triangle, float64.

    A float32 sum of squares holds no more than a row of a tile, since longer ones lose digits.
    """
    n = g.shape[0]
    rows = [
        torch.linalg.vector_norm(block, dim=1)
        for j in range(0, n, NORM_TILE)
        for block in (torch.tril(g[j : j + NORM_TILE, j : j + NORM_TILE]), g[j + NORM_TILE :, j : j + NORM_TILE])
    ]
    lower, diagonal = torch.cat(rows).double(), g.diagonal().double()
    return (2 * torch.dot(lower, lower) - torch.dot(diagonal, diagonal)).sqrt()


class Backend(Protocol):
    """Operations on a wave of w matrices. Blocks are thin: b is 16 or less."""

    name: str
    device: torch.device

    @property
    def counts(self) -> dict[str, int]:
        """How many "launches" of our own kernels and "reads" for which the host waited this backend has made."""

    @property
    def side_by_side(self) -> bool:
        """Whether many threads with one matrix each are faster than one thread with a wave."""

    def rungs(self, shape: tuple[int, int], dtype: torch.dtype, *, proofs: bool = False) -> tuple[Rung, ...]:
        """The ladder for matrices of this shape (m, n), m >= n, and storage dtype, cheapest first.

        With ``proofs`` the cost includes that of the proof: ``factor`` may keep products for ``exact_products``.
        """

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype, *, proofs: bool = False) -> int:
        """Bytes that such a matrix takes in a wave beside the stored weight, with ``proofs`` including its proof.

        In a wave of many matrices this is the memory of the first rung and, for matrices that climb, CLIMBING of that.
        """

    def need(self, shape: tuple[int, int], rung: Rung) -> int:
        """Bytes that such a matrix takes on a rung beside the stored weight, from its Gram matrix to the polish."""

    def prepare(self, weights: Sequence[Tensor]) -> list[Operand]:
        """Move to the device, make tall, check for NaN and inf, scale by a power of two where needed."""

    def digests(self, operands: Sequence[Operand]) -> list[bytes]:
        """One seed for the start blocks of every operand, which depends on its shape, dtype and entries alone.

        The digests are cryptographic: whoever could make weights for a known digest could make their extreme vectors
        orthogonal to the start blocks.
        """

    def gaussian(self, ns: Sequence[int], seeds: Sequence[bytes], width: int, salt: int, dtype: torch.dtype) -> Panel:
        """Standard Gaussian blocks (n, width), each from the digest of its matrix and ``salt``."""

    def gram(self, operands: Sequence[Operand], dtype: torch.dtype, chunk: int | None = None) -> list[Tensor]:
        """Lower triangles of A^T A, shape (n, n); entries above the diagonal are undefined.

        With ``chunk`` every entry is summed in runs of at most ``chunk`` products, which the proofs rely on. Then the
        result may be one that ``factor`` kept with the operand, which keeps it no longer.
        """

    def cholesky(self, grams: Sequence[Tensor]) -> list[bool]:
        """Factor G = L L^T in place (lower triangle, zeros above); False where a pivot was not positive."""

    def exact_products(
        self, operands: Sequence[Operand], level: int, limits: Sequence[float]
    ) -> Sequence[ExactProducts] | None:
        """Products for proofs; those of a higher level are closer to the weights. None past the last level.

        The products may omit operands whose distance at this level reaches their ``limits``, since they would prove
        nothing. A backend without such products returns None, and proofs use ``gram`` and ``cholesky``.
        """

    def factor(self, operands: Sequence[Operand], rungs: Sequence[Rung]) -> Factors:
        """Factor every operand by its rung."""

    def volumes(self, operands: Sequence[Operand], factors: Factors) -> Tensor:
        """(w, 3), float64: the sum of log |r_ii|, that of its absolute values, and ||A^T A||_F to a relative 1e-5.

        The sums err by less than 1e-9 n beside their own rounding; the norm is nan where ``factor`` had no Gram matrix.
        """

    def product(self, factors: Factors, blocks: Panel) -> Panel:
        """R^T R X for blocks (n, b), in the dtype of the blocks: the rungs' ``blocks``, or their ``quick``."""

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
        are rounding errors and left out.
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
        floor (w,): theta of a leading part of T, a lower bound of the largest eigenvalue up to the rounding of theta;
        nan where none is known. A floor may save work and changes theta by no more than the accuracy of theta.
        """

    def weighted_binades(self, operands: Sequence[Operand], left: Panel, right: Panel) -> Tensor:
        """sum_ij b_ij^2 l_ik r_jk, b_ij = 2^floor(log2 |A_ij|), 0 where A_ij is 0 or subnormal in float32.

        For every column k of left (m, k) and right (n, k): shape (w, k), float64, to a relative 1e-5.
        """

    def read(self, values: Tensor) -> list[Any]:
        """The numbers as nested lists on the host, which waits for the device; ``counts`` counts these reads."""
