"""Matrices whose condition number is known: exactly by construction, or from mpmath.

A product U diag(s) V^T formed in floating point has other singular values than s: kappa moves by about kappa n u. The
truth here is that of the stored entries. ``prescribed`` builds them from integers without any rounding, ``kappa_of``
measures any small matrix with 80 digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mpmath as mp
import torch

Tensor = torch.Tensor

EXACT_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@dataclass(frozen=True)
class Known:
    """A matrix and the condition number of its stored entries (mp.inf if it is singular)."""

    name: str
    matrix: Tensor
    kappa: mp.mpf


def singular_values(matrix: Tensor) -> list[mp.mpf]:
    """All singular values, descending, of a small matrix (up to about 40 columns), to an absolute 1e-78 sigma_1."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    with mp.workdps(80):
        values = mp.svd_r(mp.matrix(tall.double().tolist()), compute_uv=False)
        return sorted((mp.mpf(x) for x in values), reverse=True)


def kappa_of(matrix: Tensor) -> mp.mpf:
    """The condition number of the stored entries; mp.inf where the matrix is singular."""
    values = singular_values(matrix)
    with mp.workdps(80):
        return values[0] / values[-1] if values[-1] > mp.mpf("1e-70") * values[0] else mp.inf


def contains(lower: float, kappa: mp.mpf, upper: float) -> bool:
    """Whether lower <= kappa <= upper, compared without rounding."""
    with mp.workdps(80):
        return bool(mp.mpf(lower) <= kappa <= mp.mpf(upper))


def hadamard(n: int) -> Tensor | None:
    """A matrix of ones and minus ones with orthogonal columns, int64 (n, n), or None where none is built here.

    Sylvester's doubling, and Paley's construction for n - 1 a prime that leaves 3 modulo 4.
    """
    if n == 1:
        return torch.ones((1, 1), dtype=torch.int64)
    q = n - 1
    if q % 4 == 3 and all(q % p for p in range(2, math.isqrt(q) + 1)):
        squares = {x * x % q for x in range(1, q)}
        residue = torch.tensor([0] + [1 if x in squares else -1 for x in range(1, q)])
        index = torch.arange(q)
        skew = torch.zeros((n, n), dtype=torch.int64)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = residue[(index[:, None] - index[None]) % q]
        return skew + torch.eye(n, dtype=torch.int64)
    half = hadamard(n // 2) if n % 2 == 0 else None
    return None if half is None else torch.kron(torch.tensor([[1, 1], [1, -1]]), half)


def mixing(n: int, generator: torch.Generator) -> Tensor:
    """A random integer matrix with orthogonal columns of equal length, int64 (n, n).

    A shuffled Hadamard matrix where there is one, else the reflection n I - 2 v v^T with v of ones and minus ones.
    """
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    base = hadamard(n)
    if base is None:
        base = n * torch.eye(n, dtype=torch.int64) - 2 * torch.outer(signs, signs)
    return signs[:, None] * base[torch.randperm(n, generator=generator)][:, torch.randperm(n, generator=generator)]


def _geometric(n: int, kappa: float, _: torch.Generator) -> Tensor:
    return kappa ** -torch.linspace(0, 1, n, dtype=torch.float64)


def _arithmetic(n: int, kappa: float, _: torch.Generator) -> Tensor:
    return torch.linspace(1, 1 / kappa, n, dtype=torch.float64)


def _one_small(n: int, kappa: float, _: torch.Generator) -> Tensor:
    values = torch.ones(n, dtype=torch.float64)
    values[-1] = 1 / kappa
    return values


def _one_large(n: int, kappa: float, _: torch.Generator) -> Tensor:
    values = torch.full((n,), 1 / kappa, dtype=torch.float64)
    values[0] = 1
    return values


def _clustered(n: int, kappa: float, generator: torch.Generator) -> Tensor:
    # Two clusters of relative width 1e-3, one at each end, and the smallest value a little below its cluster.
    widths = 1 + 1e-3 * torch.rand(n, generator=generator, dtype=torch.float64)
    values = widths / 1.001
    values[n // 2 :] = widths[n // 2 :] * 1.02 / kappa
    values[0], values[-1] = 1, 1 / kappa
    return values


def _log_uniform(n: int, kappa: float, generator: torch.Generator) -> Tensor:
    values = kappa ** -torch.rand(n, generator=generator, dtype=torch.float64)
    values[0], values[-1] = 1, 1 / kappa
    return values


SPECTRA: dict[str, Callable[[int, float, torch.Generator], Tensor]] = {
    "geometric": _geometric,
    "arithmetic": _arithmetic,
    "one small": _one_small,
    "one large": _one_large,
    "clustered": _clustered,
    "log-uniform": _log_uniform,
}


def prescribed(
    spectrum: str, m: int, n: int, kappa: float, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Known:
    """A dense (m, n) matrix, m >= n, with the spectrum of that name and a condition number near ``kappa``.

    The singular values are integers times one common factor and every entry is an integer that ``dtype`` holds, so
    that the stored matrix has exactly the condition number that is returned. Where ``dtype`` cannot span ``kappa``, the
    smallest value is 1 and kappa the largest possible.
    """
    generator = torch.Generator().manual_seed(seed)
    left, right = mixing(m, generator)[:, :n], mixing(n, generator)
    values = SPECTRA[spectrum](n, kappa, generator)
    room = 2.0 ** EXACT_BITS[dtype] / float(left.abs().max() * right.abs().max()) - n
    integers = (values * (room / values.sum())).long().clamp_min(1)
    entries = (left * integers).double() @ right.T.double()  # exact: no partial sum exceeds 2^53
    matrix = entries.to(dtype)
    assert torch.equal(matrix.double(), entries), f"{dtype} cannot hold this spectrum"
    exact = mp.mpf(int(integers.max())) / int(integers.min())
    return Known(f"{spectrum} {m}x{n} {kappa:.0e} {str(dtype).removeprefix('torch.')}", matrix, exact)


def hilbert(n: int) -> Tensor:
    """Entries 1 / (i + j - 1): kappa grows like e^(3.5 n)."""
    index = torch.arange(1, n + 1, dtype=torch.float64)
    return 1 / (index[:, None] + index[None] - 1)


def kahan(n: int, theta: float = 1.2) -> Tensor:
    """Kahan's triangular matrix, whose smallest singular value no diagonal entry of R shows."""
    powers = math.sin(theta) ** torch.arange(n, dtype=torch.float64)
    return powers[:, None] * (torch.eye(n, dtype=torch.float64) - math.cos(theta) * torch.ones(n, n).triu(1).double())


def vandermonde(m: int, n: int) -> Tensor:
    """Monomials on equidistant points of [-1, 1]."""
    return torch.linspace(-1, 1, m, dtype=torch.float64)[:, None] ** torch.arange(n)


def cosines(n: int) -> Tensor:
    """The discrete cosine transform: orthogonal up to rounding, and hard on the rounding of an SVD."""
    index = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * index[:, None] + 1) * index[None] / (2 * n)) * math.sqrt(2 / n)
    matrix[:, 0] /= math.sqrt(2)
    return matrix


def growing(n: int) -> Tensor:
    """Wilkinson's matrix, for whose transpose partial pivoting lets the entries of U grow to 2^(n-1): LU takes that."""
    matrix = torch.eye(n, dtype=torch.float64) - torch.ones(n, n).tril(-1).double()
    matrix[:, -1] = 1
    return matrix.T.contiguous()


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    """Independent standard normal entries, float64."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graded(m: int, n: int, rows: float, columns: float, seed: int = 0) -> Tensor:
    """A Gaussian matrix whose rows and columns shrink by factors of ``rows`` and ``columns`` from first to last."""
    left = rows ** -torch.linspace(0, 1, m, dtype=torch.float64)
    right = columns ** -torch.linspace(0, 1, n, dtype=torch.float64)
    return left[:, None] * gaussian(m, n, seed) * right


def trained_like(m: int, n: int, seed: int = 0) -> Tensor:
    """Random weights of size 0.02 with a decaying spectrum of outliers, as training leaves them, float64."""
    rank = max(1, min(m, n) // 16)
    left, right = torch.linalg.qr(gaussian(m, rank, seed + 1)).Q, torch.linalg.qr(gaussian(n, rank, seed + 2)).Q
    scale = 0.02 * (math.sqrt(m) + math.sqrt(n))
    outliers = 6 * scale * torch.arange(1, rank + 1, dtype=torch.float64) ** -0.7
    return 0.02 * gaussian(m, n, seed) + (left * outliers) @ right.T


def _with(matrix: Tensor, column: int, value: Tensor | float) -> Tensor:
    matrix[:, column] = value
    return matrix


CLASSICS: dict[str, Callable[[], Tensor]] = {
    "hilbert 3": lambda: hilbert(3),
    "hilbert 8": lambda: hilbert(8),
    "hilbert 11": lambda: hilbert(11),
    "hilbert 33": lambda: hilbert(33),
    "kahan 16": lambda: kahan(16),
    "kahan 34": lambda: kahan(34),
    "kahan 36, 0.9": lambda: kahan(36, 0.9),
    "vandermonde 12": lambda: vandermonde(12, 12),
    "vandermonde 40x33": lambda: vandermonde(40, 33),
    "cosines 25": lambda: cosines(25),
    "cosines 34": lambda: cosines(34),
    "growing 24": lambda: growing(24),
    "growing 36": lambda: growing(36),
    "graded rows": lambda: graded(34, 33, 1e12, 1),
    "graded rows, tall": lambda: graded(60, 33, 1e9, 1),
    "graded columns": lambda: graded(40, 33, 1, 1e10),
    "graded columns, square": lambda: graded(34, 34, 1, 1e14),
    "graded both ways": lambda: graded(35, 35, 1e5, 1e5),
    "two equal rows, tall": lambda: torch.cat([gaussian(34, 33), gaussian(34, 33)]),
    "constant plus noise": lambda: 1 + 1e-9 * gaussian(40, 33),
    "nearly equal columns": lambda: _with(gaussian(40, 33), 32, (gaussian(40, 33) + 1e-9 * gaussian(40, 33, 5))[:, 0]),
}

SINGULAR: dict[str, Callable[[], Tensor]] = {
    "zero": lambda: torch.zeros(36, 34, dtype=torch.float64),
    "constant": lambda: torch.full((36, 34), 0.1, dtype=torch.float64),
    "rank one": lambda: torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 5.0)).double(),
    "rank 9 of 34": lambda: gaussian(40, 9).mul(8).round() @ gaussian(9, 34, 1).mul(8).round(),
    "rank 33 of 34": lambda: gaussian(34, 33).mul(8).round() @ gaussian(33, 34, 1).mul(8).round(),
    "two equal columns": lambda: _with(gaussian(20, 12), 5, gaussian(20, 12)[:, 2]),
    "two equal columns, wave": lambda: _with(gaussian(200, 64), 5, gaussian(200, 64)[:, 2]),
    "a zero column": lambda: _with(gaussian(40, 36), 7, 0.0),
    "a zero row of a square matrix": lambda: _with(gaussian(48, 48), 7, 0.0).T,
    "two equal rows of a square matrix": lambda: _with(gaussian(36, 36), 3, gaussian(36, 36)[:, 30]).T,
}


@cache
def classic(name: str) -> Known:
    """One of CLASSICS, which have broken numerical software before, with its truth from mpmath (up to 0.3 s)."""
    matrix = CLASSICS[name]()
    return Known(name, matrix, kappa_of(matrix))
