"""Small matrices on the CPU: equal shapes in batches, both ends of the spectrum proven by shifted Cholesky factors.

For symmetric M and any L, lambda_min(M) >= -||M - L L^T||, since L L^T is positive semidefinite. With M = G - t I and
M = T I - G, G = A^T A, that bounds sigma_n from below and sigma_1 from above. t and T are placed by the eigenvalues of
G as LAPACK has them, or by a few steps of block Lanczos. Nothing is assumed of the accuracy of these, nor of that of L:
where they are wrong, the interval is too wide or there is none, and the matrix is left to the ladder. The same factors
give the singular vectors, by inverse iteration. docs/numerics.md, section 5, has the bounds.

Every matrix of a batch is computed as it would be alone, to the last bit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..backends.base import Operand, Tensor
from ..machine.helping import share
from ..machine.threads import each_on_one_thread, fits_one_thread
from . import statistics
from .certify import OUT_ULP
from .polish import binade_totals, ratio_bound, sensitivity
from .resolution import Goal, Resolution
from .rounding import OUT, TINY, U, gamma
from .shifted import factor_batch

METHOD = "gram64"
# Columns from which the ladder is faster: 2048 x 512 takes 41 ms here and 45 to 50 there, 3072 x 768 takes 91 to 98 and
# 73 to 93. With proofs more is tried here first: a 5632 x 2048 takes 1.3 to 2 times as long as without them, and on the
# ladder 2.3 times.
BELOW = 640
PROOFS_BELOW = 4096  # of tall matrices; a large square one is likely to have a kappa that a Gram matrix cannot resolve
SQUARE_PROOFS_BELOW, TALL = 1024, 1.25
KRYLOV_FROM = 224  # columns from which Lanczos steps are faster than all eigenvalues
KRYLOV_RTOL = 2e-3  # for a smaller rtol all eigenvalues are computed, up to EIGENVALUES_UP_TO columns
EIGENVALUES_UP_TO = 1024
# Rows of a block, whose products are summed on their own: as many as have NARROW_ENTRIES entries, or WIDE_ROWS.
NARROW_ENTRIES, WIDE_ROWS = 1 << 15, 1024
# A matrix with more than ALONE columns is worked on by PANEL of them at a time. MKL's products with AVX-512 work on
# multiples of 24 columns: the lower triangle of a 1536 x 384 Gram matrix takes 0.69 of the full product with panels of
# 96 columns, and 0.96 with 128.
ALONE, PANEL, WIDE_PANEL = 128, 96, 288
BATCH_ENTRIES = 1 << 17  # entries of the matrices of one batch
HELD_ENTRIES = 1 << 20  # entries up to which a matrix is converted as a whole
# Libraries round by the alignment, so matrices share a batch only if each begins at a cache line, of 8 float64 numbers.
# For the same reason products have two columns at least: with one a lone matrix is multiplied in another way.
ALIGNED = 8
WIDTH = 8  # columns of a Lanczos block
STEPS = 12
CHECKED = (2, 4, 6, 8, 10, 11)  # the steps, from 0, after which the Ritz values are looked at
CANCELLED = 1e-3  # of what was multiplied: what is left then is not orthogonal to the basis, to working precision
RESIDUAL = 0.25  # a residual (of the largest Ritz value) below this share of sqrt(rtol) is small enough
PLACED = 1.5  # how many rtol (of sigma^2) t and T are placed beyond estimates by Lanczos steps
SOLVES = 3
BELOW_ESTIMATE = 0.5  # of sigma_n^2, where nothing but statistics without it is wanted

Operator = Callable[[Tensor], Tensor]


def eligible(shape: tuple[int, int], goal: Goal) -> bool:
    """Whether a matrix of this shape (m, n), m >= n, is tried here first."""
    m, n = shape
    proofs_below = PROOFS_BELOW if m >= TALL * n else SQUARE_PROOFS_BELOW
    if n >= (proofs_below if goal.certify else BELOW):
        return False
    return n >= 2 and (goal.rtol >= KRYLOV_RTOL or n <= EIGENVALUES_UP_TO)


def batch_size(m: int, n: int) -> int:
    """How many matrices (m, n), m >= n, make a batch: their entries fit into a cache."""
    return max(1, BATCH_ENTRIES // (m * n)) if m % ALIGNED == 0 == n % ALIGNED else 1


def batches(kinds: Sequence[tuple[int, int, bool]]) -> Iterator[list[int]]:
    """The positions of matrices (m, n, turned or not) of equal kinds, as many at a time as fit into a cache."""
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for i, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(i)
    for (m, n, _), which in alike.items():
        count = batch_size(m, n)
        yield from (which[start : start + count] for start in range(0, len(which), count))


def resolve_small(operands: Sequence[Operand], dtypes: Sequence[torch.dtype], goal: Goal) -> list[Resolution | None]:
    """One resolution, in scaled units, for every operand whose interval is as narrow as the goal's rtol; else None.

    operands: finite and not zero.  dtypes: those of the stored weights.
    """
    found: list[Resolution | None] = [None] * len(operands)

    def resolve_batch(which: list[int]) -> list[Resolution | None]:
        return _resolve_batch([operands[i] for i in which], [dtypes[i] for i in which], goal)

    parts = list(batches([(*a.shape, a.turned) for a in operands]))
    # Several threads would share out a batch in another way than a matrix, and round it in another way.
    threaded = torch.get_num_threads() > 1
    shared = [which for which in parts if threaded and fits_one_thread(operands[which[0]].shape)]
    rest = [which for which in parts if not threaded or not fits_one_thread(operands[which[0]].shape)]
    with contextlib.closing(each_on_one_thread(resolve_batch, shared)) as finished:
        for which, resolutions in itertools.chain(finished, ((which, resolve_batch(which)) for which in rest)):
            for i, resolution in zip(which, resolutions, strict=True):
                if resolution is not None and (resolution.half_width <= goal.rtol or not goal.ends):
                    found[i] = resolution
    return found


class _Batch:
    """Tall matrices of one shape (m, n), and blocks of their rows (b, rows, n) in float64 on the CPU."""

    def __init__(self, operands: Sequence[Operand]) -> None:
        self.shape = m, n = operands[0].shape
        self.rows = NARROW_ENTRIES // n // ALIGNED * ALIGNED if n < ALONE else WIDE_ROWS
        self._tensors = [a.tensor for a in operands]
        self._turned = operands[0].turned
        self._held = self._converted(0, m) if m * n <= HELD_ENTRIES else None

    def _converted(self, start: int, stop: int) -> Tensor:
        """Turned matrices lie in memory as their weights do, column by column."""
        rows, (_, n), count = stop - start, self.shape, len(self._tensors)
        block = torch.empty((count, n, rows) if self._turned else (count, rows, n), dtype=torch.float64)
        for place, tensor in zip(block, self._tensors, strict=True):
            lines = tensor[start:stop]
            place.copy_(lines.T if self._turned else lines)
        return block.mT if self._turned else block

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, values) of one block after the other, of up to ``rows`` rows, or of all that is converted."""
        m = self.shape[0]
        if rows is None:
            rows = self.rows if self._held is None else m
        for start in range(0, m, rows):
            stop = min(start + rows, m)
            yield start, self._converted(start, stop) if self._held is None else self._held[:, start:stop]

    def gram(self) -> tuple[Tensor, int]:
        """A^T A (b, n, n), and how often a term of it is rounded at most: first in its block, then with the blocks."""
        m, n = self.shape
        panel = _panel(n)
        g = torch.empty((len(self._tensors), n, n), dtype=torch.float64)
        for start, x in self.blocks(self.rows):
            share([functools.partial(_add_panel, g, x, j, min(j + panel, n), start > 0) for j in range(0, n, panel)])
        for j in range(panel, n, panel):
            g[:, :j, j : j + panel] = g[:, j : j + panel, :j].mT
        return g, min(m, self.rows) + -(-m // self.rows) + 1

    def images(self, x: Tensor) -> Tensor:
        """A X (b, m, k) for X (b, n, k)."""
        parts = [torch.bmm(block, x) for _, block in self.blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def binade_totals(self, left: Tensor, right: Tensor) -> list[float]:
        """See polish.binade_totals."""
        totals = [binade_totals(x, left[:, i : i + x.shape[1]], right) for i, x in self.blocks()]
        return functools.reduce(torch.add, totals).tolist()


def _add_panel(g: Tensor, x: Tensor, start: int, stop: int, begun: bool) -> None:
    """Columns start to stop of the lower triangle of X^T X: in place of those of G, or added to them once begun."""
    part = torch.bmm(x[:, :, start:].mT, x[:, :, start:stop])
    g[:, start:, start:stop] = g[:, start:, start:stop].add_(part) if begun else part


def _panel(n: int) -> int:
    if n <= ALONE:
        return n
    return PANEL if n < BELOW else WIDE_PANEL


def _resolve_batch(operands: Sequence[Operand], dtypes: Sequence[torch.dtype], goal: Goal) -> list[Resolution | None]:
    a = _Batch(operands)
    n = a.shape[1]
    g, roundings = a.gram()
    trace = g.diagonal(dim1=1, dim2=2).sum(dim=1)
    unknown = gamma(roundings) * trace * OUT + TINY  # of G
    resolved = unknown + 2 * gamma(n + 2) * trace  # an eigenvalue can be proven about so closely
    placed = _placed_by_lanczos if n >= KRYLOV_FROM and goal.rtol >= KRYLOV_RTOL else _placed_by_eigenvalues
    room = g.clone()  # of one factor after the other: new memory costs as much as some of the work
    plain, unproven = factor_batch(room, torch.zeros_like(trace))
    if not goal.ends:
        volumes = _Volumes.of(plain, unproven + unknown, g)
        return _without_ends(a.shape, g, plain, volumes, trace, unknown, resolved, goal.rtol)
    ends = placed(g, plain, resolved, goal.rtol)
    if ends is None:
        return [None] * len(operands)
    volumes = _Volumes.of(plain, unproven + unknown, g)
    factor, defect = factor_batch(torch.neg(g, out=room), -ends.bound)
    highest = (ends.bound * OUT_ULP + (defect + unknown) * OUT).tolist()
    top = _iterated(factor, ends.top)
    factor, defect = factor_batch(g, ends.shift)
    lowest = (ends.shift - (defect + unknown) * OUT - ends.shift.abs() * 4 * U).tolist()
    right = torch.cat([top, _iterated(factor, ends.bottom)], dim=2)
    left = a.images(right)
    reached = torch.linalg.vector_norm(left, dim=1)
    lengths, norms = torch.linalg.vector_norm(right, dim=1).tolist(), trace.sqrt().tolist()
    totals = a.binade_totals(left / reached[:, None].square(), right)
    results: list[Resolution | None] = []
    for i, (high, low) in enumerate(reached.tolist()):
        proven = lowest[i] > 0 and highest[i] < math.inf and volumes.errors[i] < math.inf
        if not (ends.hopeful[i] and proven and 0 < low < math.inf):
            results.append(None)
            continue
        below = ratio_bound(a.shape, norms[i], (high, low), (lengths[i][0], lengths[i][1]), 1)
        largest, smallest = high / lengths[i][0], low / lengths[i][1]
        kappa = max(largest / smallest, below)
        above = max(math.sqrt(highest[i] / lowest[i]) * (1 + 8 * U), kappa)
        moved = sensitivity(totals[i], dtypes[i], operands[i].exponent, largest, smallest)
        certified = goal.certify and operands[i].exact
        known = statistics.of_gram(a.shape, volumes.one(i, lowest[i]), norms[i], (largest, smallest))
        results.append(Resolution("ok", kappa, below, above, largest, smallest, METHOD, certified, moved, known))
    return results


def _without_ends(
    shape: tuple[int, int],
    g: Tensor,
    plain: Tensor,
    volumes: _Volumes,
    trace: Tensor,
    unknown: Tensor,
    resolved: Tensor,
    rtol: float,
) -> list[Resolution | None]:
    """The statistics that need no end of the spectrum. A bound of sigma_n^2 far below it does for them: it only has to
    lie above all rounding. The other arguments are those of _resolve_batch.
    """
    x = _iterated(plain, _start(shape[1], 2)[:, :1].expand(len(g), -1, -1))
    shift = torch.linalg.vector_norm(torch.bmm(torch.tril(plain).mT, x), dim=1)[:, 0].square() * BELOW_ESTIMATE
    _, defect = factor_batch(g, shift)
    lowest = (shift - (defect + unknown) * OUT - shift.abs() * 4 * U).tolist()
    hopeful, norms, nan = (resolved < rtol * shift).tolist(), trace.sqrt().tolist(), math.nan
    results: list[Resolution | None] = []
    for i, low in enumerate(lowest):
        if not (hopeful[i] and low > 0 and volumes.errors[i] < math.inf):
            results.append(None)
            continue
        known = statistics.of_gram(shape, volumes.one(i, low), norms[i], (nan, nan))
        results.append(Resolution("bounded", nan, 1.0, math.inf, nan, nan, METHOD, statistics=known))
    return results


@dataclass(frozen=True)
class _Placed:
    """Where both ends of every G are to be proven, bound above its eigenvalues and shift below them, both (b,).

    top, bottom: vectors (b, n, 1) from which to iterate for those of the ends.  hopeful: whether rounding lets a proof
    come close enough, for each matrix.
    """

    bound: Tensor
    shift: Tensor
    top: Tensor
    bottom: Tensor
    hopeful: list[bool]


@dataclass(frozen=True)
class _Volumes:
    """What the statistics need of every G, from a Cholesky factor L with a measured residual; for (b,).

    logs: of the pivots l_ii, (b, n).  largest: the largest size of one.  grams: ||G||_F.  errors: bounds on
    ||A^T A - L L^T||_F with all rounding, inf without a factor.
    """

    logs: list[list[float]]
    largest: list[float]
    grams: list[float]
    errors: list[float]

    @classmethod
    def of(cls, factor: Tensor, errors: Tensor, g: Tensor) -> _Volumes:
        logs = factor.diagonal(dim1=1, dim2=2).log()
        grams = torch.linalg.matrix_norm(g).tolist()
        return cls(logs.tolist(), logs.abs().amax(dim=1).tolist(), grams, (errors * OUT).tolist())

    def one(self, i: int, lowest: float) -> tuple[float, float, float]:
        """The mean logarithm of the singular values of matrix i, a bound on its error, and ||G||_F.

        lowest: a proven bound below the eigenvalues of A^T A. With E = A^T A - L L^T and X = (A^T A)^(-1/2) E
        (A^T A)^(-1/2), log det L L^T - log det A^T A = log det(I - X), which is at most sqrt(n) x / (1 - x) in size for
        ||X||_F <= x < 1, and ||X||_F <= ||E||_F / lowest. ``fsum`` does not depend on an order.
        """
        logs, error = self.logs[i], self.errors[i]
        n = len(logs)
        unknown = error / max(lowest - error, TINY) / math.sqrt(n) / 2
        return math.fsum(logs) / n, (unknown + 8 * U * self.largest[i]) * OUT, self.grams[i]


def _placed_by_eigenvalues(g: Tensor, factor: Tensor, resolved: Tensor, rtol: float) -> _Placed | None:
    """As close to LAPACK's eigenvalues as rounding lets a proof come; None if that is too far for all matrices."""
    n = g.shape[1]
    theta = torch.linalg.eigvalsh(g)
    high, low = theta[:, -1], theta[:, 0]
    hopeful = (resolved < rtol * low).tolist()
    if not any(hopeful):
        return None
    start = _start(n, 2).expand(len(g), -1, -1)
    bound = high + 4 * (resolved + 2 * n * gamma(n + 2) * high)
    return _Placed(bound, low - 5 * resolved, start[:, :, :1], start[:, :, 1:], hopeful)


def _placed_by_lanczos(g: Tensor, factor: Tensor, resolved: Tensor, rtol: float) -> _Placed | None:
    """By Ritz values, with room for what these may lack; None if no matrix can be resolved. factor: that of G."""
    start = _start(g.shape[1], WIDTH)

    def inverse(x: Tensor) -> Tensor:
        y = torch.linalg.solve_triangular(factor, x, upper=False)
        return torch.linalg.solve_triangular(factor.mT, y, upper=True)

    theta, bottom = _lanczos(inverse, start, len(g), rtol)
    shift = (1 - PLACED * rtol) / theta
    hopeful = (resolved < rtol * shift).tolist()
    if not any(hopeful):
        return None
    narrow = g.to(torch.float32)
    high, top = _lanczos(lambda x: torch.bmm(narrow, x), start.to(torch.float32), len(g), rtol)
    return _Placed(high * (1 + PLACED * rtol), shift, top.to(torch.float64), bottom, hopeful)


@functools.lru_cache(64)
def _start(n: int, width: int) -> Tensor:
    """An orthonormal block (n, width) to start from. Anybody may know it: nothing that is proven depends on it."""
    return torch.linalg.qr(torch.randn((n, width), dtype=torch.float64, generator=torch.Generator().manual_seed(n))).Q


def _lanczos(operator: Operator, start: Tensor, count: int, rtol: float) -> tuple[Tensor, Tensor]:
    """Largest Ritz values (b,) and their vectors (b, n, 1), each after the steps that its own residual asks for."""
    n = start.shape[0]
    steps = min(STEPS, n // WIDTH)
    basis = start.new_empty((count, n, steps * WIDTH))
    projected = start.new_zeros((count, steps * WIDTH, steps * WIDTH), dtype=torch.float64)
    block = start.expand(count, -1, -1)
    values, vectors = start.new_zeros(count, dtype=torch.float64), start.new_zeros((count, n, 1))
    open_ = list(range(count))
    for step in range(steps):
        size = (step + 1) * WIDTH
        basis[:, :, size - WIDTH : size] = block
        known = basis[:, :, :size]
        image = operator(block)
        coefficients = torch.bmm(known.mT, image)
        block, coupling = torch.linalg.qr(torch.baddbmm(image, known, coefficients, alpha=-1))
        _orthogonalize_cancelled(block, known, coupling, coefficients)
        projected[:, :size, size - WIDTH : size] = coefficients
        if step not in CHECKED:
            continue
        t = projected[:, :size, :size]
        finite = torch.isfinite(t).all(dim=2).all(dim=1)[:, None, None]  # LAPACK must not get a nan or inf
        theta, s = torch.linalg.eigh(torch.where(finite, t, 0.0), UPLO="U")
        outside = torch.linalg.vector_norm(torch.bmm(coupling.to(torch.float64), s[:, -WIDTH:, -2:]), dim=1)[:, 1]
        far = (outside / theta[:, -1]).tolist()
        done = [i for i in open_ if not far[i] > RESIDUAL * math.sqrt(rtol) or step == steps - 1]
        if done:
            values[done] = theta[done, -1]
            vectors[done] = torch.bmm(known[done], s[done, :, -2:].to(known.dtype))[:, :, 1:]
            open_ = [i for i in open_ if i not in done]
            if not open_:
                break
    return values, vectors


def _orthogonalize_cancelled(block: Tensor, known: Tensor, coupling: Tensor, coefficients: Tensor) -> None:
    """Once more, in place, for matrices some of whose new directions are hardly more than rounding errors."""
    least = coupling.diagonal(dim1=1, dim2=2).abs().amin(dim=1)
    cancelled = least < CANCELLED * coefficients.abs().amax(dim=2).amax(dim=1)
    for i in cancelled.nonzero()[:, 0].tolist():
        for _ in range(2):
            rest = block[i] - known[i] @ (known[i].T @ block[i])
            block[i] = torch.linalg.qr(rest).Q


def _iterated(factor: Tensor, x: Tensor) -> Tensor:
    """Inverse iteration with L L^T: unit vectors (b, n, 1)."""
    for _ in range(SOLVES):
        x = torch.linalg.solve_triangular(factor, x, upper=False)
        x = torch.linalg.solve_triangular(factor.mT, x, upper=True)
        x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x
