"""Small problems with known answers, run on a device before its kernels are trusted with anything.

Some compilers turn a kernel into something else without a word (a cast before a float64 product, an accumulator that is
promoted too late), so what a device computes is compared with float64 on the host: once per process and device for
the kernels that know no dtype, and once for every storage class that a wave brings.
"""

from __future__ import annotations

from functools import cache

import torch

from . import apply, cholesky, gram, orthogonal, panel, quantize, ritz, shifted, triangular
from .problems import INNER_COLUMNS, INNER_NONE, Problems, Storage, Tensor
from .quantize import DIGIT_BITS

EXACT = 1e-11  # relative error of float64 results; wrong ones are off by 1e-8 (a float32 somewhere) or all of it


class CanaryError(RuntimeError):
    """A kernel computed something else than it should on this device."""


@cache
def check_device(device: torch.device) -> None:
    """The kernels that know no dtype: Cholesky, its residuals, solves, inner products, orthogonalization, Ritz values.

    Raises:
        CanaryError: one of them is wrong there; it names which.
    """
    matrices = [_numbers(400, 330, 1).float(), _numbers(90, 40, 2).float()]
    problems = Problems.of([a.to(device) for a in matrices])
    packed = torch.zeros(problems.gram_elements, dtype=torch.float64, device=device)
    grams = [a.double().T @ a.double() for a in matrices]
    for view, g in zip(problems.gram_views(packed), grams, strict=True):
        view.copy_(g)
    factored = cholesky.cholesky(problems, packed)
    lowers = [torch.tril(view).cpu() for view in problems.gram_views(factored.packed)]
    for lower, g in zip(lowers, grams, strict=True):
        _compare("cholesky", device, lower @ lower.T, g)
    _check_triangular(problems, factored, lowers)
    _check_shifted(problems, grams)
    _check_blocks(device)
    _check_ritz(device)
    _check_splits(device)


@cache
def check_storage(device: torch.device, storage: Storage) -> None:
    """The kernels that read stored weights, for one storage class: peaks, slices, Gram matrices, products.

    Raises:
        CanaryError: one of them is wrong there; it names which.
    """
    stored = [_stored(storage, *size).to(device) for size in ((208, 144), (160, 48))]
    tensors = [_laid_out(a, storage) for a in stored]
    exact = [a.cpu().to(torch.float64) for a in stored]
    problems = Problems.of(tensors)
    peaks = quantize.column_peaks(problems)
    found = peaks.view(torch.float32).cpu().double().split(problems.n.tolist())
    for got, a in zip(found, exact, strict=True):
        _compare("column_peaks", device, got, a.abs().amax(dim=0), 0.0)
    for count in (2, 3, 4):
        _check_slices(problems, peaks, count, exact, storage)
    if storage.dtype in (torch.bfloat16, torch.float16):
        for view, a in zip(problems.gram_views(gram.gram_of_weights(problems)), exact, strict=True):
            _compare(f"gram_of_weights of {storage}", device, torch.tril(view), torch.tril(a.T @ a), 1e-5)
    _check_products(problems, exact, storage)


def _check_slices(problems: Problems, peaks: Tensor, count: int, exact: list[Tensor], storage: Storage) -> None:
    """Slices hold a matrix Q as near as they say, and G is Q^T Q: proofs rest on both."""
    device = problems.device
    slices = quantize.quantize(problems, peaks, count)
    views = problems.gram_views(gram.gram_of_slices(problems, slices))
    for view, q, a, squared in zip(views, slices.dense(problems), exact, slices.residual.tolist(), strict=True):
        true = float(torch.linalg.matrix_norm(a - q)) ** 2
        if not true * (1 - EXACT) <= squared <= true * (1 + 1e-8):
            raise CanaryError(f"quantize calls {true:.17g} {squared:.17g} on {device} for {storage}")
        if not squared**0.5 <= 2.0 ** (3 - DIGIT_BITS.value * count) * float(torch.linalg.matrix_norm(a)):
            raise CanaryError(f"quantize leaves out too much on {device} for {storage}")
        what = f"gram_of_slices, {count} slices of {storage},"
        _compare(what, device, torch.tril(view), torch.tril(q.T @ q))


def _check_products(problems: Problems, exact: list[Tensor], storage: Storage) -> None:
    device, blocks = problems.device, apply.Blocks.of(problems)
    x = [_numbers(a.shape[1], 16, 5) for a in exact]
    packed = torch.cat(x).to(device)
    image, squares = apply.times(problems, blocks, packed)
    back = apply.transposed_times(problems, blocks, image)
    weighted = apply.squared_times(problems, blocks, packed)
    images = [a @ b for a, b in zip(exact, x, strict=True)]
    _compare(f"times of {storage}", device, image, torch.cat(images))
    _compare(f"times of {storage}", device, squares, torch.stack([(a * a).sum() for a in exact]))
    backs = [a.T @ b for a, b in zip(exact, images, strict=True)]
    _compare(f"transposed_times of {storage}", device, back, torch.cat(backs))
    wanted = [(a * a) @ b for a, b in zip(exact, x, strict=True)]
    _compare(f"squared_times of {storage}", device, weighted, torch.cat(wanted))


def _check_triangular(problems: Problems, factored: cholesky.Factored, lowers: list[Tensor]) -> None:
    device, members = problems.device, triangular.Members.of(problems)
    x = [_numbers(len(lower), 16, 6) for lower in lowers]
    packed = torch.cat(x).to(device)
    products = [lower @ b for lower, b in zip(lowers, x, strict=True)]
    transposed = [lower.T @ b for lower, b in zip(lowers, x, strict=True)]
    _compare(
        "lower_product", device, triangular.lower_product(problems, factored, members, packed), torch.cat(products)
    )
    found = triangular.transposed_product(problems, factored, members, packed)
    _compare("transposed_product", device, found, torch.cat(transposed))
    found = triangular.forward_solve(problems, factored, members, torch.cat(products).to(device))
    _compare("forward_solve", device, found, torch.cat(x))
    found = triangular.backward_solve(problems, factored, members, torch.cat(transposed).to(device))
    _compare("backward_solve", device, found, torch.cat(x))


def _check_shifted(problems: Problems, grams: list[Tensor]) -> None:
    """What proofs rest on. A residual that came out too small would prove anything."""
    device = problems.device
    packed = torch.zeros(problems.gram_elements, dtype=torch.float64, device=device)
    for view, g in zip(problems.gram_views(packed), grams, strict=True):
        view.copy_(g)
    kept = shifted.Mirrored.of(problems, packed)
    _compare("traces", device, kept.traces(), torch.stack([g.trace() for g in grams]))
    chosen = range(len(grams))
    for sign, shifts in ((1, [0.5, 0.25]), (-1, [2e3, 1e3])):
        found = kept.factored(chosen, shifts, sign)
        if int(found.info.abs().max()):
            raise CanaryError(f"cholesky broke down on {device} for a shifted matrix that is definite")
        factors = [torch.tril(view).cpu() for view in problems.gram_views(packed)]
        moved = [sign * (g - t * torch.eye(len(g), dtype=torch.float64)) for g, t in zip(grams, shifts, strict=True)]
        squares, sizes = found.residuals()
        _compare("sizes of factors", device, sizes, torch.stack([(lower * lower).sum() for lower in factors]))
        small = float((squares.sqrt() / sizes).max())
        if not small <= EXACT:
            raise CanaryError(f"residuals of good factors are {small:.1e} on {device}, where {EXACT:.0e} is allowed")
        for view in problems.gram_views(packed):
            view.sub_(torch.tril(view) / 2)  # of L / 2 three quarters of the matrix are left
        squares, _ = found.residuals()
        left = torch.stack([0.75 * torch.linalg.matrix_norm(m) for m in moved])
        _compare("residuals of halved factors", device, squares.sqrt(), left)


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
