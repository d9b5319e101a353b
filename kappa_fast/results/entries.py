"""The records of a ranking: TensorKappa for a ranked matrix, Skipped for a parameter that was not ranked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from .statistics import STATISTICS, Statistics

Index = tuple[int | slice, ...]
Status = Literal["ok", "rank_deficient", "bounded", "non_finite", "scored"]


@dataclass(frozen=True)
class Skipped:
    """A parameter (or a part of one) that was not ranked, and why, in words a person understands."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, repr=False)
class TensorKappa(Statistics):
    """The condition number of one weight matrix, and how certain it is.

    Attributes:
        name: name of the parameter, as ``named_parameters()`` or the checkpoint spells it.
        aliases: further names of the same tensor (tied weights).
        part: "" for the whole parameter, "[3]" for expert 3 of a stack, "[3].gate" for its gate half.
        index: the index of the matrix in the parameter; () for the whole parameter.
        layer: number of the layer in the model, None outside of layers.
        group: the name with its numbers as ``*``, plus the part without its expert.
        shape: (rows, columns) of the matrix as ranked (convolutions flattened).
        dtype: stored dtype, such as "bfloat16"; of the dequantized values where the weight was quantized.
        numel: number of weights in the matrix.
        kappa: best estimate of sigma_max / sigma_min; inf if rank deficient, nan if bounded, scored or non-finite.
        lower, upper: the interval that holds the true kappa of the stored weights.
        sigma_max, sigma_min: extreme singular values, in the units of the weights.
        score: what the ranking is sorted by, ascending.
        certified: True if the interval is proven, not estimated.
        method: the rung of the ladder that resolved the entry.
        sensitivity: first-order standard deviation of the relative change of kappa under one rounding of all
            weights to the storage dtype; nan where kappa is.
        status: "ok", "rank_deficient", "bounded" (known only to lie above ``lower``), "non_finite", or "scored" (kappa
            is only bounded, and the score, which does not need it, is known).
        quantization: how the weight was quantized, such as "fp8 e4m3, 128x128 blocks", or None for plain weights.
            Everything else is about the dequantized values; so ``sensitivity`` is about a rounding to their dtype,
            not about the far larger one to the codes.

    The statistics beside kappa follow, such as ``frobenius`` and ``flatness``: those of the class Statistics, each None
    where it is not known.
    """

    name: str
    aliases: tuple[str, ...]
    part: str
    index: Index
    layer: int | None
    group: str
    shape: tuple[int, int]
    dtype: str
    numel: int
    kappa: float
    lower: float
    upper: float
    sigma_max: float
    sigma_min: float
    score: float
    certified: bool
    method: str
    sensitivity: float
    status: Status
    quantization: str | None = None

    def __repr__(self) -> str:
        return f"TensorKappa({', '.join(f'{name}={getattr(self, name)!r}' for name in FIELDS)})"

    @property
    def key(self) -> str:
        """``name + part``: unique within a ranking."""
        return self.name + self.part


# In the order of files and tables, where the statistics come last; a dataclass has inherited fields first.
FIELDS = (*(item.name for item in fields(TensorKappa) if item.name not in STATISTICS), *STATISTICS)
