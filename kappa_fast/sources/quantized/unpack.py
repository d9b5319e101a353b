"""From codes to numbers: bit fields in integers, eight- and four-bit floats, scales for blocks of them."""

from __future__ import annotations

import torch

WORD = 32  # bits of the integers that GPTQ, AWQ and compressed-tensors pack into

# E2M1 of the OCP Microscaling Formats specification 1.0, section 5.3.3; the upper half is negative.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_TYPICAL_BLOCKS = tuple(1 << k for k in range(3, 13))


def fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` unsigned fields of ``bits`` bits along the last dimension of int32 words, lowest bits first.

    A field may begin in one word and end in the next, as it does with three bits.

    Returns:
        int32 of shape (..., count).
    """
    mask = (1 << bits) - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
        return _shifted(words, shifts, mask)[..., :count]
    at = torch.arange(count, device=words.device) * bits
    first, offset = at // WORD, at % WORD
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    found = unsigned.index_select(-1, first).bitwise_right_shift_(offset)
    second = (first + 1).clamp_(max=words.shape[-1] - 1)  # where a field ends in its word, the mask cuts this off
    found |= unsigned.index_select(-1, second).bitwise_left_shift_(WORD - offset)
    return found.bitwise_and_(mask).to(torch.int32)


def nibbles_in_order(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The eight four-bit fields of each int32 word, field ``order[j]`` at place j; int32 of shape (..., 8 * words)."""
    shifts = torch.tensor(order, dtype=torch.int32, device=words.device) * 4
    return _shifted(words, shifts, 15)


def _shifted(words: torch.Tensor, shifts: torch.Tensor, mask: int) -> torch.Tensor:
    return (words.unsqueeze(-1) >> shifts).bitwise_and_(mask).flatten(-2)


def e2m1(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The two four-bit floats in each byte, the lower half first; of shape (..., 2 * bytes)."""
    # Both halves of a byte are looked up at once, as one integer that is as wide as two floats.
    table, byte = torch.tensor(E2M1, dtype=dtype), torch.arange(256)
    pair = torch.int64 if dtype.itemsize == 4 else torch.int32
    pairs = torch.stack((table[byte & 15], table[byte >> 4]), dim=-1).view(pair).view(256).to(packed.device)
    found = pairs.index_select(0, packed.contiguous().view(torch.uint8).flatten().int())
    return found.view(dtype).view(*packed.shape[:-1], 2 * packed.shape[-1])


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32; bytes, and torch.float8_e8m0fnu, are E8M0: 2**(byte - 127), and 255 is NaN."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def times_blocks(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """``values`` (rows, columns) times the scale of their block, in place; blocks at the edges may be cut off.

    Args:
        values: what is scaled.
        scale: of shape (ceil(rows / block[0]), ceil(columns / block[1])).
        block: rows and columns that share a scale.
    """
    rows, columns = values.shape
    wide = scale if scale.shape[1] == 1 else scale.repeat_interleave(block[1], dim=1)[:, :columns]
    whole = rows // block[0]
    if whole:
        values[: whole * block[0]].view(whole, block[0], columns).mul_(wide[:whole, None])
    if whole < scale.shape[0]:
        values[whole * block[0] :].mul_(wide[whole:])
    return values


def affine(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: torch.Tensor | int
) -> torch.Tensor:
    """``(codes - zero) * scale`` in the dtype of the scales, each column with those of its group.

    Args:
        codes: integers of shape (rows, columns); int32 is overwritten.
        scale: of shape (rows or 1, groups).
        zero: integers of the shape of ``scale``, or None for zeros.
        group: how many columns in a row make a group, or which group each column is in: (columns,), integers.
    """
    if isinstance(group, int):
        group = torch.arange(codes.shape[1], device=codes.device) // group
    shifted = codes.to(torch.int32)
    if zero is not None:
        shifted -= zero.to(torch.int32).index_select(1, group)
    return shifted.to(scale.dtype).mul_(scale.index_select(1, group))


def block_sizes(size: int, count: int, configured: int | None) -> set[int]:
    """How many of ``size`` entries may share a scale if there are ``count`` scales; empty if nothing fits.

    What is configured, if it fits; else powers of two from 8 on, and equal shares.
    """
    if count == 1:
        return {size}
    if configured is not None:
        return {configured} if configured > 0 and -(-size // configured) == count else set()
    plausible = {block for block in _TYPICAL_BLOCKS if -(-size // block) == count}
    return plausible | ({size // count} if count and size % count == 0 else set())


def block_size(size: int, count: int, configured: int | None) -> int | None:
    """The only one of ``block_sizes``, or None."""
    plausible = block_sizes(size, count, configured)
    return plausible.pop() if len(plausible) == 1 else None
