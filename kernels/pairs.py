"""Stored weights as float64 operands of matrix units.

Matrix units take operands in a layout that depends on their width, and the compiler loads a tile from shared memory in
this layout if it knows of nothing narrower than 32 bits: otherwise float64 numbers go through shared memory once more,
16 bytes for every two that are stored, which sets the pace. So entries of 16 bits are read in pairs, as 32 bits. Even
and odd ones are then two tiles, whose products with the right rows are added, or which give different rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .problems import as_float, steps


@triton.jit
def widen(x, NARROW: tl.constexpr, BARRIER: tl.constexpr):
    """float32 as float64, in the layout in which matrix units take their operands, so that no float64 number goes
    through shared memory. NARROW: whether x was made of fewer bits.

    Triton 3.6 and 3.7 crash on, or miscompile, a plain cast right before a float64 dot, and they choose the layout of
    operands by the narrowest number that these are made of, which may be no layout for float64: so narrow numbers end
    at an instruction that the compiler does not look behind.
    """
    if BARRIER:
        if NARROW:
            x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
        return tl.inline_asm_elementwise("cvt.f64.f32 $0, $1;", "=d,f", [x], dtype=tl.float64, is_pure=True, pack=1)
    else:
        return x.to(tl.float64)


@triton.jit
def load_pairs(matrix, row, column, BM: tl.constexpr, BN: tl.constexpr, INNER: tl.constexpr, TURNED: tl.constexpr):
    """The 16-bit entries of an aligned matrix from (row, column) on as int32: two that are adjacent in memory in each,
    the first in the lower half, zero outside: [BM, BN], or [BN, BM] if TURNED. BM or BN counts pairs."""
    base, row_stride, column_stride, m, n = matrix
    row_step, column_step = steps(matrix, INNER)
    if TURNED:
        i, j = tl.arange(0, BM)[None, :], tl.arange(0, BN)[:, None]
    else:
        i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    corner = base + row * row_stride + column * column_stride
    if INNER == 1:
        lines = (corner + i * row_step).to(tl.pointer_type(tl.int32), bitcast=True)
        return tl.load(lines + j, mask=(i < m - row) & (j < (n - column) >> 1), other=0)
    else:
        lines = (corner + j * column_step).to(tl.pointer_type(tl.int32), bitcast=True)
        return tl.load(lines + i, mask=(i < (m - row) >> 1) & (j < n - column), other=0)


@triton.jit
def _half(pairs, ELEMENT: tl.constexpr, HIGH: tl.constexpr):
    """The lower or the upper halves of pairs of 16-bit entries as float32."""
    if tl.bfloat16 == ELEMENT:
        return ((pairs & -65536) if HIGH else (pairs << 16)).to(tl.float32, bitcast=True)
    else:
        return ((pairs >> 16) if HIGH else pairs).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def entries(
    raw,
    ELEMENT: tl.constexpr,
    FLOAT8: tl.constexpr,
    PAIRED: tl.constexpr,
    HIGH: tl.constexpr,
    BINADES: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """Stored entries, or one half of pairs, as float64; or the squares of the powers of two below them."""
    if PAIRED:
        narrow = _half(raw, ELEMENT, HIGH)
    else:
        narrow = as_float(raw, FLOAT8)
    if BINADES:  # the exponent bits alone are a power of two, or 0 for 0 and subnormal numbers
        narrow = (narrow.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    a = widen(narrow, raw.dtype != tl.float32 and not PAIRED, BARRIER)
    if BINADES:
        a *= a
    return a
