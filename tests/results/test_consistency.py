"""Rankings and selections that contradict themselves are refused when they are read, and so is what is too much."""

import json
import math
import os
import stat
from dataclasses import replace

import pytest
from make_entries import bounded, make_entry, non_finite

import kappa_fast
from kappa_fast import Ranking, RankingFileError, Selection, SourceNotFoundError
from kappa_fast.io import limits, writing
from kappa_fast.io.limits import DEEPEST
from kappa_fast.results import serialize


def rewritten(path, change):
    """The document at the path with a change made to it."""
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


ENTRIES = [
    make_entry("ok", 10.0, lower=9.0, upper=11.0),
    make_entry("singular", math.inf),
    bounded("beyond", 20.0),
    non_finite("nan"),
]


@pytest.mark.parametrize(
    ("position", "values", "message"),
    [
        (0, dict(lower=12.0), "'lower' is 12.0 and 'upper' 11.0"),
        (0, dict(lower=0.5), "'lower' is 0.5 and"),
        (0, dict(lower="nan"), "'lower' is nan"),
        (0, dict(kappa=12.0, score=12.0), "'kappa' is 12.0, outside of its interval"),
        (0, dict(kappa=0.0, score=0.0), "'kappa' is 0.0, outside"),
        (0, dict(kappa="inf"), "'kappa' is inf, outside"),
        (0, dict(numel=7), r"'numel' is 7, and its shape \[32, 16\] has 512"),
        (0, dict(shape=[64, 16]), r"'numel' is 512, and its shape \[64, 16\] has 1024"),
        (0, dict(sigma_max=0.01), "'sigma_max' is 0.01 and 'sigma_min' 0.1"),
        (0, dict(sigma_min=-1.0), "'sigma_min' -1.0"),
        (0, dict(sensitivity=-0.5), "'sensitivity' is -0.5"),
        (1, dict(kappa=5.0), "'kappa' is 5.0 and 'upper' inf for a singular matrix"),
        (1, dict(upper=1e300), "'upper' 1e\\+300 for a singular"),
        (2, dict(certified=True), "'certified' is true, and its status 'bounded'"),
        (2, dict(upper=30.0), "'upper' 30.0, where only a lower bound is known"),
        (3, dict(kappa=3.0), "'kappa' is 3.0 for weights that are not finite"),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused_with_the_field(position, values, message, tmp_path):
    Ranking(ENTRIES).to_json(tmp_path / "r.json")
    assert len(Ranking.from_json(tmp_path / "r.json")) == 4
    path = rewritten(tmp_path / "r.json", lambda raw: raw["entries"][position].update(values))
    with pytest.raises(RankingFileError, match=rf"entries\[{position}\] \('.*'\) contradicts itself: .*{message}"):
        Ranking.from_json(path)


def test_a_score_that_is_not_kappa_in_a_ranking_by_kappa_is_refused(tmp_path):
    Ranking(ENTRIES, (), {"settings": {"score": "kappa"}}).to_json(tmp_path / "r.json")
    path = rewritten(tmp_path / "r.json", lambda raw: raw["entries"][0].update(score=3.0))
    with pytest.raises(RankingFileError, match=r"the score of 'ok' is 3\.0 where its kappa is 10\.0"):
        Ranking.from_json(path)
    own = rewritten(path, lambda raw: raw["metadata"]["settings"].update(score="callable"))
    assert Ranking.from_json(own)["ok"].score == 3.0


@pytest.mark.parametrize(
    ("settings", "certain", "message"),
    [
        (dict(budget="x\ny: z", value=1), True, "'budget' is 'x.*', which is not one of num_tensors"),
        (dict(budget=["num_tensors"], value=1), True, "'budget' is"),
        (dict(budget={"num_tensors": 1}, value=1), True, "'budget' is"),
        (dict(budget="num_tensors", value="1"), True, "'value' is '1', not a count"),
        (dict(budget="num_tensors", value=-1), True, "'value' is '-1', not a count"),
        (dict(budget="top_p", value=2.0), True, "'value' is '2.0', not a fraction"),
        (dict(budget="top_p", value=0.5, unit="everything"), True, "'unit' or 'per_group'"),
        (dict(budget="top_p", value=0.5, per_group="no"), True, "'unit' or 'per_group'"),
        (dict(budget="max_kappa", value=9.5), False, "'ok' with kappa from 9.0 to 11.0 is not below 9.5"),
        (dict(budget="max_kappa", value=10.5), True, "'ok' with kappa .* is not below 10.5 for certain"),
        (dict(budget="max_params", value=100), True, "it holds 512 weights, more than max_params=100"),
    ],
)
def test_a_selection_that_its_budget_contradicts_is_refused(settings, certain, message, tmp_path):
    Selection(tuple(ENTRIES[:1]), certain, {}).to_json(tmp_path / "s.json")
    path = rewritten(tmp_path / "s.json", lambda raw: raw["settings"].update(settings))
    with pytest.raises(RankingFileError, match=rf"contradicts itself: {message}"):
        Selection.from_json(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("source", "x", "'source' is 'x', not an object"),
        ("source", {"computed": {"a": "b"}}, "'source.computed' is .*, not an object with lists of texts"),
        ("source", {"path": ["x"]}, "'source.path' is .*, not a text or null"),
        ("source", {"read_directly": [1]}, "'source.read_directly' is .*, not a list of texts"),
        ("source", {"quantization": {"fp8": "x"}}, "'source.quantization' is .*, not an object with counts"),
        ("settings", [1], "'settings' is .*, not an object"),
        ("num_parameters", "many", "'num_parameters' is 'many', not a count"),
        ("partial", 1, "'partial' is '1', not true or false"),
        ("seconds", "x", "'seconds' is 'x', not a number"),
    ],
)
def test_metadata_of_another_kind_than_rank_writes_is_refused(name, value, message, tmp_path):
    Ranking(ENTRIES, (), {"own": [1], "source": {"own": 2, "path": None}}).to_json(tmp_path / "r.json")
    assert Ranking.from_json(tmp_path / "r.json").metadata["own"] == (1,)
    path = rewritten(tmp_path / "r.json", lambda raw: raw["metadata"].update({name: value}))
    with pytest.raises(RankingFileError, match=message):
        Ranking.from_json(path)
    if name == "source":
        Selection((ENTRIES[0],), True, {"source": {"kind": "file"}}).to_json(tmp_path / "s.json")
        path = rewritten(tmp_path / "s.json", lambda raw: raw["settings"].update({name: value}))
        with pytest.raises(RankingFileError, match=message):
            Selection.from_json(path)


@pytest.mark.parametrize("entry", ENTRIES[2:])
def test_a_selection_of_what_no_budget_selects_is_refused(entry, tmp_path):
    Selection((entry,), True, {}).to_json(tmp_path / "s.json")
    with pytest.raises(RankingFileError, match="which no budget selects"):
        Selection.from_json(tmp_path / "s.json")


def test_more_matrices_than_their_number_are_refused(tmp_path):
    pair = (make_entry("a"), make_entry("b"))
    Selection(pair, True, dict(budget="num_tensors", value=1)).to_json(tmp_path / "s.json")
    with pytest.raises(RankingFileError, match="it holds 2 matrices, more than num_tensors=1"):
        Selection.from_json(tmp_path / "s.json")
    Selection(pair, True, dict(budget="num_tensors", value=1, unit="parameter")).to_json(tmp_path / "s.json")
    assert len(Selection.from_json(tmp_path / "s.json")) == 2


def test_what_rank_and_select_write_is_read_again(tmp_path):
    import torch

    ranking = kappa_fast.rank({f"l.{i}.w": torch.randn(20 + i, 18) for i in range(6)}, progress=False)
    ranking.to_json(tmp_path / "r.json")
    assert Ranking.from_json(tmp_path / "r.json") == ranking
    budgets = [dict(num_tensors=2), dict(top_p=0.5), dict(max_kappa=20), dict(max_params=0.5), dict(max_params=800)]
    for budget in budgets:
        for more in ({}, {"per_group": True}, {"unit": "parameter"}):
            selection = ranking.select(**budget, **more)
            selection.to_json(tmp_path / "s.json")
            assert Selection.from_json(tmp_path / "s.json") == selection


@pytest.mark.parametrize("form", [["x"], {"a": 1}, 3, None])
def test_a_format_that_is_no_text_is_refused(form, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"format": form, "entries": []}))
    for kind in (Ranking, Selection):
        with pytest.raises(RankingFileError, match="is not a file of the format"):
            kind.from_json(tmp_path / "r.json")


@pytest.mark.parametrize("depth", [DEEPEST + 2, 500, 100_000])
def test_deep_metadata_is_refused(depth, tmp_path):
    text = '{"a":' + "[" * depth + "]" * depth + "}"
    for kind, key, empty in ((Ranking, "metadata", Ranking(())), (Selection, "settings", Selection((), True, {}))):
        empty.to_json(tmp_path / "f.json")
        whole = (tmp_path / "f.json").read_text()
        (tmp_path / "f.json").write_text(whole.replace(f'"{key}": {{}}', f'"{key}": {text}'))
        with pytest.raises(RankingFileError, match="deep"):
            kind.from_json(tmp_path / "f.json")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    Ranking(ENTRIES).to_json(tmp_path / "r.json")
    monkeypatch.setattr(serialize, "LARGEST_RANKING", 100)
    with pytest.raises(RankingFileError, match=r"r\.json: the number of bytes is .*, and more than 100 is"):
        Ranking.from_json(tmp_path / "r.json")
    monkeypatch.setattr(serialize, "LARGEST_RANKING", limits.LARGEST_RANKING)
    monkeypatch.setattr(serialize, "MOST_VALUES_OF_RANKING", 10)
    with pytest.raises(RankingFileError, match=r"the number of values is"):
        Ranking.from_json(tmp_path / "r.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "r.json")
    with pytest.raises(RankingFileError, match="not a regular file"):
        Ranking.from_json(tmp_path / "r.json")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_what_is_written_anew_keeps_its_rights(mode, tmp_path):
    path = tmp_path / "r.json"
    Ranking(()).to_json(path)
    path.chmod(mode)
    Ranking(ENTRIES).to_json(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "missing/r.json"])
def test_a_place_that_cannot_be_written_is_an_error_that_names_it(name, tmp_path):
    with pytest.raises(RankingFileError, match="cannot write"):
        Ranking(()).to_json(tmp_path / name)
    with pytest.raises((RankingFileError, SourceNotFoundError)):
        Ranking.from_json(tmp_path / name)


def test_folders_and_their_parents_are_brought_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(writing, "sync_folder", synced.append)
    writing.make_folders(tmp_path / "a" / "b" / "c", 0o700)
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    Ranking(()).to_json(tmp_path / "a" / "r.json")
    assert synced[-1] == tmp_path / "a"


def test_a_new_file_follows_no_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "draft").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        writing.create(tmp_path / "draft", 0o600)
    assert (tmp_path / "victim").read_text() == "precious"


def with_statistics(name: str, flatness: float) -> kappa_fast.TensorKappa:
    return make_entry(
        name,
        10.0,
        stable_rank=-20 * flatness,
        flatness=flatness,
        flatness_lower=flatness - 0.01,
        flatness_upper=flatness,
        flatness_by_shape=3 * flatness,
    )


@pytest.mark.parametrize("score", ["kappa", "-kappa", "flatness", "-flatness", "flatness_by_shape", "stable_rank"])
def test_a_ranking_whose_scores_are_not_what_its_settings_name_is_refused(score, tmp_path):
    path = tmp_path / "r.json"
    entries = [with_statistics("a", -0.5), with_statistics("b", -0.25), non_finite("nan"), bounded("c", 20.0)]
    Ranking(entries).by(score).to_json(path)
    assert Ranking.from_json(path).metadata["settings"]["score"] == score
    for other in ("demmel", "frobenius", score.removeprefix("-") if score.startswith("-") else f"-{score}"):
        rewritten(path, lambda raw, other=other: raw["metadata"]["settings"].update(score=other))
        with pytest.raises(RankingFileError, match=f"it is ranked by {other}, and the score of '[ab]' is"):
            Ranking.from_json(path)


def test_a_callable_called_like_a_score_is_no_contradiction(tmp_path):
    def flatness(entry: kappa_fast.TensorKappa) -> float:
        return 7.0

    for score in (flatness, lambda entry: len(entry.key)):
        found = Ranking([with_statistics("a", -0.5), make_entry("d", math.inf)]).by(score)
        found.to_json(tmp_path / "r.json")
        assert Ranking.from_json(tmp_path / "r.json") == found


def test_a_singular_matrix_without_the_score_is_no_contradiction(tmp_path):
    found = Ranking([with_statistics("a", -0.5), make_entry("d", math.inf)]).by("sensitivity")
    found.to_json(tmp_path / "r.json")
    assert Ranking.from_json(tmp_path / "r.json") == found


@pytest.mark.parametrize(
    ("name", "value"),
    [("outliers_above", 17), ("outliers_undecided", 10**20), ("snr", -0.5), ("alpha", 0.5), ("spectral_entropy", 1.5)],
)
def test_statistics_by_request_that_no_matrix_has_are_refused(name, value, tmp_path):
    known = dict(outliers_above=16, outliers_below=0, outliers_undecided=16, snr=0.0, alpha=1.5, spectral_entropy=1.0)
    entry = make_entry("a", 5.0, shape=(32, 16), **known)
    path = tmp_path / "ranking.json"
    kappa_fast.Ranking([entry]).to_json(path)
    assert kappa_fast.Ranking.from_json(path)[0] == entry
    kappa_fast.Ranking([replace(entry, **{name: value})]).to_json(path)
    with pytest.raises(kappa_fast.RankingFileError, match=f"'{name}' is"):
        kappa_fast.Ranking.from_json(path)
