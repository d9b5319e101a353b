"""The Triton backend: the heavy operations on a wave as a handful of launches, whatever the number of matrices.

Gram matrices, Cholesky factors, products and solves with them and products with the weights run in kernels/. The small
operations of the Krylov steps, the proofs, and rungs that these kernels do not climb are still torch's, one matrix
after the other. Float64 weights are torch's altogether: four slices hold 28 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BackendError
from .base import Extension, Factors, Operand, Panel, Ritz, Rung, Tensor
from .torch_backend import SLENDER, TorchBackend

if TYPE_CHECKING:
    from kappa_fast.kernels.apply import Blocks
    from kappa_fast.kernels.cholesky import Factored
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.triangular import Members

# Names say where the Gram matrix comes from; its factor is float64 in every case.
WEIGHTS16 = Rung("weights16", "weights16", torch.float64, 2)
SLICES = {k: Rung(f"slices{k}", f"slices{k}", torch.float64, 2) for k in (2, 3, 4)}
KINDS = {WEIGHTS16.kind: 0, **{rung.kind: k for k, rung in SLICES.items()}}
LANES = 16  # columns of a block in the kernels


@dataclass(frozen=True)
class _Wave:
    """A factored wave and what was computed of it."""

    problems: Problems
    factored: Factored


@dataclass(frozen=True)
class _Place:
    """One matrix of a factored wave: what Factors.data holds."""

    wave: _Wave
    position: int


class TritonBackend:
    """See base.Backend for what each operation promises."""

    name = "triton"
    side_by_side = False

    def __init__(self, device: torch.device) -> None:
        try:
            from kappa_fast.kernels.problems import INTERPRETED, target_of
        except ImportError as error:
            raise BackendError(f"backend='triton' needs Triton, which is for Linux: {error}") from error
        if device.type != "cuda" and not INTERPRETED:
            raise BackendError(f"backend='triton' needs a GPU, not {device}: use backend='torch'")
        try:
            target_of(device)
        except RuntimeError as error:
            raise BackendError(f"backend='triton' cannot work on {device}: {error}") from error
        self.device = device
        self._torch = TorchBackend(device)

    def rungs(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Rung, ...]:
        """Slices before everything torch has; 16-bit products first where float32 resolves trained matrices."""
        m, n = shape
        rest = tuple(rung for rung in self._torch.rungs(shape, dtype) if rung.dtype == torch.float64)
        if dtype == torch.float64:
            return rest
        if n >= SLENDER * m:
            return (SLICES[3], SLICES[4], *rest)
        first = WEIGHTS16 if dtype in (torch.bfloat16, torch.float16) else SLICES[2]
        return (first, SLICES[3], *rest)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        m, n = shape
        return max(self._torch.workspace(shape, dtype), 9 * n * n + max(SLICES) * (m + 128) * n)

    def prepare(self, weights: Sequence[Tensor]) -> list[Operand]:
        return self._torch.prepare(weights)

    def gram(self, operands: Sequence[Operand], dtype: torch.dtype, chunk: int | None = None) -> list[Tensor]:
        return self._torch.gram(operands, dtype, chunk)

    def cholesky(self, grams: Sequence[Tensor]) -> list[bool]:
        return self._torch.cholesky(grams)

    def factor(self, operands: Sequence[Operand], rung: Rung) -> Factors:
        if rung.kind not in KINDS:
            return self._torch.factor(operands, rung)
        usable = [i for i, a in enumerate(operands) if _fits(a.tensor, rung)]
        data: list[Any] = [None] * len(operands)
        if usable:
            wave = _factored([operands[i].tensor for i in usable], KINDS[rung.kind])
            for position, (i, failed) in enumerate(zip(usable, wave.factored.info.tolist(), strict=True)):
                data[i] = None if failed else _Place(wave, position)
        return Factors(rung, tuple(a.shape[1] for a in operands), tuple(data))

    def product(self, factors: Factors, blocks: Panel) -> Panel:
        if factors.rung.kind not in KINDS:
            return self._torch.product(factors, blocks)
        from kappa_fast.kernels.triangular import lower_product, transposed_product

        wave, members = _wave_of(factors)
        inner = transposed_product(wave.problems, wave.factored, members, _padded(blocks))
        return _cut(lower_product(wave.problems, wave.factored, members, inner), blocks)

    def solve(self, factors: Factors, blocks: Panel) -> Panel:
        if factors.rung.kind not in KINDS:
            return self._torch.solve(factors, blocks)
        from kappa_fast.kernels.triangular import backward_solve, forward_solve

        wave, members = _wave_of(factors)
        inner = forward_solve(wave.problems, wave.factored, members, _padded(blocks))
        return _cut(backward_solve(wave.problems, wave.factored, members, inner), blocks)

    def departure(self, operands: Sequence[Operand], factors: Factors, blocks: Panel) -> Panel:
        if factors.rung.kind not in KINDS:
            return self._torch.departure(operands, factors, blocks)
        from kappa_fast.kernels.apply import times, transposed_times
        from kappa_fast.kernels.triangular import backward_solve, forward_solve

        wave, members = _wave_of(factors)
        places = _blocks(wave.problems, [place.position for place in factors.data])
        x = _padded(blocks)
        image, _ = times(wave.problems, places, backward_solve(wave.problems, wave.factored, members, x))
        normal = transposed_times(wave.problems, places, image)
        return _cut(forward_solve(wave.problems, wave.factored, members, normal) - x, blocks)

    def apply(self, operands: Sequence[Operand], blocks: Panel) -> tuple[Panel, Tensor]:
        from kappa_fast.kernels.apply import times
        from kappa_fast.kernels.problems import Problems, supported

        if not all(supported(a.tensor.dtype) for a in operands):
            return self._torch.apply(operands, blocks)
        problems = Problems.of([a.tensor for a in operands])
        image, squares = times(problems, _blocks(problems, range(len(operands))), _padded(blocks.to(torch.float64)))
        return Panel(image[:, : blocks.width], tuple(a.shape[0] for a in operands)), squares.sqrt()

    def normal(self, operands: Sequence[Operand], blocks: Panel) -> Panel:
        return self._torch.normal(operands, blocks)

    def orthonormalize(self, blocks: Panel) -> Panel:
        return self._torch.orthonormalize(blocks)

    def extend(self, bases: Panel, blocks: Panel, scale: Tensor) -> Extension:
        return self._torch.extend(bases, blocks, scale)

    def combine(self, bases: Panel, coefficients: Tensor) -> Panel:
        return self._torch.combine(bases, coefficients)

    def svd(self, blocks: Panel) -> tuple[Panel, Tensor, Tensor]:
        return self._torch.svd(blocks)

    def norms(self, blocks: Panel) -> Tensor:
        return self._torch.norms(blocks)

    def ritz(self, columns: Sequence[Tensor], coupling: Tensor) -> Ritz:
        return self._torch.ritz(columns, coupling)

    def weighted_squares(self, operands: Sequence[Operand], left: Panel, right: Panel) -> Tensor:
        return self._torch.weighted_squares(operands, left, right)


def _fits(tensor: Tensor, rung: Rung) -> bool:
    """Whether a rung reads this: scaling may have widened what prepare() was given."""
    from kappa_fast.kernels.problems import supported

    return tensor.dtype in (torch.bfloat16, torch.float16) if rung is WEIGHTS16 else supported(tensor.dtype)


def _factored(tensors: Sequence[Tensor], slices: int) -> _Wave:
    from kappa_fast.kernels.cholesky import cholesky
    from kappa_fast.kernels.gram import gram_of_slices, gram_of_weights
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.quantize import column_peaks, quantize

    problems = Problems.of(tensors)
    if slices == 0:
        return _Wave(problems, cholesky(problems, gram_of_weights(problems)))
    packed = gram_of_slices(problems, quantize(problems, column_peaks(problems), slices))
    return _Wave(problems, cholesky(problems, packed))


def _wave_of(factors: Factors) -> tuple[_Wave, Members]:
    """The wave that all these factors belong to, and which of its matrices they are."""
    from kappa_fast.kernels.triangular import Members

    wave: _Wave = factors.data[0].wave
    if "members" not in factors.cache:
        factors.cache["members"] = Members.of(wave.problems, [place.position for place in factors.data])
    return wave, factors.cache["members"]


def _blocks(problems: Problems, chosen: Sequence[int]) -> Blocks:
    from kappa_fast.kernels.apply import Blocks

    return Blocks.of(problems, list(chosen))


def _padded(blocks: Panel) -> Tensor:
    if blocks.width == LANES:
        return blocks.data.contiguous()
    return torch.nn.functional.pad(blocks.data, (0, LANES - blocks.width))


def _cut(data: Tensor, blocks: Panel) -> Panel:
    return Panel(data[:, : blocks.width], blocks.rows)
