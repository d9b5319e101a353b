"""Eight-bit weights of optimum-quanto: qint8 and the three qfloat8 formats, with a scale for each row.

``QModuleMixin`` saves them as ``weight._data`` and ``weight._scale``, quantized along axis 0. The weight is
scale x code in the dtype of the scale (``QBytesDequantizer``); the dtype of the codes identifies the format. Codes of
four and two bits are ``weight._data._data`` with ``weight._shift``; these are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .. import codes
from .fp8 import FORMATS
from .packed import FLOATS
from .recipe import Candidate, Recipe, refuse

_KINDS = {torch.int8: "qint8", **{dtype: f"qfloat8 {kind}" for dtype, kind in FORMATS.items()}}


class Quanto:
    """Recognizes ``weight._data`` with ``weight._scale``."""

    name = "quanto"

    def recognize(self, candidate: Candidate, /) -> Recipe | str | None:
        """See ``Family``. Raises SourceError if scales are missing, or if there is not one for each row."""
        if not codes.is_of_quanto(candidate.name):
            return None
        stored, scale = candidate.codes, candidate.find("scale")
        kind = _KINDS.get(stored.dtype) if stored.dtype is not None else None
        if kind is None or candidate.find("shift") is not None:
            return f"codes of quanto with fewer than eight bits; {codes.NOT_SUPPORTED}"
        if len(stored.shape) != 2:
            return f"codes of quanto for a convolution; {codes.NOT_SUPPORTED}"
        if scale is None:
            raise candidate.missing("weight._scale")
        if scale.dtype not in FLOATS or scale.shape != (stored.shape[0], 1):
            raise refuse(candidate, scale, f"floats of shape {(stored.shape[0], 1)}, one for each row, are expected")
        return Recipe(
            quantization=f"quanto {kind}, a scale for each row",
            shape=stored.shape,
            dtype=scale.dtype,
            inputs={"codes": stored, "scale": scale},
            dequantize=_dequantize,
            peak=scale.dtype.itemsize,
        )


def _dequantize(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return inputs["scale"] * inputs["codes"].to(inputs["scale"].dtype)
