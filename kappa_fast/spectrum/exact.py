"""The last rung of the ladder, and the only one for tiny matrices: both ends of the spectrum from a full decomposition
on the CPU, in float64 or twice its precision. A comparison of entries finds plainly singular matrices."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..backends.base import Operand, Tensor
from . import doubled
from .doubled import norm
from .rounding import OUT, TINY, U, gamma
from .statistics import Values

METHOD = "svd64"
# A matrix with SVD_FROM columns or more goes to an SVD if it has fewer than SVD_SLENDER times as many rows as columns,
# else to a Gram matrix.
SVD_FROM, SVD_SLENDER = 160, 2
SVD_TALL = 16, 512  # (rows per column, rows): up to the larger of both, an SVD may follow an inconclusive Gram matrix
DOUBLED_BELOW = 32  # columns below which a Gram matrix in twice float64's precision comes before an SVD
SUM = 64  # products that are summed on their own
BLOCK_ENTRIES = 1 << 18  # entries of the rows that are converted at a time
SHARE = 1.0  # the share of rtol that both sides of sigma_n may take together
ROUNDS = 4
SINGULAR = 2.0**52  # in float64 a larger kappa cannot be told from infinity
OUT_ULP = 1 + 8 * U

Interval = tuple[float, float]


def _svd_rows(n: int) -> int:
    return max(SVD_TALL[0] * n, SVD_TALL[1])


def peak_bytes(shape: tuple[int, int]) -> int:
    """The bytes that ``decompose`` takes at most beside the weights.

    An SVD holds the operand, a copy, U and a second operand (m, n), V, its slices and workspace (n, n), and a block of
    rows with its slices. Gram matrices hold two numbers for each entry of G and of its products, their slices, and a
    block of rows.
    """
    m, n = shape
    gram = 30 * n * n + 8 * min(m, max(doubled.ROWS, BLOCK_ENTRIES // n)) * n
    whole = DOUBLED_BELOW <= n < SVD_FROM or m <= _svd_rows(n)
    svd = 6 * m * n + 8 * n * n + 3 * doubled.ROWS * n if whole else 2 * m * n * (n >= SVD_FROM)
    return 8 * max(gram, svd)


PATIENCE = 0.1  # seconds


class MemoryGate:
    """The memory that the decompositions of a run share; a decomposition that needs more than all of it runs alone.

    Waves are sized for the earlier rungs, and a decomposition needs 2.5 to 3 times as much memory. A waiting thread
    looks at ``stop`` every PATIENCE seconds, so that an interrupted run starts no further decomposition.
    """

    def __init__(self, nbytes: float = math.inf, stop: threading.Event | None = None) -> None:
        self.nbytes, self.stop = nbytes, stop
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, a: Operand) -> Iterator[None]:
        """Reserve the memory for the decomposition of ``a``, and wait for other decompositions if they hold too much.

        Raises:
            KeyboardInterrupt: the run was stopped while this thread waited.
        """
        need = peak_bytes(a.shape)
        with self._changed:
            while self._used and self._used + need > self.nbytes:
                self._changed.wait(PATIENCE)
                if self.stop is not None and self.stop.is_set():
                    raise KeyboardInterrupt
            self._used += need
        try:
            yield
        finally:
            with self._changed:
                self._used -= need
                self._changed.notify_all()


@dataclass(frozen=True)
class SpectrumEnds:
    """Proven intervals [low, high] of the largest and the smallest singular value; the low end of the latter may be 0.

    left (m, 2), right (n, 2): approximate singular vectors of sigma_1 and sigma_n, float64 on the CPU; None where
    sigma_n is not proven to be positive. settled: A shrinks some vector as far as rounding lets it shrink a null
    vector, so no other method is likely to prove that sigma_n is positive. values: all singular values, where a
    method finds them.
    """

    largest: Interval
    smallest: Interval
    left: Tensor | None = None
    right: Tensor | None = None
    settled: bool = False
    values: Values | None = None

    def is_narrow(self, rtol: float) -> bool:
        """Whether the interval of sigma_n is narrow enough for an interval of kappa of relative half-width ``rtol``."""
        low, high = self.smallest
        return high - low <= SHARE * rtol * low

    @property
    def separated(self) -> bool:
        """Whether sigma_n is proven to be larger than zero."""
        return self.left is not None

    def intersected(self, other: SpectrumEnds) -> SpectrumEnds:
        """The intersection of both intervals of one matrix, with the vectors of the larger lower bound of sigma_n."""
        largest, smallest = (
            (max(x[0], y[0]), min(x[1], y[1]))
            for x, y in ((self.largest, other.largest), (self.smallest, other.smallest))
        )
        closer = max(self, other, key=lambda x: x.smallest[0])
        values = min((x.values for x in (self, other) if x.values), key=lambda values: values.width, default=None)
        return SpectrumEnds(largest, smallest, closer.left, closer.right, self.settled or other.settled, values)


def decompose(a: Operand, rtol: float, *, suspected: bool = False) -> SpectrumEnds:
    """Both ends of the spectrum of a finite matrix, to a relative ``rtol`` if twice float64's precision can reach it.

    All residuals are measured and nothing is assumed of any factorization: docs/numerics.md, section 5. If one method
    gives too wide an interval, the next one's is intersected with it, which is valid since both are proven.
    suspected: whether the matrix may be singular; then a test of that, without singular vectors, comes first.
    """
    m, n = a.shape
    slender = m >= SVD_SLENDER * n
    if suspected and (shown := _try_singular(a)) is not None:
        return shown
    if n < SVD_FROM and (found := _decompose_gram(a, rtol)) is not None:
        return found
    if n < DOUBLED_BELOW or (n >= SVD_FROM and slender):
        found = _decompose_doubled_gram(a, rtol)
        # An SVD adds nothing if sigma_n is proven positive, and hardly ever anything for tall matrices.
        if m > _svd_rows(n) or (found.separated and found.values is not None and found.values.width <= n * rtol):
            return found
        other = decompose_svd(a, rtol)
        if not found.separated:
            return found.intersected(other)
        return replace(found, values=found.intersected(other).values)  # it knows those between both ends better
    found = decompose_svd(a, rtol)
    if n >= SVD_FROM or found.settled or found.is_narrow(rtol):
        return found
    return found.intersected(_decompose_doubled_gram(a, rtol))


def _try_singular(a: Operand) -> SpectrumEnds | None:
    """Bounds from a vector that A shrinks so far that float64 cannot tell sigma_n from zero; None if none is found.

    The vector comes from inverse iteration with R of a QR decomposition; the bounds are measured with A itself.
    """
    wide = a.tensor.to("cpu", torch.float64)
    m, n = a.shape
    r = torch.linalg.qr(wide, mode="r").R
    diagonal, hidden = r.diagonal(), U * norm(r) / n
    diagonal.copy_(torch.where(diagonal.abs() > hidden, diagonal, hidden))
    v = x = torch.ones((n, 1), dtype=torch.float64)
    for _ in range(3):
        v = torch.linalg.solve_triangular(r.T, v / v.norm(), upper=False)
        v = torch.linalg.solve_triangular(r, v / v.norm(), upper=True)
        x = r.T @ (r @ (x / x.norm()))
    v, x = v / v.norm(), x / x.norm()
    if not bool(torch.isfinite(v).all()):
        return None
    high, low = torch.linalg.vector_norm(wide @ torch.cat([x, v], dim=1), dim=0).tolist()
    if not low <= (4 + math.sqrt(n) / 2 + math.sqrt(m) / 64) * U * high:  # the rounding at vectors of singular matrices
        return None
    rounding, relative = (n + 4) * U * norm(wide), 1 + (m + 2 * n + 8) * U
    return SpectrumEnds(
        (max(0.0, high / relative - rounding), norm(wide)), (0.0, low * relative + rounding), settled=True
    )


def _blocks(a: Operand) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of rows (start, stop, values), a few MB each, row-major float64 on the CPU."""
    m, n = a.shape
    step = max(SUM, BLOCK_ENTRIES // n // SUM * SUM)
    for start in range(0, m, step):
        rows = a.tensor[start : start + step]
        yield start, min(start + step, m), rows.to("cpu", torch.float64).contiguous()


def _gram(a: Operand) -> tuple[Tensor, float]:
    """A^T A in float64 and a bound on its error: SUM products are summed, then the sums of a block, then the blocks."""
    n = a.shape[1]
    total = torch.zeros((n, n), dtype=torch.float64)
    longest = blocks = 0
    for start, stop, rows in _blocks(a):
        whole = (stop - start) // SUM * SUM
        parts = rows[:whole].view(-1, SUM, n)
        total += (parts.mT @ parts).sum(dim=0) + rows[whole:].T @ rows[whole:]
        longest, blocks = max(longest, len(parts)), blocks + 1
    return total, gamma(SUM + longest + blocks + 2) * float(total.diagonal().sum()) * OUT + TINY


@dataclass(frozen=True)
class _Eigen:
    """Eigenpairs of a symmetric matrix, ascending; each eigenvalue is within theta * defect + rest of its theta."""

    theta: Tensor
    vectors: Tensor
    rest: float
    defect: float

    @classmethod
    def of(cls, matrix: Tensor, error: float) -> _Eigen:
        """``error`` bounds the distance in ||.||_2 of ``matrix`` from the exact matrix."""
        theta, v = torch.linalg.eigh(matrix)
        h = matrix.shape[0] + 4
        scaled = v * theta
        rest = norm(matrix - scaled @ v.T) + gamma(h) * (norm(matrix) + norm(scaled) * norm(v))
        eye = torch.eye(len(theta), dtype=torch.float64)
        defect = norm(v.T @ v - eye) + gamma(h) * (norm(v) ** 2 + 1)
        return cls(theta, v, (rest * OUT + error) * OUT + TINY, defect * OUT)

    def roots(self, distance: float = 0.0) -> Values:
        """The square roots of all eigenvalues, of a matrix within ``distance``."""
        return Values.of_squares(self.theta, self.defect, self.rest, distance)

    def bounds(self, i: int) -> tuple[float, float]:
        """Bounds of the square root of eigenvalue i."""
        theta = float(self.theta[i])
        low, high = (theta * (1 + s * math.copysign(self.defect, theta)) + s * self.rest for s in (-1, 1))
        return math.sqrt(max(0.0, low)) * (1 - 4 * U), math.sqrt(max(0.0, high)) * (1 + 4 * U)


def _decompose_gram(a: Operand, rtol: float) -> SpectrumEnds | None:
    """Both ends from the Gram matrix in float64; None if that leaves too wide an interval."""
    total, error = _gram(a)
    least = torch.eye(a.shape[1], dtype=torch.float64) * (error / rtol)
    if int(torch.linalg.cholesky_ex(total - least).info):  # the error is too large for the smallest eigenvalue
        return None
    eigen = _Eigen.of(total, error)
    largest, smallest = eigen.bounds(-1), eigen.bounds(0)
    if not SpectrumEnds(largest, smallest).is_narrow(rtol):
        return None
    return _with_vectors(a, largest, smallest, eigen.vectors[:, [-1, 0]], eigen.roots())


def _decompose_doubled_gram(a: Operand, rtol: float) -> SpectrumEnds:
    """Both ends from X and C with (X C)^T A^T A (X C) = I + E: sigma_n lies within sqrt(1 +- ||E||) / ||X C||.

    T = X^T A^T A X is computed in twice float64's precision, C = T^(-1/2) and everything else in float64.
    """
    g, distance = doubled.gram(a.tensor)
    eigen = _Eigen.of(g.high, g.error + U * norm(g.high))
    low, high = eigen.bounds(-1)
    largest = max(0.0, low - distance), high + distance
    x, spread = eigen.vectors, eigen.theta
    bottom, top, right = 0.0, high, None
    for step in range(ROUNDS):
        x = doubled.rounded(_scaled(x, spread))
        if not bool(torch.isfinite(x).all()):
            break
        t = doubled.transposed_product(x, doubled.product(g, x))
        spread, w = torch.linalg.eigh(t.high)
        if float(spread[0]) <= t.error:  # T cannot be told from a singular matrix, and no other X changes that
            top = min(top, _rayleigh_bound(x, t, w[:, 0]))
            break
        for c in [None, _scaled(w, spread)][: step + 1]:
            found = _bounds_of_smallest(x, t, c)
            if found is not None and found[0] > bottom:
                bottom, right = found[0], found[2]
            if found is not None:
                top = min(top, found[1])
            if top - bottom <= SHARE * rtol * bottom:
                break
        else:
            top = min(top, _rayleigh_bound(x, t, w[:, 0]))
            x = x @ w
            continue
        break
    smallest = max(0.0, bottom - distance) * (1 - 2 * U), (top + distance) * (1 + 2 * U)
    if right is None or not smallest[0] > 0:
        return SpectrumEnds(largest, (0.0, smallest[1]), values=eigen.roots(distance))
    vectors = torch.stack([eigen.vectors[:, -1], right / right.norm()], dim=1)
    return _with_vectors(a, largest, smallest, vectors, eigen.roots(distance))


def _bounds_of_smallest(x: Tensor, t: doubled.Double, c: Tensor | None) -> tuple[float, float, Tensor] | None:
    """Bounds of sigma_n from T = X^T A^T A X and C (None: the identity), and its vector; None unless ||E|| < 1."""
    n = x.shape[1]
    eye = torch.eye(n, dtype=torch.float64)
    unknown = t.error + U * norm(t.high)
    if c is None:
        defect = (norm((t.high - eye) + t.low) * (1 + 4 * U) + t.error) * OUT
        y, rounding = x, 0.0
    else:
        defect = norm(c.T @ t.high @ c - eye)
        defect = (defect + norm(c) ** 2 * (norm(t.high) * gamma(2 * n + 4) + unknown) + 4 * n * U) * OUT
        y, rounding = x @ c, gamma(n + 1) * norm(x) * norm(c) * OUT
    if not defect < 1:
        return None
    length = _Eigen.of(y.T @ y, gamma(n + 2) * norm(y) ** 2)
    shorter, longer = length.bounds(-1)
    bottom = math.sqrt(1 - defect) / (longer + rounding) * (1 - 8 * U)
    top = math.sqrt(1 + defect) / (shorter - rounding) * (1 + 8 * U) if shorter > rounding else math.inf
    return bottom, top, y @ length.vectors[:, -1]


def _rayleigh_bound(x: Tensor, t: doubled.Double, v: Tensor) -> float:
    """||A X v|| / ||X v|| from T = X^T A^T A X, rounded up: an upper bound of sigma_n for any v."""
    n = len(v)
    squared = float(v @ (t.high @ v)) + (gamma(2 * n + 3) * norm(t.high) + t.error) * float(v @ v)
    length = float(torch.linalg.vector_norm(x @ v)) - gamma(n + 2) * norm(x) * OUT
    return math.sqrt(squared) / length * OUT if length > 0 and squared >= 0 else math.inf


def _scaled(vectors: Tensor, values: Tensor) -> Tensor:
    """Every vector divided by the root of its eigenvalue, which is raised to the size of its rounding error."""
    return vectors / values.clamp(min=4 * len(values) * U * float(values[-1])).sqrt()


def decompose_svd(a: Operand, rtol: float = 0.0) -> SpectrumEnds:
    """Both ends from LAPACK's SVD and its residual: |sigma_i(A) - sigma_i(U S V^T)| <= ||A - U S V^T||.

    The residual is computed in float64 if that is enough for ``rtol``, else in twice its precision.
    """
    wide = a.tensor.to("cpu", torch.float64)
    n = a.shape[1]
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    scaled = u * s
    eye = torch.eye(n, dtype=torch.float64)
    defect = norm(vh @ vh.T - eye) + gamma(n + 2) * norm(vh) ** 2
    cross, error = _gram(Operand(u, 0, True, 1.0))
    defect += norm(cross - eye) + error + 2 * n * U
    plain = norm(wide - scaled @ vh) + gamma(n + 3) * (norm(wide) + norm(scaled) * norm(vh))
    found = _bounds_from_svd(u, s, vh, (plain + 2 * U * norm(scaled)) * OUT, defect * OUT)
    if found.is_narrow(rtol):
        return found
    if float(s[-1]) <= math.sqrt(n) * U * float(s[0]) and (shown := _try_singular(a)) is not None:
        return found.intersected(shown)  # no residual can be smaller than this sigma_n
    rest = doubled.residual(wide, scaled, vh) + 2 * U * norm(scaled)  # the entries of U S are rounded
    return _bounds_from_svd(u, s, vh, rest * OUT, defect * OUT)


def _bounds_from_svd(u: Tensor, s: Tensor, vh: Tensor, rest: float, defect: float) -> SpectrumEnds:
    """rest: ||A - U S V^T||.  defect: ||U^T U - I|| + ||V^T V - I||, a bound on the relative error of every value."""
    high, low = float(s[0]), float(s[-1])
    up, down = (1 + defect) * OUT_ULP, (1 - defect) / OUT_ULP
    largest = max(0.0, high * down - rest), high * up + rest
    smallest = max(0.0, low * down - rest), low * up + rest
    values = Values.of_values(s, defect + 8 * U, rest)
    if not smallest[0] > 0:
        return SpectrumEnds(largest, smallest, values=values)
    return SpectrumEnds(largest, smallest, u[:, [0, -1]], vh.T[:, [0, -1]], values=values)


def _with_vectors(
    a: Operand, largest: tuple[float, float], smallest: tuple[float, float], right: Tensor, values: Values
) -> SpectrumEnds:
    left = torch.cat([rows @ right for _, _, rows in _blocks(a)])
    return SpectrumEnds(largest, smallest, left / left.norm(dim=0), right, values=values)


def singular_reason(a: Operand) -> str | None:
    """Why comparing entries shows that the matrix is singular: a column is zero or repeated. None if neither is so.

    Zero and repeated rows make only a square matrix singular, and are searched for only there.
    """
    if a.peak == 0:
        return "all entries are zero"
    m, n = a.shape
    tensor = a.tensor.to("cpu", torch.float64)
    for side, name in ((tensor, "column"), (tensor.T, "row")):
        if name == "row" and m > n:
            break
        lines = np.ascontiguousarray(side.T.numpy()) + 0.0  # -0.0 + 0.0 is 0.0, so both zeros compare equal
        if not lines.any(axis=1).all():
            return f"a {name} is zero"
        packed = lines.view(np.dtype((np.void, lines.dtype.itemsize * lines.shape[1]))).ravel()
        if len(np.unique(packed)) < len(packed):
            return f"two {name}s are equal"
    return None
