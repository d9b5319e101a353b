"""Small eigenproblems of a wave: the projected operators T of block Krylov spaces, block tridiagonal, 16 x 16 blocks.

    T = [A_1 U_1          ]      D_1 = lambda - A_1,   D_j = lambda - A_j - U_(j-1)^T D_(j-1)^-1 U_(j-1)
        [U_1^T A_2 U_2    ]      F_1 = I,              F_j = U_(j-1)^T D_(j-1)^-1 F_(j-1)
        [     ...      A_J]      last block row of (lambda - T)^-1 E_1 = D_J^-1 F_J

lambda lies above the spectrum of T exactly if every D_j is positive definite, which the pivots of its inversion show.
So multisection finds the largest eigenvalue, and the last line gives the bound of spectrum/bounds.py. Libraries
decompose matrices of more than 32 columns one after the other; these kernels take 2 values of lambda per program and
any number of matrices. Entries of T beyond its three block diagonals are rounding errors of the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import launch
from .orthogonal import orthonormalized
from .panel import Rows, combine, inner
from .problems import INTERPRETED, Instance, Tensor

SIDE = tl.constexpr(16)
# Values of lambda per program of one warp, whose sums need no barrier: four warps for 8 values wait for each other 19
# times in every step of a sweep, and 4 values spill (Triton 3.7.1, sm_90). The interpreter would rather have more.
POINTS = 32 if INTERPRETED else 2
SECTIONS = 12 if INTERPRETED else 34  # at most: an interval of 48 eigenvalues takes 9, or 27, and rounding a few more
ACCURACY = tl.constexpr(2e-11)  # of the largest eigenvalue
SHIFTS = (1e-2, 1e-4, 1e-7)  # relative distances from the largest eigenvalue of the inverse iteration, in turn


@dataclass(frozen=True)
class Tridiagonal:
    """diagonal (w, J, 16, 16), symmetric; upper (w, J, 16, 16), the last one unused; coupling (w, 16, 16). float64."""

    diagonal: Tensor
    upper: Tensor
    coupling: Tensor

    @classmethod
    def of(cls, columns: Sequence[Tensor], coupling: Tensor) -> Tridiagonal:
        """From block columns (w, (j + 1) 16, 16) of T from the top down to the diagonal; its upper triangle counts."""
        half = torch.triu(torch.stack([column[:, -SIDE.value :] for column in columns], dim=1))
        diagonal = half + torch.triu(half, 1).mT
        above = [column[:, -2 * SIDE.value : -SIDE.value] for column in columns[1:]]
        upper = torch.stack([*above, torch.zeros_like(coupling)], dim=1)
        return cls(diagonal.contiguous(), upper.contiguous(), coupling.contiguous())

    @property
    def members(self) -> int:
        return self.diagonal.shape[0]

    @property
    def blocks(self) -> int:
        return self.diagonal.shape[1]


@triton.jit
def _negative_inverse(d, k_of, positive):
    """-D^-1 of symmetric [P, SIDE, SIDE] by sweeps, zeros if a pivot is not positive; and (P,) whether all are."""
    i, j = k_of[None, :, None], k_of[None, None, :]
    for k in range(0, SIDE):
        row = tl.sum(tl.where(i == k, d, 0.0), axis=1)  # [P, SIDE]
        pivot = tl.sum(tl.where(k_of[None, :] == k, row, 0.0), axis=1)
        positive = tl.where(pivot > 0.0, positive, 0.0)
        swept = tl.where(k_of[None, :] == k, -1.0, row)
        scaled = swept / tl.where(pivot > 0.0, pivot, 1.0)[:, None]
        d = tl.where((i == k) | (j == k), 0.0, d) - swept[:, :, None] * scaled[:, None, :]
        d = tl.where(positive[:, None, None] > 0.0, d, 0.0)  # after a failure the numbers would overflow
    return d, positive


@triton.jit
def _times(symmetric, block, k_of, P: tl.constexpr):
    """[P, SIDE, SIDE] times the SIDE x SIDE numbers at ``block``."""
    total = tl.zeros((P, SIDE, SIDE), tl.float64)
    for k in range(0, SIDE):
        column = tl.sum(tl.where(k_of[None, :, None] == k, symmetric, 0.0), axis=1)
        total += column[:, :, None] * tl.load(block + k * SIDE + k_of)[None, None, :]
    return total


@triton.jit
def _transposed_times(block, x, k_of, P: tl.constexpr):
    """The transpose of the SIDE x SIDE numbers at ``block`` times [P, SIDE, SIDE]."""
    total = tl.zeros((P, SIDE, SIDE), tl.float64)
    for k in range(0, SIDE):
        row = tl.sum(tl.where(k_of[None, :, None] == k, x, 0.0), axis=1)
        total += tl.load(block + k * SIDE + k_of)[None, :, None] * row[:, None, :]
    return total


@triton.jit
def _product(x, y, k_of, P: tl.constexpr):
    """X Y of two [P, SIDE, SIDE], X symmetric."""
    total = tl.zeros((P, SIDE, SIDE), tl.float64)
    for k in range(0, SIDE):
        column = tl.sum(tl.where(k_of[None, :, None] == k, x, 0.0), axis=1)
        row = tl.sum(tl.where(k_of[None, :, None] == k, y, 0.0), axis=1)
        total += column[:, :, None] * row[:, None, :]
    return total


@triton.jit
def _is_above(diagonal, upper, blocks, values, P: tl.constexpr):
    """1.0 where a value (P,) lies above the spectrum of the T that starts at ``diagonal`` and ``upper``, else 0.0."""
    k_of = tl.arange(0, SIDE)
    identity = tl.where(k_of[:, None] == k_of[None, :], 1.0, 0.0).to(tl.float64)
    place = k_of[:, None] * SIDE + k_of[None, :]
    positive = values * 0.0 + 1.0
    d = values[:, None, None] * identity[None, :, :] - tl.load(diagonal + place)[None, :, :]
    for j in range(1, blocks + 1):
        d, positive = _negative_inverse(d, k_of, positive)
        if j < blocks:
            above = upper + (j - 1) * SIDE * SIDE
            carried = _transposed_times(above, _times(d, above, k_of, P), k_of, P)  # negative already
            next_one = tl.load(diagonal + j * SIDE * SIDE + place)
            d = values[:, None, None] * identity[None, :, :] - next_one[None, :, :] + carried
    return positive


@triton.jit(do_not_specialize=["blocks"])
def _largest_kernel(diagonal, upper, brackets, blocks, out, P: tl.constexpr, TIMES: tl.constexpr):
    """An upper bound of the largest eigenvalue, to within the last section, one program per matrix."""
    member = tl.program_id(0).to(tl.int64)
    diagonal += member * blocks * SIDE * SIDE
    upper += member * blocks * SIDE * SIDE
    low, high = tl.load(brackets + 2 * member), tl.load(brackets + 2 * member + 1)
    point = (tl.arange(0, P) + 1).to(tl.float64)
    # First by powers of two, from 2^-38 of the interval on, since the eigenvalue is often close to the lower end.
    fractions = tl.exp2((point - P - 1) * (38.0 / P))
    turn = 0
    while (high - low > high * ACCURACY) & (turn < TIMES):
        values = low + (high - low) * fractions
        above = _is_above(diagonal, upper, blocks, values, P)
        low = tl.maximum(low, tl.max(tl.where(above > 0.0, low, values), axis=0))
        high = tl.minimum(high, tl.min(tl.where(values > low, values, high), axis=0))
        fractions = point / (P + 1)
        turn += 1
    tl.store(out + member, high)


@triton.jit(do_not_specialize=["blocks", "count"])
def _reach_kernel(diagonal, upper, coupling, values, blocks, count, out, P: tl.constexpr):
    """||B D_J^-1 F_J||_F for P values of lambda per program; nan where lambda is not above the spectrum."""
    member = tl.program_id(0).to(tl.int64)
    diagonal += member * blocks * SIDE * SIDE
    upper += member * blocks * SIDE * SIDE
    point = tl.program_id(1) * P + tl.arange(0, P)
    value = tl.load(values + member * count + tl.minimum(point, count - 1))
    k_of = tl.arange(0, SIDE)
    identity = tl.where(k_of[:, None] == k_of[None, :], 1.0, 0.0).to(tl.float64)
    place = k_of[:, None] * SIDE + k_of[None, :]
    positive = value * 0.0 + 1.0
    d = value[:, None, None] * identity[None, :, :] - tl.load(diagonal + place)[None, :, :]
    f = identity[None, :, :] + 0.0 * d
    for j in range(1, blocks + 1):
        d, positive = _negative_inverse(d, k_of, positive)
        f = -_product(d, f, k_of, P)
        if j < blocks:
            above = upper + (j - 1) * SIDE * SIDE
            f = _transposed_times(above, f, k_of, P)
            carried = _transposed_times(above, _times(d, above, k_of, P), k_of, P)
            next_one = tl.load(diagonal + j * SIDE * SIDE + place)
            d = value[:, None, None] * identity[None, :, :] - next_one[None, :, :] + carried
    total = tl.zeros((P, SIDE, SIDE), tl.float64)
    for k in range(0, SIDE):
        column = tl.load(coupling + member * SIDE * SIDE + k_of * SIDE + k)
        row = tl.sum(tl.where(k_of[None, :, None] == k, f, 0.0), axis=1)
        total += column[None, :, None] * row[:, None, :]
    norm = tl.sqrt(tl.sum(tl.sum(total * total, axis=2), axis=1))
    norm = tl.where(positive > 0.0, norm, float("nan"))
    tl.store(out + member * count + point, norm, mask=point < count)


@triton.jit(do_not_specialize=["blocks"])
def _shifted_solve_kernel(diagonal, upper, shifts, x, inverses, blocks):
    """X <- (lambda - T)^-1 X for X (16 J, 16) and lambda above the spectrum, one program per matrix."""
    member = tl.program_id(0).to(tl.int64)
    start = member * blocks * SIDE * SIDE
    shift = tl.load(shifts + member)
    k_of = tl.arange(0, SIDE)
    identity = tl.where(k_of[:, None] == k_of[None, :], 1.0, 0.0).to(tl.float64)
    place = k_of[:, None] * SIDE + k_of[None, :]
    positive = tl.zeros((1,), tl.float64) + 1.0
    f = tl.load(x + start + place)[None, :, :]
    d = (shift * identity - tl.load(diagonal + start + place))[None, :, :]
    for j in range(1, blocks + 1):
        here = start + (j - 1) * SIDE * SIDE
        d, positive = _negative_inverse(d, k_of, positive)
        tl.store(inverses + here + place, tl.reshape(d, (SIDE, SIDE)))
        f = -_product(d, f, k_of, 1)
        tl.store(x + here + place, tl.reshape(f, (SIDE, SIDE)))
        if j < blocks:
            above = upper + here
            f = tl.load(x + here + SIDE * SIDE + place)[None, :, :] + _transposed_times(above, f, k_of, 1)
            carried = _transposed_times(above, _times(d, above, k_of, 1), k_of, 1)
            d = (shift * identity - tl.load(diagonal + here + SIDE * SIDE + place))[None, :, :] + carried
    tl.debug_barrier()  # what follows reads what other threads of this program have written
    for back in range(1, blocks):
        here = start + (blocks - 1 - back) * SIDE * SIDE
        # x_j = D_j^-1 (f_j + U_j x_(j+1)), of which the first half is stored already.
        moved = tl.zeros((1, SIDE, SIDE), tl.float64)
        for k in range(0, SIDE):
            row = tl.sum(tl.where(k_of[None, :, None] == k, f, 0.0), axis=1)
            moved += tl.load(upper + here + k_of * SIDE + k)[None, :, None] * row[:, None, :]
        d = tl.load(inverses + here + place)[None, :, :]
        f = tl.load(x + here + place)[None, :, :] - _product(d, moved, k_of, 1)
        tl.store(x + here + place, tl.reshape(f, (SIDE, SIDE)))


@triton.jit(do_not_specialize=["blocks"])
def _apply_kernel(diagonal, upper, x, out, blocks):
    """T X for X (16 J, 16), a program per block row."""
    member, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    here = (member * blocks + j) * SIDE * SIDE
    k_of = tl.arange(0, SIDE)
    total = tl.zeros((SIDE, SIDE), tl.float64)
    for k in range(0, SIDE):
        column = tl.load(diagonal + here + k_of * SIDE + k)
        total += column[:, None] * tl.load(x + here + k * SIDE + k_of)[None, :]
        if j > 0:
            left = tl.load(upper + here - SIDE * SIDE + k * SIDE + k_of)
            total += left[:, None] * tl.load(x + here - SIDE * SIDE + k * SIDE + k_of)[None, :]
        if j < blocks - 1:
            right = tl.load(upper + here + k_of * SIDE + k)
            total += right[:, None] * tl.load(x + here + SIDE * SIDE + k * SIDE + k_of)[None, :]
    tl.store(out + here + k_of[:, None] * SIDE + k_of[None, :], total)


def largest_eigenvalue(t: Tridiagonal, floor: Tensor | None = None) -> Tensor:
    """Upper bounds of the largest eigenvalues, (w,) float64, to a relative 1e-10; nan where T is not finite or <= 0.

    floor (w,): the result of an earlier call for a leading part of T, whose largest eigenvalue is no larger; nan where
    there is none. One launch. J blocks cost J inversions of a 16 x 16 matrix for 2 values at a time: 27 times without a
    floor, 15 times with a floor within 1e-4, 3 times with one within 1e-10.
    """
    low = t.diagonal.diagonal(dim1=2, dim2=3).amax(dim=(1, 2))
    if floor is not None:  # an upper bound itself, by twice ACCURACY at most
        low = torch.fmax(low, floor * (1 - 2 * ACCURACY.value))
    size = torch.maximum(t.diagonal.abs().amax(dim=(1, 2, 3)), t.upper.abs().amax(dim=(1, 2, 3)))
    sound = torch.isfinite(size) & (low > 0)
    # The norm of a block is at most 16 times its largest entry, and a block row has three blocks.
    high = 3 * SIDE.value * 1.001 * size
    brackets = torch.where(sound[:, None], torch.stack([low, high], dim=1), 1.0)
    out = torch.empty_like(low)
    diagonal = torch.where(sound[:, None, None, None], t.diagonal, 0.0)
    upper = torch.where(sound[:, None, None, None], t.upper, 0.0)
    launch(
        _largest_kernel,
        (t.members,),
        diagonal,
        upper,
        brackets,
        t.blocks,
        out,
        P=POINTS,
        TIMES=SECTIONS,
        num_warps=1,
    )
    return torch.where(sound, out, torch.nan)


def reach(t: Tridiagonal, values: Tensor) -> Tensor:
    """||B E^T (lambda - T)^-1 E_1||_F for values of lambda (w, p): (w, p), nan where one is not above T. One launch."""
    out = torch.empty_like(values)
    grid = (t.members, -(-values.shape[1] // POINTS))
    launch(
        _reach_kernel,
        grid,
        t.diagonal,
        t.upper,
        t.coupling,
        values.contiguous(),
        t.blocks,
        values.shape[1],
        out,
        P=POINTS,
        num_warps=1,
    )
    return out


def leading_vectors(t: Tridiagonal, theta: Tensor) -> Tensor:
    """Orthonormal (w, 16 J, 16), vectors of the largest eigenvalues, ascending, by inverse iteration above ``theta``.

    An eigenvalue at a relative distance g below the largest and the 17th at a distance h: their vectors mix by the
    product of (s + g) / (s + h) over the SHIFTS s. The Rayleigh quotients of 16 x 16 are the library's.
    """
    w, size = t.members, SIDE.value * t.blocks
    rows = Rows.of([size] * w, theta.device)
    limits = torch.zeros_like(theta)
    x = _start(size, theta.device).repeat(w, 1)
    inverses = torch.empty_like(x)
    for distance in SHIFTS:
        shifts = torch.where(torch.isfinite(theta), theta * (1 + distance), 1.0)
        launch(_shifted_solve_kernel, (w,), t.diagonal, t.upper, shifts, x, inverses, t.blocks, num_warps=1)
        x, _ = orthonormalized(rows, x, limits)
    image = torch.empty_like(x)
    launch(_apply_kernel, (w, t.blocks), t.diagonal, t.upper, x, image, t.blocks, num_warps=1)
    _, turn = eigh_in_batches(inner(rows, x, image))
    return combine(rows, x, turn).reshape(w, size, SIDE.value)


def eigh_in_batches(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of symmetric (w, 16, 16), ascending; zeros for a matrix that is not finite.

    A single matrix is doubled to a batch, since libraries use another routine for one matrix than for many.
    """
    sound = torch.isfinite(matrices).all(dim=2).all(dim=1)
    clean = torch.where(sound[:, None, None], matrices, 0.0)
    values, vectors = torch.linalg.eigh(torch.cat([clean, torch.zeros_like(clean[:1])]))
    return values[:-1], torch.where(sound[:, None, None], vectors[:-1], 0.0)


def svd_in_batches(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, descending singular values and V of (w, b, b), b up to 16; nan for a matrix that is not finite."""
    sound = torch.isfinite(matrices).all(dim=2).all(dim=1)
    clean = torch.where(sound[:, None, None], matrices, 0.0)
    u, s, vh = torch.linalg.svd(torch.cat([clean, torch.zeros_like(clean[:1])]))
    return u[:-1], torch.where(sound[:, None], s[:-1], torch.nan), vh[:-1].mT


def _start(size: int, device: torch.device) -> Tensor:
    """(size, 16): the first 16 rows are an identity, the others have fixed pseudorandom numbers."""
    place = torch.arange(size * SIDE.value, dtype=torch.float64, device=device).reshape(size, SIDE.value)
    below = (place * 0.6180339887498949).frac() - 0.5
    return torch.eye(size, SIDE.value, dtype=torch.float64, device=device) + below


def instances(target: str) -> list[Instance]:
    """Everything that the launchers of this file can ask the compiler for; the same for every target."""
    t = {"diagonal": "*fp64", "upper": "*fp64", "blocks": "i32"}
    out = {"out": "*fp64"}
    return [
        Instance(_largest_kernel, {**t, **out, "brackets": "*fp64"}, {"P": 2, "TIMES": 34}, 1),
        Instance(_reach_kernel, {**t, **out, "coupling": "*fp64", "values": "*fp64", "count": "i32"}, {"P": 2}, 1),
        Instance(_shifted_solve_kernel, {**t, "shifts": "*fp64", "x": "*fp64", "inverses": "*fp64"}, {}, 1),
        Instance(_apply_kernel, {**t, **out, "x": "*fp64"}, {}, 1),
    ]
