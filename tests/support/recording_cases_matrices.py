"""Cases of a recording: single matrices, from easy to impossible, estimated and proven."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from recording_sources import Cases, Stored, gaussian, integers, trained_like, with_kappa
from torch import Tensor

import kappa_fast

F64, F32, F16, B16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SHAPES = {
    "tall": (220, 168),
    "wide": (168, 220),
    "square": (176, 176),
    "slender": (720, 40),
    "small": (64, 48),
    "tiny": (18, 16),
}
KAPPAS = (1.0, 1e3, 1e6, 1e9, 1e12, 1e15)
NARROWED = {
    "tall": lambda: trained_like(220, 168),
    "square": lambda: gaussian(176, 176),
    "small": lambda: gaussian(48, 40),
}


def _with_line(tensor: Tensor, place: int, other: int) -> Tensor:
    tensor[:, place] = tensor[:, other]
    return tensor


def _with_value(tensor: Tensor, value: float) -> Tensor:
    tensor[3, 5] = value
    return tensor


def _low_rank(m: int, n: int, rank: int) -> Tensor:
    """Of exact integers."""
    left, right = (integers(*shape, seed=s, low=-8, high=9, dtype=F64) for s, shape in ((1, (m, rank)), (2, (rank, n))))
    return left @ right


def _graded(m: int, n: int, rows: float, columns: float) -> Tensor:
    left, right = rows ** -torch.linspace(0, 1, m, dtype=F64), columns ** -torch.linspace(0, 1, n, dtype=F64)
    return left[:, None] * gaussian(m, n, seed=3, dtype=F64) * right


def _hilbert(n: int) -> Tensor:
    index = torch.arange(1, n + 1, dtype=F64)
    return 1 / (index[:, None] + index[None] - 1)


def _clustered(m: int, n: int) -> Tensor:
    """Many smallest singular values that nearly agree."""
    values = torch.cat([torch.linspace(1, 2, n - 30, dtype=F64), 1e-4 * (1 + 1e-6 * torch.arange(30, dtype=F64))])
    left, right = (torch.linalg.qr(gaussian(size, n, seed=size + s, dtype=F64)).Q for s, size in ((0, m), (1, n)))
    return (left * values) @ right.T


SPECIAL: dict[str, Callable[[], Tensor]] = {
    "zero": lambda: torch.zeros(200, 168),
    "zero, float64": lambda: torch.zeros(40, 36, dtype=F64),
    "constant": lambda: torch.full((200, 168), 0.1, dtype=F64),
    "one": lambda: torch.ones(1, 1),
    "a column": lambda: gaussian(40, 1),
    "a row": lambda: gaussian(1, 40),
    "a zero column": lambda: torch.zeros(40, 1),
    "nan": lambda: _with_value(gaussian(200, 168), float("nan")),
    "inf": lambda: _with_value(gaussian(200, 168), float("inf")),
    "-inf, bfloat16": lambda: _with_value(gaussian(40, 30, dtype=B16), float("-inf")),
    "rank 5 of 30": lambda: _low_rank(40, 30, 5),
    "rank 167 of 168": lambda: _low_rank(200, 168, 167),
    "rank 175 of 176, square": lambda: _low_rank(176, 176, 175),
    "two equal columns": lambda: _with_line(gaussian(200, 168), 5, 60),
    "two equal columns, float16": lambda: _with_line(gaussian(200, 168, dtype=F16), 5, 60),
    "nearly equal columns": lambda: (
        _with_line(gaussian(200, 168, dtype=F64), 5, 60) + 1e-9 * gaussian(200, 168, dtype=F64)
    ),
    "huge": lambda: 1e30 * gaussian(200, 168),
    "huge, float64": lambda: 1e300 * gaussian(200, 168, dtype=F64),
    "largest float16": lambda: 60000 * gaussian(200, 168).clamp(-1, 1).half(),
    "small numbers": lambda: 1e-30 * gaussian(200, 168),
    "small numbers, float64": lambda: 1e-300 * gaussian(200, 168, dtype=F64),
    "subnormal": lambda: (integers(80, 40, low=-50, high=51, dtype=F64) * 1.4e-45).float(),
    "mixed scales": lambda: torch.cat([1e30 * gaussian(100, 168), 1e-30 * gaussian(100, 168, seed=1)]),
    "graded rows": lambda: _graded(200, 168, 1e12, 1),
    "graded columns": lambda: _graded(200, 168, 1, 1e10),
    "graded both ways": lambda: _graded(176, 176, 1e5, 1e5),
    "hilbert 8": lambda: _hilbert(8),
    "hilbert 170": lambda: _hilbert(170),
    "orthogonal": lambda: torch.linalg.qr(gaussian(176, 176, dtype=F64)).Q,
    "identity": lambda: torch.eye(176),
    "clustered": lambda: _clustered(220, 168),
    "sparse": lambda: gaussian(220, 168) * (gaussian(220, 168, seed=1) > 1),
    "constant plus noise": lambda: 1 + 1e-6 * gaussian(200, 168),
    "transposed": lambda: gaussian(168, 220).T,
    "strided": lambda: gaussian(440, 336)[::2, ::2],
    "one row many times": lambda: gaussian(1, 40).expand(30, 40),
    "with gradients": lambda: gaussian(40, 30).requires_grad_(),
    "float8": lambda: (4 * gaussian(60, 40)).to(torch.float8_e4m3fn),
    "large": lambda: trained_like(640, 320, seed=8),
    "large, bfloat16": lambda: trained_like(320, 640, seed=9, dtype=B16),
}


def cases(stored: Stored) -> Cases:
    """Every matrix by itself, so that a difference has a name."""
    made: dict[str, Callable[[], Tensor]] = {}
    for (name, shape), kappa in itertools.product(SHAPES.items(), KAPPAS):
        for dtype in (F64,) if kappa > 1e6 else (F64, F32):
            made[f"{name} {kappa:.0e} {_called(dtype)}"] = partial(with_kappa, *shape, kappa, dtype=dtype)
    for (name, shape), dtype in itertools.product(SHAPES.items(), (F16, B16)):
        made[f"{name} trained-like {_called(dtype)}"] = partial(trained_like, *shape, seed=4, dtype=dtype)
    for name, make in {**made, **SPECIAL}.items():
        yield name, partial(_ranked, make)
        yield f"{name}, proven", partial(_ranked, make, certify=True)
    for rtol, (name, make) in itertools.product((0.5, 0.1, 1e-4, 1e-6, 1e-8), NARROWED.items()):
        yield f"rtol {rtol:g}, {name}", partial(_ranked, make, rtol=rtol)
        yield f"rtol {rtol:g}, {name}, proven", partial(_ranked, make, rtol=rtol, certify=True)


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ranked(make: Callable[[], Tensor], **options: Any) -> kappa_fast.Ranking:
    return kappa_fast.rank({"w": make()}, min_dim=1, progress=False, **options)
