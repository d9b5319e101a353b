"""Unpacking of codes: bit fields in integers, eight- and four-bit floats, scales of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

WORD = 32  # bits of the integers that GPTQ, AWQ and compressed-tensors pack into

# E2M1 of the OCP Microscaling Formats specification 1.0, section 5.3.3; the upper half is negative.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_TYPICAL_BLOCKS = tuple(1 << k for k in range(3, 13))


def fields(words: torch.Tensor, bits: int, count: int, order: Sequence[int] = ()) -> torch.Tensor:
    """Return the first ``count`` unsigned fields of ``bits`` bits along the last dimension of int32 words.

    Args:
        words: of shape (..., words), lowest bits first. If ``bits`` does not divide 32, as with three bits, a field may
            begin in one word and end in the next.
        bits: bits of a field.
        count: number of fields.
        order: the position in its word of each field, if it is not from the lowest bits on.

    Returns:
        uint8 of shape (..., count).
    """
    if WORD % bits:
        return _across_words(words, bits, count)
    each, mask = WORD // bits, (1 << bits) - 1
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8)  # little-endian, as safetensors is
    found = octets.new_empty((*words.shape, each))
    for place, field in enumerate(order or range(each)):
        octet, shift = divmod(field * bits, 8)
        torch.bitwise_and(octets[..., octet] >> shift, mask, out=found[..., place])
    return found.flatten(-2)[..., :count]


def _across_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    at = torch.arange(count, device=words.device) * bits
    first, offset = at // WORD, at % WORD
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    found = unsigned.index_select(-1, first).bitwise_right_shift_(offset)
    second = (first + 1).clamp_(max=words.shape[-1] - 1)  # unused by fields that end in their first word
    found |= unsigned.index_select(-1, second).bitwise_left_shift_(WORD - offset)
    return found.bitwise_and_((1 << bits) - 1).to(torch.uint8)


def e2m1(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the two four-bit floats in each byte, the lower half first; the shape is (..., 2 * bytes)."""
    # Both halves of a byte are looked up together, as one integer that is as wide as two floats.
    table, byte = torch.tensor(E2M1, dtype=dtype), torch.arange(256)
    pair = torch.int64 if dtype.itemsize == 4 else torch.int32
    pairs = torch.stack((table[byte & 15], table[byte >> 4]), dim=-1).view(pair).view(256).to(packed.device)
    found = pairs.index_select(0, packed.contiguous().view(torch.uint8).flatten().int())
    return found.view(dtype).view(*packed.shape[:-1], 2 * packed.shape[-1])


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Return scales as float32; uint8 and torch.float8_e8m0fnu are E8M0: 2**(byte - 127), and 255 is NaN."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def times_blocks(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiply ``values`` (rows, columns) by the scale of their block, in place; blocks at the edges may be incomplete.

    Args:
        values: the values to scale.
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
    """Return ``(codes - zero) * scale`` in the dtype of the scales; the columns of a group share scale and zero point.

    Differences of integers of up to eight bits are exact in every dtype of scales.

    Args:
        codes: integers of shape (rows, columns), of one byte each.
        scale: of shape (rows or 1, groups).
        zero: integers that broadcast with ``scale``, or None for zeros.
        group: the number of consecutive columns in a group, or the group of each column: (columns,), integers.
    """
    values, columns = codes.to(scale.dtype), codes.shape[1]
    shift = None if zero is None else zero.to(scale.dtype).expand(-1, scale.shape[1])
    if isinstance(group, torch.Tensor):
        if shift is not None:
            values -= shift.index_select(1, group)
        return values.mul_(scale.index_select(1, group))
    whole = columns // group
    for part, groups in (
        (values[:, : whole * group].view(-1, whole, group) if whole else None, slice(whole)),
        (values[:, whole * group :].unsqueeze(1) if whole * group < columns else None, slice(whole, None)),
    ):
        if part is not None:
            if shift is not None:
                part -= shift[:, groups, None]
            part *= scale[:, groups, None]
    return values


def block_sizes(size: int, count: int, configured: int | None) -> set[int]:
    """Return the possible numbers of entries that share a scale, for ``count`` scales of ``size`` entries.

    A configured size is the only one, if it fits; else powers of two from 8 on, and equal division, are possible.
    """
    if count == 1:
        return {size}
    if configured is not None:
        return {configured} if configured > 0 and -(-size // configured) == count else set()
    plausible = {block for block in _TYPICAL_BLOCKS if -(-size // block) == count}
    return plausible | ({size // count} if count and size % count == 0 else set())


def block_size(size: int, count: int, configured: int | None) -> int | None:
    """Return the block size if ``block_sizes`` has exactly one, else None."""
    plausible = block_sizes(size, count, configured)
    return plausible.pop() if len(plausible) == 1 else None
