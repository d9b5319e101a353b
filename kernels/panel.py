"""Inner products and combinations of the packed blocks of a wave in float64, for orthogonalization and the polish.

    inner      V^T W      combine      V C      subtract      W - V C

V (rows, k) holds a basis for every member of the wave, row after row, W (rows, b) a block, C (members, k, b) the
coefficients. Bound by reading V. Sums run over 512 rows at a time and then over these, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cholesky import WITH_DOT
from .launch import launch
from .problems import Expected, Instance, Tensor, on_host, starts_of, target_of, to_device

CHUNK = tl.constexpr(512)  # rows that one program sums
ROWS = tl.constexpr(64)  # rows of a tile
GROUP = tl.constexpr(64)  # columns of V per program
STEP = tl.constexpr(32)  # columns of V per product with coefficients
LANES = tl.constexpr(16)  # columns of a block, at most
WARPS = 4
# Triton would make a size of 1 a constant, which is not a tensor, and compile the kernel again for every such case.
SIZES = ["k", "b", "v_stride", "w_stride"]


@dataclass(frozen=True)
class Rows:
    """The rows of every member, and the programs that work on them.

    start, stop (a,) int64; chunk_owner, chunk_first: a program per CHUNK rows; tile_owner, tile_first: one per ROWS.
    """

    start: Tensor
    stop: Tensor
    chunk_owner: Tensor
    chunk_first: Tensor
    chunks: int
    tile_owner: Tensor
    tile_first: Tensor
    tiles: int
    total: int

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device) -> Rows:
        """Rows of each member, in order."""
        rows = on_host(counts)
        start, total = starts_of(rows)
        maps = []
        for size in (CHUNK.value, ROWS.value):
            programs = -(-rows // size)
            owner = torch.repeat_interleave(on_host(range(len(rows))), programs)
            first, programs_of_all = starts_of(programs)
            moved = to_device(owner, device, torch.int32), to_device(first, device, torch.int32)
            maps += [*moved, programs_of_all]
        return cls(to_device(start, device), to_device(start + rows, device), *maps, total)

    @property
    def members(self) -> int:
        return self.start.shape[0]


@triton.jit(do_not_specialize=SIZES)
def _inner_kernel(
    start, stop, owner, first, v, v_stride, k, w, w_stride, b, parts, UNIT: tl.constexpr, USE_DOT: tl.constexpr
):
    v_stride, k, w_stride, b = v_stride * UNIT, k * UNIT, w_stride * UNIT, b * UNIT
    chunk = tl.program_id(0)
    column = tl.program_id(1) * GROUP
    member = tl.load(owner + chunk)
    row = tl.load(start + member) + (chunk - tl.load(first + member)).to(tl.int64) * CHUNK
    end = tl.minimum(tl.load(stop + member), row + CHUNK)
    i, g, j = tl.arange(0, ROWS), tl.arange(0, GROUP), tl.arange(0, LANES)
    total = tl.zeros((GROUP, LANES), tl.float64)
    if USE_DOT:
        turned = tl.zeros((LANES, GROUP), tl.float64)  # W^T V: only what is turned is copied in pieces of 8 bytes
        left_place, right_place = i[:, None] * v_stride + g[None, :], i[:, None] * w_stride + j[None, :]
        v += row * v_stride + column
        w += row * w_stride
        count = (end - row).to(tl.int32)
        for done in range(0, CHUNK, ROWS):
            inside = (i < count - done)[:, None]
            left = tl.load(v + left_place, mask=inside & (g < k - column)[None, :], other=0.0)
            right = tl.load(w + right_place, mask=inside & (j < b)[None, :], other=0.0)
            turned = tl.dot(tl.trans(right), left, turned, out_dtype=tl.float64)
            v += ROWS * v_stride
            w += ROWS * w_stride
        total = tl.trans(turned)
    else:
        for _ in range(0, (end - row).to(tl.int32)):
            left = tl.load(v + row * v_stride + column + g, mask=g < k - column, other=0.0)
            right = tl.load(w + row * w_stride + j, mask=j < b, other=0.0)
            total += left[:, None] * right[None, :]
            row += 1
    target = parts + (chunk.to(tl.int64) * k + column + g)[:, None] * LANES + j[None, :]
    tl.store(target, total, mask=(g < k - column)[:, None])


@triton.jit(do_not_specialize=["k", "chunks", "members"])
def _add_chunks_kernel(first, chunks, parts, k, out, members):
    """Add the partial sums of one member and GROUP columns, in their order."""
    member = tl.program_id(0)
    column = tl.program_id(1) * GROUP
    begin = tl.load(first + member)
    end = tl.load(first + member + 1, mask=member + 1 < members, other=chunks)
    g, j = tl.arange(0, GROUP), tl.arange(0, LANES)
    inside = (g < k - column)[:, None] & (j < LANES)[None, :]
    total = tl.zeros((GROUP, LANES), tl.float64)
    for chunk in range(begin, end):
        place = (chunk * k.to(tl.int64) + column + g)[:, None] * LANES + j[None, :]
        total += tl.load(parts + place, mask=inside, other=0.0)
    target = out + (member.to(tl.int64) * k + column + g)[:, None] * LANES + j[None, :]
    tl.store(target, total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _combine_kernel(
    start,
    stop,
    owner,
    first,
    v,
    v_stride,
    k,
    c,
    w,
    w_stride,
    b,
    out,
    SUBTRACT: tl.constexpr,
    UNIT: tl.constexpr,
    USE_DOT: tl.constexpr,
):
    v_stride, k, w_stride, b = v_stride * UNIT, k * UNIT, w_stride * UNIT, b * UNIT
    tile = tl.program_id(0)
    member = tl.load(owner + tile)
    row = tl.load(start + member) + (tile - tl.load(first + member)).to(tl.int64) * ROWS
    end = tl.load(stop + member)
    i, s, j = tl.arange(0, ROWS), tl.arange(0, STEP), tl.arange(0, LANES)
    place = row + i
    coefficients = c + member.to(tl.int64) * k * b
    total = tl.zeros((ROWS, LANES), tl.float64)
    if USE_DOT:
        for column in range(0, k, STEP):
            left_inside = (place < end)[:, None] & (s < k - column)[None, :]
            left = tl.load(v + place[:, None] * v_stride + (column + s)[None, :], mask=left_inside, other=0.0)
            right_inside = (s < k - column)[:, None] & (j < b)[None, :]
            right = tl.load(coefficients + (column + s)[:, None] * b + j[None, :], mask=right_inside, other=0.0)
            total = tl.dot(left, right, total, out_dtype=tl.float64)
    else:
        for column in range(0, k):
            left = tl.load(v + place * v_stride + column, mask=place < end, other=0.0)
            right = tl.load(coefficients + column * b + j, mask=j < b, other=0.0)
            total += left[:, None] * right[None, :]
    inside = (place < end)[:, None] & (j < b)[None, :]
    if SUBTRACT:
        total = tl.load(w + place[:, None] * w_stride + j[None, :], mask=inside, other=0.0) - total
    tl.store(out + place[:, None] * b + j[None, :], total, mask=inside)


def inner(rows: Rows, v: Tensor, w: Tensor) -> Tensor:
    """V^T W of every member, (members, k, b), float64; v (rows, k) and w (rows, b <= 16) may be columns of wider ones.

    Two launches, whatever the number of members.
    """
    _check(rows, v, w)
    k, b = v.shape[1], w.shape[1]
    groups = -(-k // GROUP.value)
    parts = torch.empty((rows.chunks, k, LANES.value), dtype=torch.float64, device=v.device)
    out = torch.empty((rows.members, k, LANES.value), dtype=torch.float64, device=v.device)
    unit = _unit(v.stride(0), k, w.stride(0), b)
    launch(
        _inner_kernel,
        (rows.chunks, groups),
        rows.start,
        rows.stop,
        rows.chunk_owner,
        rows.chunk_first,
        v,
        v.stride(0) // unit,
        k // unit,
        w,
        w.stride(0) // unit,
        b // unit,
        parts,
        UNIT=unit,
        USE_DOT=target_of(v.device) in WITH_DOT,
        num_warps=WARPS,
    )
    launch(
        _add_chunks_kernel,
        (rows.members, groups),
        rows.chunk_first,
        rows.chunks,
        parts,
        k,
        out,
        rows.members,
        num_warps=WARPS,
    )
    return out[:, :, :b]


def combine(rows: Rows, v: Tensor, coefficients: Tensor) -> Tensor:
    """V C of every member, (rows, b), float64, for coefficients (members, k, b <= 16). One launch."""
    return _combine(rows, v, coefficients, None)


def subtract(rows: Rows, v: Tensor, coefficients: Tensor, w: Tensor) -> Tensor:
    """W - V C of every member, (rows, b), float64, for coefficients (members, k, b <= 16). One launch."""
    return _combine(rows, v, coefficients, w)


def _combine(rows: Rows, v: Tensor, coefficients: Tensor, w: Tensor | None) -> Tensor:
    _check(rows, v, v[:, :0] if w is None else w)
    members, k, b = coefficients.shape
    if (members, k) != (rows.members, v.shape[1]) or b > LANES.value or (w is not None and w.shape[1] != b):
        raise ValueError(f"coefficients {tuple(coefficients.shape)} do not fit {rows.members} bases of {v.shape[1]}")
    out = torch.empty((rows.total, b), dtype=torch.float64, device=v.device)
    block = out if w is None else w
    unit = _unit(v.stride(0), k, block.stride(0), b)
    launch(
        _combine_kernel,
        (rows.tiles,),
        rows.start,
        rows.stop,
        rows.tile_owner,
        rows.tile_first,
        v,
        v.stride(0) // unit,
        k // unit,
        coefficients.contiguous(),
        block,
        block.stride(0) // unit,
        b // unit,
        out,
        SUBTRACT=w is not None,
        UNIT=unit,
        USE_DOT=target_of(v.device) in WITH_DOT,
        num_warps=WARPS,
    )
    return out


def _unit(*sizes: int) -> int:
    """The unit of the sizes: 16 if all are multiples of 16, so that the compiler knows this and loads 16 bytes.

    Triton sees the alignment of the first entry of a block itself.
    """
    return LANES.value if all(size % LANES.value == 0 for size in sizes) else 1


def _check(rows: Rows, *blocks: Tensor) -> None:
    for block in blocks:
        if block.ndim != 2 or block.shape[0] != rows.total or block.dtype != torch.float64 or block.stride(1) != 1:
            raise ValueError(f"a block must have {rows.total} rows of float64, row-major, not {tuple(block.shape)}")
    if blocks[-1].shape[1] > LANES.value:
        raise ValueError(f"a block of {blocks[-1].shape[1]} columns: at most {LANES.value}")


def instances(target: str) -> list[Instance]:
    """Everything that the launchers of this file can ask the compiler for."""
    use_dot = target in WITH_DOT
    unit = "float64" if use_dot else None
    members = {"start": "*i64", "stop": "*i64", "owner": "*i32", "first": "*i32"}
    sizes = {"v": "*fp64", "v_stride": "i32", "k": "i32", "w": "*fp64", "w_stride": "i32", "b": "i32"}
    adding = {"first": "*i32", "chunks": "i32", "parts": "*fp64", "k": "i32", "out": "*fp64", "members": "i32"}
    found = [Instance(_add_chunks_kernel, adding, {}, WARPS)]
    for size in (1, LANES.value):
        turned, held = (Expected(width=w, ahead=True) if use_dot and size > 1 else None for w in (8, 16))
        constants: dict[str, object] = {"UNIT": size, "USE_DOT": use_dot}
        types = {**members, **sizes, "parts": "*fp64"}
        found.append(Instance(_inner_kernel, types, constants, WARPS, unit=unit, expected=turned))
        for subtracting in (False, True):
            types = {**members, **sizes, "c": "*fp64", "out": "*fp64"}
            constants = {"SUBTRACT": subtracting, "UNIT": size, "USE_DOT": use_dot}
            found.append(Instance(_combine_kernel, types, constants, WARPS, unit=unit, expected=held))
    return found
