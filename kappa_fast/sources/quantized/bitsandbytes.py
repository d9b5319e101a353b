"""bitsandbytes: four bits in blocks of the flattened weight (nf4, fp4), eight bits with a scale for each row.

The result is that of its GPU kernels: the value of the code times the scale, in float32, then rounded. The package is
not needed, and its CPU kernels are not used: on a CPU with AVX-512, bitsandbytes 0.50 uses wrong scales if the rows are
not a multiple of the block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import SourceError
from ...results.entries import Index
from ..base import Stored
from .recipe import Candidate, Recipe, refuse

# The sixteen values of each type, by code: get_4bit_type() of bitsandbytes/functional.py (nf4: arXiv 2305.14314, E).
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(-0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
        *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}
PER_127 = 7.874015718698502e-3  # 1 / 127, as rounded in int8_vectorwise_dequant()
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STATE = "quant_state.bitsandbytes__"
NESTED = ("nested_absmax", "nested_quant_map")

_CHUNK = 1 << 20  # weights that are looked up at a time, so that they fit into the processor's cache
_LARGEST_STATE = 1 << 16  # bytes of JSON


@dataclass(frozen=True)
class Blocks:
    """The layout of four-bit codes, from the JSON that is stored with them.

    Attributes:
        kind: "nf4" or "fp4".
        size: the number of consecutive weights of the flattened weight that share a scale.
        shape: the shape of the weight.
        dtype: the dtype of the weight before quantization and after dequantization.
        nested_size: the number of scales that share a scale; 0 if the scales are not quantized.
        nested_offset: the offset that is added to every dequantized scale.
    """

    kind: str
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested_size: int = 0
    nested_offset: float = 0.0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """The number of blocks; the last one may be incomplete."""
        return -(-self.numel // self.size)

    @property
    def peak(self) -> int:
        """Bytes per weight beside codes and result: a chunk needs an int32 for two weights and a float32 for each."""
        matrix = self.numel // (self.shape[0] if len(self.shape) == 3 else 1)
        return -(-7 * min(matrix, _CHUNK) // matrix)

    @property
    def description(self) -> str:
        nested = ", nested" if self.nested_size else ""
        return f"bitsandbytes {self.kind}, blocks of {self.size}{nested}"


def dequantize_4bit(codes: torch.Tensor, scales: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Dequantize consecutive blocks; only the last block of the weight may be incomplete.

    Args:
        codes: two per byte, the first in the upper half; of any dtype and shape.
        scales: float32, one for each block.
        blocks: the layout of the codes.

    Returns:
        The weights, one-dimensional, in ``blocks.dtype``, on the device of the codes: rounded once from the float32
        product.
    """
    packed = codes.contiguous().view(torch.uint8).flatten()
    table = torch.tensor(TABLES[blocks.kind], dtype=torch.float32, device=codes.device)
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # [256, 2], by byte
    scales = scales.to(codes.device)
    found = torch.empty((packed.numel(), 2), dtype=blocks.dtype, device=codes.device)
    step = max(blocks.size, _CHUNK // blocks.size * blocks.size) // 2
    for start in range(0, packed.numel(), step):
        values = pairs.index_select(0, packed[start : start + step].int()).flatten()
        first, whole = 2 * start // blocks.size, values.numel() // blocks.size
        values[: whole * blocks.size].view(-1, blocks.size).mul_(scales[first : first + whole, None])
        values[whole * blocks.size :].mul_(scales[first + whole : first + whole + 1])
        found[start : start + step] = values.view(-1, 2)
        del values  # free the memory before the next chunk is looked up
    return found.flatten()


def dequantize_scales(codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Dequantize the scales of blocks ("double quantization") to float32.

    Args:
        codes: uint8, one for each block.
        table: float32, the 256 values of the codes.
        scales: float32, one for every ``blocks.nested_size`` codes.
        blocks: the layout of the codes.
    """
    index = torch.arange(codes.numel(), device=codes.device) // blocks.nested_size
    return table[codes.flatten().int()] * scales.flatten()[index] + torch.tensor(
        blocks.nested_offset, dtype=torch.float32, device=codes.device
    )


def dequantize_8bit(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return rows of int8 times the scale of the row over 127, in float32, as ``int8_vectorwise_dequant`` does."""
    return codes.float().mul_(scales.to(codes.device, torch.float32).view(-1, 1)).mul_(PER_127)


def unpacked_from_cpu(codes: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the codes in the usual order, from the order that bitsandbytes uses for its product on CPUs.

    In evaluation mode, the first forward pass of a Linear4bit on a CPU with AVX-512 for bfloat16 reorders its codes: of
    each 32 rows and two columns, the codes of the first 16 rows become the lower halves of 32 bytes.

    Args:
        codes: uint8 of shape (rows, columns / 2).
        shape: (rows, columns) of the weight.

    Returns:
        uint8 of shape (rows * columns / 2,), in the usual order.
    """
    rows, columns = shape
    packed = codes.contiguous().view(-1, 32)
    halves = torch.cat([packed & 15, packed >> 4], 1)
    plain = halves.view(rows // 32, columns // 2, 32, 2).transpose(1, 2).reshape(-1, 2)
    return (plain[:, 0] << 4) | plain[:, 1]


@dataclass(frozen=True)
class Scales:
    """The scales of one weight: a call with ``(first, last)`` returns those of a range of blocks, in float32."""

    absmax: Stored
    blocks: Blocks
    nested: tuple[Stored, Stored] | None = None  # scales and values of the codes in absmax, if it is quantized

    def __call__(self, first: int, last: int) -> torch.Tensor:
        if self.nested is None:
            return self.absmax.take((slice(first, last),)).float()
        # Reading starts at the first code of a nested scale, and the codes before ``first`` are dropped.
        size = self.blocks.nested_size
        start = first // size * size
        absmax, table = (item.take(()) for item in self.nested)
        codes = self.absmax.take((slice(start, last),))
        return dequantize_scales(codes, table, absmax[start // size :], self.blocks)[first - start :]


class Bitsandbytes:
    """Recognizes both formats by their companions, in files, state dicts and modules."""

    name = "bitsandbytes"

    def recognize(self, candidate: Candidate, /) -> Recipe | None:
        """See ``Family``.

        Raises:
            SourceError: a companion is missing, or does not fit.
        """
        beside = candidate.companions
        states = [role for role in beside if role.startswith(STATE)]
        if states:
            blocks = blocks_of(candidate.name, beside[states[0]], states[0].removeprefix(STATE))
            return four_bits(candidate, blocks, beside[states[0]])
        if "absmax" in beside or "nested_absmax" in beside:
            raise candidate.missing(f"{candidate.name}.{STATE}nf4")
        if "SCB" in beside and candidate.codes.dtype == torch.int8:
            return eight_bits(candidate)
        return None


def blocks_of(name: str, state: Stored, kind: str) -> Blocks:
    """Return the layout of codes from the JSON in ``quant_state.bitsandbytes__<kind>``.

    Raises:
        SourceError: ``state`` is not JSON, or describes an impossible layout.
    """
    try:
        if state.dtype != torch.uint8 or not 0 < state.numel <= _LARGEST_STATE:
            raise ValueError(f"{state.dtype} of shape {state.shape} is not a text")
        return _blocks(json.loads(bytes(state.take(()).flatten().tolist())), kind)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"the quantization state of {name!r} ({state.name}) is damaged ({error!r}): download it again, or leave "
            f"the weight out with exclude={name!r}",
            says_exclude=True,
        ) from error


def _blocks(said: Mapping[str, Any], kind: str) -> Blocks:
    if said["quant_type"] != kind or kind not in TABLES:
        raise ValueError(f"quant_type {said['quant_type']!r} under the name of {kind!r}")
    size, shape = said["blocksize"], tuple(said["shape"])
    nested_size = said.get("nested_blocksize", 0)
    counts = (size, *shape, *([nested_size] if "nested_blocksize" in said else []))
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in counts) or size % 2 or not shape:
        raise ValueError(f"blocks of {size} and {nested_size} in a weight of shape {shape}")
    offset = float(said["nested_offset"]) if nested_size else 0.0
    return Blocks(kind, size, shape, DTYPES[said["dtype"]], nested_size, offset)


def four_bits(candidate: Candidate, blocks: Blocks, state: Stored | None = None) -> Recipe:
    """Return the recipe for a weight of four bits.

    Raises:
        SourceError: a companion is missing, or its size contradicts the state.
    """
    codes, beside = candidate.codes, candidate.companions
    wanted = {"absmax": blocks.count}
    if blocks.nested_size:
        wanted |= {"nested_absmax": -(-blocks.count // blocks.nested_size), "nested_quant_map": 256}
    for role, count in wanted.items():
        if role not in beside:
            raise candidate.missing(f"{candidate.name}.{role}")
        if beside[role].numel != count or len(beside[role].shape) != 1:
            raise refuse(candidate, beside[role], f"{count} values are expected")
    if (beside["absmax"].dtype == torch.uint8) != bool(blocks.nested_size):
        raise refuse(candidate, beside["absmax"], "only quantized scales are uint8")
    assert codes.dtype is not None
    if codes.numel * codes.dtype.itemsize != -(-blocks.numel // 2):
        raise refuse(candidate, beside["absmax"], f"a weight of shape {blocks.shape} has two codes in a byte")
    nested = (beside[NESTED[0]], beside[NESTED[1]]) if blocks.nested_size else None
    return recipe_of(codes, Scales(beside["absmax"], blocks, nested), blocks, state)


def recipe_of(codes: Stored, scales: Scales, blocks: Blocks, state: Stored | None) -> Recipe:
    """Return the recipe of a weight, or of each matrix of a stack; the sizes of codes and scales must be checked."""
    where = codes.device
    if len(blocks.shape) != 3:
        matrix = blocks.shape if len(blocks.shape) == 2 else (blocks.shape[0], blocks.numel // blocks.shape[0])
        read = {"codes": codes, "absmax": scales.absmax}
        if scales.nested is not None:
            read |= dict(zip(NESTED, scales.nested, strict=True))
        if state is not None:
            read["state"] = state  # for the stamp: the weight depends on the state

        def dequantize(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            absmax = inputs["absmax"]
            if blocks.nested_size:
                absmax = dequantize_scales(absmax, inputs[NESTED[1]], inputs[NESTED[0]], blocks)
            values = dequantize_4bit(inputs["codes"], absmax.float(), blocks)
            return values[: blocks.numel].view(matrix)

        return Recipe(blocks.description, matrix, blocks.dtype, read, dequantize, blocks.peak, repr(blocks))
    experts = blocks.shape[0]
    part = blocks.numel // experts
    if part % blocks.size == 0:
        inputs = {
            "codes": Stored(codes.names, (experts, part // 2), torch.uint8, where, _Rows(codes, experts)),
            "scales": Stored(
                (scales.absmax.name,), (experts, part // blocks.size), torch.float32, where, _ScalesOf(scales, experts)
            ),
        }

        def of_expert(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return dequantize_4bit(inputs["codes"], inputs["scales"], blocks).view(blocks.shape[1:])

        return Recipe(blocks.description, blocks.shape, blocks.dtype, inputs, of_expert, blocks.peak)
    # Blocks extend across experts: all blocks that an expert overlaps are dequantized on the device of the codes.
    whole = Stored(codes.names, blocks.shape, blocks.dtype, where, _AcrossExperts(codes, scales))
    return Recipe(
        blocks.description, blocks.shape, blocks.dtype, {"weights": whole}, lambda i: i["weights"], blocks.peak
    )


def eight_bits(candidate: Candidate) -> Recipe:
    """Return the recipe for rows of int8.

    Raises:
        SourceError: the scales do not fit, or the codes are in the order of one kind of GPU.
    """
    codes, scales = candidate.codes, candidate.companions["SCB"]
    if len(codes.shape) != 2 or scales.numel != codes.shape[0]:
        raise refuse(candidate, scales, "a float32 for each row is expected")
    arrangement = candidate.companions.get("format")
    if arrangement is not None and arrangement.take(()).flatten().tolist() != [0]:
        raise SourceError(
            f"{candidate.name!r} is in the order of one kind of GPU ({arrangement.name} is not 0): load the model with "
            "bitsandbytes below 0.45 and save it again"
        )

    inputs = {"codes": codes, "scales": scales}
    return Recipe(
        "bitsandbytes int8, a scale for each row", codes.shape, torch.float32, inputs, _dequantize_rows, peak=0
    )


def _dequantize_rows(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return dequantize_8bit(inputs["codes"], inputs["scales"])


@dataclass(frozen=True)
class _Rows:
    """``Stored.take`` of the bytes of a flattened tensor, with one row for each of ``count`` experts."""

    of: Stored
    count: int

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        first, last = _range(index, self.count)
        rows = self.of.shape[0] // self.count
        if self.of.shape[0] % self.count:  # an element of a wide dtype contains bytes of two experts
            whole = self.of.take(()).contiguous().view(torch.uint8).flatten()
            size = whole.numel() // self.count
            part = whole[first * size : last * size]
        else:
            taken = self.of.take((slice(first * rows, last * rows),))
            part = taken.contiguous().view(torch.uint8)
        return part.reshape(last - first, -1)[0] if index else part.reshape(self.count, -1)


@dataclass(frozen=True)
class _ScalesOf:
    """``Stored.take`` of the scales of one expert, or of all."""

    scales: Scales
    count: int

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        first, last = _range(index, self.count)
        size = self.scales.blocks.count // self.count
        part = self.scales(first * size, last * size)
        return part if index else part.view(self.count, size)


@dataclass(frozen=True)
class _AcrossExperts:
    """``Stored.take`` of the weights of one expert, or of all, if blocks extend from one expert into the next."""

    codes: Stored
    scales: Scales

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        blocks = self.scales.blocks
        first, last = _range(index, blocks.shape[0])
        part = blocks.numel // blocks.shape[0]
        start, end = first * part // blocks.size, min(-(-last * part // blocks.size), blocks.count)
        packed = self.codes.take(()).contiguous().view(torch.uint8).flatten()
        run = packed[start * blocks.size // 2 : end * blocks.size // 2]
        values = dequantize_4bit(run, self.scales(start, end), blocks)
        values = values[first * part - start * blocks.size :][: (last - first) * part]
        return values.view(blocks.shape[1:] if index else blocks.shape).clone()


def _range(index: Index, count: int) -> tuple[int, int]:
    if not index:
        return 0, count
    (expert,) = index
    assert isinstance(expert, int)
    return expert, expert + 1
