"""Sparse weights of compressed-tensors: ``sparse-24-bitmask`` (two values in every four) and ``sparse-bitmask``.

``compressed`` has the nonzero values row by row. ``bitmask`` has a bit for each weight, the lowest bit of a byte first;
each row begins with a new byte. ``shape`` is the shape of the weight (``BitmaskTensor``, ``Sparse24BitMaskTensor``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch

from ...errors import SourceError
from .packed import FLOATS
from .recipe import Candidate, Recipe, refuse


class Sparse:
    """Recognizes sparse weights by ``bitmask`` in uint8 with ``compressed``."""

    name = "sparse"

    def recognize(self, candidate: Candidate, /) -> Recipe | str | None:
        """See ``Family``. Raises SourceError if the values or the shape do not fit the bits."""
        mask, values, stored = candidate.codes, candidate.find("compressed"), candidate.find("shape")
        if not candidate.name.endswith("bitmask") or mask.dtype != torch.uint8 or values is None:
            return None
        if values.dtype not in FLOATS or candidate.find("scale") is not None:
            return "sparse and quantized (compressed, bitmask): this quantized format is not supported"
        if stored is None:
            raise candidate.missing("shape")
        if stored.numel != 2 or stored.dtype not in (torch.int32, torch.int64):
            raise refuse(candidate, stored, "two integers are expected")
        rows, columns = (int(size) for size in stored.take(()).flatten())
        if rows < 1 or columns < 1 or mask.shape != (rows, -(-columns // 8)):
            raise refuse(candidate, stored, f"it is {(rows, columns)}, which needs one byte for eight weights of a row")
        if values.numel > rows * columns:
            raise refuse(candidate, values, f"there are more values than the {rows * columns} weights")
        halves = values.shape == (rows, columns // 2) and columns % 4 == 0
        return Recipe(
            quantization="sparse 2:4 (bitmask)" if halves else "sparse (bitmask)",
            shape=(rows, columns),
            dtype=values.dtype,
            inputs={"mask": mask, "values": values},
            dequantize=partial(_filled, name=candidate.name, shape=(rows, columns)),
            peak=18,
        )


def _filled(inputs: Mapping[str, torch.Tensor], *, name: str, shape: tuple[int, int]) -> torch.Tensor:
    mask, values = inputs["mask"], inputs["values"].flatten()
    bits = (mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    places = bits.flatten(1)[:, : shape[1]].bool()
    if int(places.sum()) != values.numel():
        raise SourceError(
            f"{name!r} has bits for {int(places.sum())} of {math.prod(shape)} weights, but there are "
            f"{values.numel()} values: download the file again, or leave the weight out with exclude={name!r}",
            says_exclude=True,
        )
    whole = torch.zeros(shape, dtype=values.dtype, device=values.device)
    whole[places] = values
    return whole
