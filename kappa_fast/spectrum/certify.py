"""Proofs for the ladder: upper bounds of kappa in float64 that hold for any estimate and account for all rounding.

Both ends use one fact that relies on no library's factorization: for symmetric M and any L, lambda_min(M) >=
-||M - L L^T||, since L L^T is positive semidefinite. shifted.py computes L and this residual with a bound on its
rounding (Rump, BIT 46 (2006) 433, bounds the residual a priori instead). The only assumption about a product is that it
is an IEEE sum of at most K products, each rounded at most once, in any order, with or without FMA.

The bound of sigma_n comes from A^T A - t I where float64 suffices, else from a preconditioner X ~ R^-1, for which
sigma_n(A) >= sigma_n(A X) / ||X|| (Rump, BIT 51 (2011) 367): kappa then enters once, not squared.

Where a backend has products of nearby matrices Q for a whole wave, both ends of all Q are bounded in lockstep, and
|sigma_i(A) - sigma_i(Q)| <= ||A - Q||_2 (Weyl). Matrices for which that proves nothing are proved one after the other.
docs/numerics.md has the derivations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..backends.base import Backend, ExactProducts, Operand, Tensor
from ..backends.moving import accelerated
from ..machine.torch_state import is_exact
from . import shifted
from .rounding import OUT, TINY, U32, U, gamma

if TYPE_CHECKING:
    from .resolution import Resolution

OUT_ULP = 1 + 4 * U
# With such bounds all underflows in float32 are off by less than TINY32 times the bound together, flushed to zero or
# not: 2^-126 for each of up to n products of n^2 entries, n up to 2^17, and for each entry that was converted.
RANGE32 = 1e-15, 1e30
TINY32 = 1e-15
CHUNKS = (256, 128, 64, 32)  # products per partial sum, the fastest first
LARGE_CHUNKS = (1 << 15, 4096, 1024)  # come before them on an accelerator, where every product is a launch
CHUNK32 = 128
GROWTH = 8.0  # || |L| |L|^T || over || L L^T || for a factor L of T I - G, as it is seen at least
# The relative distances between estimate and proven bound that are tried in turn, from about a quarter of rtol on. All
# rtol share these numbers, so that a narrower rtol never gives a wider interval.
WIDENINGS = (*(x * 100.0**-k for k in (4, 3, 2, 1) for x in (0.25, 1.0, 4.0)), 0.25, 0.9)
# From here on a widening leaves room for the residual of a coarse factor, which is a thousandth of the bound or so.
COARSE_FROM = 2e-3
ALPHA = 0.25  # of rtol: how far from orthonormal a preconditioned matrix may be


@dataclass(frozen=True)
class _Product:
    """A computed symmetric product with ||computed - exact||_2 <= error; only the lower triangle is filled."""

    lower: Tensor
    error: float
    trace: float


def widenings(rtol: float) -> tuple[float, ...]:
    """The WIDENINGS that are tried for an interval of relative half-width ``rtol``, ascending."""
    first = max([i for i, x in enumerate(WIDENINGS) if x <= rtol / 4 * OUT], default=0)
    return WIDENINGS[first:]


def chunk_rows(m: int) -> int:
    """Rows per partial sum: about sqrt(m), which minimizes K + m / K, as a multiple of 32."""
    return max(32, min(256, 32 * round(math.sqrt(m) / 32)))


def chunk_for(count: int, size: float, limit: float, chunks: Sequence[int] = CHUNKS) -> int:
    """The first of ``chunks`` for which ``count`` products, summed in chunks, err by at most ``limit``; else the best.

    size: the 2-norm of the sum of their absolute values.
    """
    found = (k for k in chunks if gamma(min(k, count) + math.ceil(count / k) + 2) * size <= limit)
    return next(found, chunk_rows(count))


def chunks_on(device: torch.device) -> tuple[int, ...]:
    """The numbers of products per partial sum that chunk_for() tries for matrices on a device, the fastest first."""
    return (*LARGE_CHUNKS, *CHUNKS) if accelerated(device) else CHUNKS


def gram_with_error(backend: Backend, a: Operand, chunk: int | None = None) -> _Product:
    """A^T A in float64, in chunks of K rows. Its error is at most gamma(h) |A|^T |A| entrywise, h = K + ceil(m / K)
    + 1, and || |A|^T |A| ||_2 is at most the trace."""
    m = a.shape[0]
    k = min(chunk or chunk_rows(m), m)
    (g,) = backend.gram([a], torch.float64, chunk=k)
    trace = float(g.diagonal().sum()) * OUT
    return _Product(g, gamma(k + math.ceil(m / k) + 1) * trace * OUT + TINY, trace)


def smallest_eigenvalue(backend: Backend, product: _Product, shift: float, chunk: int | None = None) -> float:
    """A proven lower bound of lambda_min of the exact matrix that ``product`` approximates.

    The bound is near ``shift`` as a rule, and -inf if G - shift I is not positive definite to working precision.
    """
    return shift - _defect(backend, product, shift, 1, chunk) - abs(shift) * 4 * U


def largest_eigenvalue(backend: Backend, product: _Product, bound: float, chunk: int | None = None) -> float:
    """A proven upper bound of lambda_max of the exact matrix that ``product`` approximates.

    The result is near ``bound`` as a rule, and inf if bound I - G is not positive definite to working precision.
    """
    return bound * (1 + 4 * U) + _defect(backend, product, bound, -1, chunk)


def _defect(backend: Backend, product: _Product, shift: float, sign: int, chunk: int | None) -> float:
    """A bound on how far the smallest eigenvalue of sign (exact matrix - shift I) lies below 0; inf without a proof."""
    matrix = sign * product.lower
    matrix.diagonal().sub_(sign * shift)
    distance = shifted.factor(backend, matrix, chunk or chunk_rows(matrix.shape[0]), before=1)
    return (distance + product.error) * OUT + TINY


def _largest_in_float32(backend: Backend, product: _Product, bound: float) -> float:
    """``largest_eigenvalue`` from a factor in float32, whose error is small beside lambda_max; inf without a proof."""
    if not (is_exact() and RANGE32[0] < bound < RANGE32[1]):
        return math.inf
    scale = 2.0 ** -math.frexp(bound)[1]  # the largest entry of the factored matrix then lies near 1
    matrix = product.lower.to(torch.float32).mul_(-scale)
    matrix.diagonal().copy_((bound - product.lower.diagonal()) * scale)
    distance = shifted.factor(backend, matrix, CHUNK32, before=2)  # the diagonal: in float64, then to float32
    return bound * (1 + 4 * U) + ((distance + TINY32) / scale + product.error) * OUT


def norm_bound(backend: Backend, product: _Product, estimate: float, rtol: float) -> float:
    """A proven upper bound of sqrt(lambda_max) of the exact matrix; ``estimate`` approximates the root from below."""
    best = product.trace + product.error
    n = product.lower.shape[0]
    chunks = chunks_on(product.lower.device)
    # Float32 is no faster on an accelerator: sums of CHUNK32 products take a launch each.
    narrow = (
        not accelerated(product.lower.device) and 2 * GROWTH * gamma(shifted.roundings(n, CHUNK32, 2), U32) < rtol / 2
    )
    for widening in widenings(rtol):
        bound = estimate**2 * (1 + widening)
        proven = _largest_in_float32(backend, product, bound) if narrow else math.inf
        if not proven <= bound * (1 + rtol / 2):
            chunk = chunk_for(n, 2 * n * bound, rtol * bound / 16, chunks)
            proven = largest_eigenvalue(backend, product, bound, chunk)
        if proven < best:
            return math.sqrt(proven) * OUT_ULP
    return math.sqrt(best) * OUT


def certify_wave(
    backend: Backend, operands: Sequence[Operand], founds: Sequence[Resolution], rtol: float
) -> list[Resolution]:
    """One resolution per operand: that of ``founds``, with a proven interval if float64 can prove one."""
    results = list(founds)
    rest = [i for i, a in enumerate(operands) if a.exact]
    level = 0
    while rest and (proven := _prove_level(backend, {i: operands[i] for i in rest}, founds, rtol, level)) is not None:
        for i, found in proven.items():
            results[i] = found
        rest = [i for i in rest if i not in proven]
        level += 1
    for i in rest:
        results[i] = certified(backend, operands[i], founds[i], rtol)
    return results


def _prove_level(
    backend: Backend, operands: Mapping[int, Operand], founds: Sequence[Resolution], rtol: float, level: int
) -> dict[int, Resolution] | None:
    """The resolutions that the products of one level prove, by position; None past the last level."""
    chosen = [founds[i] for i in operands]
    limits = [rtol * found.sigma_min / 2 for found in chosen]
    made = backend.exact_products(list(operands.values()), level, limits)
    if made is None:
        return None
    positions = list(operands)
    return {
        positions[place]: proven
        for products in made
        for place, proven in _prove_from_products(products, chosen, rtol).items()
    }


def _prove_from_products(products: ExactProducts, founds: Sequence[Resolution], rtol: float) -> dict[int, Resolution]:
    """The resolutions, by position, that these products prove because they are close enough to the weights."""
    ends = _GramEigenvalueBounds(products)
    tail = [founds[i].sigma_min for i in products.which]
    lows = [
        math.isfinite(e) and rtol * s**2 > 2 * e and rtol * s > 2 * d
        for s, e, d in zip(tail, ends.errors, products.distances, strict=True)
    ]
    bottoms: dict[int, float] = {}
    tops: dict[int, float] = {}
    for widening in widenings(rtol):
        open_ = [j for j, worth in enumerate(lows) if worth and j not in bottoms]
        bounds = ends.smallest(open_, [tail[j] ** 2 * (1 - widening) for j in open_])
        for j, low in zip(open_, bounds, strict=True):
            proven = math.sqrt(low) * (1 - 4 * U) - products.distances[j] if low > 0 else 0.0
            if proven > 0:
                bottoms[j] = proven * (1 - 4 * U)
    for widening in widenings(rtol):
        open_ = [j for j in bottoms if j not in tops]
        tops.update(_proven_tops(ends, {j: founds[products.which[j]].sigma_max ** 2 for j in open_}, widening))
    results = {}
    for j, low in bottoms.items():
        found = founds[products.which[j]]
        high = math.sqrt(tops.get(j, ends.traces[j])) * OUT_ULP + products.distances[j]
        upper = high / low * (1 + 8 * U)
        results[products.which[j]] = replace(found, upper=max(upper, found.kappa), certified=True)
    return results


def _proven_tops(ends: _GramEigenvalueBounds, heads: Mapping[int, float], widening: float) -> dict[int, float]:
    """Upper bounds of lambda_max, below the trace, of the places where they are proven; heads: the estimates.

    A coarse factor will do where its residual is no larger than the widening: the next one proves more than four times
    as far away, so the order of trials depends on no rtol, and a narrower one proves no less.
    """
    found: dict[int, float] = {}
    if widening >= COARSE_FROM:
        bounds = ends.largest(list(heads), [head * (1 + widening) for head in heads.values()], coarse=True)
        limits = [min(head * (1 + 2 * widening), ends.traces[j]) for j, head in heads.items()]
        found = {j: high for j, high, limit in zip(heads, bounds, limits, strict=True) if high < limit}
    rest = [j for j in heads if j not in found]
    bounds = ends.largest(rest, [heads[j] * (1 + widening) for j in rest])
    return found | {j: high for j, high in zip(rest, bounds, strict=True) if high < ends.traces[j]}


class _GramEigenvalueBounds:
    """Proven bounds of the extreme eigenvalues of Q^T Q.

    errors: bounds on ||G - Q^T Q||_2.  traces: upper bounds of the traces of Q^T Q.
    """

    def __init__(self, products: ExactProducts) -> None:
        self._products = products
        traces = [trace * OUT for trace in products.traces]
        self.errors = [gamma(h) * t * OUT + TINY for h, t in zip(products.roundings, traces, strict=True)]
        self.traces = [(t + e) * OUT for t, e in zip(traces, self.errors, strict=True)]

    def smallest(self, chosen: Sequence[int], shifts: Sequence[float]) -> list[float]:
        """Lower bounds of lambda_min, near ``shifts`` as a rule; -inf where G - shift I is not positive definite."""
        defects = self._defects(chosen, shifts, 1)
        return [shift - d - abs(shift) * 4 * U for shift, d in zip(shifts, defects, strict=True)]

    def largest(self, chosen: Sequence[int], bounds: Sequence[float], *, coarse: bool = False) -> list[float]:
        """Upper bounds of lambda_max, near ``bounds`` as a rule; inf where bound I - G is not positive definite."""
        defects = self._defects(chosen, bounds, -1, coarse=coarse)
        return [bound * (1 + 4 * U) + d for bound, d in zip(bounds, defects, strict=True)]

    def _defects(
        self, chosen: Sequence[int], shifts: Sequence[float], sign: int, *, coarse: bool = False
    ) -> list[float]:
        """Bounds on how far the smallest eigenvalue of sign (Q^T Q - shift I) lies below 0; compare residual_norm."""
        if not chosen:
            return []
        if coarse:
            residuals = self._products.coarse_residuals(chosen, shifts)
        else:
            residuals = self._products.residuals(chosen, shifts, sign)
        found = []
        for j, (rest, squares) in zip(chosen, residuals, strict=True):
            size = 2 * (squares + rest) * OUT
            # The shift rounds the diagonal once more; entries of the diagonal are no larger than ``size``.
            roundings = self._products.coarse_roundings if coarse else self._products.residual_roundings(j)
            rounding = gamma(roundings + 1) * size
            found.append((rest * OUT + rounding + self.errors[j]) * OUT + TINY)
        return found


def certified(backend: Backend, a: Operand, found: Resolution, rtol: float) -> Resolution:
    """``found`` with a proven interval, or unchanged if float64 cannot prove one.

    The proof takes the Gram matrix, unless the estimate has left it, a factorization for each end, and the
    preconditioned product where kappa is too large for the Gram matrix.
    """
    if not a.exact:
        return found
    squares = float(torch.linalg.vector_norm(a.tensor.to(torch.float32))) ** 2
    limit = rtol * found.sigma_min**2 / 16
    chunks = chunks_on(a.tensor.device)
    chunk = chunk_for(a.shape[0], squares, limit, chunks)
    if gamma(chunk + math.ceil(a.shape[0] / chunk) + 2) * squares > 16 * limit:
        chunk = chunks[0]  # the Gram matrix is too far from A^T A for sigma_n however it is summed
    product = gram_with_error(backend, a, chunk)
    high = norm_bound(backend, product, found.sigma_max, rtol)
    low = 0.0
    # The relative distance of a bound from the Gram matrix: the error of the matrix, and as much for the residual.
    behind = 2 * product.error / found.sigma_min**2
    if behind < rtol:
        low = _smallest_from_gram(backend, product, found.sigma_min, rtol)
    if not low > 0:
        low = preconditioned_smallest(backend, a, found.sigma_min, rtol, product)
        if behind < 1 and low**2 < found.sigma_min**2 * (1 - behind):
            low = max(low, _smallest_from_gram(backend, product, found.sigma_min, behind))
    if not low > 0:
        return found
    upper = high / low * (1 + 4 * U)
    return replace(found, upper=max(upper, found.kappa), certified=True)


def _smallest_from_gram(backend: Backend, product: _Product, sigma_min: float, rtol: float) -> float:
    """A proven lower bound of sigma_n from the Gram matrix; 0 where float64 proves no positive one."""
    chunks = chunks_on(product.lower.device)
    chunk = chunk_for(product.lower.shape[0], 2 * product.trace, rtol * sigma_min**2 / 16, chunks)
    for widening in widenings(rtol):
        low = smallest_eigenvalue(backend, product, sigma_min**2 * (1 - widening), chunk)
        if low > 0:
            return math.sqrt(low) * (1 - 4 * U)
    return 0.0


def preconditioned_smallest(
    backend: Backend, a: Operand, sigma_min: float, rtol: float, product: _Product | None = None
) -> float:
    """A proven lower bound of sigma_n through X ~ R^-1 for R^T R ~ A^T A; 0 where float64 proves no positive one.

    With C = A X computed and ||C^T C - I|| <= alpha: sigma_n(A) ||X|| >= sigma_n(A X) >= sqrt(1 - alpha) - ||C - A X||.
    The proof makes no assumption about X and R: it uses C, its Gram matrix and ||X||, all with proven errors.

    R is the Cholesky factor of the Gram matrix ``product`` where that is likely to be near enough, which takes a sixth
    of the time, and where it is not, and otherwise, that of Householder QR.
    """
    best = 0.0
    n = a.shape[1]
    if product is not None and 4 * U * math.sqrt(n) * product.trace < ALPHA * rtol * sigma_min**2 * n:
        lower = torch.tril(product.lower)
        if backend.cholesky([lower])[0]:
            best, alpha = _with_preconditioner(backend, a, lower.T, sigma_min, rtol)
            if alpha <= ALPHA * rtol:
                return best
    r = torch.linalg.qr(a.tensor.to(torch.float64), mode="r").R
    return max(best, _with_preconditioner(backend, a, r, sigma_min, rtol)[0])


def _with_preconditioner(backend: Backend, a: Operand, r: Tensor, sigma_min: float, rtol: float) -> tuple[float, float]:
    """The bound of preconditioned_smallest, 0 without one, and its alpha, inf without one, for an upper triangle R."""
    if not bool((r.diagonal() != 0).all()):
        return 0.0, math.inf
    n = r.shape[0]
    x = torch.linalg.solve_triangular(r, torch.eye(n, dtype=r.dtype, device=r.device), upper=True)
    if not bool(torch.isfinite(x).all()):
        return 0.0, math.inf
    wide = a.tensor.to(torch.float64)
    sizes = float(torch.linalg.vector_norm(wide)), float(torch.linalg.vector_norm(x))
    chunks = chunks_on(wide.device)
    k = min(chunk_for(n, sizes[0] * sizes[1], rtol / 16, chunks), n)
    c = wide.new_zeros(wide.shape)
    for j in range(0, n, k):  # X is upper triangular: row j is zero left of column j
        c[:, j:] += wide[:, j : j + k] @ x[j : j + k, j:]
    h = gamma(k + math.ceil(n / k) + 1)
    distance = (h * sizes[0] * sizes[1] + TINY) * OUT
    image = gram_with_error(backend, Operand(c, 0, True, 1.0), chunk_for(len(c), n, rtol / 16, chunks))
    image.lower.diagonal().sub_(1.0)
    defect = torch.tril(image.lower)
    alpha = (math.sqrt(2) * float(torch.linalg.vector_norm(defect)) + image.error + 4 * U * n) * OUT
    if not alpha < 1:
        return 0.0, math.inf
    smallest = math.sqrt(1 - alpha) * (1 - 4 * U) - distance
    if not smallest > 0:
        return 0.0, alpha
    chunk = chunk_for(n, sizes[1] ** 2, rtol / 16 / sigma_min**2, chunks)
    product = gram_with_error(backend, Operand(x, 0, True, 1.0), chunk)
    return smallest / norm_bound(backend, product, 1 / sigma_min, rtol) * (1 - 4 * U), alpha
