"""The Triton backend: every operation on a wave takes a few launches for any number of matrices.

The torch backend does the rungs and proofs that need more than the 28 bits of four slices, one matrix after the other:
few matrices need them, except for float64 weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BackendError
from .base import CLIMBING, DROP, ExactProducts, Extension, Factors, Operand, Panel, Ritz, Rung, Tensor
from .rates import rates_of
from .start import block_key
from .torch_backend import SAFE, SLENDER, TorchBackend, prepare_one
from .triton_waves import (
    BYTES,
    FEW_BITS,
    KEPT,
    KINDS,
    LANES,
    SLICES,
    WEIGHTS16,
    InWave,
    TorchOperation,
    TridiagonalRitz,
    Wave,
    WaveOperation,
    WaveShare,
    blocks_of,
    can_read,
    factor_grams,
    padded,
    peaks_of,
    problems_of,
    rows_of,
    tall,
    unpadded,
    volumes_of,
)

if TYPE_CHECKING:
    from kappa_fast.kernels.panel import Rows
    from kappa_fast.kernels.problems import Problems
    from kappa_fast.kernels.triangular import Members

# An assumption: torch works on a single matrix at a fraction 1 / ALONE of the full rate.
ALONE = 4.0


class TritonBackend:
    """See base.Backend for what each operation promises."""

    name = "triton"
    side_by_side = False

    def __init__(self, device: torch.device) -> None:
        try:
            from kappa_fast.kernels.launch import tally
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
        self._rates = rates_of(device)
        self._reads, self._launched = 0, tally.launches

    def rungs(self, shape: tuple[int, int], dtype: torch.dtype, *, proofs: bool = False) -> tuple[Rung, ...]:
        """The cheapest float32 factor if float32 resolves trained matrices, then slices, then the rungs of torch.

        Slices are omitted if torch's first rung takes less time by the rates of the device. With proofs the first rung
        is the one whose Gram matrix is kept for these, if the dtype has one.
        """
        m, n = shape
        rest = tuple(replace(r, quick=None) for r in self._torch.rungs(shape, dtype) if r.dtype == torch.float64)
        if dtype == torch.float64:
            return rest
        rates = self._rates
        narrow = [] if n >= SLENDER * m else [SLICES[2]]
        if narrow and dtype in (torch.bfloat16, torch.float16):
            narrow.insert(0, WEIGHTS16)
        narrow.sort(key=lambda rung: rates.seconds(shape, rung.kind))  # stable: WEIGHTS16 comes first at equal cost
        wide = [SLICES[3]] if narrow else [SLICES[3], SLICES[4]]
        limit = ALONE * rates.seconds(shape, rest[0].kind)
        if narrow and proofs and dtype in FEW_BITS and rates.seconds(shape, BYTES.kind) <= limit:
            narrow = [BYTES]
        found = [*narrow[:1], *wide]
        return (*(rung for rung in found if rates.seconds(shape, rung.kind) <= limit), *rest)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype, *, proofs: bool = False) -> int:
        m, n = shape
        rungs = self.rungs(shape, dtype, proofs=proofs)
        if rungs[0].kind not in KINDS:
            return self._torch.workspace(shape, dtype)
        first = self.need(shape, rungs[0])
        resolving = int((1 + CLIMBING) * first)
        if rungs[0] == BYTES:  # slices are freed before any matrix climbs, the exact Gram matrix is kept for the proof
            resolving = max(first, int(CLIMBING * first) + self.need(shape, WEIGHTS16)) + 8 * n * (n + 16)
        proving = 8 * n * (n + 180) + max(4 * (m + 128) * n, 6 * n * (n + 200))  # with slices, or a coarse factor
        return max(resolving, proving) if proofs else resolving

    def need(self, shape: tuple[int, int], rung: Rung) -> int:
        """The factor with the inverses of its diagonal tiles, and the larger of the slices (which are freed before the
        search) and the search's blocks of 16 columns: a basis of up to 32 blocks, and three images."""
        m, n = shape
        if rung.kind not in KINDS:
            return self._torch.workspace(shape, rung.dtype)
        count, bits = KINDS[rung.kind]
        slices, blocks = count * (m + 128) * n, 8 * LANES * (40 * n + 3 * m)
        sums = (
            (m + 128) * n // 3 if bits == 8 else 0
        )  # sums over rows and columns of the remainder, see kernels/norms.py
        return rung.dtype.itemsize * n * (n + 144) + max(slices + sums, blocks)

    def prepare(self, weights: Sequence[Tensor]) -> list[Operand]:
        """One launch per storage class and one read for all peaks; torch scales the matrices that need it.

        This is the first operation on any wave, so the kernels that the wave needs are checked here.
        """
        from kappa_fast.kernels.problems import Problems, supported

        moved = [weight.detach().to(self.device) for weight in weights]
        narrow = [i for i, weight in enumerate(moved) if supported(weight.dtype) and weight.numel()]
        found: dict[int, float] = {}
        if narrow:
            problems = Problems.of([tall(moved[i]) for i in narrow])
            self._trust(problems)
            found = dict(zip(narrow, self.read(peaks_of(problems)), strict=True))
        return [self._operand(weight, found.get(i)) for i, weight in enumerate(moved)]

    def _trust(self, problems: Problems) -> None:
        """Raises CanaryError if a kernel that this wave needs computes wrong results."""
        from kappa_fast.kernels.canary import check_device, check_storage

        if self.device.type == "cuda":  # the interpreter computes what numpy computes
            check_device(self.device)
            for storage in problems.classes():
                check_storage(self.device, storage)

    def _operand(self, weight: Tensor, peak: float | None) -> Operand:
        if peak is None or (math.isfinite(peak) and peak > 0 and abs(math.frexp(peak)[1]) > SAFE):
            return prepare_one(weight)
        turned = weight.shape[0] < weight.shape[1]
        return Operand(tall(weight), 0, math.isfinite(peak), peak, turned=turned)

    def digests(self, operands: Sequence[Operand]) -> list[bytes]:
        """The device hashes every column to 64 bits, and the host hashes these: one read."""
        from kappa_fast.kernels.problems import supported
        from kappa_fast.kernels.start import column_digests

        narrow = [i for i, a in enumerate(operands) if supported(a.tensor.dtype)]
        found = dict.fromkeys(range(len(operands)), b"")
        if narrow:
            problems = problems_of([operands[i] for i in narrow])
            self._reads += 1
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
        rows = rows_of(tuple(ns), self.device)
        data = gaussian_blocks(rows, [int.from_bytes(key, "little", signed=True) for key in keys])
        return Panel(data[:, :width].to(dtype), tuple(ns))

    def gram(self, operands: Sequence[Operand], dtype: torch.dtype, chunk: int | None = None) -> list[Tensor]:
        return self._torch.gram(operands, dtype, chunk)

    def cholesky(self, grams: Sequence[Tensor]) -> list[bool]:
        return self._torch.cholesky(grams)

    def exact_products(
        self, operands: Sequence[Operand], level: int, limits: Sequence[float]
    ) -> list[ExactProducts] | None:
        from .triton_proofs import exact_products

        return exact_products(operands, level, limits, self.read)

    def factor(self, operands: Sequence[Operand], rungs: Sequence[Rung]) -> Factors:
        """One launch sequence and one read for each dtype of factors; Gram matrices may be computed in several ways."""
        data: list[Any] = [None] * len(operands)
        usable: dict[torch.dtype, list[int]] = {}
        for i, (a, rung) in enumerate(zip(operands, rungs, strict=True)):
            if rung.kind not in KINDS:
                data[i] = self._torch.factor([a], [rung]).data[0]
            elif can_read(a.tensor, rung):
                usable.setdefault(rung.dtype, []).append(i)
        for dtype, chosen in usable.items():
            chosen.sort(key=lambda i: KINDS[rungs[i].kind])
            wave, kept = factor_grams(
                [operands[i].tensor for i in chosen], [KINDS[rungs[i].kind] for i in chosen], dtype
            )
            if kept is not None:
                exact = [i for i in chosen if rungs[i] == BYTES]
                for place, i in enumerate(exact):
                    operands[i].cache[KEPT] = kept, place
            for position, (i, failed) in enumerate(zip(chosen, self.read(wave.factored.info), strict=True)):
                data[i] = None if failed else InWave(wave, position)
        return Factors(tuple(rungs), tuple(a.shape[1] for a in operands), tuple(data))

    def volumes(self, operands: Sequence[Operand], factors: Factors) -> Tensor:
        """The kernels overwrite their Gram matrices, so their rungs give no norm of these."""
        found = torch.full((len(factors.ns), 3), math.nan, dtype=torch.float64, device=self.device)
        for share in self._wave_shares(factors):
            which = list(share.which)
            if share.wave is None:
                found[which] = self._torch.volumes([operands[i] for i in which], factors.take(which))
            else:
                found[which, :2] = volumes_of(share.wave, [factors.data[i].position for i in which])
        return found

    def product(self, factors: Factors, blocks: Panel) -> Panel:
        from kappa_fast.kernels.triangular import lower_product, transposed_product

        def ours(wave: Wave, members: Members, x: Tensor, out: Tensor) -> None:
            inner = transposed_product(wave.problems, wave.factored, members, x)
            lower_product(wave.problems, wave.factored, members, inner, out)

        return self._each(factors, blocks, ours, self._torch.product)

    def solve(self, factors: Factors, blocks: Panel) -> Panel:
        from kappa_fast.kernels.triangular import backward_solve, forward_solve

        def ours(wave: Wave, members: Members, x: Tensor, out: Tensor) -> None:
            inner = forward_solve(wave.problems, wave.factored, members, x)
            backward_solve(wave.problems, wave.factored, members, inner, out)

        return self._each(factors, blocks, ours, self._torch.solve)

    def departure(
        self, operands: Sequence[Operand], factors: Factors, blocks: Panel, *, transposed: bool = False
    ) -> Panel:
        from kappa_fast.kernels.triangular import backward_solve, forward_solve

        def right(wave: Wave, members: Members, x: Tensor, out: Tensor) -> None:
            backward_solve(wave.problems, wave.factored, members, x, out)

        def left(wave: Wave, members: Members, x: Tensor, out: Tensor) -> None:
            forward_solve(wave.problems, wave.factored, members, x, out)

        ours = [i for i, rung in enumerate(factors.rungs) if rung.kind in KINDS]
        theirs = [i for i, rung in enumerate(factors.rungs) if rung.kind not in KINDS]
        parts = list(blocks.blocks())
        if ours:
            chosen, x = factors.take(ours), blocks.take(ours)
            normal = self.normal([operands[i] for i in ours], self._each(chosen, x, right, None))
            found = self._each(chosen, normal, left, None)
            found = Panel(found.data - x.data, x.rows)
            if not theirs:
                return found
            for i, block in zip(ours, found.blocks(), strict=True):
                parts[i] = block
        if theirs:
            chosen, x = factors.take(theirs), blocks.take(theirs)
            found = self._torch.departure([operands[i] for i in theirs], chosen, x, transposed=transposed)
            for i, block in zip(theirs, found.blocks(), strict=True):
                parts[i] = block
        return Panel.pack(parts)

    def _each(self, factors: Factors, blocks: Panel, ours: WaveOperation, theirs: TorchOperation | None) -> Panel:
        """Apply ``ours`` to every factored wave, and ``theirs`` to the matrices that torch has factored."""
        x = padded(blocks)
        out = torch.empty_like(x)
        for share in self._wave_shares(factors):
            if share.wave is not None and share.members is not None:
                ours(share.wave, share.members, x, out)
            elif theirs is not None:
                found = theirs(factors.take(share.which), blocks.take(share.which))
                into = torch.split(out, list(blocks.rows))
                for i, block in zip(share.which, found.blocks(), strict=True):
                    into[i][:, : blocks.width] = block
        return unpadded(out, blocks)

    def _wave_shares(self, factors: Factors) -> list[WaveShare]:
        """The factors grouped by wave, made once and kept with the factors."""
        from kappa_fast.kernels.problems import on_host, starts_of
        from kappa_fast.kernels.triangular import Members

        if "shares" not in factors.cache:
            waves: dict[int, list[int]] = {}
            for i, place in enumerate(factors.data):
                waves.setdefault(id(place.wave) if isinstance(place, InWave) else 0, []).append(i)
            starts, rows = starts_of(on_host(factors.ns))
            shares = []
            for which in waves.values():
                places = [factors.data[i] for i in which]
                if isinstance(places[0], InWave):
                    wave = places[0].wave
                    members = Members.of(wave.problems, [p.position for p in places], starts[which], rows)
                    shares.append(WaveShare(wave, members, tuple(which)))
                else:
                    shares.append(WaveShare(None, None, tuple(which)))
            factors.cache["shares"] = shares
        found: list[WaveShare] = factors.cache["shares"]
        return found

    def read(self, values: Tensor) -> list[Any]:
        self._reads += 1
        found: list[Any] = values.tolist()
        return found

    @property
    def counts(self) -> dict[str, int]:
        from kappa_fast.kernels.launch import tally

        return {"launches": tally.launches - self._launched, "reads": self._reads}

    def apply(self, operands: Sequence[Operand], blocks: Panel) -> tuple[Panel, Tensor]:
        from kappa_fast.kernels.apply import times
        from kappa_fast.kernels.problems import supported

        if not all(supported(a.tensor.dtype) for a in operands):
            return self._torch.apply(operands, blocks)
        problems = problems_of(operands)
        image, squares = times(problems, blocks_of(problems, range(len(operands))), padded(blocks.to(torch.float64)))
        return Panel(image[:, : blocks.width], tuple(a.shape[0] for a in operands)), squares.sqrt()

    def normal(self, operands: Sequence[Operand], blocks: Panel) -> Panel:
        from kappa_fast.kernels.apply import times, transposed_times
        from kappa_fast.kernels.problems import supported

        if not all(supported(a.tensor.dtype) for a in operands):
            return self._torch.normal(operands, blocks)
        problems = problems_of(operands)
        places = blocks_of(problems, range(len(operands)))
        image, _ = times(problems, places, padded(blocks.to(torch.float64)), squares=False)
        return unpadded(transposed_times(problems, places, image), blocks).to(blocks.data.dtype)

    def orthonormalize(self, blocks: Panel) -> Panel:
        from kappa_fast.kernels.orthogonal import orthonormalized

        rows = self._rows(blocks)
        limits = torch.zeros(rows.members, dtype=torch.float64, device=self.device)
        return unpadded(orthonormalized(rows, padded(blocks.to(torch.float64)), limits)[0], blocks).to(
            blocks.data.dtype
        )

    def extend(self, bases: Panel, blocks: Panel, scale: Tensor) -> Extension:
        """Two passes of Gram-Schmidt, two of orthonormalization, and one more of each: orthonormalizing a direction of
        the size of rounding errors enlarges its error along the basis. All steps are in float64 for any dtype."""
        from kappa_fast.kernels.orthogonal import identities, one_pass
        from kappa_fast.kernels.panel import inner, subtract

        rows, basis, new = self._rows(blocks), bases.data.to(torch.float64), padded(blocks.to(torch.float64))
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
            coefficients[:, :, :b], unpadded(new, blocks).to(blocks.data.dtype), coupling[:, :b, :b].contiguous(), scale
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
        basis, coupling = orthonormalized(rows, padded(blocks), limits)
        u, s, v = svd_in_batches(coupling[:, :b, :b])
        return Panel(combine(rows, basis[:, :b], u), blocks.rows), s, v

    def norms(self, blocks: Panel) -> Tensor:
        from kappa_fast.kernels.panel import inner

        data = blocks.data.to(torch.float64).contiguous()
        parts = [inner(self._rows(blocks), x, x) for x in torch.split(data, LANES, dim=1)]
        return torch.cat([part.diagonal(dim1=1, dim2=2) for part in parts], dim=1).sqrt()

    def ritz(self, columns: Sequence[Tensor], coupling: Tensor, floor: Tensor | None = None) -> Ritz:
        if coupling.shape[1] != LANES:
            return self._torch.ritz(columns, coupling, floor)
        from kappa_fast.kernels.ritz import Tridiagonal

        return TridiagonalRitz(Tridiagonal.of(columns, coupling), floor)

    def weighted_binades(self, operands: Sequence[Operand], left: Panel, right: Panel) -> Tensor:
        from kappa_fast.kernels.apply import binade_times
        from kappa_fast.kernels.panel import inner
        from kappa_fast.kernels.problems import supported

        if not all(supported(a.tensor.dtype) for a in operands):
            return self._torch.weighted_binades(operands, left, right)
        problems = problems_of(operands)
        image = binade_times(problems, blocks_of(problems, range(len(operands))), padded(right))
        sums = inner(self._rows(left), left.data, image[:, : left.width])
        return sums.diagonal(dim1=1, dim2=2)

    def _rows(self, blocks: Panel) -> Rows:
        return rows_of(blocks.rows, self.device)
