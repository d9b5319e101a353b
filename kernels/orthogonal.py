"""Orthonormal bases of the packed blocks of a wave, by Cholesky factors of their 16 x 16 inner products, float64.

One pass maps W to Q = W T, where T is the inverse of the factor of W^T W. Its loss of orthogonality is the square of
the condition of W, so a pivot that may be only rounding error is raised to TAU, which shrinks the column instead of
filling it with noise, and a second and a third pass restore orthogonality (Fukaya et al., SIAM J. Sci. Comput. 42
(2020), here with the shift only on pivots that need it). The largest pivot comes first, since columns that are nearly
dependent carry rounding errors of large cancelling terms, which must not spread to other columns. A direction of which
no column of W has more than a limit is left out: its column of Q and its row of the coupling B of W = Q B are zero. The
host reads nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .panel import Rows, combine, inner
from .problems import Instance, Tensor

LANES = tl.constexpr(16)
TAU = tl.constexpr(1e-14)  # of a pivot of unit columns; their inner products are known to about 2e-15
PASSES = 3


@triton.jit
def _pass_kernel(gram, limits, coupling, transform, out):
    """From W^T W and the coupling so far to the T of one pass and the coupling after it, one program per block."""
    member = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, LANES)
    place = member * LANES * LANES + i[:, None] * LANES + i[None, :]
    g = tl.load(gram + place)
    squares = tl.sum(tl.where(i[:, None] == i[None, :], g, 0.0), axis=1)
    sound = (squares > 0.0) & (squares < float("inf"))
    lengths = tl.sqrt(tl.where(sound, squares, 1.0))
    rest = tl.where(sound[:, None] & sound[None, :], g / lengths[:, None] / lengths[None, :], 0.0)
    factor = tl.zeros((LANES, LANES), tl.float64)  # column p belongs to pivot p
    turn = tl.where(sound, LANES, -1)  # when a column was the pivot
    for k in range(0, LANES):
        remaining = tl.sum(tl.where(i[:, None] == i[None, :], rest, 0.0), axis=1)
        heights = tl.where(turn == LANES, remaining * lengths * lengths, -1e300)
        p = tl.min(
            tl.where((heights == tl.max(heights, axis=0)) & (turn == LANES), i, LANES), axis=0
        )  # LANES: none left
        column = tl.sum(tl.where(i[None, :] == p, rest, 0.0), axis=1)
        pivot = tl.sum(tl.where(i == p, remaining, 0.0), axis=0)
        root = tl.sqrt(tl.maximum(pivot, TAU))
        # An unresolved column meets the others again in the next pass, when it is long enough to be told from noise.
        others = tl.where(pivot > TAU, 1.0, 0.0) * tl.where(turn == LANES, column / root, 0.0)
        line = tl.where(i == p, root, others)
        line = tl.where(p < LANES, line, 0.0)
        factor = tl.where(i[None, :] == p, line[:, None], factor)
        rest -= line[:, None] * line[None, :]
        turn = tl.where(i == p, k, turn)
    after = tl.zeros((LANES, LANES), tl.float64)
    for k in range(0, LANES):
        left = tl.sum(tl.where(i[:, None] == k, factor, 0.0), axis=0)  # row k of the factor, column k of R
        length = tl.sum(tl.where(i == k, lengths, 0.0), axis=0)
        after += left[:, None] * (length * tl.load(coupling + member * LANES * LANES + k * LANES + i))[None, :]
    reached = tl.sqrt(tl.sum(after * after, axis=1))
    kept = sound & (reached > tl.load(limits + member)) & (reached < float("inf"))
    tl.store(out + place, tl.where(kept[:, None], after, 0.0))
    # Forward substitution on the identity, in the order of the pivots.
    inverse = tl.where((i[:, None] == i[None, :]) & sound[:, None], 1.0, 0.0).to(tl.float64)
    for k in range(0, LANES):
        now = turn == k
        below = tl.sum(tl.where(now[None, :], factor, 0.0), axis=1)
        corner = tl.sum(tl.where(now, below, 0.0), axis=0)
        line = tl.sum(tl.where(now[:, None], inverse, 0.0), axis=0) / tl.where(corner > 0.0, corner, 1.0)
        inverse = tl.where(now[:, None], line[None, :], inverse)
        inverse -= tl.where(turn > k, below, 0.0)[:, None] * line[None, :]
    tl.store(transform + place, tl.where(kept[None, :], tl.trans(inverse), 0.0) / lengths[:, None])


def one_pass(rows: Rows, blocks: Tensor, limits: Tensor, coupling: Tensor) -> tuple[Tensor, Tensor]:
    """Q and the coupling after one pass: blocks (rows, 16), limits (members,), coupling (members, 16, 16)."""
    gram = inner(rows, blocks, blocks)
    transform, after = torch.empty_like(coupling), torch.empty_like(coupling)
    launch(_pass_kernel, (rows.members,), gram, limits, coupling, transform, after, num_warps=1)
    return combine(rows, blocks, transform), after


def identities(members: int, device: torch.device) -> Tensor:
    """(members, 16, 16): the coupling before the first pass."""
    return torch.eye(LANES.value, dtype=torch.float64, device=device).repeat(members, 1, 1)


def orthonormalized(rows: Rows, blocks: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Q (rows, 16) and B (members, 16, 16) with W = Q B; directions at or below ``limits`` (members,) are left out.

    blocks (rows, 16) float64, row-major; columns of zeros stay zero. 4 launches a pass, three passes.
    """
    coupling = identities(rows.members, blocks.device)
    for _ in range(PASSES):
        blocks, coupling = one_pass(rows, blocks, limits, coupling)
    return blocks, coupling


def instances(target: str) -> list[Instance]:
    """Everything that the launchers of this file can ask the compiler for; the same for every target."""
    names = ("gram", "limits", "coupling", "transform", "out")
    return [Instance(_pass_kernel, dict.fromkeys(names, "*fp64"), {}, 1)]
