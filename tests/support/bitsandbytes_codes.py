"""Codes of bitsandbytes, and rankings of them against the dequantized weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from models import one_thread

import kappa_fast


def hard(rows: int, columns: int, kappa: float = 1e3, seed: int = 0) -> torch.Tensor:
    """A matrix with a prescribed condition number, so that quantization is seen in it."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda m, n: torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q  # noqa: E731
    n = min(rows, columns)
    return (draw(rows, n) * torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64) @ draw(columns, n).T).float()


def assert_ranked(source: object, expected: Mapping[str, torch.Tensor], **options: object) -> kappa_fast.Ranking:
    """The keys are those expected, and every interval holds kappa of the float64 SVD of the expected matrix."""
    with one_thread():
        ranking = kappa_fast.rank(source, **options)
        values = {key: torch.linalg.svdvals(weight.double()) for key, weight in expected.items()}
    assert {entry.key for entry in ranking} == set(expected)
    for entry in ranking:
        s = values[entry.key]
        assert entry.lower <= float(s[0] / s[-1]) <= entry.upper, entry.key
        assert entry.upper <= 1.05 * entry.lower
        assert entry.shape == tuple(expected[entry.key].shape)
        assert entry.quantization.startswith("bitsandbytes ")
    return ranking
