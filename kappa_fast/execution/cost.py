"""What a matrix costs by its shape: operations, and how times grow with them. The same on every machine."""

from __future__ import annotations

UNIT = (2048, 1024)  # the shape whose time relative_cost() is measured in
# Times of larger matrices: one part grows with the operations, the rest with their power 2/3 as the entries do. From
# this many operations on (for each two threads that share a matrix) the former is the larger part; smaller matrices
# than those measured cost a power of their operations. One AVX-512 core: 0.083 s at 2048 x 1024, 0.50 s at 5632 x 2048
# (a ratio of 6.0, and 5.8 by this rule), 0.13 s at 3584 x 1024, 0.60 s at 7168 x 2048 (4.6; 5.0), 0.015 s at 384 x 384,
# 0.045 s at 768 x 768, 0.084 s at 1024 x 1024, 0.39 s at 2048 x 2048 (4.6; 4.4).
CROSSING = 1.2e10
CERTIFIED_CROSSING = 1e9  # 0.25 s at 1024 x 1024 and 1.65 s at 2048 x 2048 with proofs (6.6; 6.4)
SHRINKING = 0.6


def operations(shape: tuple[int, int]) -> float:
    """What a matrix costs, in multiply-adds: Gram matrix and Cholesky factor."""
    m, n = max(shape), min(shape)
    return float(m) * n * n + n**3 / 3


def growth(start: float, ratio: float, certify: bool, pairs: float = 1.0) -> float:
    """How many times as long a matrix takes that has ``ratio`` times the operations ``start``.

    pairs: of threads that share the matrix, 1 where one thread works on it.
    """
    if ratio < 1:
        return ratio**SHRINKING
    crossing = (CERTIFIED_CROSSING if certify else CROSSING) * pairs
    cubic = 1 / (1 + crossing / start)
    return cubic * ratio + (1 - cubic) * ratio ** (2 / 3)


def relative_cost(shape: tuple[int, int], certify: bool) -> float:
    """What such a matrix takes, on one thread of whatever processor, in units of what one of ``UNIT`` takes.

    The rule by which measured times are scaled, and no measurement: the same on every machine.
    """
    return growth(operations(UNIT), operations(shape) / operations(UNIT), certify)
