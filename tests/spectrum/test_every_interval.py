"""Thousands of small rankings of matrices whose condition number is a known fraction: no interval misses."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from models import one_thread
from spectra import EXACT_BITS, mixing

from kappa_fast.pipeline import rank
from kappa_fast.spectrum import ladder

BEYOND = 10**13  # float64 may take a matrix with a larger kappa for singular
RANKINGS = 250  # of ten matrices each, for every seed
LAYOUTS = (
    lambda w: w,
    lambda w: w.T,
    lambda w: w.T.contiguous().T,
    lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape),
)


@cache
def orthogonal(n: int, seed: int) -> torch.Tensor:
    """Integer columns of equal length, orthogonal to each other."""
    return mixing(n, torch.Generator().manual_seed(seed)).double()


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self._generator))

    def unit(self) -> float:
        return float(torch.rand(1, generator=self._generator, dtype=torch.float64))

    def of(self, choices: Any) -> Any:
        return choices[self.integer(0, len(choices) - 1)]

    def matrix(self) -> tuple[torch.Tensor, Fraction]:
        """A weight and its exact condition number, 2^1100 if it is singular."""
        n = self.integer(2, 24) if self.unit() < 0.8 else self.integer(25, 72)
        m = n if self.unit() < 0.4 else n + self.integer(1, 100)
        dtype = self.of((torch.float64, torch.float64, torch.float32, torch.bfloat16))
        left, right = orthogonal(m, self.integer(0, 2))[:, :n], orthogonal(n, self.integer(0, 2))
        distinct = self.integer(1, 4) if self.unit() < 0.5 else n
        levels = [10 ** (-15 * self.unit()) for _ in range(distinct)]
        values = torch.tensor([self.of(levels) for _ in range(n)], dtype=torch.float64)
        room = 2.0 ** EXACT_BITS[dtype] / float(left.abs().max() * right.abs().max()) - n
        if room < 4 * n:
            return self.matrix()
        integers = (values * (room / values.sum())).long().clamp_min(1)
        if self.unit() < 0.05:
            integers[self.integer(0, n - 1)] = 0
        entries = (left * integers) @ right.T  # exact: no partial sum exceeds what the dtype holds
        weight = (entries * 2.0 ** self.integer(-30, 30)).to(dtype)
        smallest = int(integers.min())
        kappa = Fraction(int(integers.max()), smallest) if smallest else Fraction(2**1100)
        return self.of(LAYOUTS)(weight), kappa


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_no_interval_misses_and_no_status_is_wrong(seed, monkeypatch):
    draw = Draw(seed)
    for _ in range(RANKINGS):
        monkeypatch.setattr(ladder, "EXACT_BELOW", draw.of((32, 160)))
        drawn = {f"layers.{i}.w": draw.matrix() for i in range(10)}
        options: dict[str, Any] = {"rtol": max(1e-8, 0.5 * 10 ** (-8 * draw.unit())), "min_dim": 1, "embeddings": True}
        options["certify"] = draw.unit() < 0.3
        if draw.unit() < 0.4:
            options["top"] = draw.integer(1, 9)
        if draw.unit() < 0.2:
            options["memory_budget"] = draw.of((1, 10**5, 10**7))
        with warnings.catch_warnings(), one_thread() if draw.unit() < 0.5 else warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="float64 cannot prove")
            ranking = rank({name: weight for name, (weight, _) in drawn.items()}, **options)
        assert len(ranking) == len(drawn)
        for entry in ranking:
            kappa = drawn[entry.name][1]
            what = f"{entry} of {float(kappa) if kappa < 2**1000 else math.inf}, {options}"
            assert entry.status in ("ok", "rank_deficient", "bounded"), what
            assert math.isinf(entry.lower) or Fraction(entry.lower) <= kappa, what
            assert math.isinf(entry.upper) or kappa <= Fraction(entry.upper), what
            assert entry.status != "rank_deficient" or kappa > BEYOND, what
            assert entry.status != "ok" or entry.lower <= entry.kappa <= entry.upper, what
            assert not math.isinf(entry.lower) or kappa == 2**1100, what
