"""What training did to a matrix: norms of the difference, where it lies among the leading singular directions of the
old weights, and how the leading directions of the new weights relate to all old ones. docs/scores.md has the formulas.

Everything is in float64, by LAPACK's or cuSOLVER's SVD: the difference is measured, not estimated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from .rounding import U

HUGE = 2.0**1000  # entries above it are scaled down before they are subtracted
CLOSER = 0.5  # a square matrix is taken for transposed if its transpose is nearer than this share of the difference


@dataclass(frozen=True)
class UpdateNumbers:
    """The numbers of one pair of matrices; ``results.difference.Update`` says what each of them means."""

    norm: float
    norm_before: float
    spectral_norm: float
    changed: bool = True
    share_left: float | None = None
    share_right: float | None = None
    share: float | None = None
    similarities: tuple[float, ...] | None = None


def is_finite(weights: torch.Tensor) -> bool:
    """Whether a matrix has neither NaN nor inf."""
    return bool(torch.isfinite(weights).all())


def looks_transposed(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether a square matrix is stored transposed in ``after``: much nearer to the transpose than to ``before``.

    before, after: float64, square and finite.
    """
    straight, turned = (_norm_of(*_difference(old, after)) for old in (before, before.mT))
    return turned < CLOSER * straight


def measure_update(before: torch.Tensor, after: torch.Tensor, k: int) -> UpdateNumbers:
    """Compare a matrix with what training made of it.

    Args:
        before, after: float64 matrices of one shape on one device, without NaN and inf.
        k: how many leading singular directions are looked at; with 0 there is no SVD of the weights. It is cut to the
            smaller side.

    Returns:
        The shares are None where the directions of the old weights are not determined: where sigma_k and sigma_(k+1)
        are equal to rounding, or all weights are zero. Where nothing changed, there is nothing to share out.

    Raises:
        torch.linalg.LinAlgError: a decomposition did not converge.
    """
    norm_before = _norm_of(*_scaled(before))
    if torch.equal(before, after):
        return UpdateNumbers(0.0, norm_before, 0.0, changed=False)
    difference, power = _difference(before, after)
    norm = float(torch.linalg.vector_norm(difference))
    spectral = _spectral_norm(difference)
    numbers = UpdateNumbers(_times(norm, power), norm_before, _times(min(spectral, norm), power))
    leading = min(k, *before.shape)
    if not leading or not norm_before:
        return numbers
    left, values, right = torch.linalg.svd(_scaled(before)[0], full_matrices=False)
    if _is_determined(values, leading, max(before.shape)):
        u, v = left[:, :leading].mT, right[:leading].mT
        within = (u @ difference, difference @ v, u @ difference @ v)
        one, other, both = (min(1.0, (float(torch.linalg.vector_norm(part)) / norm) ** 2) for part in within)
        numbers = replace(numbers, share_left=one, share_right=other, share=both)
    if not bool(after.any()):
        return numbers
    new = torch.linalg.svd(_scaled(after)[0], full_matrices=False).U[:, :leading]
    cosines = (left.mT @ new).abs().amax(dim=0)
    return replace(numbers, similarities=tuple(min(1.0, float(cosine)) for cosine in cosines))


def _is_determined(values: torch.Tensor, k: int, rows: int) -> bool:
    """Whether the subspace of the k largest singular values is more than a choice among equals."""
    following = float(values[k]) if k < len(values) else 0.0
    return float(values[k - 1]) - following > 8 * rows * U * float(values[0])


def _difference(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``after - before``, scaled as by ``_scaled``."""
    if max(float(before.abs().max()), float(after.abs().max())) > HUGE:  # or it might overflow
        scaled, power = _scaled(after / 2 - before / 2)
        return scaled, power + 1
    return _scaled(after - before)


def _norm_of(scaled: torch.Tensor, power: int) -> float:
    """The Frobenius norm of a matrix that ``_scaled`` has scaled."""
    return _times(float(torch.linalg.vector_norm(scaled)), power)


def _scaled(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The matrix divided by a power of two so that its largest entry is about 1, and that power: squares then neither
    overflow nor vanish."""
    largest = float(matrix.abs().max())
    power = math.frexp(largest)[1] if largest else 0
    half = power // 2  # in two steps, since 2 ** power may have no float64 of its own
    return matrix * 2.0**-half * 2.0 ** (half - power), power


def _times(value: float, power: int) -> float:
    with np.errstate(over="ignore"):
        return float(np.ldexp(value, power))


def _spectral_norm(matrix: torch.Tensor) -> float:
    """The largest singular value, from the Gram matrix of the smaller side: its relative error is about n 2^-53."""
    gram = matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1])))
