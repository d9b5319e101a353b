"""How work is divided among ranks, without any: nothing twice, nothing forgotten, nobody left waiting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kappa_fast.distributed.shares import Shares
from kappa_fast.execution.cost import relative_cost
from kappa_fast.planning.division import simulate


@given(st.dictionaries(st.integers(0, 10**6), st.floats(1e-6, 1e6), max_size=60), st.integers(1, 9))
def test_every_matrix_is_in_one_share_or_piece(costs, ranks):
    shares = Shares.of(costs, ranks)
    assert len(shares.first) == ranks
    every = [i for part in (*shares.first, *shares.pieces) for i in part]
    assert sorted(every) == sorted(costs)
    assert all(shares.pieces)
    assert all(map(bool, shares.first)) or len(costs) < ranks


DEEPSEEK_V3 = (
    [(7168, 2048)] * (58 * 257 * 3)
    + [(18432, 7168)] * 9
    + 61 * [(7168, 1536), (24576, 1536), (7168, 576), (32768, 512), (16384, 7168)]
)
MIXTRAL = [(14336, 4096)] * (32 * 8 * 3) + 32 * [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)]


def longest_over_mean(costs: dict[int, float], speeds: list[float]) -> float:
    """Of the times at which ranks of these speeds are done, the longest by what all of them would take at best."""
    parts = simulate(Shares.of(costs, len(speeds)), costs, speeds)
    times = [sum(costs[i] for i in part) / speed for part, speed in zip(parts, speeds, strict=True)]
    return max(times) * sum(speeds) / sum(costs.values())


@pytest.mark.parametrize("shapes", [DEEPSEEK_V3, MIXTRAL], ids=["DeepSeek-V3", "Mixtral"])
@pytest.mark.parametrize("slow", [1.0, 0.5], ids=["equal", "uneven"])
@pytest.mark.parametrize("certify", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_rank_works_more_than_a_twentieth_longer_than_the_mean(shapes, slow, certify):
    cost = {shape: relative_cost(shape, certify) for shape in set(shapes)}
    costs = dict(enumerate(cost[shape] for shape in shapes))
    counts = [ranks for ranks in (1, 2, 3, 8, 32, 100, 256, 1024) if len(shapes) >= 20 * ranks]
    found = {n: longest_over_mean(costs, [1.0 if rank % 2 else slow for rank in range(n)]) for n in counts}
    print({n: round(imbalance, 4) for n, imbalance in found.items()})
    assert max(found.values()) <= 1.05


def test_the_same_costs_give_the_same_shares_in_whatever_order_they_come():
    costs = {i: float(i % 7 + 1) for i in range(100)}
    assert Shares.of(costs, 3) == Shares.of(dict(reversed(costs.items())), 3)
