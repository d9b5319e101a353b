"""The table with which one launch serves many matrices: the address, size and tiles of each.

A wave is a sequence of 2-D tensors of any shapes, dtypes and strides on one device. One row of int64 numbers describes
a matrix to a kernel, and a program loads the number of its matrix from a map that is built once per wave. Kernels are
compiled for a storage class (dtype, contiguous direction, alignment), never for a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

Tensor = torch.Tensor

# Columns of the table, as constexpr: int64 each.
POINTER = tl.constexpr(0)  # address of the first entry, in bytes
ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(2)
ROW_STRIDE = tl.constexpr(3)  # in elements
COLUMN_STRIDE = tl.constexpr(4)
FIRST_COLUMN = tl.constexpr(5)  # where its columns begin in arrays with one entry per column of the wave
PITCH = tl.constexpr(6)  # rows of a slice in memory: ROWS rounded up to PAD
SLICE = tl.constexpr(7)  # where its slices begin, in bytes
GRAM = tl.constexpr(8)  # where its n x n results begin, in elements
LEADING = tl.constexpr(9)  # elements between rows of an n x n result
FIELDS = tl.constexpr(10)

PAD = tl.constexpr(128)  # of slices along m: whole tiles along the contracted dimension, and 16-byte addresses
ROW_PAD = tl.constexpr(16)  # of n x n results: rows that start on a cache line

TILE_LIMIT = 256  # no tile has a longer side
INNER_ROWS, INNER_COLUMNS, INNER_NONE = 0, 1, 2
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.uint8,
    torch.float8_e5m2: tl.uint8,
    torch.int8: tl.int8,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class Storage:
    """The properties of a matrix for which a kernel that reads stored weights is compiled.

    inner: the direction in which entries are contiguous.  aligned: every line in that direction starts on 16 bytes, and
    the sizes along it are multiples of 16, so that loads can be vectors.
    """

    dtype: torch.dtype
    inner: int
    aligned: bool

    @classmethod
    def of(cls, matrix: Tensor) -> Storage:
        return _storage(matrix.dtype, *matrix.shape, *matrix.stride(), matrix.data_ptr() % 16 == 0)

    @classmethod
    def laid_out(cls, dtype: torch.dtype, m: int, n: int, rows: int, columns: int, *, even: bool) -> Storage:
        """The class of a matrix (m, n) with these strides; ``even``: its address is a multiple of 16 bytes."""
        inner = INNER_COLUMNS if columns == 1 else INNER_ROWS if rows == 1 else INNER_NONE
        pitch, length = (rows, n) if inner == INNER_COLUMNS else (columns, m)
        if pitch * TILE_LIMIT >= 2**31:  # places within a tile are 32-bit numbers
            inner = INNER_NONE
        even = even and pitch % 16 == 0 and length % 16 == 0
        return cls(dtype, inner, inner != INNER_NONE and even)

    @property
    def element(self) -> tl.dtype:
        """The type that the pointer is cast to; float8 is read as bytes and decoded, since not every target has it."""
        return _TYPES[self.dtype]

    @property
    def float8(self) -> int:
        """0: not float8, else the number of its exponent bits."""
        return {torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}.get(self.dtype, 0)


@lru_cache(maxsize=1024)  # a wave has thousands of matrices of a few shapes
def _storage(dtype: torch.dtype, m: int, n: int, rows: int, columns: int, even: bool) -> Storage:
    return Storage.laid_out(dtype, m, n, rows, columns, even=even)


def supported(dtype: torch.dtype) -> bool:
    """Whether ``quantize`` can read this dtype. float64 has more bits than four slices hold."""
    return dtype in _TYPES and dtype not in (torch.int8, torch.float64)


@dataclass(frozen=True)
class TileMap:
    """The matrix owner[program] of every program, (total,) int32, and the first program of every matrix, (w,) int32."""

    owner: Tensor
    first: Tensor
    total: int


@dataclass(frozen=True)
class Problems:
    """A wave on its device. table: (w, FIELDS) int64.  m, n: sizes, (w,) int64 on the host."""

    matrices: tuple[Tensor, ...]
    table: Tensor
    m: Tensor
    n: Tensor
    columns: int  # of all matrices together
    slice_bytes: int  # of one slice of all matrices
    gram_elements: int

    @classmethod
    def of(cls, matrices: Sequence[Tensor]) -> Problems:
        """Matrices (m, n), m >= n >= 1, all on one device; they are neither copied nor changed."""
        known = on_host([(a.data_ptr(), *a.shape, *a.stride()) for a in matrices]).reshape(-1, 5)
        m, n = known[:, 1].clone(), known[:, 2].clone()
        pitch, leading = _round_up(m, PAD.value), _round_up(n, ROW_PAD.value)
        table = on_host([0] * (len(m) * FIELDS.value)).reshape(-1, FIELDS.value)
        table[:, POINTER.value : COLUMN_STRIDE.value + 1] = known
        table[:, FIRST_COLUMN.value], columns = starts_of(n)
        table[:, PITCH.value] = pitch
        table[:, SLICE.value], slice_bytes = starts_of(n * pitch)
        table[:, GRAM.value], gram_elements = starts_of(n * leading)
        table[:, LEADING.value] = leading
        moved = to_device(table, matrices[0].device)
        return cls(tuple(matrices), moved, m, n, columns, slice_bytes, gram_elements)

    @property
    def device(self) -> torch.device:
        return self.table.device

    def classes(self) -> dict[Storage, list[int]]:
        """Positions of the matrices by storage class: each class is a launch of its own."""
        return self._classes

    @cached_property
    def _classes(self) -> dict[Storage, list[int]]:
        found: dict[Storage, list[int]] = {}
        for i, matrix in enumerate(self.matrices):
            found.setdefault(Storage.of(matrix), []).append(i)
        return found

    def tiles(self, counts: Tensor, chosen: Sequence[int] | None = None) -> TileMap:
        """A map in which every chosen matrix owns ``counts`` programs, those with the longest columns first."""
        positions = self.chosen(chosen)
        order = positions[torch.argsort(self.m[positions], descending=True, stable=True)]
        first = torch.zeros(len(self.m), dtype=torch.int32, device="cpu")
        starts, total = starts_of(counts[order])
        first[order] = starts.to(torch.int32)
        owner = torch.repeat_interleave(order.to(torch.int32), counts[order])
        return TileMap(to_device(owner, self.device), to_device(first, self.device), total)

    def chosen(self, positions: Sequence[int] | None) -> Tensor:
        """Positions of matrices, int64 on the host: those given, or all."""
        return on_host(range(len(self.m)) if positions is None else positions)

    def gram_views(self, packed: Tensor) -> list[Tensor]:
        """The (n, n) matrices in a packed result, as views."""
        starts, steps = (places.tolist() for places in self.gram_places())
        offset, sizes = int(packed.storage_offset()), zip(self.n.tolist(), steps, starts, strict=True)
        return [packed.as_strided((n, n), (step - 1, 1), offset + start) for n, step, start in sizes]

    def gram_places(self) -> tuple[Tensor, Tensor]:
        """Where the diagonal of every matrix begins in a packed result, and the steps along it: (w,) int64 each, on the
        host."""
        leading = _round_up(self.n, ROW_PAD.value)
        return starts_of(self.n * leading)[0], leading + 1


TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942")


def target_of(device: torch.device) -> str:
    """The target whose tiles fit a device: its own, or the one with the same matrix units and shared memory.

    Raises:
        RuntimeError: the device has no int8 matrix units that Triton can use.
    """
    if device.type == "meta" and not INTERPRETED:  # jit_cache.py compiles for a device that may not be there
        where = triton.runtime.driver.active.get_current_target()
        hip, capability = where.backend == "hip", (0, 0) if where.backend == "hip" else divmod(where.arch, 10)
    elif device.type != "cuda":
        return "sm_90"  # the interpreter takes any
    else:
        hip, capability = torch.version.hip, torch.cuda.get_device_capability(device)
    if hip:
        return "gfx942"
    major, minor = capability
    if major < 8:
        raise RuntimeError(f"compute capability {major}.{minor} is below 8.0, the first that Triton supports")
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_89"
    if major == 10:
        return "sm_103" if minor == 3 else "sm_100"
    return {9: "sm_90", 11: "sm_100"}.get(major, "sm_120")


@dataclass(frozen=True)
class Expected:
    """The expectations of the compiled inner loop of a kernel, see aot.py.

    width: least bytes per thread of every load or asynchronous copy in the loop; for a kernel without loops, of its
    widest load.  ahead: copies into shared memory overlap with products.  registers: most per thread.  stack: most
    bytes of local memory per thread.  spills: most accesses to local memory in the loop.
    """

    width: int = 0
    ahead: bool = False
    registers: int = 255
    stack: int = 0
    spills: int = 0


@dataclass(frozen=True)
class Instance:
    """One compilation that a launcher can request, see aot.py.

    types: those of arguments that are not constants, as Triton writes them; all other arguments are None.  unit: the
    kind of matrix instruction that the result must have, if any.  expected: None if the loop is not checked.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int = 3
    unit: str | None = None
    expected: Expected | None = None

    @property
    def name(self) -> str:
        """The kernel and what it is compiled for, without spaces."""
        constants = ",".join(f"{key}={value}" for key, value in self.constants.items())
        return f"{self.kernel.__name__.strip('_').removesuffix('_kernel')}[{constants}]"


def storages() -> list[Storage]:
    """Every storage class that kernels reading stored weights are compiled for."""
    dtypes = [dtype for dtype in _TYPES if supported(dtype)]
    layouts = [(INNER_ROWS, True), (INNER_ROWS, False), (INNER_COLUMNS, True), (INNER_COLUMNS, False)]
    return [Storage(dtype, *layout) for dtype in dtypes for layout in [*layouts, (INNER_NONE, False)]]


def on_host(numbers: Sequence[Any] | Tensor) -> Tensor:
    """Sizes or positions as int64 on the host, whatever torch's default device is."""
    if isinstance(numbers, Tensor):
        return numbers.to("cpu", torch.int64)
    if isinstance(numbers, range):
        return torch.arange(numbers.start, numbers.stop, numbers.step, dtype=torch.int64, device="cpu")
    return torch.tensor(list(numbers), dtype=torch.int64, device="cpu")


def to_device(host: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A small tensor of the host on the device, without waiting for what it does at the moment."""
    host = host.to(dtype or host.dtype).contiguous()
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _round_up(sizes: Tensor, step: int) -> Tensor:
    return -(-sizes // step) * step


def starts_of(sizes: Tensor) -> tuple[Tensor, int]:
    """The starts of runs of these sizes that follow each other, and their total length."""
    ends = torch.cumsum(sizes, 0)
    return ends - sizes, int(ends[-1]) if len(ends) else 0


def binades(a: Tensor) -> Tensor:
    """2^floor(log2 |a|) of every entry, 0 for 0."""
    return torch.where(a == 0, 0.0, torch.ldexp(torch.ones_like(a), torch.frexp(a).exponent - 1))


@triton.jit
def locate(owner, first):
    """The matrix of this program and the number of its tile within the matrix."""
    program = tl.program_id(0)
    matrix = tl.load(owner + program)
    return matrix.to(tl.int64), program - tl.load(first + matrix)


@triton.jit
def field(table, matrix, FIELD: tl.constexpr, MULTIPLE: tl.constexpr = 1):
    """One number of a matrix, of which the compiler may assume that it is a multiple of MULTIPLE.

    The load itself carries the hint, since a hint on the result of a call is lost when the call is inlined.
    """
    return tl.multiple_of(tl.load(table + matrix * FIELDS + FIELD), MULTIPLE)


@triton.jit
def triangular(tile):
    """Row and column of a tile of a lower triangle, counted row by row. The root is rounded, so it is checked."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def stored(table, matrix, ELEMENT: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr):
    """A stored matrix: the address of its first entry, the strides of rows and columns, the numbers of both.

    Read once per program, in front of every loop. An aligned matrix has addresses, distances of lines and lengths of
    lines that are multiples of 16, see Storage. The stride in the contiguous direction is 1.
    """
    BASE: tl.constexpr = 16 if ALIGNED else 1
    WIDE: tl.constexpr = 16 if ALIGNED and INNER == 1 else 1
    TALL: tl.constexpr = 16 if ALIGNED and INNER == 0 else 1
    base = tl.multiple_of(field(table, matrix, POINTER).to(tl.pointer_type(ELEMENT)), BASE)
    m, n = field(table, matrix, ROWS, TALL).to(tl.int32), field(table, matrix, COLUMNS, WIDE).to(tl.int32)
    if INNER == 1:
        return base, field(table, matrix, ROW_STRIDE, WIDE), 1, m, n
    elif INNER == 0:
        return base, 1, field(table, matrix, COLUMN_STRIDE, TALL), m, n
    else:
        return base, field(table, matrix, ROW_STRIDE), field(table, matrix, COLUMN_STRIDE), m, n


@triton.jit
def steps(matrix, INNER: tl.constexpr):
    """The strides within a tile: 32-bit beside a contiguous direction, since addresses cost registers."""
    _, row_stride, column_stride, _, _ = matrix
    if INNER == 1:
        return row_stride.to(tl.int32), 1
    elif INNER == 0:
        return 1, column_stride.to(tl.int32)
    else:
        return row_stride, column_stride


@triton.jit
def load_tile(matrix, row, column, BM: tl.constexpr, BN: tl.constexpr, INNER: tl.constexpr):
    """The tile of a stored matrix that starts at (row, column), as it is stored: [BM, BN], zero outside."""
    base, row_stride, column_stride, m, n = matrix
    row_step, column_step = steps(matrix, INNER)
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    corner = base + row * row_stride + column * column_stride
    return tl.load(corner + i * row_step + j * column_step, mask=(i < m - row) & (j < n - column), other=0)


@triton.jit
def load_turned(matrix, row, column, BM: tl.constexpr, BN: tl.constexpr, INNER: tl.constexpr):
    """The same tile with rows and columns exchanged: [BN, BM]."""
    base, row_stride, column_stride, m, n = matrix
    row_step, column_step = steps(matrix, INNER)
    i, j = tl.arange(0, BM)[None, :], tl.arange(0, BN)[:, None]
    corner = base + row * row_stride + column * column_stride
    return tl.load(corner + i * row_step + j * column_step, mask=(i < m - row) & (j < n - column), other=0)


@triton.jit
def as_float(raw, FLOAT8: tl.constexpr):
    """Stored entries as float32, exactly."""
    if FLOAT8 == 0:
        return raw.to(tl.float32)
    else:
        return _decode(raw, FLOAT8)


@triton.jit
def _decode(code, EXPONENT_BITS: tl.constexpr):
    """float8 as float32. e5m2 is the upper half of a float16; e4m3 shifted by one bit less is 2^-8 of its value."""
    bits = code.to(tl.int16)
    if EXPONENT_BITS == 5:
        return (bits << 8).to(tl.float16, bitcast=True).to(tl.float32)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


# Whether kernels run on the CPU under Triton's interpreter, whose products of bfloat16 are wrong.
INTERPRETED = isinstance(field, InterpretedFunction)
