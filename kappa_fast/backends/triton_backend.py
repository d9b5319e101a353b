"""The Triton backend: every operation on a wave as a handful of launches, whatever the number of matrices.

The rungs that these kernels do not climb and the proofs beyond 28 bits are torch's, one matrix after the other: few
matrices get there. Float64 weights are torch's altogether: four slices hold 28 bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BackendError
from .base import DROP, ExactProducts, Extension, Factors, Operand, Panel, Ritz, Rung, Tensor
from .start import block_key
from .torch_backend import SAFE, SLENDER, TorchBackend, prepare_one

if TYPE_CHECKING:
    from kappa_fast.kernels.apply import Blocks
    from kappa_fast.kernels.cholesky import Factored
    from kappa_fast.kernels.panel import Rows
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.ritz import Tridiagonal
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

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype, *, proofs: bool = False) -> int:
        """Beside the Gram matrix, its diagonal tiles with their inverses and the slices (a proof takes four), blocks of
        16 columns: Krylov bases of 32 blocks at most, and three images. Higher rungs take more, one at a time."""
        m, n = shape
        kinds = [rung.kind for rung in self.rungs(shape, dtype) if rung.kind in KINDS]
        if not kinds:
            return self._torch.workspace(shape, dtype)
        slices = 4 if proofs else max(KINDS[kind] for kind in kinds if kind != SLICES[4].kind)
        return 8 * n * (n + 144) + slices * (m + 128) * n + 8 * LANES * (40 * n + 3 * m)

    def prepare(self, weights: Sequence[Tensor]) -> list[Operand]:
        """One launch per storage class and one read for all peaks; what must be scaled goes through torch.

        The first thing that happens to any wave, so kernels are checked here before they are trusted with it.
        """
        from kappa_fast.kernels.problems import Problems, supported

        moved = [weight.detach().to(self.device) for weight in weights]
        narrow = [i for i, weight in enumerate(moved) if supported(weight.dtype) and weight.numel()]
        found: dict[int, float] = {}
        if narrow:
            problems = Problems.of([_tall(moved[i]) for i in narrow])
            self._trust(problems)
            found = dict(zip(narrow, _peaks(problems), strict=True))
        return [self._operand(weight, found.get(i)) for i, weight in enumerate(moved)]

    def _trust(self, problems: Problems) -> None:
        """Raises CanaryError where a kernel that this wave needs computes something else than it should."""
        from kappa_fast.kernels.canary import check_device, check_storage

        if self.device.type == "cuda":  # the interpreter computes what numpy computes
            check_device(self.device)
            for storage in problems.classes():
                check_storage(self.device, storage)

    def _operand(self, weight: Tensor, peak: float | None) -> Operand:
        if peak is None or (math.isfinite(peak) and peak > 0 and abs(math.frexp(peak)[1]) > SAFE):
            return prepare_one(weight)
        turned = weight.shape[0] < weight.shape[1]
        return Operand(_tall(weight), 0, math.isfinite(peak), peak, turned=turned)

    def digests(self, operands: Sequence[Operand]) -> list[bytes]:
        """On the device but for 64 bits of every column, which the host hashes: one read."""
        from kappa_fast.kernels.problems import Problems, supported
        from kappa_fast.kernels.start import column_digests

        narrow = [i for i, a in enumerate(operands) if supported(a.tensor.dtype)]
        found = dict.fromkeys(range(len(operands)), b"")
        if narrow:
            problems = Problems.of([operands[i].tensor for i in narrow])
            columns = column_digests(problems).cpu().split(problems.n.tolist())
            for i, digests in zip(narrow, columns, strict=True):
                label = f"columns {operands[i].tensor.dtype} {operands[i].shape} ".encode()
                found[i] = hashlib.sha256(label + digests.numpy().tobytes()).digest()
        wide = [i for i in found if not found[i]]
        found |= zip(wide, self._torch.digests([operands[i] for i in wide]), strict=True)
        return [found[i] for i in range(len(operands))]

    def gaussian(self, ns: Sequence[int], seeds: Sequence[bytes], width: int, salt: int, dtype: torch.dtype) -> Panel:
        from kappa_fast.kernels.start import gaussian_blocks

        keys = [block_key(n, width, salt, seed)[:8] for n, seed in zip(ns, seeds, strict=True)]
        rows = _rows_of(tuple(ns), self.device)
        data = gaussian_blocks(rows, [int.from_bytes(key, "little", signed=True) for key in keys])
        return Panel(data[:, :width].to(dtype), tuple(ns))

    def gram(self, operands: Sequence[Operand], dtype: torch.dtype, chunk: int | None = None) -> list[Tensor]:
        return self._torch.gram(operands, dtype, chunk)

    def cholesky(self, grams: Sequence[Tensor]) -> list[bool]:
        return self._torch.cholesky(grams)

    def exact_products(self, operands: Sequence[Operand], level: int) -> ExactProducts | None:
        from kappa_fast.kernels.problems import supported

        from .triton_proofs import COUNTS, SliceProducts

        which = [i for i, a in enumerate(operands) if supported(a.tensor.dtype)]
        return SliceProducts(operands, which, COUNTS[level]) if which and level < len(COUNTS) else None

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

    def departure(
        self, operands: Sequence[Operand], factors: Factors, blocks: Panel, *, transposed: bool = False
    ) -> Panel:
        if factors.rung.kind not in KINDS:
            return self._torch.departure(operands, factors, blocks, transposed=transposed)
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
        from kappa_fast.kernels.apply import times, transposed_times
        from kappa_fast.kernels.problems import Problems, supported

        if not all(supported(a.tensor.dtype) for a in operands):
            return self._torch.normal(operands, blocks)
        problems = Problems.of([a.tensor for a in operands])
        places = _blocks(problems, range(len(operands)))
        image, _ = times(problems, places, _padded(blocks.to(torch.float64)))
        return _cut(transposed_times(problems, places, image), blocks).to(blocks.data.dtype)

    def orthonormalize(self, blocks: Panel) -> Panel:
        from kappa_fast.kernels.orthogonal import orthonormalized

        rows = self._rows(blocks)
        limits = torch.zeros(rows.members, dtype=torch.float64, device=self.device)
        return _cut(orthonormalized(rows, _padded(blocks.to(torch.float64)), limits)[0], blocks).to(blocks.data.dtype)

    def extend(self, bases: Panel, blocks: Panel, scale: Tensor) -> Extension:
        """Gram-Schmidt twice before and once after two passes of orthonormalization: what these brought up from the
        size of rounding carries as much of the basis. All in float64, whatever the blocks are stored in."""
        from kappa_fast.kernels.orthogonal import identities, one_pass
        from kappa_fast.kernels.panel import inner, subtract

        rows, basis, new = self._rows(blocks), bases.data.to(torch.float64), _padded(blocks.to(torch.float64))
        coefficients = torch.zeros((), dtype=torch.float64, device=self.device)
        for _ in range(2):
            part = inner(rows, basis, new)
            new, coefficients = subtract(rows, basis, part, new), coefficients + part
        scale = torch.maximum(scale, coefficients.abs().amax(dim=(1, 2)))
        limits = DROP * float(torch.finfo(blocks.data.dtype).eps) / 2 * scale
        coupling = identities(rows.members, self.device)
        for _ in range(2):
            new, coupling = one_pass(rows, new, limits, coupling)
        new = subtract(rows, basis, inner(rows, basis, new), new)
        new, coupling = one_pass(rows, new, limits, coupling)
        b = blocks.width
        return Extension(
            coefficients[:, :, :b], _cut(new, blocks).to(blocks.data.dtype), coupling[:, :b, :b].contiguous(), scale
        )

    def combine(self, bases: Panel, coefficients: Tensor) -> Panel:
        from kappa_fast.kernels.panel import combine

        data = combine(self._rows(bases), bases.data.to(torch.float64), coefficients.to(torch.float64))
        return Panel(data, bases.rows).to(bases.data.dtype)

    def svd(self, blocks: Panel) -> tuple[Panel, Tensor, Tensor]:
        from kappa_fast.kernels.orthogonal import orthonormalized
        from kappa_fast.kernels.panel import combine
        from kappa_fast.kernels.ritz import svd_in_batches

        rows, b = self._rows(blocks), blocks.width
        limits = torch.zeros(rows.members, dtype=torch.float64, device=self.device)
        basis, coupling = orthonormalized(rows, _padded(blocks), limits)
        u, s, v = svd_in_batches(coupling[:, :b, :b])
        return Panel(combine(rows, basis[:, :b], u), blocks.rows), s, v

    def norms(self, blocks: Panel) -> Tensor:
        from kappa_fast.kernels.panel import inner

        data = blocks.data.to(torch.float64).contiguous()
        parts = [inner(self._rows(blocks), x, x) for x in torch.split(data, LANES, dim=1)]
        return torch.cat([part.diagonal(dim1=1, dim2=2) for part in parts], dim=1).sqrt()

    def ritz(self, columns: Sequence[Tensor], coupling: Tensor) -> Ritz:
        if coupling.shape[1] != LANES:
            return self._torch.ritz(columns, coupling)
        from kappa_fast.kernels.ritz import Tridiagonal

        return TridiagonalRitz(Tridiagonal.of(columns, coupling))

    def weighted_squares(self, operands: Sequence[Operand], left: Panel, right: Panel) -> Tensor:
        from kappa_fast.kernels.apply import squared_times
        from kappa_fast.kernels.panel import inner
        from kappa_fast.kernels.problems import Problems, supported

        if not all(supported(a.tensor.dtype) for a in operands):
            return self._torch.weighted_squares(operands, left, right)
        problems = Problems.of([a.tensor for a in operands])
        image = squared_times(problems, _blocks(problems, range(len(operands))), _padded(right))
        sums = inner(self._rows(left), left.data, image[:, : left.width])
        return sums.diagonal(dim1=1, dim2=2)

    def _rows(self, blocks: Panel) -> Rows:
        return _rows_of(blocks.rows, self.device)


class TridiagonalRitz:
    """base.Ritz by sections of intervals and inverse iteration, see kernels/ritz.py."""

    def __init__(self, t: Tridiagonal) -> None:
        from kappa_fast.kernels.ritz import largest_eigenvalue

        self._t = t
        self.theta = largest_eigenvalue(t)

    def reach(self, gaps: Tensor) -> Tensor:
        from kappa_fast.kernels.ritz import reach

        return reach(self._t, self.theta[:, None] * (1 + gaps))

    def vectors(self, count: int) -> Tensor:
        from kappa_fast.kernels.ritz import leading_vectors

        return leading_vectors(self._t, self.theta)[:, :, -count:]


@lru_cache(maxsize=32)  # the same members take part in several calls of a step
def _rows_of(counts: tuple[int, ...], device: torch.device) -> Rows:
    from kappa_fast.kernels.panel import Rows

    return Rows.of(counts, device)


def _tall(weight: Tensor) -> Tensor:
    return weight.T if weight.shape[0] < weight.shape[1] else weight


def _peaks(problems: Problems) -> list[float]:
    """The largest absolute entry of every matrix, inf or nan if it has such; one read."""
    from kappa_fast.kernels.quantize import column_peaks

    owner = torch.repeat_interleave(problems.n).to(problems.device)
    bits = torch.zeros(len(problems.n), dtype=torch.int32, device=problems.device)
    bits.scatter_reduce_(0, owner, column_peaks(problems), "amax")
    peaks: list[float] = bits.view(torch.float32).tolist()
    return peaks


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
