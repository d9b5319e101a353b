from __future__ import annotations

import copy
import math
import pickle
import random
import sys
from dataclasses import FrozenInstanceError, fields

import make_entries as make
import pytest
from hypothesis import given
from make_entries import bounded, make_entry, non_finite

from kappa_fast.errors import MissingExtraError, OptionError
from kappa_fast.results.entries import FIELDS, Skipped, TensorKappa
from kappa_fast.results.ranking import Ranking

MIXED = [
    non_finite("n2"),
    bounded("b2", 3.0),
    make_entry("d1", math.inf),
    make_entry("k2", 20.0),
    bounded("b1", 40.0),
    non_finite("n1"),
    make_entry("k1", 10.0),
]


def test_the_order_is_resolved_then_rank_deficient_then_bounded_by_lower_then_non_finite():
    assert [entry.key for entry in Ranking(MIXED)] == ["k1", "k2", "d1", "b2", "b1", "n1", "n2"]


def test_ties_are_broken_by_key():
    ranking = Ranking(
        [make_entry("b"), make_entry("a", part="[1]"), make_entry("a", part="[0]"), bounded("d", 1), bounded("c", 1)]
    )
    assert [entry.key for entry in ranking] == ["a[0]", "a[1]", "b", "c", "d"]


@given(make.entry_lists, make.st.randoms())
def test_the_order_of_the_entries_that_come_in_changes_nothing(entries, chance):
    shuffled = list(entries)
    chance.shuffle(shuffled)
    assert Ranking(shuffled) == Ranking(entries)
    assert [entry.key for entry in Ranking(shuffled)] == [entry.key for entry in Ranking(entries)]


@given(make.entry_lists)
def test_scores_ascend_among_the_resolved(entries):
    resolved = [entry.score for entry in Ranking(entries) if entry.status == "ok"]
    assert resolved == sorted(resolved)


def test_a_custom_score_decides_the_order():
    assert [e.name for e in Ranking([make_entry("a", 5.0, score=2.0), make_entry("b", 50.0, score=1.0)])] == ["b", "a"]


def test_two_entries_with_one_key_are_refused():
    with pytest.raises(OptionError, match=r"two entries have the key 'a\[1\]': give each matrix its own name and part"):
        Ranking([make_entry("a[1]"), make_entry("a", part="[1]", kappa=3.0)])


@pytest.mark.parametrize(
    ("entry", "what"), [(make_entry("w", score=math.nan), "score"), (bounded("w", math.nan), "lower")]
)
def test_nan_where_the_order_is_decided_is_refused(entry, what):
    with pytest.raises(OptionError, match=rf"the {what} of w \(shape \(32, 16\)\) is nan, which cannot be sorted"):
        Ranking([entry])


def test_a_ranking_is_a_sequence_of_entries():
    ranking = Ranking(MIXED)
    assert len(ranking) == 7
    assert ranking[0].key == "k1"
    assert ranking[-1].key == "n2"
    assert ranking[1:3] == ranking.entries[1:3]
    assert isinstance(ranking[1:3], tuple)
    assert ranking.index(ranking[3]) == 3
    assert list(reversed(ranking)) == list(ranking)[::-1]
    assert ranking[2] in ranking
    assert make_entry("other") not in ranking
    with pytest.raises(IndexError):
        ranking[7]


def test_entries_are_found_by_key():
    ranking = Ranking([make_entry("a", part="[3].gate"), make_entry("b")], [Skipped("head", (3, 4), "output head")])
    assert ranking["a[3].gate"].part == "[3].gate"
    assert "b" in ranking
    assert "a" not in ranking
    with pytest.raises(KeyError, match=r"no entry 'a' in this ranking; entry\.key lists the keys there are"):
        ranking["a"]
    with pytest.raises(KeyError, match="no entry 'head' in this ranking; it was skipped: output head"):
        ranking["head"]


def test_nothing_in_a_ranking_can_be_changed():
    source = {"settings": {"include": ["a"]}}
    entries = [make_entry()]
    ranking = Ranking(entries, [], source)
    source["settings"]["include"].append("b")
    entries.clear()
    assert len(ranking) == 1
    assert ranking.metadata["settings"]["include"] == ("a",)
    with pytest.raises(FrozenInstanceError):
        ranking.entries = ()
    with pytest.raises(TypeError):
        ranking.metadata["seconds"] = 1.0
    with pytest.raises(TypeError):
        ranking.metadata["settings"]["rtol"] = 1.0
    with pytest.raises(TypeError):
        hash(ranking)


def test_metadata_that_is_no_json_is_refused():
    with pytest.raises(OptionError, match=r"metadata\['device'\] is of type object, which JSON cannot hold"):
        Ranking([], (), {"device": object()})


def test_copies_and_pickles_are_equal_and_other_things_are_not():
    ranking = Ranking(MIXED, [Skipped("s", (2,), "small")], {"settings": {"include": ["a", None, 0.5]}})
    assert pickle.loads(pickle.dumps(ranking)) == ranking
    assert copy.deepcopy(ranking) == ranking
    assert Ranking(MIXED, [], ranking.metadata) != ranking
    assert Ranking(MIXED[1:], ranking.skipped, ranking.metadata) != ranking
    assert ranking != list(ranking)


def test_repr_is_one_short_line():
    assert repr(Ranking(MIXED, [Skipped("s", (2,), "small")])) == (
        "Ranking(7 matrices, kappa 10 to 20, 1 rank deficient, 2 only bounded, 2 nan, 1 skipped)"
    )
    assert repr(Ranking([])) == "Ranking(0 matrices, 0 skipped)"
    random.seed(0)
    many = Ranking([make_entry(f"w{i}", random.uniform(1, 9)) for i in range(500)])
    assert len(repr(many)) < 100


def test_a_dataframe_has_a_row_per_entry_and_a_column_per_field():
    frame = Ranking(MIXED).to_dataframe()
    names = list(FIELDS)
    assert sorted(names) == sorted(item.name for item in fields(TensorKappa))
    at = names.index("shape")
    assert list(frame.columns) == ["key", *names[:at], "rows", "columns", *names[at + 1 :]]
    assert list(frame["key"]) == ["k1", "k2", "d1", "b2", "b1", "n1", "n2"]
    assert frame["kappa"][0] == 10.0
    assert (frame["rows"][0], frame["columns"][0]) == (32, 16)
    assert list(Ranking([]).to_dataframe().columns) == list(frame.columns)


def test_without_pandas_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    message = r"Ranking\.to_dataframe\(\) needs the package 'pandas': pip install 'kappa_fast\[dataframe\]'"
    with pytest.raises(MissingExtraError, match=message):
        Ranking([]).to_dataframe()


def test_importing_the_ranking_brings_neither_rich_nor_pandas(run_python, root):
    code = (
        "import sys, kappa_fast.results.ranking; print({'rich', 'pandas', 'triton', 'matplotlib'} & set(sys.modules))"
    )
    assert run_python(code, cwd=root).strip() == "set()"
