from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_entries import make_entry, non_finite

from kappa_fast.errors import OptionError, RankingFileError
from kappa_fast.results.ranking import Ranking
from kappa_fast.results.selecting import check_budget
from kappa_fast.results.selection import Selection

# Small models have few selections, of which the lowest is one.
pytestmark = pytest.mark.filterwarnings("ignore:seed=.* draws the lowest themselves:UserWarning")

TYPES = {"q": (8, 8), "up": (24, 8)}


def experts(layers: int = 3, count: int = 6) -> Ranking:
    """Several matrices of two types in each layer, the lowest kappas in the first."""
    entries = [
        make_entry(
            f"layers.{layer}.{name}.{i}",
            2.0 + layer + 0.1 * i + (0.05 if name == "up" else 0),
            group=f"layers.*.{name}",
            layer=layer,
            shape=shape,
        )
        for layer in range(layers)
        for name, shape in TYPES.items()
        for i in range(count)
    ]
    return Ranking(entries, (), {"num_parameters": sum(entry.numel for entry in entries)})


def cells(selection: Selection, *fields: str) -> Counter[Any]:
    return Counter(tuple(getattr(entry, field) for field in fields) for entry in selection)


def test_highest_takes_the_other_end():
    ranking = experts()
    assert ranking.select(num_tensors=5, order="highest").entries == ranking.entries[-5:]
    assert ranking.select(num_tensors=5, order="highest").boundary_certain
    assert not set(ranking.select(top_p=0.5, order="highest").keys) & set(ranking.select(top_p=0.5).keys)
    assert ranking.select(num_tensors=5, order="lowest") == ranking.select(num_tensors=5)


@given(st.integers(1, 36), st.booleans())
def test_highest_is_lowest_of_the_opposite_scores(count, per_group):
    ranking = experts()
    opposite = Ranking([replace(entry, score=-entry.score) for entry in ranking], (), ranking.metadata)
    for budget in ({"num_tensors": count}, {"max_params": 200 * count}, {"max_params": 200 * count, "fill": True}):
        found = ranking.select(order="highest", per_group=per_group, **budget)
        assert set(found.keys) == set(opposite.select(per_group=per_group, **budget).keys)


def test_a_cut_between_overlapping_intervals_is_uncertain_from_above_too():
    entries = [make_entry("a", 2.0), make_entry("b", 3.0, lower=2.9, upper=4.1), make_entry("c", 4.0, upper=4.2)]
    assert not Ranking(entries).select(num_tensors=1, order="highest").boundary_certain
    assert Ranking(entries).select(num_tensors=2, order="highest").boundary_certain


@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([("type",), ("layer",), ("type", "layer")]))
def test_a_matched_draw_differs_from_the_lowest_in_nothing_that_it_matches(seed, count, match):
    ranking = experts()
    lowest = ranking.select(num_tensors=count)
    drawn = ranking.select(num_tensors=count, order="random", seed=seed, match=match)
    fields = ["shape", *({"type": "group", "layer": "layer"}[name] for name in match)]
    assert cells(drawn, *fields) == cells(lowest, *fields)
    assert drawn.num_params == lowest.num_params


def test_every_matrix_of_a_cell_is_drawn_equally_often():
    ranking, draws = experts(1, 6), 1200
    counts = Counter(
        key
        for seed in range(draws)
        for key in ranking.select(num_tensors=4, order="random", seed=seed, match=("type", "layer")).keys
    )
    assert len(counts) == 12
    assert all(abs(n - draws / 3) < 4.5 * (draws * 2 / 9) ** 0.5 for n in counts.values())


def test_a_seed_draws_the_same_whatever_the_scores_and_the_order_of_entries():
    ranking = experts()
    again = Ranking(reversed(ranking.entries), (), ranking.metadata)
    other = Ranking([replace(e, score=e.score + 1) for e in ranking], (), ranking.metadata)
    for match in ((), ("type", "layer")):
        options: dict[str, Any] = dict(max_params=0.2, order="random", seed=7, match=match)
        first = ranking.select(**options)
        assert first == again.select(**options) == ranking.select(**options)
        assert set(first.keys) == set(other.select(**options).keys)
        assert first != ranking.select(**(options | {"seed": 8}))
        assert list(first) == [entry for entry in ranking if entry in first]  # in the order of the ranking


def test_a_random_order_is_cut_by_its_budget():
    ranking = experts()
    drawn = ranking.select(max_params=1000, order="random", seed=1, fill=True)
    assert 0 < drawn.num_params <= 1000
    assert drawn.boundary_certain  # kappas have no part in it
    assert ranking.select(top_p=0.5, order="random", per_group=True, seed=1).took() == "18 of 36 in 2 groups: 50.0%"


def test_a_draw_of_experts_takes_them_whole():
    entries = [
        make_entry(f"layers.{layer}.experts.{e}.{name}", 2.0 + e, group=f"*.{name}", layer=layer, shape=(4, 4))
        for layer in range(2)
        for e in range(8)
        for name in ("w1", "w2")
    ]
    drawn = Ranking(entries).select(top_p=0.25, unit="expert", order="random", seed=3, match=("type", "layer"))
    assert cells(drawn, "layer", "group") == {(layer, f"*.{name}"): 2 for layer in range(2) for name in ("w1", "w2")}
    assert len({e.name.rpartition(".")[0] for e in drawn}) == 4


def test_a_draw_that_can_only_be_the_lowest_is_refused():
    dense = Ranking([make_entry(f"layers.{i}.q", 2.0 + i, group="q", layer=i) for i in range(8)])
    with pytest.raises(
        OptionError, match=r"leaves one way to draw, the lowest themselves.*: give match='margins', which"
    ):
        dense.select(num_tensors=2, order="random", match=("type", "layer"))
    with pytest.raises(OptionError, match="give a smaller budget, or another unit"):
        dense.select(num_tensors=8, order="random", match="type")
    assert len(dense.select(num_tensors=2, order="random", match="type")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "middle"}, "order='middle' is unknown: use one of 'lowest', 'highest', 'random'"),
        ({"order": "random", "seed": -1}, "seed=-1: give an int from 0 on"),
        ({"order": "random", "seed": 0.0}, "seed=0.0: give an int from 0 on"),
        ({"order": "random", "match": "depth"}, "match='depth': give 'type', 'layer' or both, or 'margins'"),
        ({"order": "random", "match": ("type", "margins")}, "give 'type', 'layer' or both, or 'margins'"),
        ({"seed": 1}, "seed= is for random draws"),
        ({"order": "highest", "match": "type"}, "match= is for random draws"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    for check in (experts().select, lambda **given: check_budget(given)):
        with pytest.raises(OptionError, match=message):
            check(num_tensors=2, **options)


def test_max_kappa_has_controls_only_where_they_match_the_lowest():
    ranking = experts()
    for order in ("highest", "random"):
        with pytest.raises(OptionError, match="max_kappa says which matrices, not how many"):
            ranking.select(max_kappa=2.35, order=order)
    drawn = ranking.select(max_kappa=2.35, order="random", match=("type", "layer"))
    assert cells(drawn, "layer", "group") == cells(ranking.select(max_kappa=2.35), "layer", "group")


def test_what_was_not_resolved_is_not_drawn_from():
    entries = [make_entry("a", 2.0), make_entry("b", 3.0), make_entry("c", status="bounded", lower=3.5)]
    with pytest.raises(OptionError, match="c was not resolved: rank again without top"):
        Ranking(entries).select(num_tensors=1, order="random")
    with pytest.raises(OptionError, match="rank again without top"):
        Ranking(entries).select(num_tensors=1, order="highest")


def test_singular_and_broken_matrices_are_no_controls():
    entries = [make_entry(f"w{i}", 2.0 + i) for i in range(4)] + [non_finite("n")]
    entries.append(make_entry("s", status="rank_deficient", lower=1e9))
    ranking = Ranking(entries, (), {"num_parameters": sum(e.numel for e in entries)})
    assert ranking.select(num_tensors=2, order="highest").keys == ("w2", "w3")
    for seed in range(20):
        assert set(ranking.select(num_tensors=3, order="random", seed=seed).keys) <= {"w0", "w1", "w2", "w3"}
        assert set(ranking.select(num_tensors=2, order="random", seed=seed, match="type").keys) <= {
            f"w{i}" for i in range(4)
        }


def test_a_control_is_written_and_read(tmp_path):
    ranking = experts()
    drawn = ranking.select(max_kappa=2.35, order="random", seed=5, match=("layer", "type"))
    drawn.to_json(tmp_path / "drawn.json")
    assert Selection.from_json(tmp_path / "drawn.json") == drawn
    document = json.loads((tmp_path / "drawn.json").read_text())
    assert document["settings"]["order"] == "random"
    assert document["settings"]["seed"] == 5
    assert document["settings"]["match"] == ["type", "layer"]
    document["settings"]["order"] = "sideways"
    (tmp_path / "strange.json").write_text(json.dumps(document))
    with pytest.raises(RankingFileError, match="'order' is 'sideways', none of lowest, highest, random"):
        Selection.from_json(tmp_path / "strange.json")
    within = ranking.select(max_params=0.3, per_group=True)
    within.to_json(tmp_path / "within.json")
    assert Selection.from_json(tmp_path / "within.json") == within
