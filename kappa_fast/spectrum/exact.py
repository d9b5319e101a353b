"""The last rung and the first one for tiny matrices: a full singular value decomposition in float64 on the CPU.

Also what can be said without any arithmetic: zero matrices, zero columns, repeated columns.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..backends.base import Operand, Tensor
from . import doubled
from .certify import gamma
from .doubled import OUT, TINY, U, norm

METHOD = "svd64"
# From so many columns on a matrix with less than twice as many rows is decomposed, others have their Gram matrix taken.
SVD_FROM, SVD_SLENDER = 160, 2
SVD_TALL = 16, 512  # times as many rows, and rows: up to there an SVD has a say where the Gram matrix is first
DOUBLED_BELOW = 32  # columns for which nothing lies between a Gram matrix in float64 and one in twice its precision
SUM = 64  # products that are summed on their own
BLOCK_ENTRIES = 1 << 18  # of rows converted at a time
SHARE = 1.0  # of rtol that both sides of sigma_n may take together
ROUNDS = 4
SINGULAR = 2.0**52  # a kappa beyond it means nothing more in float64 than infinity
OUT_ULP = 1 + 8 * U


def _svd_rows(n: int) -> int:
    return max(SVD_TALL[0] * n, SVD_TALL[1])


def peak_bytes(shape: tuple[int, int]) -> int:
    """What ``decompose`` takes beside the weights, at most.

    An SVD: operand, copy, U and a second operand (m, n), V, its slices and workspace (n, n), a block of rows and its
    slices. Gram matrices: two numbers for each entry of G and of products with it, slices of these, a block of rows.
    """
    m, n = shape
    gram = 30 * n * n + 8 * min(m, max(doubled.ROWS, BLOCK_ENTRIES // n)) * n
    whole = DOUBLED_BELOW <= n < SVD_FROM or m <= _svd_rows(n)
    svd = 6 * m * n + 8 * n * n + 3 * doubled.ROWS * n if whole else 2 * m * n * (n >= SVD_FROM)
    return 8 * max(gram, svd)


PATIENCE = 0.1  # seconds


class Room:
    """Memory that the decompositions of a run share: side by side as far as it goes, one that needs more of it alone.

    Waves are cut for what the rungs before need, and a decomposition needs 2.5 to 3 times as much. ``stop`` is the
    event that ends the run: an interrupted run should not do the decompositions that wait one after the other.
    """

    def __init__(self, nbytes: float = math.inf, stop: threading.Event | None = None) -> None:
        self.nbytes, self.stop = nbytes, stop
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, a: Operand) -> Iterator[None]:
        """Wait until there is room for the decomposition of ``a``, and keep it meanwhile.

        Raises:
            KeyboardInterrupt: the run was stopped while this waited.
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
class Extremes:
    """What is proven of both ends of the spectrum: sigma lies in [low, high]; the smallest low end may be 0.

    left (m, 2), right (n, 2): approximate singular vectors of sigma_1 and sigma_n, float64 on the CPU; None where
    sigma_n cannot be told from zero. settled: a vector shrinks to what rounding makes of a null vector, and no way is
    likely to tell sigma_n from zero.
    """

    largest: tuple[float, float]
    smallest: tuple[float, float]
    left: Tensor | None = None
    right: Tensor | None = None
    settled: bool = False

    def is_narrow(self, rtol: float) -> bool:
        """Whether the interval of sigma_n leaves that of kappa a relative half-width of ``rtol``."""
        low, high = self.smallest
        return high - low <= SHARE * rtol * low

    @property
    def separated(self) -> bool:
        """Whether sigma_n is proven to be larger than zero."""
        return self.left is not None

    def met(self, other: Extremes) -> Extremes:
        """What both prove of the same matrix; the vectors of the one that knows more of sigma_n."""
        largest, smallest = (
            (max(x[0], y[0]), min(x[1], y[1]))
            for x, y in ((self.largest, other.largest), (self.smallest, other.smallest))
        )
        closer = max(self, other, key=lambda x: x.smallest[0])
        return Extremes(largest, smallest, closer.left, closer.right, self.settled or other.settled)


def decompose(a: Operand, rtol: float, *, suspected: bool = False) -> Extremes:
    """Both ends of the spectrum of a finite matrix, to a relative ``rtol`` where twice float64's precision reaches it.

    Nothing is assumed of any factorization, all residuals are measured: docs/numerics.md, section 5. Where one way is
    not enough, the next one's bounds are met with those before: all are proven.
    suspected: of being singular; then that is looked at first, without singular vectors.
    """
    m, n = a.shape
    slender = m >= SVD_SLENDER * n
    if suspected and (shown := _as_singular(a)) is not None:
        return shown
    if n < SVD_FROM and (found := _from_gram(a, rtol)) is not None:
        return found
    if n < DOUBLED_BELOW or (n >= SVD_FROM and slender):
        found = _from_doubled_gram(a, rtol)
        # Where it tells sigma_n from zero no SVD says more, and hardly ever for tall matrices, where an SVD is dear.
        return found if found.separated or m > _svd_rows(n) else found.met(from_svd(a, rtol))
    found = from_svd(a, rtol)
    if n >= SVD_FROM or found.settled or found.is_narrow(rtol):
        return found
    return found.met(_from_doubled_gram(a, rtol))


def _as_singular(a: Operand) -> Extremes | None:
    """What a vector shows of sigma_n, if that is where float64 cannot tell it from zero; None if it may be larger.

    The vector comes from inverse iteration with R of a QR decomposition. What is said is measured with A.
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
    if not low <= (4 + math.sqrt(n) / 2 + math.sqrt(m) / 64) * U * high:  # what the best vectors of singular ones give
        return None
    rounding, relative = (n + 4) * U * norm(wide), 1 + (m + 2 * n + 8) * U
    return Extremes((max(0.0, high / relative - rounding), norm(wide)), (0.0, low * relative + rounding), settled=True)


def _blocks(a: Operand) -> Iterator[tuple[int, int, Tensor]]:
    """Rows in float64 on the CPU, row-major, a few MB at a time."""
    m, n = a.shape
    step = max(SUM, BLOCK_ENTRIES // n // SUM * SUM)
    for start in range(0, m, step):
        rows = a.tensor[start : start + step]
        yield start, min(start + step, m), rows.to("cpu", torch.float64).contiguous()


def _gram(a: Operand) -> tuple[Tensor, float]:
    """A^T A in float64, and a bound on its error: sums of SUM products each, of those in a block, and of blocks."""
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
    """Eigenpairs of a symmetric matrix, ascending; no eigenvalue is further from theta than theta defect + rest."""

    theta: Tensor
    vectors: Tensor
    rest: float
    defect: float

    @classmethod
    def of(cls, matrix: Tensor, error: float) -> _Eigen:
        """``error``: how far the matrix is from the one that is meant, ||.||_2."""
        theta, v = torch.linalg.eigh(matrix)
        h = matrix.shape[0] + 4
        scaled = v * theta
        rest = norm(matrix - scaled @ v.T) + gamma(h) * (norm(matrix) + norm(scaled) * norm(v))
        eye = torch.eye(len(theta), dtype=torch.float64)
        defect = norm(v.T @ v - eye) + gamma(h) * (norm(v) ** 2 + 1)
        return cls(theta, v, (rest * OUT + error) * OUT + TINY, defect * OUT)

    def bounds(self, i: int) -> tuple[float, float]:
        """Of the square root of eigenvalue i."""
        theta = float(self.theta[i])
        low, high = (theta * (1 + s * math.copysign(self.defect, theta)) + s * self.rest for s in (-1, 1))
        return math.sqrt(max(0.0, low)) * (1 - 4 * U), math.sqrt(max(0.0, high)) * (1 + 4 * U)


def _from_gram(a: Operand, rtol: float) -> Extremes | None:
    """From the Gram matrix in float64, if that is enough."""
    total, error = _gram(a)
    least = torch.eye(a.shape[1], dtype=torch.float64) * (error / rtol)
    if int(torch.linalg.cholesky_ex(total - least).info):  # the smallest eigenvalue is smaller, and the error too large
        return None
    eigen = _Eigen.of(total, error)
    largest, smallest = eigen.bounds(-1), eigen.bounds(0)
    if not Extremes(largest, smallest).is_narrow(rtol):
        return None
    return _with_vectors(a, largest, smallest, eigen.vectors[:, [-1, 0]])


def _from_doubled_gram(a: Operand, rtol: float) -> Extremes:
    """From X and C with (X C)^T A^T A (X C) = I + E: sigma_n lies within sqrt(1 +- ||E||) / ||X C||.

    T = X^T A^T A X takes twice float64's precision, C = T^(-1/2) and the rest no more than float64.
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
        if float(spread[0]) <= t.error:  # as good as zero, and no other X shows more
            top = min(top, _quotient(x, t, w[:, 0]))
            break
        for c in [None, _scaled(w, spread)][: step + 1]:
            found = _least(x, t, c)
            if found is not None and found[0] > bottom:
                bottom, right = found[0], found[2]
            if found is not None:
                top = min(top, found[1])
            if top - bottom <= SHARE * rtol * bottom:
                break
        else:
            top = min(top, _quotient(x, t, w[:, 0]))
            x = x @ w
            continue
        break
    smallest = max(0.0, bottom - distance) * (1 - 2 * U), (top + distance) * (1 + 2 * U)
    if right is None or not smallest[0] > 0:
        return Extremes(largest, (0.0, smallest[1]))
    return _with_vectors(a, largest, smallest, torch.stack([eigen.vectors[:, -1], right / right.norm()], dim=1))


def _least(x: Tensor, t: doubled.Double, c: Tensor | None) -> tuple[float, float, Tensor] | None:
    """Bounds of sigma_n from T = X^T A^T A X and C (None: the identity), and its vector; None if ||E|| reaches 1."""
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


def _quotient(x: Tensor, t: doubled.Double, v: Tensor) -> float:
    """||A X v|| / ||X v|| from T = X^T A^T A X, rounded up: no less than sigma_n, whatever comes of the rest."""
    n = len(v)
    squared = float(v @ (t.high @ v)) + (gamma(2 * n + 3) * norm(t.high) + t.error) * float(v @ v)
    length = float(torch.linalg.vector_norm(x @ v)) - gamma(n + 2) * norm(x) * OUT
    return math.sqrt(squared) / length * OUT if length > 0 and squared >= 0 else math.inf


def _scaled(vectors: Tensor, values: Tensor) -> Tensor:
    """Every vector over the root of its eigenvalue; those that rounding hides are taken to be as large as it."""
    return vectors / values.clamp(min=4 * len(values) * U * float(values[-1])).sqrt()


def from_svd(a: Operand, rtol: float = 0.0) -> Extremes:
    """From LAPACK's SVD and its residual: |sigma_i(A) - sigma_i(U S V^T)| <= ||A - U S V^T||.

    The residual in float64 where that is enough for ``rtol``, else in twice its precision.
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
    found = _of_svd(u, s, vh, (plain + 2 * U * norm(scaled)) * OUT, defect * OUT)
    if found.is_narrow(rtol):
        return found
    if float(s[-1]) <= math.sqrt(n) * U * float(s[0]) and (shown := _as_singular(a)) is not None:
        return found.met(shown)  # no residual is that small
    rest = doubled.residual(wide, scaled, vh) + 2 * U * norm(scaled)  # of U S, whose entries are rounded
    return _of_svd(u, s, vh, rest * OUT, defect * OUT)


def _of_svd(u: Tensor, s: Tensor, vh: Tensor, rest: float, defect: float) -> Extremes:
    """rest: ||A - U S V^T||.  defect: ||U^T U - I|| + ||V^T V - I||, which is as much of every value at most."""
    high, low = float(s[0]), float(s[-1])
    up, down = (1 + defect) * OUT_ULP, (1 - defect) / OUT_ULP
    largest = max(0.0, high * down - rest), high * up + rest
    smallest = max(0.0, low * down - rest), low * up + rest
    if not smallest[0] > 0:
        return Extremes(largest, smallest)
    return Extremes(largest, smallest, u[:, [0, -1]], vh.T[:, [0, -1]])


def _with_vectors(a: Operand, largest: tuple[float, float], smallest: tuple[float, float], right: Tensor) -> Extremes:
    left = torch.cat([rows @ right for _, _, rows in _blocks(a)])
    return Extremes(largest, smallest, left / left.norm(dim=0), right)


def singular_reason(a: Operand) -> str | None:
    """Why the matrix is singular beyond any doubt, or None: a zero or a repeated column (exact comparison).

    Repeated rows of a tall matrix mean nothing; for a square one they are looked for as well.
    """
    if a.peak == 0:
        return "all entries are zero"
    m, n = a.shape
    tensor = a.tensor.to("cpu", torch.float64)
    for side, name in ((tensor, "column"), (tensor.T, "row")):
        if name == "row" and m > n:
            break
        lines = np.ascontiguousarray(side.T.numpy()) + 0.0  # -0.0 + 0.0 is 0.0: both zeros compare as one
        if not lines.any(axis=1).all():
            return f"a {name} is zero"
        packed = lines.view(np.dtype((np.void, lines.dtype.itemsize * lines.shape[1]))).ravel()
        if len(np.unique(packed)) < len(packed):
            return f"two {name}s are equal"
    return None
