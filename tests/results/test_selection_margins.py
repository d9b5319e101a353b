"""Draws with the margins of the lowest, against all selections with these margins, which are enumerated."""

from __future__ import annotations

import itertools
import json
import warnings
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_entries import make_entry

from kappa_fast.cli.select import lines_of
from kappa_fast.errors import OptionError
from kappa_fast.results.margins import redrawn
from kappa_fast.results.ranking import Ranking
from kappa_fast.results.selection import Selection
from kappa_fast.results.units import make_units

# Small models have few selections, of which the lowest is one.
pytestmark = pytest.mark.filterwarnings("ignore:seed=.* draws the lowest themselves:UserWarning")

SHAPES = {"q": (8, 8), "k": (8, 8), "gate": (24, 8), "up": (24, 8), "down": (8, 24)}


def dense(kappas: dict[tuple[str, int], float]) -> Ranking:
    """One matrix for each type and layer."""
    entries = [
        make_entry(f"layers.{layer}.{name}", kappa, group=f"layers.*.{name}", layer=layer, shape=SHAPES[name])
        for (name, layer), kappa in kappas.items()
    ]
    return Ranking(
        sorted(entries, key=lambda entry: entry.kappa), (), {"num_parameters": sum(e.numel for e in entries)}
    )


def margins(entries: Any) -> tuple[Counter[Any], Counter[Any]]:
    found = list(entries)
    return Counter((e.group, e.shape) for e in found), Counter((e.layer, e.numel) for e in found)


def with_the_same_margins(ranking: Ranking, lowest: Selection) -> set[frozenset[str]]:
    """By trying all subsets."""
    asked = margins(lowest)
    subsets = itertools.combinations(list(ranking), len(lowest))
    return {frozenset(e.key for e in some) for some in subsets if margins(some) == asked}


@settings(deadline=None)
@given(st.permutations(range(40)), st.integers(2, 20), st.integers(0, 100))
def test_a_draw_has_as_many_of_each_type_and_in_each_layer_as_the_lowest(order, count, seed):
    places = [(name, layer) for name in SHAPES for layer in range(8)]
    ranking = dense({place: 2.0 + kappa for place, kappa in zip(places, order, strict=True)})
    lowest = ranking.select(num_tensors=count)
    try:
        drawn = ranking.select(num_tensors=count, order="random", seed=seed, match="margins")
    except OptionError:
        assert not can_be_exchanged(lowest, ranking)
        return
    assert len(set(drawn.keys)) == len(lowest)
    assert margins(drawn) == margins(lowest)
    assert drawn.num_params == lowest.num_params


def can_be_exchanged(lowest: Selection, ranking: Ranking) -> bool:
    """Whether any two of the lowest can give way to the two others of their types and layers."""
    there = {(e.numel, e.group, e.layer): e.key for e in ranking}
    taken = set(lowest.keys)
    return any(
        a.numel == b.numel
        and (c := there.get((a.numel, a.group, b.layer)))
        and (d := there.get((a.numel, b.group, a.layer)))
        and not {c, d} & taken
        for a, b in itertools.combinations(lowest, 2)
    )


EACH = 60  # draws for each selection that is possible
CHOSEN = {
    "halves": [("gate", 0), ("gate", 1), ("up", 2), ("up", 3)],
    "three types": [("gate", 0), ("gate", 1), ("up", 0), ("up", 2), ("down", 3)],
    "two sizes": [("gate", 0), ("up", 1), ("q", 2), ("k", 3)],
}


def check_uniform(counts: Counter[frozenset[str]], possible: int) -> None:
    """By chi-square, five standard deviations of it."""
    freedom = possible - 1
    assert len(counts) == possible
    assert sum((n - EACH) ** 2 / EACH for n in counts.values()) < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_all_selections_with_these_margins_are_drawn_equally_often(chosen):
    places = [(name, layer) for name in SHAPES for layer in range(4)]
    ranking = dense({place: 2.0 + i + 100 * (place not in chosen) for i, place in enumerate(places)})
    lowest = ranking.select(num_tensors=len(chosen))
    assert {(e.group.rpartition(".")[2], e.layer) for e in lowest} == set(chosen)
    possible = with_the_same_margins(ranking, lowest)
    assert len(possible) >= 4
    units = make_units(ranking.entries, "matrix")
    taken = [unit for unit in units if unit.key in lowest.keys]
    draws = [frozenset(u.key for u in redrawn(units, taken, seed) or ()) for seed in range(EACH * len(possible))]
    assert set(draws) == possible
    check_uniform(Counter(draws), len(possible))


def test_units_of_cells_of_any_size_are_drawn_equally_often():
    """Cells with one to four units: an exchange into a large cell is proposed less often for each of its units."""
    sizes = {("gate", 0): 4, ("gate", 1): 1, ("up", 0): 2, ("up", 1): 3}
    entries = [
        make_entry(f"layers.{layer}.{name}.{i}", 2.0 + i, group=name, layer=layer, shape=SHAPES[name])
        for (name, layer), count in sizes.items()
        for i in range(count)
    ]
    units = make_units(entries, "matrix")
    chosen = [unit for unit in units if unit.key in ("layers.0.gate.0", "layers.1.up.0")]
    possible = 4 * 3 + 1 * 2  # one gate of layer 0 and one up of layer 1, or the other way round
    draws = (redrawn(units, chosen, seed) or () for seed in range(EACH * possible))
    check_uniform(Counter(frozenset(unit.key for unit in draw) for draw in draws), possible)


def test_a_seed_draws_the_same_and_the_order_of_entries_changes_nothing():
    places = [(name, layer) for name in SHAPES for layer in range(8)]
    ranking = dense({place: 2.0 + 7 * i % 40 for i, place in enumerate(places)})
    again = Ranking(reversed(ranking.entries), (), ranking.metadata)
    options: dict[str, Any] = dict(max_params=0.3, fill=True, order="random", match="margins")
    assert ranking.select(seed=7, **options) == again.select(seed=7, **options)
    draws = {frozenset(ranking.select(seed=seed, **options).keys) for seed in range(30)}
    assert len(draws) > 20
    overlap = [len(draw & set(ranking.select(max_params=0.3, fill=True).keys)) / len(draw) for draw in draws]
    assert sum(overlap) / len(overlap) < 0.7  # most of what can move has moved


def test_it_is_written_and_read_and_says_where_there_is_no_choice(tmp_path):
    ranking = dense(
        {(name, layer): 2.0 + 3 * (i + layer) % 8 for i, name in enumerate(("gate", "up")) for layer in range(8)}
    )
    one_type = dense({("q", layer): 2.0 + layer for layer in range(8)})
    with pytest.raises(
        OptionError, match=r"match='margins' found no two.*: give another budget, or match='type', which"
    ):
        one_type.select(num_tensors=3, order="random", match="margins")
    drawn = ranking.select(num_tensors=5, order="random", seed=2, match="margins")
    drawn.to_json(tmp_path / "drawn.json")
    assert Selection.from_json(tmp_path / "drawn.json") == drawn
    assert json.loads((tmp_path / "drawn.json").read_text())["settings"]["match"] == ["margins"]


def test_a_draw_that_is_the_lowest_is_told():
    """Two selections have these margins, so half of the seeds draw the one that is to be controlled."""
    ranking = dense({("gate", 0): 2.0, ("up", 1): 3.0, ("gate", 1): 4.0, ("up", 0): 5.0})
    lowest, told = ranking.select(num_tensors=2).keys, 0
    for seed in range(40):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            drawn = ranking.select(num_tensors=2, order="random", seed=seed, match="margins")
        assert bool(caught) == (set(drawn.keys) == set(lowest))
        assert all(f"seed={seed} draws the lowest themselves" in str(each.message) for each in caught)
        told += bool(caught)
    assert 8 < told < 32


def test_the_only_exchange_of_many_matrices_is_found():
    """Of 58 only gate 28 and up 29 can give way, to gate 29 and up 28: two selections have these margins."""
    chosen = {("gate", i) for i in range(29)} | {("up", i) for i in (*range(28), 29)}
    kappas = {(name, i): (2.0 if (name, i) in chosen else 200.0) + i for name in ("gate", "up") for i in range(30)}
    ranking = dense(kappas)
    lowest = set(ranking.select(num_tensors=58).keys)
    found = [ranking.select(num_tensors=58, order="random", seed=seed, match="margins") for seed in range(20)]
    assert 4 <= sum(set(drawn.keys) == lowest for drawn in found) <= 16
    assert {frozenset(set(drawn.keys) - lowest) for drawn in found} == {
        frozenset(),
        frozenset({"layers.29.gate", "layers.28.up"}),
    }


def test_a_control_says_so():
    ranking = dense({("gate", i): 2.0 + i for i in range(8)} | {("up", i): 9.5 - i for i in range(8)})
    drawn = ranking.select(num_tensors=5, order="random", seed=2, match="margins")
    assert "order=random, seed=2, match=margins" in repr(drawn)
    assert "a control: order=random, seed=2, match=margins" in lines_of(drawn)
    assert "control" not in "".join(lines_of(ranking.select(num_tensors=5)))


def test_rank_deficient_matrices_are_not_drawn():
    ranking = dense({("gate", i): 2.0 + i for i in range(4)} | {("up", i): 5.5 - i for i in range(4)})
    broken = [
        make_entry(
            f"layers.{i}.down", group="layers.*.down", layer=i, shape=(8, 24), status="rank_deficient", lower=1e9
        )
        for i in range(4)
    ]
    both = Ranking([*ranking.entries, *broken], (), ranking.metadata)
    for seed in range(20):
        drawn = both.select(num_tensors=3, order="random", seed=seed, match="margins")
        assert not any("down" in key for key in drawn.keys)
