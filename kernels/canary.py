"""Small problems with known answers, which check the kernels on a device before they compute results.

Some compilers miscompile a kernel silently (a cast before a float64 product, an accumulator that is promoted too late),
so the results of a device are compared with float64 on the host: once per process and device for kernels that do not
depend on the dtype, and once for every storage class of a wave.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from . import apply, cholesky, coarse, gram, orthogonal, panel, quantize, ritz, shifted, start, triangular
from .problems import (
    FIELDS,
    INNER_COLUMNS,
    INNER_NONE,
    SLICE,
    Problems,
    Storage,
    Tensor,
    binades,
    target_of,
)
from .splits import triangular_tiles
from .steps import Steps

EXACT = 1e-11  # relative error of float64 results; wrong ones are off by 1e-8 (a float32 somewhere) or all of it
SINGLE = 1e-4  # relative error of results of float32 factors; a single TF32 product would be off by 1e-3
# Waves of an odd number of matrices. The first one is updated behind two super-panels of its factor.
DEFINITE = ((700, 600), (90, 40), (33, 17))
STORED = ((208, 144), (160, 48), (48, 32))
LONG = (gram.FLOAT_ROWS.value + 64, 32)  # more rows than the matrix unit sums by itself
FAR = 1 << 31  # entries, and bytes of slices: places from here on are no 32-bit numbers
log = logging.getLogger("kappa_fast")


class CanaryError(RuntimeError):
    """A kernel computed a wrong result on this device."""


@cache
def check_device(device: torch.device) -> None:
    """Check the kernels that do not depend on the dtype: Cholesky, its residuals, solves, inner products,
    orthogonalization, Ritz values.

    Raises:
        CanaryError: a kernel is wrong on the device; the message names the kernel.
    """
    matrices = [_numbers(m, n, n).float() for m, n in DEFINITE]
    problems = Problems.of([a.to(device) for a in matrices])
    grams = [a.double().T @ a.double() + torch.eye(a.shape[1], dtype=torch.float64) for a in matrices]
    for dtype, allowed in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        factored = cholesky.cholesky(problems, _packed(problems, grams, dtype))
        lowers = [torch.tril(view).cpu().double() for view in problems.gram_views(factored.packed)]
        for lower, g in zip(lowers, grams, strict=True):
            _compare("cholesky", device, lower @ lower.T, g, allowed)
        _check_triangular(problems, factored, lowers, allowed)
    _check_shifted(problems, grams)
    _check_blocks(device)
    _check_ritz(device)
    _check_splits(device)
    _check_start(device)
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > 6 * FAR:
        _check_far(device)
    else:
        log.info("addresses beyond 2 GiB are not checked: %s does not have enough memory", device)


def _packed(problems: Problems, grams: list[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    packed = torch.zeros(problems.gram_elements, dtype=dtype, device=problems.device)
    for view, g in zip(problems.gram_views(packed), grams, strict=True):
        view.copy_(g)
    return packed


@cache
def check_storage(device: torch.device, storage: Storage) -> None:
    """Check the kernels that read stored weights for one storage class: peaks, slices, Gram matrices, products.

    Raises:
        CanaryError: a kernel is wrong on the device; the message names the kernel.
    """
    problems, exact = _wave(storage, STORED, device)
    peaks = quantize.column_peaks(problems)
    found = peaks.view(torch.float32).cpu().double().split(problems.n.tolist())
    for got, a in zip(found, exact, strict=True):
        _compare("column_peaks", device, got, a.abs().amax(dim=0), 0.0)
    for count, bits in ((2, 7), (3, 7), (4, 7), (2, 8)):
        _check_slices(problems, peaks, count, bits, exact, storage)
    if storage.dtype in (torch.bfloat16, torch.float16):
        for wave, known in ((problems, exact), _wave(storage, (LONG,), device)):
            for view, a in zip(wave.gram_views(gram.gram_of_weights(wave)), known, strict=True):
                _compare(f"gram_of_weights of {storage}", device, torch.tril(view), torch.tril(a.T @ a), 1e-5)
    _check_products(problems, exact, storage)


def _wave(storage: Storage, sizes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Problems, list[Tensor]]:
    """Matrices of a class on the device, and their values in float64 on the host."""
    stored = [_stored(storage, *size) for size in sizes]
    return Problems.of([_laid_out(a.to(device), storage) for a in stored]), [a.to(torch.float64) for a in stored]


def _check_slices(
    problems: Problems, peaks: Tensor, count: int, bits: int, exact: list[Tensor], storage: Storage
) -> None:
    """Check that slices hold a matrix Q within the given distance, and that G is Q^T Q: proofs rely on both."""
    device = problems.device
    slices = quantize.quantize(problems, peaks, count, bits=bits)
    views = problems.gram_views(gram.gram_of_slices(problems, slices))
    for view, q, a, squared in zip(views, slices.dense(problems), exact, slices.residual.tolist(), strict=True):
        left = (a - q).abs()
        true = float(torch.linalg.matrix_norm(left)) ** 2
        if bits == 8:
            true = min(true, float(left.sum(dim=0).max() * left.sum(dim=1).max()))
        if not true * (1 - EXACT) <= squared <= true * (1 + 1e-8):
            raise CanaryError(f"quantize computes {squared:.17g} instead of {true:.17g} on {device} for {storage}")
        if not squared**0.5 <= 2.0 ** (3 - bits * count) * float(torch.linalg.matrix_norm(a)):
            raise CanaryError(f"quantize leaves too large a remainder on {device} for {storage}")
        what = f"gram_of_slices, {count} slices of {bits} bits of {storage},"
        _compare(what, device, torch.tril(view), torch.tril(q.T @ q))


def _check_products(problems: Problems, exact: list[Tensor], storage: Storage) -> None:
    device, blocks = problems.device, apply.Blocks.of(problems)
    x = [_numbers(a.shape[1], 16, 5) for a in exact]
    packed = torch.cat(x).to(device)
    image, squares = apply.times(problems, blocks, packed)
    back = apply.transposed_times(problems, blocks, image)
    weighted = apply.binade_times(problems, blocks, packed)
    images = [a @ b for a, b in zip(exact, x, strict=True)]
    _compare(f"times of {storage}", device, image, torch.cat(images))
    _compare(f"times of {storage}", device, squares, torch.stack([(a * a).sum() for a in exact]))
    backs = [a.T @ b for a, b in zip(exact, images, strict=True)]
    _compare(f"transposed_times of {storage}", device, back, torch.cat(backs))
    wanted = [binades(a).square() @ b for a, b in zip(exact, x, strict=True)]
    _compare(f"binade_times of {storage}", device, weighted, torch.cat(wanted))


def _check_triangular(
    problems: Problems, factored: cholesky.Factored, lowers: list[Tensor], allowed: float = EXACT
) -> None:
    device, members = problems.device, triangular.Members.of(problems)
    x = [_numbers(len(lower), 16, 6) for lower in lowers]
    packed = torch.cat(x).to(device)
    products = [lower @ b for lower, b in zip(lowers, x, strict=True)]
    transposed = [lower.T @ b for lower, b in zip(lowers, x, strict=True)]
    _compare(
        "lower_product",
        device,
        triangular.lower_product(problems, factored, members, packed),
        torch.cat(products),
        allowed,
    )
    found = triangular.transposed_product(problems, factored, members, packed)
    _compare("transposed_product", device, found, torch.cat(transposed), allowed)
    found = triangular.forward_solve(problems, factored, members, torch.cat(products).to(device))
    _compare("forward_solve", device, found, torch.cat(x), allowed)
    found = triangular.backward_solve(problems, factored, members, torch.cat(transposed).to(device))
    _compare("backward_solve", device, found, torch.cat(x), allowed)


def _check_shifted(problems: Problems, grams: list[Tensor]) -> None:
    """Check the residuals that proofs rely on: a residual that is too small would prove a wrong bound."""
    device = problems.device
    packed = _packed(problems, grams)
    kept = shifted.Mirrored.of(problems, packed)
    _compare("traces", device, kept.traces(), torch.stack([g.trace() for g in grams]))
    chosen = range(len(grams))
    for sign, shifts in ((1, [0.5, 0.25, 0.125]), (-1, [4e3, 1e3, 1e3])):
        found = kept.factored(chosen, shifts, sign)
        if int(found.factors.info.abs().max()):
            raise CanaryError(f"cholesky broke down on {device} for a shifted matrix that is definite")
        factors = [torch.tril(view).cpu() for view in problems.gram_views(packed)]
        moved = [sign * (g - t * torch.eye(len(g), dtype=torch.float64)) for g, t in zip(grams, shifts, strict=True)]
        squares, sizes = found.residuals()
        _compare("sizes of factors", device, sizes, torch.stack([(lower * lower).sum() for lower in factors]))
        small = float((squares.sqrt() / sizes).max())
        if not small <= EXACT:
            raise CanaryError(f"residuals of good factors are {small:.1e} on {device}, where {EXACT:.0e} is allowed")
        rests = zip(moved, factors, strict=True)
        left = torch.stack([torch.linalg.matrix_norm(m - lower @ lower.T) for m, lower in rests])
        allowed = squares.sqrt().cpu() + EXACT * sizes.cpu()
        if not bool((left <= allowed).all()):
            raise CanaryError(f"factors are off by {left.tolist()} on {device}, but residuals are {allowed.tolist()}")
        apart = float(found.deviations(squares, sizes).max())
        if not apart <= 1:
            raise CanaryError(f"deviations of good factors are {apart:.1e} on {device}, where 1 is allowed")
    for view in problems.gram_views(packed):
        view.sub_(torch.tril(view) * 1e-6)
    apart = float(found.deviations(squares, sizes).min())
    if not apart > 1:
        raise CanaryError(f"deviations of wrong factors are {apart:.1e} on {device}, where more than 1 is wanted")
    _check_residuals(problems, grams)
    _check_coarse(problems, grams)


def _check_coarse(problems: Problems, grams: list[Tensor]) -> None:
    """Check coarse factors and their residuals: of what was computed, and after 5% more of every diagonal."""
    device = problems.device
    whole = shifted.Mirrored.of(problems, _packed(problems, grams))
    bounds = [1.0025 * float(torch.linalg.eigvalsh(g)[-1]) for g in grams]
    found = coarse.coarse_factors(whole, range(len(grams)), bounds)
    if int(found.info.abs().max()):
        raise CanaryError(f"coarse factors broke down on {device} for a shifted matrix that is definite")
    for scale, least, most in ((1.0, 0.0, 2e-3), (1.05, 0.05, 10.0)):
        found.narrow.mul_(scale)
        squares, sizes = found.residuals()
        factors = found.dense()
        rests = [
            b * torch.eye(len(g), dtype=torch.float64) - g - lower @ lower.T
            for b, g, lower in zip(bounds, grams, factors, strict=True)
        ]
        wanted = torch.stack([torch.linalg.matrix_norm(rest) for rest in rests])
        ones, lengths = torch.ones_like(wanted), torch.stack([(x * x).sum() for x in factors])
        _compare("residuals of coarse factors", device, squares.cpu().sqrt() / wanted, ones, 1e-7)
        _compare("sizes of coarse factors", device, sizes.cpu() / lengths, ones)
        left = wanted / torch.tensor(bounds, dtype=torch.float64)
        if not (least <= float(left.min()) and float(left.max()) <= most):
            raise CanaryError(f"coarse factors leave {left.tolist()} on {device}, not {least} to {most}")


def _check_residuals(problems: Problems, grams: list[Tensor]) -> None:
    """Check residuals that are not zero: a quarter for columns finished with half the inverse, and for twice the
    identity the error of its root, 2.7e-16 or, where products are rounded before sums, 4.4e-16."""
    device = problems.device
    squares, first = _first_step(problems, grams)
    wanted = [2 * float(torch.linalg.matrix_norm(torch.tril(g)[64:, :64]) / 4) ** 2 for g in grams]
    counts = triangular_tiles(problems.n, cholesky.BLOCK.value)
    found = torch.stack([squares[k : k + c].sum() for k, c in zip(first, counts.tolist(), strict=True)])
    _compare("residuals of columns", device, found, torch.tensor(wanted, dtype=torch.float64))
    squares, first = _first_step(problems, [2 * torch.eye(len(g), dtype=torch.float64) for g in grams])
    for k, n in zip(first, problems.n.tolist(), strict=True):
        off = float((squares[k] / min(n, 64)).sqrt())
        if not 2.7e-16 <= off <= 4.5e-16:
            raise CanaryError(f"residuals of roots are {off:.1e} on {device}, where 2.7e-16 to 4.4e-16 are right")


def _first_step(problems: Problems, grams: list[Tensor]) -> tuple[Tensor, list[int]]:
    """Squares by tiles after the first step with its inverses halved, zero where nothing was done; and their starts."""
    device, target = problems.device, target_of(problems.device)
    side = cholesky.side_of(target, cholesky.products_of(target, torch.float64))
    steps = Steps.of(problems, cholesky.BLOCK.value, cholesky.SUPER.value, side)
    tiles = problems.tiles(triangular_tiles(problems.n, cholesky.BLOCK.value))
    starts, total = cholesky.diagonal_starts(problems)
    squares, inverses = (torch.zeros(k, dtype=torch.float64, device=device) for k in (tiles.total, total))
    info = torch.zeros(len(grams), dtype=torch.int32, device=device)
    factored = cholesky.Factored(_packed(problems, grams), inverses, starts, info)
    residuals = cholesky.Residuals(squares, squares.clone(), tiles.first)
    cholesky.factor_diagonals(problems, factored, steps, 0, residuals)
    inverses.div_(2)
    cholesky.finish_columns(problems, factored, steps, 0, residuals)
    return squares.cpu(), tiles.first.tolist()


def _check_blocks(device: torch.device) -> None:
    counts = [600, 70]
    v, w = [_numbers(n, 80, 7) for n in counts], [_numbers(n, 16, 8) for n in counts]
    rows = panel.Rows.of(counts, device)
    bases, blocks = torch.cat(v).to(device), torch.cat(w).to(device)
    inner = torch.stack([a.T @ b for a, b in zip(v, w, strict=True)])
    _compare("inner", device, panel.inner(rows, bases, blocks), inner)
    combined = torch.cat([a @ c for a, c in zip(v, inner, strict=True)])
    _compare("combine", device, panel.combine(rows, bases, inner.to(device)), combined)
    _compare("subtract", device, panel.subtract(rows, bases, inner.to(device), blocks), torch.cat(w) - combined)
    q, coupling = orthogonal.orthonormalized(rows, blocks, torch.zeros(2, dtype=torch.float64, device=device))
    for block, basis, b in zip(w, q.cpu().split(counts), coupling.cpu(), strict=True):
        _compare("orthonormalized", device, basis.T @ basis, torch.eye(16, dtype=torch.float64))
        _compare("orthonormalized", device, basis @ b, block)


def _check_ritz(device: torch.device) -> None:
    half = torch.stack([_numbers(48, 48, 9), _numbers(48, 48, 10)])
    full = half @ half.mT
    full[:, :16, 32:] = full[:, 32:, :16] = 0
    full += 100 * torch.eye(48, dtype=torch.float64)  # definite without its corners
    columns = [full[:, : 16 * j + 16, 16 * j : 16 * j + 16] for j in range(3)]
    t = ritz.Tridiagonal.of([c.to(device) for c in columns], half[:, :16, :16].to(device))
    largest = torch.linalg.eigvalsh(full)[:, -1]
    theta = ritz.largest_eigenvalue(t)
    _compare("largest_eigenvalue", device, theta, largest, 1e-9)
    values = largest[:, None] * torch.tensor([1.001, 1.5], dtype=torch.float64)
    start = torch.eye(48, 16, dtype=torch.float64)
    shifted = values[:, :, None, None] * torch.eye(48, dtype=torch.float64) - full[:, None]
    ends = torch.linalg.solve(shifted, start.expand(2, 2, 48, 16))[:, :, 32:]
    wanted = torch.linalg.matrix_norm(half[:, None, :16, :16] @ ends)
    _compare("reach", device, ritz.reach(t, values.to(device)), wanted, 1e-9)
    vectors = ritz.leading_vectors(t, theta).cpu()[:, :, -1:]
    _compare("leading_vectors", device, full @ vectors, largest[:, None, None] * vectors, 1e-3)


def _check_splits(device: torch.device) -> None:
    a = _numbers(16400, 40, 11).float()  # long enough to be cut along its rows
    problems = Problems.of([a.to(device)])
    slices = quantize.quantize(problems, quantize.column_peaks(problems), 3)
    (view,) = problems.gram_views(gram.gram_of_slices(problems, slices))
    exact = a.double()
    _compare("gram_of_slices in parts", device, torch.tril(view), torch.tril(exact.T @ exact), 1e-5)
    half = a.bfloat16()
    problems = Problems.of([half.to(device)])
    exact = half.double()
    for dtype in (torch.float64, torch.float32):
        packed = torch.empty(problems.gram_elements, dtype=dtype, device=device)
        (view,) = problems.gram_views(gram.gram_of_weights(problems, out=packed))
        _compare(f"gram_of_weights in parts, {dtype}", device, torch.tril(view), torch.tril(exact.T @ exact), 1e-5)


def _check_start(device: torch.device) -> None:
    """Check that start blocks are Gaussian and depend on every bit of every entry, see start.py."""
    block = start.gaussian_blocks(panel.Rows.of([4000, 4000], device), [1, 2]).cpu()
    inner = block.T @ block / 8000
    if not float((inner - torch.eye(16, dtype=torch.float64)).abs().max()) < 0.1 or torch.equal(*block.split(4000)):
        raise CanaryError(f"gaussian_blocks are not Gaussian on {device}")
    a = _numbers(start.STRIPE.value + 70, 40, 12).float()
    changed = a.clone().view(torch.int32)
    changed[-1, ::2] ^= 1
    found = start.column_digests(Problems.of([x.to(device) for x in (a, changed.view(torch.float32), a)])).cpu()
    before, after, again = found.split(40)
    if not torch.equal(before, again) or (before == after).tolist() != 20 * [False, True]:
        raise CanaryError(f"column_digests does not tell columns apart on {device}")


def _check_far(device: torch.device) -> None:
    """Check entries and slices more than 2^31 places apart. On a CPU, memory that is not touched is not allocated."""
    n, m = 48, 264
    pitch = -(-FAR // (m - 8) // 16) * 16
    a = _stored(Storage(torch.bfloat16, INNER_COLUMNS, True), m, n)
    whole = torch.empty(m * pitch, dtype=torch.bfloat16, device=device)
    far = whole.as_strided((m, n), (pitch, 1))
    far.copy_(a)
    problems, exact = Problems.of([far]), a.double()
    wanted = torch.tril(exact.T @ exact)
    (view,) = problems.gram_views(gram.gram_of_weights(problems))
    _compare("gram_of_weights beyond 2 GiB", device, torch.tril(view), wanted, 1e-5)
    _check_products(problems, [exact], Storage.of(far))
    near = Problems.of([a.to(device)])
    if not torch.equal(start.column_digests(problems), start.column_digests(near)):
        raise CanaryError(f"column_digests reads wrong entries beyond 2 GiB on {device}")
    del whole, far, problems
    table = near.table.clone()
    table.view(-1, FIELDS.value)[:, SLICE.value] += FAR
    apart = replace(near, table=table, slice_bytes=near.slice_bytes + FAR)
    (view,) = apart.gram_views(gram.gram_of_slices(apart, quantize.quantize(apart, quantize.column_peaks(apart), 2)))
    _compare("gram_of_slices beyond 2 GiB", device, torch.tril(view), wanted, 1e-3)


def _compare(what: str, device: torch.device, found: Tensor, wanted: Tensor, allowed: float = EXACT) -> None:
    error = float((found.cpu() - wanted).abs().max()) / float(wanted.abs().max())
    if not error <= allowed:
        raise CanaryError(f"{what} is off by {error:.1e} on {device}, where {allowed:.0e} is allowed")


def _numbers(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(seed))


def _stored(storage: Storage, m: int, n: int) -> Tensor:
    """Numbers of many sizes in the dtype, an odd number of rows and columns unless the class is an aligned one."""
    odd = 0 if storage.aligned else 3
    scales = torch.exp2(torch.arange(n - odd, dtype=torch.float64) % 7 - 3)
    return (_numbers(m - odd, n - odd, m) * scales).clamp(-200, 200).to(storage.dtype)


def _laid_out(a: Tensor, storage: Storage) -> Tensor:
    """The same matrix in the memory layout of the class."""
    if storage.inner == INNER_COLUMNS:
        return a.contiguous()
    if storage.inner == INNER_NONE:
        wide = a.new_zeros((a.shape[0], 2 * a.shape[1]))
        wide[:, ::2] = a
        return wide[:, ::2]
    return a.T.contiguous().T
