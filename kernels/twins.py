"""The checked functions of this folder in plain torch, a matrix at a time, as the reference of their tests.

They have the same names, arguments and results as the functions of the files below. Their sums are the library's, so
results agree to rounding, or exactly if all numbers are integers. They run on any device, slowly, and synchronize.

    quantize.py     column_peaks, quantize                gram.py        gram_of_slices, gram_of_weights
    cholesky.py     cholesky                              triangular.py  products and solves
    panel.py        inner, combine, subtract              orthogonal.py  orthonormalized
    ritz.py         largest_eigenvalue, reach, leading_vectors
    apply.py        times, binade_times, transposed_times
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .apply import Blocks
from .cholesky import BLOCK, Factored, Residuals, diagonal_starts
from .panel import Rows
from .problems import COLUMNS, FIRST_COLUMN, PITCH, ROWS, SLICE, Problems, Tensor, binades
from .quantize import DIGIT_BITS, MAX_SLICES, Slices, column_exponents
from .ritz import Tridiagonal
from .steps import Steps
from .triangular import Members


def column_peaks(problems: Problems) -> Tensor:
    """See quantize.column_peaks: NaN is larger than infinity, as the bits are."""
    found = []
    for a in problems.matrices:
        entries = a.float().abs()
        largest = torch.where(torch.isnan(entries), 0.0, entries).amax(dim=0)
        bits = largest.contiguous().view(torch.int32)
        found.append(torch.where(torch.isnan(entries).any(dim=0), 0x7FC00000, bits).to(torch.int32))
    return torch.cat(found)


def quantize(
    problems: Problems, peaks: Tensor, slices: int, earlier: Slices | None = None, bits: int = DIGIT_BITS.value
) -> Slices:
    """See quantize.quantize; ``earlier`` slices are computed again."""
    if bits == 8 and (slices != 2 or earlier is not None):
        raise ValueError(f"8 bits need two slices and no earlier ones, not {slices}")
    data = torch.zeros((slices, problems.slice_bytes), dtype=torch.int8, device=problems.device)
    residual = torch.zeros(len(problems.m), dtype=torch.float64, device=problems.device)
    last = 1 if bits == 8 else MAX_SLICES - 1  # of the digits that Q has
    half = 2 ** (bits - 1)
    for i, (a, row) in enumerate(zip(problems.matrices, problems.table.tolist(), strict=True)):
        m, n, pitch, start, first = (row[f.value] for f in (ROWS, COLUMNS, PITCH, SLICE, FIRST_COLUMN))
        shift = -column_exponents(peaks[first : first + n], bits)
        wide = a.to(torch.float64)
        scaled = torch.ldexp(wide, shift)
        rest = torch.floor(scaled + 0.5).to(torch.int64)
        digits = []
        for _ in range(last):
            digit = ((rest + half) & (2 * half - 1)) - half
            digits.append(digit)
            rest = (rest - digit) >> bits
        digits = [rest, *reversed(digits)][:slices]
        kept = torch.zeros_like(scaled)
        for k, digit in enumerate(digits):
            data[k, start : start + n * pitch].view(n, pitch)[:, :m] = digit.T.to(torch.int8)
            kept += torch.ldexp(digit.to(torch.float64), torch.tensor(bits * (last - k)))
        left = torch.ldexp(scaled - kept, -shift).abs()
        residual[i] = left.square().sum() * (1 + 1e-9)
        if bits == 8:
            residual[i] = residual[i].clamp(max=left.sum(dim=0).max() * left.sum(dim=1).max() * (1 + 1e-9))
    return Slices(data, peaks, residual, bits)


def gram_of_slices(
    problems: Problems, slices: Slices, out: Tensor | None = None, *, low: int = 1, copy: Tensor | None = None
) -> Tensor:
    """See gram.gram_of_slices; all products are computed for any ``low``."""
    if low > 1 and out is None:
        raise ValueError("adding slices needs the result for the earlier slices")
    dense = [a.to(problems.device) for a in slices.dense(problems)]
    if copy is not None:
        _lower_triangles(problems, range(len(dense)), dense, copy)
    return _lower_triangles(problems, range(len(dense)), dense, out)


def gram_of_weights(problems: Problems, chosen: Sequence[int] | None = None, out: Tensor | None = None) -> Tensor:
    """See gram.gram_of_weights, in float64."""
    members = problems.chosen(chosen).tolist()
    for i in members:
        if problems.matrices[i].dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"products of {problems.matrices[i].dtype} in float32 are not exact: use gram_of_slices")
    return _lower_triangles(problems, members, [problems.matrices[i].double() for i in members], out)


def _lower_triangles(problems: Problems, members: Sequence[int], dense: Sequence[Tensor], out: Tensor | None) -> Tensor:
    if out is None:
        out = torch.empty(problems.gram_elements, dtype=torch.float64, device=problems.device)
    views = problems.gram_views(out)
    for i, a in zip(members, dense, strict=True):
        views[i].copy_(torch.tril(a.T @ a) + torch.triu(views[i], 1))
    return out


def cholesky(
    problems: Problems,
    packed: Tensor,
    info: Tensor | None = None,
    steps: Steps | None = None,
    residuals: Residuals | None = None,
    *,
    coarse: bool = False,
) -> Factored:
    """See cholesky.cholesky; ``steps`` are not needed, residuals are those of whole products; none is coarse."""
    starts, total = diagonal_starts(problems)
    inverses = torch.empty(total, dtype=packed.dtype, device=packed.device)
    failed = torch.zeros(len(problems.n), dtype=torch.int32, device=packed.device) if info is None else info
    for i, view in enumerate(problems.gram_views(packed)):
        if failed[i]:
            continue
        whole = torch.tril(view) + torch.tril(view, -1).T
        factor, state = torch.linalg.cholesky_ex(whole)
        failed[i] = state
        if residuals is not None and not state:
            start, tiles = int(residuals.first[i]), _tiles(factor)
            residuals.sizes[start : start + len(tiles)] = torch.stack([tile.square().sum() for tile in tiles])
            rest = whole - factor @ factor.T
            tiles = _tiles(torch.tril(rest).square() + torch.tril(rest, -1).square())
            residuals.squares[start : start + len(tiles)] = torch.stack([tile.sum() for tile in tiles])
        view.copy_(torch.tril(factor) + torch.triu(view, 1))
        for k, first in enumerate(range(0, len(factor), BLOCK.value)):
            tile = torch.eye(BLOCK.value, dtype=packed.dtype, device=packed.device)
            part = torch.tril(factor[first : first + BLOCK.value, first : first + BLOCK.value])
            tile[: len(part), : len(part)] = part
            place = int(starts[i]) + k * BLOCK.value**2
            inverse = torch.linalg.solve_triangular(tile, torch.eye(BLOCK.value).to(tile), upper=False)
            inverses[place : place + BLOCK.value**2] = inverse.flatten()
    return Factored(packed, inverses, starts, failed)


def _tiles(matrix: Tensor) -> list[Tensor]:
    """The tiles of BLOCK columns in the lower triangle, row by row."""
    lines = matrix.split(BLOCK.value)
    return [tile for k, line in enumerate(lines) for tile in line.split(BLOCK.value, dim=1)[: k + 1]]


def lower_product(
    problems: Problems, factored: Factored, members: Members, block: Tensor, out: Tensor | None = None
) -> Tensor:
    """See triangular.lower_product: L X."""
    return _with_factors(problems, factored, members, block, out, torch.matmul)


def transposed_product(
    problems: Problems, factored: Factored, members: Members, block: Tensor, out: Tensor | None = None
) -> Tensor:
    """See triangular.transposed_product: L^T X."""
    return _with_factors(problems, factored, members, block, out, lambda lower, x: lower.T @ x)


def forward_solve(
    problems: Problems, factored: Factored, members: Members, block: Tensor, out: Tensor | None = None
) -> Tensor:
    """See triangular.forward_solve: L^-1 X."""
    solve = torch.linalg.solve_triangular
    return _with_factors(problems, factored, members, block, out, lambda lower, x: solve(lower, x, upper=False))


def backward_solve(
    problems: Problems, factored: Factored, members: Members, block: Tensor, out: Tensor | None = None
) -> Tensor:
    """See triangular.backward_solve: L^-T X."""
    solve = torch.linalg.solve_triangular
    return _with_factors(problems, factored, members, block, out, lambda lower, x: solve(lower.T, x, upper=True))


def _with_factors(
    problems: Problems,
    factored: Factored,
    members: Members,
    block: Tensor,
    out: Tensor | None,
    operation: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    out = torch.empty_like(block) if out is None else out
    views = problems.gram_views(factored.packed)
    for i, start in zip(members.ids.tolist(), members.start.tolist(), strict=True):
        here = slice(start, start + len(views[i]))
        out[here] = operation(torch.tril(views[i]).to(torch.float64), block[here])
    return out


def inner(rows: Rows, v: Tensor, w: Tensor) -> Tensor:
    """See panel.inner: V^T W."""
    return torch.stack([x.T @ y for x, y in zip(_parts(rows, v), _parts(rows, w), strict=True)])


def combine(rows: Rows, v: Tensor, coefficients: Tensor) -> Tensor:
    """See panel.combine: V C."""
    return torch.cat([x @ c for x, c in zip(_parts(rows, v), coefficients, strict=True)])


def subtract(rows: Rows, v: Tensor, coefficients: Tensor, w: Tensor) -> Tensor:
    """See panel.subtract: W - V C."""
    return w - combine(rows, v, coefficients)


def _parts(rows: Rows, block: Tensor) -> tuple[Tensor, ...]:
    return block.split((rows.stop - rows.start).tolist())


def orthonormalized(rows: Rows, blocks: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """See orthogonal.orthonormalized, by the singular value decomposition: another basis of the same space.

    Q B is W, and Q is orthonormal except for columns of zeros. The singular values decide here which directions are
    below a limit, so Q may hold more or fewer of the directions within a factor of 4 of the limit.
    """
    q, b = [], []
    for w, limit in zip(_parts(rows, blocks), limits.tolist(), strict=True):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        kept = s > limit
        width = w.shape[1]
        u, coupling = torch.where(kept, u, 0.0), torch.where(kept[:, None], s[:, None] * vh, 0.0)
        q.append(torch.nn.functional.pad(u, (0, width - u.shape[1])))
        b.append(torch.nn.functional.pad(coupling, (0, 0, 0, width - len(coupling))))
    return torch.cat(q), torch.stack(b)


def largest_eigenvalue(t: Tridiagonal, floor: Tensor | None = None) -> Tensor:
    """See ritz.largest_eigenvalue; ``floor`` is not needed."""
    full = _dense(t)
    sound = torch.isfinite(full).all(dim=2).all(dim=1)
    values = torch.linalg.eigvalsh(torch.where(sound[:, None, None], full, 0.0))[:, -1]
    return torch.where(sound & (values > 0), values, torch.nan)


def reach(t: Tridiagonal, values: Tensor) -> Tensor:
    """See ritz.reach."""
    full = _dense(t)
    size = full.shape[1]
    shifted = values[:, :, None, None] * torch.eye(size).to(full) - full[:, None]
    start = torch.eye(size, t.coupling.shape[1]).to(full).expand(*values.shape, -1, -1)
    ends = torch.linalg.solve(shifted, start)[:, :, -t.coupling.shape[1] :]
    norms = torch.linalg.matrix_norm(t.coupling[:, None] @ ends)
    return torch.where(values > torch.linalg.eigvalsh(full)[:, -1:], norms, torch.nan)


def leading_vectors(t: Tridiagonal, theta: Tensor) -> Tensor:
    """See ritz.leading_vectors; ``theta`` is not needed."""
    return torch.linalg.eigh(_dense(t)).eigenvectors[:, :, -t.coupling.shape[1] :]


def _dense(t: Tridiagonal) -> Tensor:
    w, blocks, side, _ = t.diagonal.shape
    full = t.diagonal.new_zeros((w, blocks, side, blocks, side))
    for j in range(blocks):
        full[:, j, :, j] = t.diagonal[:, j]
        if j + 1 < blocks:
            full[:, j, :, j + 1], full[:, j + 1, :, j] = t.upper[:, j], t.upper[:, j].mT
    return full.reshape(w, blocks * side, blocks * side)


def times(problems: Problems, blocks: Blocks, x: Tensor, *, squares: bool = True) -> tuple[Tensor, Tensor]:
    """See apply.times: A X and ||A||_F^2."""
    weights = _weights(problems, blocks)
    images = [a @ part for a, part in zip(weights, x.split([a.shape[1] for a in weights]), strict=True)]
    sums = torch.stack([a.square().sum() for a in weights])
    return torch.cat(images), sums if squares else torch.zeros_like(sums)


def binade_times(problems: Problems, blocks: Blocks, x: Tensor) -> Tensor:
    """See apply.binade_times."""
    weights = _weights(problems, blocks)
    parts = x.split([a.shape[1] for a in weights])
    return torch.cat([binades(a).square() @ part for a, part in zip(weights, parts, strict=True)])


def transposed_times(problems: Problems, blocks: Blocks, y: Tensor) -> Tensor:
    """See apply.transposed_times: A^T Y."""
    weights = _weights(problems, blocks)
    return torch.cat([a.T @ part for a, part in zip(weights, y.split([a.shape[0] for a in weights]), strict=True)])


def _weights(problems: Problems, blocks: Blocks) -> list[Tensor]:
    return [problems.matrices[i].double() for i in blocks.chosen.tolist()]
