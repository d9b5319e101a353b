"""Scores by name: orders, what is refused, and what selections make of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from make_entries import bounded, make_entry, non_finite
from models import one_thread

import kappa_fast
from kappa_fast import OptionError, Ranking
from kappa_fast.cli.select import lines_of
from kappa_fast.results.scores import NAMES, NamedScore
from kappa_fast.spectrum import small


def generated(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    found = {f"layers.{i}.up": generated(300 + 20 * i, 180 - 4 * i, i) for i in range(3)}
    found |= {"layers.0.q": generated(200, 200, 7), "layers.1.small": generated(40, 24, 8)}
    singular = generated(210, 170, 9)
    singular[:, 5] = 0
    return found | {"layers.2.singular": singular}


@pytest.fixture(autouse=True)
def _no_batches(monkeypatch):
    # Batches of small matrices have both ends of all their matrices: others are too large for quick tests.
    monkeypatch.setattr(small, "BELOW", 2)


@pytest.fixture
def full(weights) -> Ranking:
    with one_thread():
        return kappa_fast.rank(weights, progress=False)


def values(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(weight.double())


TRUTHS = {
    "flatness": lambda s: float(s.log().mean() - s.square().mean().log() / 2),
    "stable_rank": lambda s: float(s.square().sum() / s[0].square()),
    "participation_ratio": lambda s: float(s.square().sum() ** 2 / s.pow(4).sum()),
    "frobenius": lambda s: float(s.square().sum().sqrt()),
    "demmel": lambda s: float(s.square().sum().sqrt() / s[-1]),
}


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize("sign", ["", "-"])
def test_rank_sorts_by_a_statistic_of_the_singular_values_from_either_end(weights, name, sign):
    ranking = kappa_fast.rank(weights, score=sign + name, progress=False)
    exact = {key: TRUTHS[name](values(w)) for key, w in weights.items() if key != "layers.2.singular"}
    assert [e.key for e in ranking][:-1] == sorted(exact, key=exact.__getitem__, reverse=bool(sign))
    for entry in ranking[:-1]:
        assert abs(entry.score) == pytest.approx(abs(exact[entry.key]), rel=1e-2, abs=1e-4)
        assert (entry.score < 0) == ((sign == "-") != (name == "flatness"))
    assert ranking[-1].status == "rank_deficient"
    assert ranking.metadata["settings"]["score"] == sign + name


def test_what_a_score_does_not_need_is_not_computed(weights, monkeypatch):

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("no Krylov space is needed")

    monkeypatch.setattr("kappa_fast.spectrum.search.largest", refuse)
    ranking = kappa_fast.rank(weights, score="-flatness", progress=False)
    assert [entry.status for entry in ranking].count("scored") == 4
    scored = next(entry for entry in ranking if entry.status == "scored")
    assert math.isnan(scored.kappa)
    assert (scored.lower, scored.upper, scored.certified) == (1.0, math.inf, False)
    with pytest.raises(AssertionError, match="no Krylov"):
        kappa_fast.rank(weights, score="stable_rank", progress=False)


def test_the_same_score_comes_from_the_same_pass_and_from_one_of_its_own(weights, full):
    again, own = full.by("-flatness"), kappa_fast.rank(weights, score="-flatness", progress=False)
    assert [entry.key for entry in again] == [entry.key for entry in own]
    assert [entry.score for entry in again] == [entry.score for entry in own]


def test_by_sorts_anew_without_weights_also_from_a_file_and_back(full, tmp_path):
    flat = full.by("flatness_by_shape")
    flat.to_json(tmp_path / "r.json")
    read = Ranking.from_json(tmp_path / "r.json")
    assert read == flat
    assert [e.score for e in read[:5]] == sorted(e.flatness_by_shape for e in full if e.status == "ok")
    assert read.by("kappa") == full
    assert full.by(lambda entry: -entry.numel)[0].numel == max(entry.numel for entry in full if entry.status == "ok")


def test_a_file_whose_score_is_without_kappa_reads_back_and_knows_kappa_only_as_bounded(weights, tmp_path):
    ranking = kappa_fast.rank(weights, score="-flatness", progress=False)
    ranking.to_json(tmp_path / "r.json")
    assert Ranking.from_json(tmp_path / "r.json") == ranking
    back = ranking.by("kappa")
    assert {entry.status for entry in back} == {"ok", "rank_deficient", "bounded"}
    with pytest.raises(OptionError, match="reaches beyond what was resolved"):
        back.select(num_tensors=4)


def test_a_selection_takes_the_first_of_any_score_and_says_which(weights):
    ranking = kappa_fast.rank(weights, score="-flatness", progress=False)
    selection = ranking.select(num_tensors=2)
    assert selection.keys == tuple(entry.key for entry in ranking[:2])
    assert selection.settings["score"] == "-flatness"
    assert selection.boundary_certain  # the intervals of the flatness do not overlap
    assert "kappa nan" not in repr(ranking)
    with pytest.raises(OptionError, match=r"max_kappa needs kappa, .* rank with score='kappa'"):
        ranking.select(max_kappa=10.0)
    assert "score" not in kappa_fast.rank(weights, progress=False).select(num_tensors=2).settings


def test_overlapping_intervals_of_the_flatness_leave_a_cut_uncertain():
    def flat(name: str, at: float, width: float) -> object:
        known = dict(flatness=at, flatness_lower=at - width, flatness_upper=at + width)
        return make_entry(name, 5.0, score=at, **known)

    for width, certain in [(0.01, True), (0.2, False)]:
        entries = [flat("a", -2.0, width), flat("b", -1.7, width)]
        ranking = Ranking(entries, (), {"settings": {"score": "flatness"}})
        assert ranking.select(num_tensors=1).boundary_certain == certain


def test_a_unit_of_several_matrices_has_the_mean_flatness():
    known = [dict(flatness=x, flatness_lower=x, flatness_upper=x, score=x) for x in (-3.0, -1.0)]
    entries = [make_entry("a", part=".q", **known[0]), make_entry("a", part=".k", **known[1])]
    entries.append(make_entry("b", flatness=-2.5, flatness_lower=-2.5, flatness_upper=-2.5, score=-2.5))
    ranking = Ranking(entries, (), {"settings": {"score": "flatness"}})
    assert ranking.select(num_tensors=1, unit="parameter").names == ("b",)  # a has -2


def test_names_are_checked_and_guessed():
    ranking = Ranking([make_entry()])
    with pytest.raises(OptionError, match=r"score='flatnes': give a callable .* did you mean 'flatness'"):
        ranking.by("flatnes")
    with pytest.raises(OptionError, match="give a callable"):
        ranking.by(3)
    with pytest.raises(OptionError, match=r"'flatness' of .* is not known .*: rank the weights again with score='fla"):
        ranking.by("flatness")
    with pytest.raises(OptionError, match="returned 'x'"):
        ranking.by(lambda entry: "x")


def test_a_callable_that_raises_is_told_with_the_entry():
    def score(entry: kappa_fast.TensorKappa) -> float:
        return 1 / (entry.kappa - 2)

    with pytest.raises(OptionError, match=r"score\(\) raised ZeroDivisionError for 'b': float division") as raised:
        Ranking([make_entry("a", 5.0), make_entry("b", 2.0)]).by(score)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_proven_singular_matrix_leaves_a_cut_by_flatness_certain(weights):
    for score in ("flatness", "-flatness", "kappa", "-kappa"):
        ranking = kappa_fast.rank(weights, score=score, progress=False)
        assert ranking[-1].lower == math.inf  # a column is zero: it is proven
        assert ranking[-1].key == "layers.2.singular"
        chosen = ranking.select(num_tensors=len(ranking) - 1)
        assert chosen.boundary_certain, score
        assert "layers.2.singular" not in chosen.keys


def test_one_that_float64_cannot_tell_from_singular_leaves_a_cut_open_where_it_might_lie():
    def entry(name: str, flatness: float, status: str = "ok", **fields: float) -> kappa_fast.TensorKappa:
        known = dict(flatness=flatness, flatness_lower=flatness, flatness_upper=flatness, flatness_by_shape=0.0)
        return make_entry(name, math.inf if status != "ok" else 5.0, status=status, **{**known, **fields})

    regular = [entry("a", -0.5), entry("b", -0.25)]
    for lower, certain in ((1e15, False), (math.inf, True)):
        singular = entry("c", -math.inf, "rank_deficient", lower=lower, upper=math.inf, flatness_upper=-0.1)
        for score in ("flatness", "-flatness", "-kappa"):
            assert Ranking([*regular, singular]).by(score).select(num_tensors=2).boundary_certain is certain, score
        assert Ranking([*regular, singular]).select(num_tensors=2).boundary_certain  # kappas end below 1e15


def test_units_of_several_matrices_are_sorted_by_the_highest_statistic_too():
    def expert(number: int, rank: float, flatness: float) -> kappa_fast.TensorKappa:
        known = dict(stable_rank=rank, flatness=flatness, flatness_lower=flatness, flatness_upper=flatness)
        return make_entry(f"layers.0.experts.{number}.w{rank}", 5.0, **known)

    ranking = Ranking([expert(0, 2.0, -0.4), expert(0, 8.0, -0.1), expert(1, 3.0, -0.2), expert(1, 3.5, -0.2)])
    for score, first in (("-stable_rank", "0"), ("stable_rank", "1"), ("-flatness", "1"), ("flatness", "0")):
        chosen = ranking.by(score).select(num_tensors=1, unit="expert")
        assert {entry.name.split(".")[3] for entry in chosen} == {first}, score


@pytest.mark.parametrize("score", ["kappa", "-flatness", "outliers_above"])
@pytest.mark.parametrize("options", [{}, {"fill": True}, {"per_group": True}, {"per_group": True, "fill": True}])
def test_room_for_one_that_float64_cannot_tell_from_singular_leaves_a_cut_by_weights_open(score, options):
    def entry(name: str, kappa: float, flatness: float, **fields: Any) -> kappa_fast.TensorKappa:
        known = dict(flatness=flatness, flatness_lower=flatness, outliers_above=2, outliers_undecided=0)
        return make_entry(name, kappa, **{"flatness_upper": flatness, **known, **fields})

    regular = entry("a", 4.0, -0.5, shape=(16, 16))
    for lower, budget, certain in ((1e15, 1600, False), (math.inf, 1600, True), (1e15, 1000, True)):
        singular = entry("b", math.inf, -math.inf, lower=lower, flatness_upper=-0.6, shape=(64, 16), group="other")
        chosen = Ranking([regular, singular]).by(score).select(max_params=budget, **options)
        assert (chosen.keys, chosen.boundary_certain) == (("a",), certain), (lower, budget)


def test_counts_of_singular_matrices_are_not_compared_with_those_of_full_rank():
    def entry(name: str, kappa: float, above: int, **fields: Any) -> kappa_fast.TensorKappa:
        return make_entry(name, kappa, outliers_above=above, outliers_undecided=0, **fields)

    entries = [entry("a", 3.0, 1), entry("b", math.inf, 3, lower=math.inf), entry("c", math.inf, 0, lower=1e15)]
    ranking = Ranking(entries).by("-outliers_above")
    assert ranking.select(num_tensors=2).keys == ("a", "b")
    assert not ranking.select(num_tensors=2).boundary_certain  # c comes before b if it is of full rank
    assert Ranking(entries[:2]).by("-outliers_above").select(num_tensors=1).boundary_certain  # b is last in any case


def test_statistics_of_singular_matrices_do_not_make_a_cut_between_them_certain():
    def entry(name: str, rank: float, above: int, undecided: int) -> kappa_fast.TensorKappa:
        known = dict(stable_rank=rank, outliers_above=above, outliers_below=0, outliers_undecided=undecided)
        return make_entry(name, math.inf, lower=math.inf, **known)

    for undecided, certain in ((4, False), (0, True)):
        ranking = Ranking([entry("a", 2.0, 3, undecided), entry("b", 2.0001, 5, undecided)])
        for score in ("outliers_above", "-outliers_above"):
            assert ranking.by(score).select(num_tensors=1).boundary_certain is certain, score
        assert not ranking.by("stable_rank").select(num_tensors=1).boundary_certain  # it may be 10% off
        assert not ranking.by(lambda one: one.stable_rank).select(num_tensors=1).boundary_certain
        assert ranking.select(num_tensors=1).boundary_certain


def test_top_is_for_kappa_and_refused_where_it_saves_nothing(weights):
    with pytest.raises(OptionError, match="top= with score='flatness' would save nothing"):
        kappa_fast.rank(weights, top=2, score="flatness", progress=False)
    proven = kappa_fast.rank(weights, top=2, score="-flatness", certify="selection", progress=False)
    assert [entry.certified for entry in proven[:2]] == [True, True]


def test_entries_without_a_number_stay_at_the_end():
    ranking = Ranking([make_entry("a", 5.0), bounded("b", 7.0), non_finite("c"), make_entry("d", math.inf)])
    assert [entry.status for entry in ranking.by("-kappa")] == ["ok", "rank_deficient", "bounded", "non_finite"]
    assert [entry.status for entry in ranking.by("sensitivity")] == ["ok", "rank_deficient", "bounded", "non_finite"]


def test_a_callable_with_the_name_of_a_score_is_told_from_it():
    def flatness(entry: kappa_fast.TensorKappa) -> float:
        return 1.0

    ranking = Ranking([make_entry()]).by(flatness)
    assert ranking.metadata["settings"]["score"] == "flatness()"


@pytest.mark.parametrize("name", ["stable_rank", "sensitivity"])
def test_a_file_of_a_version_without_statistics_may_have_a_callable_with_the_name_of_a_score(name, tmp_path):
    settings = {"settings": {"score": name}}
    Ranking([make_entry("a", 5.0, score=3.0), make_entry("b", 4.0, score=7.0)], (), settings).to_json(tmp_path / "r")
    found = Ranking.from_json(tmp_path / "r")
    assert [(entry.key, entry.score) for entry in found] == [("a", 3.0), ("b", 7.0)]
    assert found.metadata["settings"]["score"] == f"{name}()"
    assert found.select(num_tensors=1).keys == ("a",)


def test_a_cache_keeps_statistics_and_computes_what_it_lacks(weights, tmp_path):
    first = kappa_fast.rank(weights, score="-flatness", cache=tmp_path, progress=False)
    again = kappa_fast.rank(weights, score="-flatness", cache=tmp_path, progress=False)
    assert again.metadata["cache"]["computed"] == 0
    assert [e.score for e in again] == [e.score for e in first]
    other = kappa_fast.rank(weights, score="participation_ratio", cache=tmp_path, progress=False)
    assert all(entry.participation_ratio is not None for entry in other)
    full = kappa_fast.rank(weights, cache=tmp_path, progress=False)
    assert all(math.isfinite(entry.kappa) for entry in full if entry.status == "ok")


def test_a_wide_interval_in_the_cache_does_not_stand_in_for_a_narrow_one(tmp_path):
    left, right = (torch.linalg.qr(generated(rows, 200, rows)).Q for rows in (400, 200))
    weights = {"w": (left * torch.logspace(0, -3, 200)) @ right.T}  # float32 resolves it for a large rtol alone

    def width(ranking: Ranking) -> float:
        return ranking[0].flatness_upper - ranking[0].flatness_lower

    narrow = kappa_fast.rank(weights, score="flatness", progress=False)
    for score in ("flatness", "kappa"):
        wide = kappa_fast.rank(weights, score=score, rtol=0.9, cache=tmp_path / score, progress=False)
        found = kappa_fast.rank(weights, score="flatness", cache=tmp_path / score, progress=False)
        assert width(found) == width(narrow) < width(wide) / 10, score
        again = kappa_fast.rank(weights, score="flatness", rtol=0.1, cache=tmp_path / score, progress=False)
        assert again.metadata["cache"]["computed"] == 0


def test_every_name_is_a_field_with_a_line_in_the_documentation():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "scores.md").read_text()
    for name in NAMES:
        assert hasattr(make_entry(), name)
        assert f"`{name}`" in page
    assert str(NamedScore.of("-flatness")) == "-flatness"


def test_numbers_of_numpy_are_scores():
    whole = Ranking([make_entry("a", 5.0), make_entry("b", 6.0)])
    assert [entry.key for entry in whole.by(lambda entry: -np.float32(entry.kappa))] == ["b", "a"]
    assert [entry.key for entry in whole.by(lambda entry: -np.int64(entry.numel * entry.kappa))] == ["b", "a"]
    with pytest.raises(OptionError, match=r"score\(\) returned 1j for 'a': it must return a number"):
        whole.by(lambda entry: 1j)
    with pytest.raises(OptionError, match=r"score\(\) returned a number for 'a' that is too large for a float"):
        whole.by(lambda entry: 10**400)


def test_a_selection_without_any_kappa_says_so():
    whole = Ranking(
        [make_entry(name, math.nan, status="scored", score=score) for name, score in (("a", 1.0), ("b", 2.0))]
    )
    selection = whole.select(num_tensors=1)
    assert "kappa not computed" in repr(selection)
    assert lines_of(selection)[0] == "1 matrices of 1 parameters, kappa not computed"


@pytest.mark.parametrize("name", ["flatness_by_shape", "alpha", "-outliers_above"])
def test_what_a_matrix_can_never_have_is_said_to_be_undefined(name):
    weights = {"column": generated(30, 1, 3), "w": generated(30, 20, 4)}
    with pytest.raises(
        OptionError, match=r"of 'column' is not defined, because it has a single singular value: .*exclude="
    ):
        kappa_fast.rank(weights, score=name, min_dim=1, progress=False)
    kappa_fast.rank(weights, score=name, min_dim=1, exclude="column", progress=False)


def test_equal_singular_values_have_no_power_law():
    weights = {"eye": torch.eye(20)}
    with pytest.raises(
        OptionError, match="'alpha' of 'eye' is not defined, because no two of its singular values differ"
    ):
        kappa_fast.rank(weights, score="alpha", progress=False)


def test_selections_by_different_scores_are_joined_in_the_order_of_kappa(weights):
    ranking = kappa_fast.rank(weights, progress=False)
    flattest = ranking.by("flatness")
    one, other = ranking.select(num_tensors=2), flattest.select(num_tensors=2, exclude=ranking[0].name)
    joined = one | other
    assert {e.key for e in joined} == {e.key for e in one} | {e.key for e in other}
    assert [e.kappa for e in joined] == sorted(e.kappa for e in joined)
    both = flattest.select(num_tensors=3) | flattest.select(num_tensors=2)
    assert [e.score for e in both] == sorted(e.score for e in both)


def test_a_gate_on_kappa_refuses_rankings_that_have_none(weights, tmp_path, monkeypatch):
    alone = kappa_fast.rank(weights, score="flatness", progress=False)
    assert any(e.status == "scored" for e in alone)
    whole = kappa_fast.rank(weights, progress=False)
    for one, other in ((alone, alone), (alone, whole), (whole, alone)):
        with pytest.raises(OptionError, match=r"nothing is known of kappa for \d matrices, .* score needs"):
            one.compare(other).exceeding(1.5)
    broken = dict(weights, **{"layers.0.q": torch.full((200, 200), math.nan)})
    found = alone.compare(kappa_fast.rank(broken, score="flatness", progress=False)).exceeding(1.5)
    assert [change.key for change in found] == ["layers.0.q"]  # what is broken is said whatever else is unknown
