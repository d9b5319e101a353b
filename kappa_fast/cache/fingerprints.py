"""What identifies a matrix by its values alone: dtype, shape, and XXH3-128 over its entries, row by row.

XXH3 protects against accidents, not against somebody who builds a collision on purpose; whoever can write into the
cache can change the results anyway. It reads 27 GB/s on one core where SHA-256 reads 1.8 (benchmarks/bench_cache.py).
"""

from __future__ import annotations

import re

import torch

# Copies of strided weights, and of weights on an accelerator, are made in pieces of this size.
PIECE_BYTES = 8 << 20

_FINGERPRINT = re.compile(r"[a-z0-9_]+-\d+x\d+-[0-9a-f]{32}")


def fingerprint(weight: torch.Tensor) -> str:
    """Such as ``float32-384x1536-`` and 32 hexadecimal digits; the same for equal bits, whatever strides or device.

    Args:
        weight: shape (m, n), of any dtype, strides and device. It is read once, and copied by pieces only where its
            rows do not lie one after the other in the memory of the host. The GIL is released meanwhile.
    """
    from xxhash import xxh3_128  # rank() without a cache has no use for it

    rows, columns = weight.shape
    label = f"{str(weight.dtype).removeprefix('torch.')}-{rows}x{columns}-"
    digest = xxh3_128(label.encode())
    whole = weight.device.type == "cpu" and weight.is_contiguous()
    step = rows if whole else max(1, PIECE_BYTES // max(1, columns * weight.itemsize))
    for start in range(0, rows, step):
        piece = weight[start : start + step].detach().contiguous()
        digest.update(piece.view(torch.uint8).cpu().numpy().data)
    return label + digest.hexdigest()


def is_fingerprint(text: object) -> bool:
    """Whether ``fingerprint`` may have made this; such a text is safe in a file name."""
    return isinstance(text, str) and _FINGERPRINT.fullmatch(text) is not None


def checksum(data: bytes) -> str:
    """32 hexadecimal digits that tell whether a document is as it was written."""
    from xxhash import xxh3_128_hexdigest

    return str(xxh3_128_hexdigest(data))
