"""Start blocks of block Krylov methods on the device: a digest of every matrix, and Gaussian blocks drawn from it.

Whoever writes the weights must not know the start blocks, since extreme singular vectors can be hidden from known
blocks; so they are drawn from the content. A cryptographic hash of every byte would take longer than all other steps,
and weights are not copied to the host. So the entries of every column are chained, 32 bits at a time, through a 64-bit
permutation with feed-forward, and the host hashes the results. docs/numerics.md says how strong this is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import launch
from .panel import ROWS as PANEL_ROWS
from .panel import Rows
from .problems import (
    COLUMN_STRIDE,
    COLUMNS,
    FIRST_COLUMN,
    POINTER,
    ROW_STRIDE,
    ROWS,
    Instance,
    Problems,
    Storage,
    Tensor,
    field,
    locate,
    starts_of,
    storages,
    to_device,
)

STRIPE = tl.constexpr(2048)  # rows per program
BM = tl.constexpr(16)
BN = tl.constexpr(128)
LANES = tl.constexpr(16)  # columns of a start block
WARPS = 4
_WORDS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32}


@triton.jit
def _mixed(x):
    """A permutation of 64-bit numbers: variant 13 of D. Stafford, "Better bit mixing" (2011), that of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _chain_kernel(table, owner, first, starts, chains, WORD: tl.constexpr, BITS: tl.constexpr, INNER: tl.constexpr):
    """BM chains in each column of a stripe: one takes every BM-th entry, so that loads are wide."""
    matrix, tile = locate(owner, first)
    m, n = field(table, matrix, ROWS), field(table, matrix, COLUMNS)
    across = tl.cdiv(n, BN)
    column, stripe = (tile % across) * BN, tile // across
    row_stride = 1 if INNER == 0 else field(table, matrix, ROW_STRIDE)
    column_stride = 1 if INNER == 1 else field(table, matrix, COLUMN_STRIDE)
    base = field(table, matrix, POINTER).to(tl.pointer_type(WORD))
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    rows, columns = stripe * STRIPE + i, column + j
    places = base + rows * row_stride + columns * column_stride
    stop = tl.minimum((stripe + 1) * STRIPE, m)
    state = _mixed((i * BN + j + 1).to(tl.uint64))
    PACKED: tl.constexpr = 32 // BITS
    for _ in range(0, (stop - stripe * STRIPE).to(tl.int32), BM * PACKED):
        word = tl.zeros((BM, BN), tl.uint64)
        for part in tl.static_range(PACKED):
            raw = tl.load(places, mask=(rows < stop) & (columns < n), other=0)
            word |= raw.to(tl.uint64) << (part * BITS)
            places += BM * row_stride
            rows += BM
        state = _absorbed(state, word)
    target = chains + tl.load(starts + matrix) + (stripe * BM + i) * n + columns
    tl.store(target, state.to(tl.int64, bitcast=True), mask=columns < n)


@triton.jit
def _absorbed(state, word):
    """The state after another 32 bits. Without the sum a chain could be inverted from its end."""
    return _mixed(state ^ word) + state


@triton.jit
def _fold_kernel(table, owner, first, starts, chains, out):
    """Combines the chains of every column into one."""
    matrix, tile = locate(owner, first)
    m, n = field(table, matrix, ROWS), field(table, matrix, COLUMNS)
    column = tile * BN + tl.arange(0, BN)
    places = chains + tl.load(starts + matrix) + column
    state = _mixed((column + 1).to(tl.uint64))
    for _ in range(0, (tl.cdiv(m, STRIPE) * BM).to(tl.int32)):
        found = tl.load(places, mask=column < n, other=0).to(tl.uint64, bitcast=True)
        state = _absorbed(_absorbed(state, found & 0xFFFFFFFF), found >> 32)
        places += n
    target = out + field(table, matrix, FIRST_COLUMN) + column
    tl.store(target, state.to(tl.int64, bitcast=True), mask=column < n)


@triton.jit
def _gaussian_kernel(start, stop, owner, first, keys, out):
    tile = tl.program_id(0)
    member = tl.load(owner + tile)
    begin, end = tl.load(start + member), tl.load(stop + member)
    row = (tile - tl.load(first + member)) * PANEL_ROWS + tl.arange(0, PANEL_ROWS)[:, None]
    column = tl.arange(0, LANES)[None, :]
    first_bits, second_bits, _, _ = tl.randint4x(tl.load(keys + member), row * LANES + column)
    radius = tl.sqrt(-2.0 * tl.log((first_bits.to(tl.uint32, bitcast=True).to(tl.float64) + 0.5) * 2.0**-32))
    angle = second_bits.to(tl.float64) * (2.0 * 3.141592653589793 * 2.0**-32)  # signed, so in [-pi, pi)
    tl.store(out + (begin + row) * LANES + column, radius * tl.cos(angle), mask=begin + row < end)


def column_digests(problems: Problems) -> Tensor:
    """64 bits of every column of every matrix, (columns,) int64 on the device.

    They depend on the entries as they are stored, bit by bit, and on their places; not on strides, addresses or other
    matrices. One launch for every size of an entry and direction, and one more.
    """
    stripes = -(-problems.m // STRIPE.value)
    starts, total = starts_of(stripes * BM.value * problems.n)
    moved = to_device(starts, problems.device)
    chains = torch.empty(total, dtype=torch.int64, device=problems.device)
    across = -(-problems.n // BN.value)
    for key, chosen in _classes(problems).items():
        tiles = problems.tiles(across * stripes, chosen)
        places = (problems.table, tiles.owner, tiles.first, moved, chains)
        launch(_chain_kernel, (tiles.total,), *places, num_warps=WARPS, **_options(*key))
    out = torch.empty(problems.columns, dtype=torch.int64, device=problems.device)
    tiles = problems.tiles(across)
    places = (problems.table, tiles.owner, tiles.first, moved, chains)
    launch(_fold_kernel, (tiles.total,), *places, out, num_warps=WARPS)
    return out


def gaussian_blocks(rows: Rows, keys: Sequence[int]) -> Tensor:
    """Standard Gaussian blocks (rows, 16), float64, each drawn from a key of 64 bits (signed). One launch.

    Philox of the key, with the place in the block as its counter (J. Salmon et al., SC 2011), and the transform of Box
    and Muller (1958) in float64, from 32 bits each.
    """
    moved = to_device(torch.tensor(list(keys), dtype=torch.int64, device="cpu"), rows.start.device)
    out = torch.empty((rows.total, LANES.value), dtype=torch.float64, device=rows.start.device)
    launch(
        _gaussian_kernel,
        (rows.tiles,),
        rows.start,
        rows.stop,
        rows.tile_owner,
        rows.tile_first,
        moved,
        out,
        num_warps=WARPS,
    )
    return out


def _classes(problems: Problems) -> dict[tuple[int, int], list[int]]:
    """Positions of the matrices by size of an entry and contiguous direction."""
    found: dict[tuple[int, int], list[int]] = {}
    for storage, chosen in problems.classes().items():
        found.setdefault(_key(storage), []).extend(chosen)
    return found


def _key(storage: Storage) -> tuple[int, int]:
    return storage.dtype.itemsize, storage.inner


def _options(size: int, inner: int) -> dict[str, object]:
    return {"WORD": _WORDS[size], "BITS": 8 * size, "INNER": inner}


def instances(target: str) -> list[Instance]:
    """Everything that the launchers of this file can ask the compiler for; the same for every target."""
    maps = {"table": "*i64", "owner": "*i32", "first": "*i32", "starts": "*i64", "chains": "*i64"}
    found = [Instance(_chain_kernel, maps, _options(*key), WARPS) for key in dict.fromkeys(map(_key, storages()))]
    found.append(Instance(_fold_kernel, {**maps, "out": "*i64"}, {}, WARPS))
    rows = {"start": "*i64", "stop": "*i64", "owner": "*i32", "first": "*i32", "keys": "*i64", "out": "*fp64"}
    return [*found, Instance(_gaussian_kernel, rows, {}, WARPS)]
