"""Lower triangles of all Gram matrices of a wave in one launch, float64 results.

Two products. ``gram_of_slices``: exact integers, Q^T Q from int8 slices on the matrix units into int32, combined
in float64. ``gram_of_weights``: A^T A straight from 16-bit weights in float32; no slices to write and a quarter of the
products, at the price of rounding. docs/kernels.md has the bounds and the floor of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import launch
from .problems import (
    COLUMNS,
    FIRST_COLUMN,
    INTERPRETED,
    PAD,
    PITCH,
    SLICE,
    Expected,
    Instance,
    Problems,
    Storage,
    Tensor,
    field,
    load_tile,
    load_turned,
    locate,
    storages,
    stored,
    target_of,
    triangular,
)
from .quantize import Slices, column_shift, power_of_two
from .splits import Splits, add_parts, split_counts, store_tile, triangular_tiles
from .splits import instances as split_instances

# Products of 16-bit weights are summed by the matrix units, which truncate, over this many rows only.
FLOAT_ROWS = tl.constexpr(2048)


@dataclass(frozen=True)
class Tile:
    """side x side of a Gram matrix per program, ``depth`` rows of the weights per step: a divisor of PAD."""

    side: int
    depth: int
    num_warps: int
    num_stages: int


# By the highest slice: 1, 3, 3 or 4 accumulators of side^2 / (32 num_warps) registers per thread. Where 128 x 128 does
# not fit registers or shared memory (docs/kernels.md has the compiler's figures) 64 x 64 does, and where the fragments
# of the older instructions would spill inside the loop, steps are shorter.
_HOPPER = {1: Tile(128, 128, 8, 3), 2: Tile(128, 64, 8, 3), 3: Tile(128, 64, 8, 3), 4: Tile(64, 64, 4, 3)}
_MMA = {1: Tile(128, 64, 8, 3), 2: Tile(128, 32, 8, 4), 3: Tile(64, 64, 4, 3), 4: Tile(64, 32, 4, 3)}
_CDNA = {1: Tile(128, 64, 8, 2), 2: Tile(128, 64, 8, 2), 3: Tile(64, 64, 4, 2), 4: Tile(64, 64, 4, 2)}
SLICE_TILES = {
    "sm_80": _MMA,
    "sm_89": _MMA,
    "sm_90": _HOPPER,
    "sm_100": _MMA,
    "sm_103": _MMA,
    "sm_120": _MMA,
    "gfx942": _CDNA,
}
# Of byte_sums, by target: the tiles of the first two slices.
BYTE_TILES = {target: tiles[2] for target, tiles in SLICE_TILES.items()}
WEIGHT_TILE = Tile(128, 64, 8, 3)


@triton.jit
def _slice_tile(base, SLICE_NUMBER: tl.constexpr, slice_bytes, place):
    return tl.load(base + (SLICE_NUMBER - 1) * slice_bytes + place)


@triton.jit
def byte_sums(base, slice_bytes, pitch, r, c, n, stop, SIDE: tl.constexpr, DEPTH: tl.constexpr):
    """Sums of products of two digits of rows r and c of tiles, up to column ``stop``: of the high ones, mixed, low.

    Exact in int32 up to 32768 columns: see splits.BYTE_ROWS. ``stop`` is a multiple of DEPTH.
    """
    side, depth = tl.arange(0, SIDE), tl.arange(0, DEPTH)
    left = base + (r * SIDE).to(tl.int64) * pitch
    right = base + (c * SIDE).to(tl.int64) * pitch
    row_place = tl.minimum(side, n - 1 - r * SIDE)[:, None] * pitch + depth[None, :]
    column_place = tl.minimum(side, n - 1 - c * SIDE)[:, None] * pitch + depth[None, :]
    high = tl.zeros((SIDE, SIDE), tl.int32)
    middle = tl.zeros((SIDE, SIDE), tl.int32)
    low = tl.zeros((SIDE, SIDE), tl.int32)
    for _ in range(0, stop, DEPTH):
        r1 = _slice_tile(left, 1, slice_bytes, row_place)
        c1 = tl.trans(_slice_tile(right, 1, slice_bytes, column_place))
        r2 = _slice_tile(left, 2, slice_bytes, row_place)
        c2 = tl.trans(_slice_tile(right, 2, slice_bytes, column_place))
        high = tl.dot(r1, c1, high, out_dtype=tl.int32)
        middle = tl.dot(r1, c2, middle, out_dtype=tl.int32)
        middle = tl.dot(r2, c1, middle, out_dtype=tl.int32)
        low = tl.dot(r2, c2, low, out_dtype=tl.int32)
        left += DEPTH
        right += DEPTH
    return high, middle, low


@triton.jit
def _slices_kernel(
    table,
    owner,
    first,
    slices,
    slice_bytes: tl.int64,
    peaks,
    out,
    copy,
    parts,
    splits,
    part_start,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
):
    """Adds all products of two slices of which the higher one lies in LOW..HIGH; LOW = 1 starts from zero."""
    matrix, item = locate(owner, first)
    n = field(table, matrix, COLUMNS).to(tl.int32)
    pitch = field(table, matrix, PITCH, PAD).to(tl.int32)
    split_count = tl.load(splits + matrix)
    r, c = triangular(item // split_count)
    split = item % split_count
    share = tl.cdiv(tl.cdiv(pitch, split_count), PAD) * PAD
    start = split * share
    length = tl.minimum(share, pitch - start)
    base = slices + field(table, matrix, SLICE, PAD) + start
    side, depth = tl.arange(0, SIDE), tl.arange(0, DEPTH)
    # Past the last column the last one is read again: its products are not stored, and loads need no mask.
    left = base + (r * SIDE).to(tl.int64) * pitch
    right = base + (c * SIDE).to(tl.int64) * pitch
    row_place = tl.minimum(side, n - 1 - r * SIDE)[:, None] * pitch + depth[None, :]  # [SIDE, DEPTH]
    column_place = tl.minimum(side, n - 1 - c * SIDE)[:, None] * pitch + depth[None, :]
    a0 = tl.zeros((SIDE, SIDE), tl.int32)
    a1 = tl.zeros((SIDE, SIDE), tl.int32)
    a2 = tl.zeros((SIDE, SIDE), tl.int32)
    a3 = tl.zeros((SIDE, SIDE), tl.int32)
    for _ in range(0, length, DEPTH):
        r1 = _slice_tile(left, 1, slice_bytes, row_place)
        c1 = tl.trans(_slice_tile(right, 1, slice_bytes, column_place))
        if LOW == 1:
            a0 = tl.dot(r1, c1, a0, out_dtype=tl.int32)
            if HIGH >= 2:
                r2 = _slice_tile(left, 2, slice_bytes, row_place)
                c2 = tl.trans(_slice_tile(right, 2, slice_bytes, column_place))
                a1 = tl.dot(r1, c2, a1, out_dtype=tl.int32)
                a1 = tl.dot(r2, c1, a1, out_dtype=tl.int32)
                a2 = tl.dot(r2, c2, a2, out_dtype=tl.int32)
        else:
            rh = _slice_tile(left, HIGH, slice_bytes, row_place)
            ch = tl.trans(_slice_tile(right, HIGH, slice_bytes, column_place))
            r2 = _slice_tile(left, 2, slice_bytes, row_place)
            c2 = tl.trans(_slice_tile(right, 2, slice_bytes, column_place))
            a0 = tl.dot(r1, ch, a0, out_dtype=tl.int32)
            a0 = tl.dot(rh, c1, a0, out_dtype=tl.int32)
            a1 = tl.dot(r2, ch, a1, out_dtype=tl.int32)
            a1 = tl.dot(rh, c2, a1, out_dtype=tl.int32)
            if HIGH == 4:
                r3 = _slice_tile(left, 3, slice_bytes, row_place)
                c3 = tl.trans(_slice_tile(right, 3, slice_bytes, column_place))
                a2 = tl.dot(r3, ch, a2, out_dtype=tl.int32)
                a2 = tl.dot(rh, c3, a2, out_dtype=tl.int32)
                a3 = tl.dot(rh, ch, a3, out_dtype=tl.int32)
            else:
                a2 = tl.dot(rh, ch, a2, out_dtype=tl.int32)
        left += DEPTH
        right += DEPTH
    # The smallest weights first. Slices i and j carry the weight 2^(7 (8 - i - j)), or 2^(8 (4 - i - j)).
    if BITS == 8:
        total = a2.to(tl.float64) + a1.to(tl.float64) * 256.0 + a0.to(tl.float64) * 65536.0
    elif LOW == 1 and HIGH == 1:
        total = a0.to(tl.float64) * 4398046511104.0
    elif LOW == 1:
        total = a2.to(tl.float64) * 268435456.0 + a1.to(tl.float64) * 34359738368.0
        total += a0.to(tl.float64) * 4398046511104.0
    elif HIGH == 3:
        total = (a2.to(tl.float64) + a1.to(tl.float64) * 128.0) * 16384.0 + a0.to(tl.float64) * 268435456.0
    else:
        total = a3.to(tl.float64) + a2.to(tl.float64) * 128.0
        total += a1.to(tl.float64) * 16384.0 + a0.to(tl.float64) * 2097152.0
    rows, columns = r * SIDE + side, c * SIDE + side
    first_column = field(table, matrix, FIRST_COLUMN)
    total *= power_of_two(-column_shift(peaks, first_column + rows, rows < n, BITS))[:, None]
    total *= power_of_two(-column_shift(peaks, first_column + columns, columns < n, BITS))[None, :]
    store_tile(table, matrix, total, r, c, n, out, copy, parts, part_start, split, LOW > 1, SIDE)


@triton.jit
def _weights_kernel(
    table,
    owner,
    first,
    out,
    parts,
    splits,
    part_start,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    ELEMENT: tl.constexpr,
    INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    matrix, item = locate(owner, first)
    whole = stored(table, matrix, ELEMENT, INNER, ALIGNED)
    _, _, _, m, n = whole
    split_count = tl.load(splits + matrix)
    r, c = triangular(item // split_count)
    split = item % split_count
    share = tl.cdiv(tl.cdiv(m, split_count), FLOAT_ROWS) * FLOAT_ROWS
    start, stop = split * share, tl.minimum((split + 1) * share, m)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for block in range(start, stop, FLOAT_ROWS):
        partial = tl.zeros((SIDE, SIDE), tl.float32)
        for k in range(block, tl.minimum(block + FLOAT_ROWS, stop), DEPTH):
            x = load_turned(whole, k, r * SIDE, DEPTH, SIDE, INNER)
            y = load_tile(whole, k, c * SIDE, DEPTH, SIDE, INNER)
            if WIDEN:
                x, y = x.to(tl.float32), y.to(tl.float32)
            partial = tl.dot(x, y, partial)
        total += partial
    store_tile(table, matrix, total.to(tl.float64), r, c, n, out, None, parts, part_start, split, False, SIDE)


def gram_of_slices(
    problems: Problems, slices: Slices, out: Tensor | None = None, *, low: int = 1, copy: Tensor | None = None
) -> Tensor:
    """Q^T Q of all matrices, Q the first ``slices.count`` digits, scaled back: packed float64, see Problems.gram_views.

    ``copy``, packed float32, for two slices of 8 bits: the result once more, rounded.
    low=1 computes all products; a higher one adds the new products to the result for ``low - 1`` slices in ``out``.
    Only lower triangles are defined. Exact up to the additions of different weights, see docs/kernels.md. One launch
    for 1 or 2 slices and one for each slice more; matrices that are split along m take one more.

    Raises:
        ValueError: ``out`` is missing for low > 1.
    """
    if low > 1 and out is None:
        raise ValueError("adding slices needs the result for the earlier slices")
    if out is None:
        out = torch.empty(problems.gram_elements, dtype=torch.float64, device=problems.device)
    steps = [(1, min(slices.count, 2))] if low == 1 else []
    steps += [(high, high) for high in range(max(low, 3), slices.count + 1)]
    target = target_of(problems.device)
    for start, high in steps:
        tile = SLICE_TILES[target][high]
        shares = Splits.of(problems, tile.side, slices.bits)
        tiles = problems.tiles(triangular_tiles(problems.n, tile.side) * shares.counts)
        launch(
            _slices_kernel,
            (tiles.total,),
            problems.table,
            tiles.owner,
            tiles.first,
            slices.data,
            problems.slice_bytes,
            slices.peaks,
            out,
            copy,
            shares.parts,
            shares.on_device,
            shares.part_start,
            LOW=start,
            HIGH=high,
            SIDE=tile.side,
            DEPTH=tile.depth,
            BITS=slices.bits,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        add_parts(problems, shares, out, copy=copy)
    return out


def slice_roundings(problems: Problems, count: int, bits: int = 7) -> Tensor:
    """The h for which gram_of_slices with ``count`` slices is off by at most gamma(h) |Q|^T |Q|, entry by entry: (w,).

    0 for two digits of 8 bits: entries are integers up to m 2^30, which float64 holds up to 2^23 rows. Else:

    Products and sums of integers are exact; additions of different weights round, three for every pair of slices and
    one for every split after the first. What they add is at most P^T P with P = sum_i w_i |Q_i| <= 3.04 |Q|, since the
    digits behind the first that is not zero weigh at most 64 / 127 of one unit of it.
    """
    if bits == 8 and int(problems.m.max()) <= 2**23:
        return torch.zeros_like(problems.m)
    target = target_of(problems.device)
    sides = {SLICE_TILES[target][high].side for high in range(2, max(2, count) + 1)}
    splits = torch.stack([split_counts(problems, side, bits) for side in sides]).amax(dim=0)
    return torch.ceil(9.3 * (count - 1) * (splits + 2).to(torch.float64)).to(torch.int64)


def gram_of_weights(problems: Problems, chosen: Sequence[int] | None = None, out: Tensor | None = None) -> Tensor:
    """A^T A of bfloat16 and float16 matrices, products exact, sums in float32: of 2048 rows each, then of these.

    Packed float64, lower triangles only. One launch per storage class.

    Raises:
        TypeError: a chosen matrix has another dtype.
    """
    if out is None:
        out = torch.empty(problems.gram_elements, dtype=torch.float64, device=problems.device)
    tile = WEIGHT_TILE
    shares = Splits.of(problems, tile.side)
    counts = triangular_tiles(problems.n, tile.side) * shares.counts
    wanted = set(range(len(problems.m)) if chosen is None else chosen)
    for storage, members in problems.classes().items():
        inside = [i for i in members if i in wanted]
        if not inside:
            continue
        if storage.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"products of {storage.dtype} in float32 are not exact: use gram_of_slices")
        tiles = problems.tiles(counts, inside)
        launch(
            _weights_kernel,
            (tiles.total,),
            problems.table,
            tiles.owner,
            tiles.first,
            out,
            shares.parts,
            shares.on_device,
            shares.part_start,
            SIDE=tile.side,
            DEPTH=tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **weight_options(storage),
        )
    add_parts(problems, shares, out, sorted(wanted))
    return out


def weight_options(storage: Storage) -> dict[str, object]:
    """The constants that ``gram_of_weights`` is compiled for."""
    return {"ELEMENT": storage.element, "INNER": storage.inner, "ALIGNED": storage.aligned, "WIDEN": INTERPRETED}


def instances(target: str) -> list[Instance]:
    """Everything that the launchers of this file can ask the compiler for."""
    common = {"table": "*i64", "owner": "*i32", "first": "*i32"}
    shares = {"parts": "*fp64", "splits": "*i32", "part_start": "*i64"}
    found = []
    wide, narrow, both = {"out": "*fp64"}, {"out": "*fp32"}, {"out": "*fp64", "copy": "*fp32"}
    kinds = [(low, high, 7, wide) for low, high in ((1, 1), (1, 2), (3, 3), (4, 4))]
    for low, high, bits, results in (*kinds, (1, 2, 7, narrow), (1, 2, 8, wide), (1, 2, 8, both)):
        tile = SLICE_TILES[target][high]
        types = {**common, "slices": "*i8", "slice_bytes": "i64", "peaks": "*i32", **results, **shares}
        constants = {"LOW": low, "HIGH": high, "SIDE": tile.side, "DEPTH": tile.depth, "BITS": bits}
        # The sums in float64 after the loop may spill, and do with Triton 3.6. Triton 3.9 waits for every copy where
        # several tcgen05 products share a turn (seen in its machine code for sm_100): right, and slower.
        waits = target == "sm_100" and high > 2 and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
        held = Expected(width=16, ahead=not waits, stack=1536)
        found.append(Instance(_slices_kernel, types, constants, tile.num_warps, tile.num_stages, "int8", held))
    for storage in storages():
        if storage.dtype in (torch.bfloat16, torch.float16):
            tile = WEIGHT_TILE
            constants = {"SIDE": tile.side, "DEPTH": tile.depth, **weight_options(storage), "WIDEN": False}
            held = Expected(width=16, ahead=True, stack=32) if storage.aligned else None
            for result in (wide, narrow):
                types = {**common, **result, **shares}
                found.append(
                    Instance(_weights_kernel, types, constants, tile.num_warps, tile.num_stages, "float16", held)
                )
    return [*found, *split_instances()]
