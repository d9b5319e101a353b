"""The records of a ranking: TensorKappa for a ranked matrix, Skipped for a parameter that was not ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Index = tuple[int | slice, ...]
Status = Literal["ok", "rank_deficient", "bounded", "non_finite", "scored"]


@dataclass(frozen=True)
class Skipped:
    """A parameter (or a part of one) that was not ranked, and why, in words a person understands."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class TensorKappa:
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
        frobenius: ||A||_F, in the units of the weights. This and what follows is None where it is not known: on rungs
            that do not give it, and in files of older versions. docs/scores.md has formulas, errors and sources.
        stable_rank: ||A||_F^2 / sigma_max^2.
        participation_ratio: (sum of sigma_i^2)^2 / (sum of sigma_i^4).
        demmel: ||A||_F / sigma_min.
        flatness: mean of log sigma_i - log(mean of sigma_i^2) / 2, -inf for a singular matrix.
        flatness_lower, flatness_upper: the interval that holds the true flatness.
        flatness_by_shape: by how many standard deviations the flatness exceeds the mean of Gaussian matrices.
        outliers_above: how many singular values lie beyond the upper edge of noise. This and what follows is known with
            the option ``statistics``, or where it is the score.
        outliers_below: how many lie below its lower edge.
        snr: Spectrum's ratio of signal to noise.
        alpha: the exponent of the power law that fits the largest sigma_i^2.
        spectral_entropy: of the shares of sigma_i^2, from 0 for rank one to 1 where all are equal.
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
    frobenius: float | None = None
    stable_rank: float | None = None
    participation_ratio: float | None = None
    demmel: float | None = None
    flatness: float | None = None
    flatness_lower: float | None = None
    flatness_upper: float | None = None
    flatness_by_shape: float | None = None
    outliers_above: int | None = None
    outliers_below: int | None = None
    snr: float | None = None
    alpha: float | None = None
    spectral_entropy: float | None = None

    @property
    def key(self) -> str:
        """``name + part``: unique within a ranking."""
        return self.name + self.part
