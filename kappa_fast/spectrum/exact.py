"""The last rung and the first one for tiny matrices: a full singular value decomposition in float64 on the CPU.

Also what can be said without any arithmetic: zero matrices, zero columns, repeated columns.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..backends.base import Operand, Tensor

METHOD = "svd64"
# Relative error of a computed value beside its share of sigma_max: what is left where kappa is close to 1.
RELATIVE = 64 * 2.0**-53


def peak_bytes(shape: tuple[int, int]) -> int:
    """What ``decompose`` takes: operand, copy, U and a second operand (m, n), V and its workspace (n, n), in float64.

    Measured beside the weights: 250 MB at 2048 x 2048 and 194 MB at 4096 x 1024, where this says 268 and 193.
    """
    m, n = shape
    return 8 * (5 * m * n + 3 * n * n)


PATIENCE = 0.1  # seconds


class Room:
    """Memory that the decompositions of a run share: side by side as far as it goes, one that needs more of it alone.

    Waves are cut for what the rungs before need, and a decomposition needs 2.5 to 3 times as much. Who waits asks
    ``stopped()`` now and then whether it is still wanted: an interrupted run should not do one after the other.
    """

    def __init__(self, nbytes: float = math.inf, stopped: Callable[[], bool] = lambda: False) -> None:
        self.nbytes, self._stopped = nbytes, stopped
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, a: Operand) -> Iterator[None]:
        """Wait until there is room for the decomposition of ``a``, and keep it meanwhile.

        Raises:
            KeyboardInterrupt: the run was stopped while this waited.
        """
        need = peak_bytes(a.shape)
        with self._changed:
            while self._used and self._used + need > self.nbytes:
                self._changed.wait(PATIENCE)
                if self._stopped():
                    raise KeyboardInterrupt
            self._used += need
        try:
            yield
        finally:
            with self._changed:
                self._used -= need
                self._changed.notify_all()


def backward_error(n: int) -> float:
    """Bound on |computed - true| / sigma_max for the singular values of LAPACK's float64 SVD.

    LAPACK states p(m, n) u with a "modestly growing" p (Users' Guide, section 4.9). p = 4 + sqrt(n) / 2 is four times
    what was seen on matrices with known spectra, n = 2 to 2048 (docs/numerics.md); a model, not a proof.
    """
    return (4 + math.sqrt(n) / 2) * 2.0**-53


def decompose(a: Operand) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, n), singular values (n,) descending, V (n, n), float64 on the CPU."""
    u, s, vh = torch.linalg.svd(a.tensor.to("cpu", torch.float64), full_matrices=False)
    return u, s, vh.T


def singular_reason(a: Operand) -> str | None:
    """Why the matrix is singular beyond any doubt, or None: a zero or a repeated column (exact comparison).

    Repeated rows of a tall matrix mean nothing; for a square one they are looked for as well.
    """
    if a.peak == 0:
        return "all entries are zero"
    m, n = a.shape
    tensor = a.tensor.to("cpu", torch.float64)
    for side, name in ((tensor, "column"), (tensor.T, "row")):
        if name == "row" and m > n:
            break
        lines = np.ascontiguousarray(side.T.numpy()) + 0.0  # -0.0 + 0.0 is 0.0: both zeros compare as one
        if not lines.any(axis=1).all():
            return f"a {name} is zero"
        packed = lines.view(np.dtype((np.void, lines.dtype.itemsize * lines.shape[1]))).ravel()
        if len(np.unique(packed)) < len(packed):
            return f"two {name}s are equal"
    return None
