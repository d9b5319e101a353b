"""top=: the lowest of the full ranking, proven bounds for the rest, and no more work than that takes."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import one_thread

import kappa_fast.execution.executor
import kappa_fast.execution.run
from kappa_fast import Ranking, TensorKappa
from kappa_fast.execution.top import BudgetedTop, expected_kappa
from kappa_fast.pipeline import rank
from kappa_fast.sources import Filters, open_source

CONSTRUCTED = (1e1, 3e1, 1e2, 1e3, 1e4)


def conditioned(rows: int, columns: int, kappa: float, seed: int) -> torch.Tensor:
    """Geometric singular values from 1 down to 1 / kappa."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    with one_thread():
        left = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64)).Q
        return (left * torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64) @ right.T).float()


def gaussian(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def mixed_shapes() -> dict[str, torch.Tensor]:
    """Two groups of shapes with narrow ranges of kappa, and one whose kappa is anywhere."""
    source = {f"layers.{i}.k": gaussian(64, 200, i) for i in range(4)}
    source |= {f"layers.{i}.up": gaussian(260, 170, 10 + i) for i in range(4)}
    return source | {f"layers.{i}.q": gaussian(180, 180, 20 + i) for i in range(4)}


def one_shape() -> dict[str, torch.Tensor]:
    """Nothing but the values tells which of these has the lowest kappa."""
    return {f"layers.{i}.w": conditioned(200, 176, CONSTRUCTED[i % 5] * (1 + i / 7), i) for i in range(8)}


def small() -> dict[str, torch.Tensor]:
    """Too small for a probe to tell anything."""
    return {f"layers.{i}.{w}": gaussian(20 + 8 * i, 20, 3 * i) for i in range(5) for w in "ab"}


MODELS = {"mixed": mixed_shapes(), "one": one_shape(), "small": small()}
FULL = {name: rank(source) for name, source in MODELS.items()}


def exact(weight: torch.Tensor) -> float:
    with one_thread():
        sigma = torch.linalg.svdvals(weight.double())
    return float(sigma[0] / sigma[-1])


@functools.cache
def true_kappas(name: str) -> dict[str, float]:
    return {key: exact(weight) for key, weight in MODELS[name].items()}


def keys(entries: Any) -> list[str]:
    return [entry.key for entry in entries]


def lowest(ranking: Ranking, count: int) -> list[tuple[str, float, float, float]]:
    return [(e.key, e.kappa, e.lower, e.upper) for e in ranking[:count]]


def assert_bounds_hold(ranking: Ranking, truth: dict[str, float], count: int) -> None:
    cutoff = max((e.kappa for e in ranking[:count]), default=0)
    for entry in ranking:
        assert entry.lower <= truth[entry.name] * (1 + 1e-12)
        if entry.status == "bounded":
            assert math.isnan(entry.kappa)
            assert math.isnan(entry.score)
            assert math.isnan(entry.sensitivity)
            assert entry.upper == math.inf
            assert entry.lower > cutoff
            assert not entry.certified


@pytest.mark.parametrize("top", [1, 2, 5, 0.01, 0.3, 0.5, 1.0, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_the_first_of_the_full_ranking_come_first_to_the_last_bit(name, top):
    source, full = MODELS[name], FULL[name]
    count = min(len(full), top if isinstance(top, int) else max(1, int(top * len(full))))
    ranking = rank(source, top=top)
    assert lowest(ranking, count) == lowest(full, count)
    assert set(keys(ranking)) == set(source)
    assert all(entry == full[entry.key] for entry in ranking if entry.status == "ok")
    assert_bounds_hold(ranking, true_kappas(name), count)


def test_a_one_is_one_entry_and_a_one_with_a_point_is_all_of_them():
    assert Counter(e.status for e in rank(MODELS["mixed"], top=1))["ok"] < 12
    assert list(rank(MODELS["mixed"], top=1.0)) == list(FULL["mixed"])


@settings(max_examples=8)
@given(kappas=st.lists(st.floats(2, 1e5), min_size=2, max_size=8), top=st.integers(1, 8), seed=st.integers(0, 99))
def test_the_lowest_are_found_wherever_they_stand(kappas, top, seed):
    source = {f"w{i}": conditioned(90, 72, kappa, seed + i) for i, kappa in enumerate(kappas)}
    full, ranking = rank(source), rank(source, top=top)
    assert lowest(ranking, top) == lowest(full, top)
    assert_bounds_hold(ranking, {key: exact(weight) for key, weight in source.items()}, top)


@pytest.mark.parametrize("top", [1, 2, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_the_lowest_of_every_group_are_known(name, top):
    source, full = MODELS[name], FULL[name]
    ranking = rank(source, top=top, top_per_group=True)
    for group in {e.group for e in full}:
        members, found = ([e for e in r if e.group == group] for r in (full, ranking))
        count = top if isinstance(top, int) else max(1, int(top * len(members)))
        assert keys(members[:count]) == keys(found[:count])
        assert all(e.status == "ok" for e in found[:count])


def test_resolved_entries_come_before_bounded_ones_and_those_by_their_bounds():
    ranking = rank(MODELS["one"], top=2)
    statuses = [e.status for e in ranking]
    assert statuses == sorted(statuses, key=["ok", "bounded"].index)
    assert "bounded" in statuses
    bounds = [e.lower for e in ranking if e.status == "bounded"]
    assert bounds == sorted(bounds)
    assert [e.kappa for e in ranking if e.status == "ok"] == sorted(e.kappa for e in ranking if e.status == "ok")


@pytest.mark.parametrize("name", MODELS)
def test_a_selection_needs_no_more_than_the_same_top(name):
    full = FULL[name]
    for share in (0.1, 0.34, 0.5, 0.99):
        assert rank(MODELS[name], top=share).select(top_p=share).keys == full.select(top_p=share).keys
    assert rank(MODELS[name], top=3).select(num_tensors=3).keys == full.select(num_tensors=3).keys
    each = rank(MODELS[name], top=0.5, top_per_group=True).select(top_p=0.5, per_group=True)
    assert each.keys == full.select(top_p=0.5, per_group=True).keys


def test_singular_matrices_count_after_all_regular_ones_and_broken_ones_last():
    broken = gaussian(40, 40, 0)
    broken[3, 3] = math.inf
    source = {
        "good": gaussian(200, 170, 1),
        "zero": torch.zeros(30, 30),
        "broken": broken,
        "ones": torch.ones(180, 170),
    }
    for top in (2, 3, 4, 9):
        ranking = rank(source, top=top)
        assert keys(ranking) == keys(rank(source))
        assert [e.status for e in ranking] == ["ok", "rank_deficient", "rank_deficient", "non_finite"]
    one = rank(source, top=1)
    assert (one[0].key, one[0].status) == ("good", "ok")
    assert {e.key: e.status for e in one}["zero"] in ("rank_deficient", "bounded")


def test_order_names_and_memory_change_no_bit_of_what_is_resolved_or_bounded():
    source = MODELS["one"] | MODELS["mixed"]
    expected = list(rank(source, top=3))
    assert list(rank(source, top=3)) == expected
    assert list(rank(dict(reversed(source.items())), top=3)) == expected
    assert list(rank(source, top=3, memory_budget=1)) == expected


@pytest.fixture
def resolved(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that are resolved, as it happens."""
    original, shapes = kappa_fast.execution.run.resolve, list[tuple[int, ...]]()

    def resolve(backend, weights, **options):
        shapes.extend(tuple(w.shape) for w in weights)
        return original(backend, weights, **options)

    monkeypatch.setattr("kappa_fast.execution.run.resolve", resolve)
    return shapes


def test_no_work_is_done_for_matrices_that_are_clearly_above(resolved):
    source = MODELS["mixed"] | {f"hard.{i}": conditioned(220, 180, 1e5, i) for i in range(2)}
    ranking = rank(source, top=4)
    assert set(resolved) == {(64, 200)}
    assert len(resolved) == 4
    assert Counter(e.method for e in ranking if e.status == "bounded") == {"probe": 10}


@pytest.fixture
def probed(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that are probed, as it happens."""
    original, shapes = kappa_fast.execution.run.lower_bounds, list[tuple[int, ...]]()

    def lower_bounds(backend, weights, **options):
        shapes.extend(tuple(w.shape) for w in weights)
        return original(backend, weights, **options)

    monkeypatch.setattr("kappa_fast.execution.run.lower_bounds", lower_bounds)
    return shapes


def test_a_cut_through_one_shape_resolves_all_of_it_at_once_and_probes_the_others(resolved, probed):
    ranking = rank(MODELS["mixed"], top=6)  # all four (64, 200), and two of four (260, 170)
    assert Counter(resolved) == {(64, 200): 4, (260, 170): 4}
    assert Counter(probed) == {(180, 180): 4}
    assert lowest(ranking, 6) == lowest(FULL["mixed"], 6)


def test_where_half_of_one_shape_is_wanted_nothing_is_probed(resolved, probed):
    rank(MODELS["one"], top=0.5)
    assert len(resolved) == 8
    assert probed == []


def test_of_a_shape_in_which_probes_prove_nothing_only_scouts_are_probed(resolved, probed):
    source = {f"layers.{i}.w": gaussian(260, 176, i) for i in range(12)}
    assert rank(source, top=2)[:2] == rank(source)[:2]
    assert len(probed) == 3
    assert len(resolved) == 24  # of both rankings


def test_what_scouts_are_proven_to_lie_above_rules_out_the_others_too(resolved, probed):
    source = {f"low.{i}": gaussian(64, 200, i) for i in range(2)} | {
        f"high.{i}": gaussian(180, 180, i) for i in range(9)
    }
    assert Counter(e.status for e in rank(source, top=2)) == {"ok": 2, "bounded": 9}
    assert len(probed) == 9
    assert len(resolved) == 2


def test_the_likeliest_of_all_groups_are_resolved_together(monkeypatch):
    together = []
    original = kappa_fast.execution.executor.Executor.results

    def results(self, step, chosen, stop=None):
        together.append(len(chosen))
        return original(self, step, chosen, stop)

    monkeypatch.setattr(kappa_fast.execution.executor.Executor, "results", results)
    rank(MODELS["mixed"], top=2, top_per_group=True)
    assert together == [12]  # no core waits for the end of a group


def test_everything_is_resolved_where_it_could_matter(resolved):
    rank(MODELS["small"], top=1.0)
    assert len(resolved) == len(MODELS["small"])


@pytest.mark.parametrize("per_group", [False, True])
def test_certify_selection_proves_the_top_and_nothing_else(per_group, resolved):
    ranking = rank(MODELS["mixed"], top=2, top_per_group=per_group, certify="selection")
    places = Counter[str]()
    for entry in ranking:
        place = places[entry.group if per_group else ""]
        places[entry.group if per_group else ""] += 1
        assert entry.certified == (place < 2)
        if entry.certified:
            assert entry.lower <= true_kappas("mixed")[entry.name] <= entry.upper


def test_certify_true_proves_all_that_is_resolved():
    ranking = rank(MODELS["mixed"], top=2, certify=True)
    assert all(e.certified for e in ranking if e.status == "ok")
    assert any(e.status == "bounded" for e in ranking)


def largest_first(entry: TensorKappa) -> float:
    return -entry.kappa


def test_another_score_resolves_everything_since_bounds_say_nothing_of_it():
    ranking = rank(MODELS["mixed"], top=2, score=largest_first)
    assert {e.status for e in ranking} == {"ok"}
    assert [e.score for e in ranking] == sorted(-e.kappa for e in FULL["mixed"])


def test_certify_selection_proves_the_top_of_another_score_too():
    ranking = rank(MODELS["mixed"], top=2, score=largest_first, certify="selection")
    assert [e.certified for e in ranking] == [True, True] + [False] * 10


def matrices(source: dict[str, torch.Tensor]) -> Any:
    return open_source(source, Filters(min_dim=1)).matrices


@pytest.mark.parametrize(
    ("top", "count"), [(1, 1), (7, 7), (12, 12), (50, 12), (0.01, 1), (0.25, 3), (0.3, 3), (1.0, 12)]
)
def test_a_share_is_rounded_down_but_is_never_nothing(top, count):
    found = matrices(MODELS["mixed"])
    (group,) = BudgetedTop.of(found, top, per_group=False).groups
    assert group.count == count
    assert len(group.order) == 12
    assert set(group.order) == set(found)


def test_without_top_all_are_wanted_in_the_order_of_the_model():
    found = matrices(MODELS["mixed"])
    (group,) = BudgetedTop.of(found, None, per_group=True).groups
    assert (group.count, group.order) == (12, found)


def test_shapes_that_are_expected_to_be_low_come_first():
    (group,) = BudgetedTop.of(matrices(MODELS["mixed"]), 3, per_group=False).groups
    shapes = [matrix.shape for matrix in group.order]
    assert shapes == [(64, 200)] * 4 + [(260, 170)] * 4 + [(180, 180)] * 4
    assert len(BudgetedTop.of(matrices(MODELS["mixed"]), 3, per_group=True).groups) == 3


@pytest.mark.parametrize("shape", [(400, 40), (40, 400), (400, 200)])
def test_the_expectation_is_that_of_a_gaussian_matrix(shape):
    assert exact(gaussian(*shape, 0)) == pytest.approx(expected_kappa(shape), rel=0.1)


def test_of_square_matrices_nothing_is_expected():
    assert expected_kappa((30, 30)) == math.inf
    assert expected_kappa((1, 30)) == pytest.approx(expected_kappa((30, 1)))


@pytest.mark.parametrize("distinct", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(176, 176), (260, 176)])
def test_weights_with_few_distinct_singular_values_are_bounded_or_resolved(shape, distinct):
    # A Krylov space of theirs ends before its block is used up: directions that were left out have no length.
    generator = torch.Generator().manual_seed(distinct)
    with one_thread():
        q = torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64)).Q
        values = torch.ones(shape[1], dtype=torch.float64)
        values[: distinct - 1] = torch.arange(2, distinct + 1)
        few = (q * values).float()
    source = {f"low.{i}": gaussian(400, 100, i) / 8 for i in range(2)} | {"few": few}
    for top in (1, 2, 3):
        ranking = rank(source, top=top)
        entry = ranking["few"]
        assert entry.status in ("ok", "bounded")
        assert entry.lower <= exact(few) * (1 + 1e-12)
        assert entry.status == "bounded" or entry.upper >= exact(few) * (1 - 1e-12)
