"""The cells of sweep.py: matrices of one shape, number, dtype and spectrum, and every plain way to their kappas."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import workloads

Way = Callable[[], list[float]]  # computes one kappa for each matrix of a cell

SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096)
ASPECTS = (1, 2, 4, 8, 16, 32)
COUNTS = (1, 64)
# In the order of what most models are: the first kinds are measured for all shapes before the next ones.
KINDS = (
    ("float32", "trained"),
    ("bfloat16", "trained"),
    ("float32", "graded"),
    ("float32", "gaussian"),
    ("bfloat16", "gaussian"),
    ("bfloat16", "graded"),
)
MOST_ENTRIES = 1 << 26  # of a cell: 512 MiB in float64, of which plain ways hold up to three copies
GRADED = 1e-4  # the scale of the last column of a graded matrix, the first has 1


@dataclass(frozen=True)
class Cell:
    """``count`` matrices (rows, columns) of one dtype ("float32", "bfloat16") and spectrum.

    spectrum: "gaussian"; "trained", which is workloads.weights' trained-like; "graded": Gaussian columns scaled
    from 1 down to GRADED, mixed by two reflections.
    """

    count: int
    rows: int
    columns: int
    dtype: str = "float32"
    spectrum: str = "trained"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Of a text such as "24x64x64" or "1x256x2048:bfloat16:graded"; ValueError for any other."""
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?::(float32|bfloat16))?(?::(gaussian|trained|graded))?", text)
        if found is None:
            raise ValueError(f"{text!r} is no cell: write COUNTxROWSxCOLUMNS[:DTYPE][:SPECTRUM]")
        count, rows, columns = (int(number) for number in found.groups()[:3])
        return cls(count, rows, columns, found[4] or "float32", found[5] or "trained")

    def __str__(self) -> str:
        return f"{self.count}x{self.rows}x{self.columns}:{self.dtype}:{self.spectrum}"

    @property
    def operations(self) -> float:
        """Operations of all lower triangles of Gram matrices: what the time of every way grows with."""
        return float(self.count) * max(self.rows, self.columns) * min(self.rows, self.columns) ** 2

    def matrices(self) -> list[torch.Tensor]:
        """The same at every call."""
        return [self._matrix(seed) for seed in range(self.count)]

    def _matrix(self, seed: int) -> torch.Tensor:
        kind = "trained" if self.spectrum == "trained" else "random"
        matrix = workloads.weights(self.rows, self.columns, kind, seed)  # type: ignore[arg-type]
        if self.spectrum == "graded":
            matrix *= torch.logspace(0, math.log10(GRADED), self.columns)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(2):
                v = torch.nn.functional.normalize(torch.randn(self.columns, generator=generator), dim=0)
                matrix -= 2 * torch.outer(matrix @ v, v)
        return matrix.to(getattr(torch, self.dtype))


def cells() -> Iterator[Cell]:
    """Those of the sweep, kind by kind, the cheapest first; tall matrices, of at most MOST_ENTRIES entries together."""
    for dtype, spectrum in KINDS:
        found = [Cell(c, a * n, n, dtype, spectrum) for n in SIZES for a in ASPECTS for c in COUNTS]
        found = [cell for cell in found if cell.count * cell.rows * cell.columns <= MOST_ENTRIES]
        yield from sorted(found, key=lambda cell: cell.operations)


def plain_ways(matrices: Sequence[torch.Tensor], *, peft: bool = True) -> dict[str, Way]:
    """Every plain way that this environment has, by its name; equal shapes go into one batched call where one exists.

    peft: whether to import it, which takes seconds.
    """
    ways: dict[str, Way] = {
        "torch svdvals float32": lambda: _ratios(torch.linalg.svdvals(_stacked(matrices, torch.float32))),
        "torch svdvals float64": lambda: _ratios(torch.linalg.svdvals(_stacked(matrices, torch.float64))),
        "torch eigvalsh of Gram float64": lambda: _of_gram(torch.linalg.eigvalsh(_gram(matrices))),
        "numpy svd float32": lambda: _numpy_svd(matrices, torch.float32),
        "numpy svd float64": lambda: _numpy_svd(matrices, torch.float64),
        "numpy eigvalsh of Gram float64": lambda: _numpy_eigvalsh(matrices),
    }
    if importlib.util.find_spec("scipy"):
        ways |= {
            "scipy svdvals float32": lambda: _scipy_svdvals(matrices, torch.float32),
            "scipy svdvals float64": lambda: _scipy_svdvals(matrices, torch.float64),
            "scipy eigvalsh of syrk float64": lambda: _scipy_eigvalsh(matrices),
        }
    if peft and importlib.util.find_spec("peft"):
        ways["PEFT's selector"] = _peft(matrices)
    return ways


def mapping(matrices: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The matrices as rank() takes them."""
    return {f"layers.{i}.weight": matrix for i, matrix in enumerate(matrices)}


def _tall(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT


def _stacked(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Shape (count, m, n), m >= n; a single matrix as (1, m, n) without a copy of its own."""
    whole = matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))
    return _tall(whole).to(dtype)


def _gram(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    a = _stacked(matrices, torch.float64)
    return a.mT @ a


def _ratios(sigmas: torch.Tensor) -> list[float]:
    return (sigmas[:, 0] / sigmas[:, -1]).tolist()


def _of_gram(eigenvalues: torch.Tensor) -> list[float]:
    return (eigenvalues[:, -1] / eigenvalues[:, 0].clamp(min=0)).sqrt().tolist()


def _numpy_svd(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> list[float]:
    sigmas = np.linalg.svd(_stacked(matrices, dtype).numpy(), compute_uv=False)
    return _ratios(torch.from_numpy(sigmas))


def _numpy_eigvalsh(matrices: Sequence[torch.Tensor]) -> list[float]:
    a = _stacked(matrices, torch.float64).numpy()
    return _of_gram(torch.from_numpy(np.linalg.eigvalsh(np.swapaxes(a, 1, 2) @ a)))


def _scipy_svdvals(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> list[float]:
    from scipy import linalg

    sigmas = [linalg.svdvals(_tall(matrix).to(dtype).numpy(), check_finite=False) for matrix in matrices]
    return [float(s[0] / s[-1]) for s in sigmas]


def _scipy_eigvalsh(matrices: Sequence[torch.Tensor]) -> list[float]:
    from scipy import linalg
    from scipy.linalg import blas

    found = []
    for matrix in matrices:
        a = _tall(matrix).to(torch.float64).contiguous().numpy()
        g = blas.dsyrk(1.0, a.T, lower=1)
        values = linalg.eigvalsh(g, lower=True, overwrite_a=True, check_finite=False, driver="ev")
        found.append(math.sqrt(values[-1] / values[0]) if values[0] > 0 else math.inf)
    return found


def _peft(matrices: Sequence[torch.Tensor]) -> Way:
    """The selector itself, on linear layers with these weights."""
    from peft import helpers

    model = torch.nn.Sequential(*(_linear(matrix) for matrix in matrices))

    def run() -> list[float]:
        selector: Any = helpers.KappaTuneSelector(model, max_dim_size_to_analyze=1 << 30, show_progress=False)
        selector._compute_kappas()
        return list(selector._condition_numbers.values())

    return run


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer
