from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import fields
from pathlib import Path

import make_entries as make
import numpy as np
import pytest
from hypothesis import given
from make_entries import make_entry

from kappa_fast.errors import KappaError, OptionError, RankingFileError, SourceNotFoundError
from kappa_fast.results import serialize
from kappa_fast.results.entries import TensorKappa
from kappa_fast.results.ranking import Ranking
from kappa_fast.results.selection import Selection
from kappa_fast.results.statistics import STATISTICS


def bits(entry: TensorKappa) -> list[object]:
    """Every field, floats as their bits, so that nan equals nan and 0.0 does not equal -0.0."""

    def comparable(value: object) -> object:
        if isinstance(value, float):
            return "nan" if math.isnan(value) else struct.pack("<d", value)
        return value

    return [(item.name, comparable(getattr(entry, item.name))) for item in fields(entry)]


def refuse_constants(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def strict_json(path: Path) -> object:
    return json.loads(path.read_text("ascii"), parse_constant=refuse_constants)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "ranking.json"


@given(entries=make.consistent_lists, skipped=make.st.lists(make.skipped, max_size=2), metadata=make.metadata)
def test_a_ranking_survives_the_round_trip_bit_for_bit_in_strict_json(file, entries, skipped, metadata):
    ranking = Ranking(entries, skipped, metadata)
    ranking.to_json(file)
    strict_json(file)
    again = Ranking.from_json(file)
    assert [bits(entry) for entry in again] == [bits(entry) for entry in ranking]
    assert again.skipped == ranking.skipped
    assert serialize.thaw(again.metadata) == metadata
    assert again == ranking


@given(entries=make.consistent_lists, certain=make.st.booleans(), settings=make.metadata)
def test_a_selection_survives_the_round_trip_bit_for_bit_in_strict_json(file, entries, certain, settings):
    entries = [entry for entry in entries if entry.status in ("ok", "rank_deficient")]
    selection = Selection(tuple(entries), certain, settings, (r"lm_head", "norm$"), (r"\.bias",))
    selection.to_json(file)
    strict_json(file)
    again = Selection.from_json(file)
    assert [bits(entry) for entry in again] == [bits(entry) for entry in selection]
    assert again == selection


def test_the_document_says_what_it_is_and_gives_each_entry_a_line(tmp_path):
    index = (3, slice(0, 16), slice(None, None, 2))
    entry = make_entry("a", math.inf, part="[3].gate", index=index)
    Ranking([entry, make.non_finite("b")], (), {"seconds": 1.5}).to_json(tmp_path / "r.json")
    raw = strict_json(tmp_path / "r.json")
    assert (raw["format"], raw["version"], raw["metadata"]) == ("kappa_fast ranking", 1, {"seconds": 1.5})
    assert raw["entries"][0]["index"] == [3, [0, 16, None], [None, None, 2]]
    assert raw["entries"][0]["kappa"] == "inf"
    assert raw["entries"][1]["kappa"] == "nan"
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert sum('"name": ' in line for line in lines) == 2


def test_writing_replaces_the_file_behind_a_link_and_leaves_nothing_beside_it(tmp_path):
    target, link = tmp_path / "old.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    Ranking([make_entry()]).to_json(link)
    assert link.is_symlink()
    assert len(Ranking.from_json(target)) == 1
    assert sorted(os.listdir(tmp_path)) == ["link.json", "old.json"]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    Ranking([make_entry("old")]).to_json(file)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RankingFileError, match=r"cannot write .*r\.json: No space left on device"):
        Ranking([make_entry("new")]).to_json(file)
    assert Ranking.from_json(file)[0].name == "old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RankingFileError, match=r"cannot write .*nowhere.*r\.json: .*choose a file that can be written"):
        Ranking([]).to_json(tmp_path / "nowhere" / "r.json")


@pytest.mark.parametrize("read", [Ranking.from_json, Selection.from_json])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(SourceNotFoundError, match=r"none\.json: no such file; to_json\(\) writes one"):
        read(tmp_path / "none.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RankingFileError, match=r"cannot read .*directory"):
        Ranking.from_json(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"a": 1', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"not json"],
    ids=["empty", "open", "cut off", "no utf-8", "too deep", "too long a number", "prose"],
)
@pytest.mark.parametrize("read", [Ranking.from_json, Selection.from_json])
def test_text_that_is_no_json_is_refused(tmp_path, read, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(RankingFileError, match=r"x\.json is not valid JSON .*damaged: write it again"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("raw", ["[]", "3", "{}", '{"a": "b"}', '{"a": true}', '{"format": 5, "version": "x"}'])
def test_json_of_another_kind_is_refused(tmp_path, raw):
    (tmp_path / "x.json").write_text(raw)
    with pytest.raises(RankingFileError, match=r"x\.json is not a file of the format 'kappa_fast ranking'"):
        Ranking.from_json(tmp_path / "x.json")


def test_a_selection_read_as_a_ranking_and_the_reverse_name_the_right_reader(tmp_path):
    Ranking([make_entry()]).to_json(tmp_path / "r.json")
    Ranking([make_entry()]).select(num_tensors=1).to_json(tmp_path / "s.json")
    with pytest.raises(RankingFileError, match=r"read it with Selection\.from_json\(\)"):
        Ranking.from_json(tmp_path / "s.json")
    with pytest.raises(RankingFileError, match=r"read it with Ranking\.from_json\(\)"):
        Selection.from_json(tmp_path / "r.json")


def _rewrite(path: Path, change) -> None:
    Ranking([make_entry(index=(1, slice(0, 2)))], [make.Skipped("n", (3,), "small")]).to_json(path)
    raw = strict_json(path)
    change(raw)
    path.write_text(json.dumps(raw))


def test_a_newer_version_says_upgrade(tmp_path):
    _rewrite(tmp_path / "x.json", lambda raw: raw.update(version=2))
    with pytest.raises(RankingFileError, match=r"x\.json has version 2 .* reads up to 1: upgrade kappa_fast"):
        Ranking.from_json(tmp_path / "x.json")


@pytest.mark.parametrize("version", [0, True, "1", None, 1.0])
def test_a_version_that_is_none_is_refused(tmp_path, version):
    _rewrite(tmp_path / "x.json", lambda raw: raw.update(version=version))
    with pytest.raises(RankingFileError, match=r"'version' is .*, not a positive integer"):
        Ranking.from_json(tmp_path / "x.json")


WRONG = [
    ("name", 3, "text"),
    ("aliases", "x", "a list of texts"),
    ("aliases", [1], "a list of texts"),
    ("index", [[0, 1]], "a list of integers and"),
    ("index", [True], "a list of integers and"),
    ("index", 3, "a list of integers and"),
    ("quantization", 3, "text or null"),
    ("layer", "3", "an integer or null"),
    ("shape", [1, 2, 3], "a list of two sizes"),
    ("shape", [1, -2], "a list of two sizes"),
    ("numel", 2.0, "a count"),
    ("numel", -1, "a count"),
    ("kappa", "12", "a number"),
    ("kappa", None, "a number"),
    ("lower", True, "a number"),
    ("upper", math.inf, "a number"),
    ("score", 10**400, "a number"),
    ("certified", 1, "true or false"),
    ("status", "fine", "one of ok, rank_deficient, bounded, non_finite"),
    ("status", [], "one of ok"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_a_damaged_field_is_named_with_what_belongs_there(tmp_path, name, value, expected):
    _rewrite(tmp_path / "x.json", lambda raw: raw["entries"][0].update({name: value}))
    message = rf"x\.json: entries\[0\]: '{name}' is .*, not {expected}.*; the file is damaged"
    with pytest.raises(RankingFileError, match=message):
        Ranking.from_json(tmp_path / "x.json")


def test_a_file_from_before_statistics_were_kept_still_loads_and_has_none(tmp_path):
    known = dict.fromkeys(STATISTICS, 2.0) | dict(flatness_lower=-3.0, flatness=-2.0, flatness_upper=-1.0)
    path = tmp_path / "x.json"
    Ranking([make_entry(**known)]).to_json(path)
    assert "participation_ratio" in path.read_text()
    raw = json.loads(path.read_text())
    for name in STATISTICS:
        del raw["entries"][0][name]
    path.write_text(json.dumps(raw))
    (entry,) = Ranking.from_json(path)
    assert {getattr(entry, name) for name in STATISTICS} == {None}


def test_the_flatness_of_a_singular_matrix_is_written_as_text_and_read_back(tmp_path):
    known = dict(flatness=-math.inf, flatness_lower=-math.inf, flatness_upper=-2.0, demmel=math.inf)
    ranking = Ranking([make_entry(kappa=math.inf, **known)])
    ranking.to_json(tmp_path / "x.json")
    assert strict_json(tmp_path / "x.json")["entries"][0]["flatness"] == "-inf"
    assert Ranking.from_json(tmp_path / "x.json") == ranking


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"stable_rank": 0.5}, "'stable_rank' is 0.5, which is below 1"),
        ({"flatness": -1.0}, "'flatness' is -1.0, and its interval from None to None"),
        ({"flatness": -1.0, "flatness_lower": -0.5, "flatness_upper": -0.1}, "outside of its interval"),
        ({"flatness": 0.5, "flatness_lower": 0.0, "flatness_upper": 1.0}, "or above 0"),
    ],
)
def test_statistics_that_no_matrix_has_are_refused(tmp_path, known, message):
    Ranking([make_entry(**known)]).to_json(tmp_path / "x.json")
    with pytest.raises(RankingFileError, match=message):
        Ranking.from_json(tmp_path / "x.json")


def test_a_file_from_before_quantization_was_told_still_loads(tmp_path):
    path = tmp_path / "x.json"
    _rewrite(path, lambda raw: [entry.pop("quantization") for entry in raw["entries"]])
    assert {entry.quantization for entry in Ranking.from_json(path)} == {None}


@pytest.mark.parametrize(
    "name", [item.name for item in fields(TensorKappa) if item.name not in ("quantization", *STATISTICS)]
)
def test_a_missing_field_is_named(tmp_path, name):
    _rewrite(tmp_path / "x.json", lambda raw: raw["entries"][0].pop(name))
    with pytest.raises(RankingFileError, match=rf"entries\[0\] has no '{name}'"):
        Ranking.from_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("entries"), "'entries' is not a list"),
        (lambda raw: raw.update(skipped={}), "'skipped' is not a list"),
        (lambda raw: raw.update(metadata=[]), "'metadata' is not an object"),
        (lambda raw: raw["entries"].append(4), r"entries\[1\] is not an object"),
        (lambda raw: raw["skipped"][0].update(shape=4), r"skipped\[0\]: 'shape' is 4, not a list of sizes"),
        (lambda raw: raw["entries"].append(raw["entries"][0]), "two entries have the key 'layers.0.q_proj.weight'"),
        (lambda raw: raw["entries"][0].update(score="nan"), "the score of layers.0.q_proj.weight .* is nan"),
    ],
)
def test_a_damaged_document_is_refused(tmp_path, change, message):
    _rewrite(tmp_path / "x.json", change)
    with pytest.raises(RankingFileError, match=rf"x\.json: {message}"):
        Ranking.from_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("boundary_certain", 1, "'boundary_certain' is not true or false"),
        ("settings", None, "'settings' is not an object"),
        ("include", [3], "'include' is not a list of texts"),
        ("exclude", ["("], r"the pattern '\(' cannot be searched for"),
        ("exclude", None, "'exclude' is not a list of texts"),
    ],
)
def test_a_damaged_selection_is_refused(tmp_path, name, value, message):
    Ranking([make_entry()]).select(num_tensors=1).to_json(tmp_path / "s.json")
    raw = strict_json(tmp_path / "s.json")
    raw[name] = value
    (tmp_path / "s.json").write_text(json.dumps(raw))
    with pytest.raises(RankingFileError, match=rf"s\.json: {message}"):
        Selection.from_json(tmp_path / "s.json")


def test_unknown_fields_are_left_alone(tmp_path):
    _rewrite(tmp_path / "x.json", lambda raw: (raw.update(note="mine"), raw["entries"][0].update(note="mine")))
    assert len(Ranking.from_json(tmp_path / "x.json")) == 1


def test_the_file_of_the_reference_implementation_is_read_as_unproven_entries(tmp_path):
    # As its json.dump(condition_numbers, f, indent=2) writes it: infinity is the bare word Infinity.
    numbers = {"model.layers.3.mlp.up_proj.weight": 7.5, "lm_head.weight": math.inf, "wte.weight": math.nan, "a": 3}
    (tmp_path / "condition_numbers.json").write_text(json.dumps(numbers, indent=2))
    ranking = Ranking.from_json(tmp_path / "condition_numbers.json")
    assert [entry.key for entry in ranking] == [
        "a",
        "model.layers.3.mlp.up_proj.weight",
        "lm_head.weight",
        "wte.weight",
    ]
    assert [entry.status for entry in ranking] == ["ok", "ok", "rank_deficient", "non_finite"]
    entry = ranking[1]
    assert (entry.kappa, entry.score, entry.lower, entry.upper) == (7.5, 7.5, 1.0, math.inf)
    assert (entry.certified, entry.method, entry.shape, entry.numel) == (False, "reference", (0, 0), 0)
    assert (entry.layer, entry.group) == (3, "model.layers.*.mlp.up_proj.weight")
    ranking.to_json(tmp_path / "mine.json")
    assert Ranking.from_json(tmp_path / "mine.json") == ranking


def test_a_huge_integer_in_the_file_of_the_reference_implementation_is_infinite(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": 10**400}))
    assert Ranking.from_json(tmp_path / "x.json")[0].status == "rank_deficient"


def test_a_mapping_of_other_numbers_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"loss": 0.25, "step": 100}')
    with pytest.raises(
        RankingFileError, match=r"x\.json: 'loss' has the condition number 0\.25, which cannot be below 1"
    ):
        Ranking.from_json(tmp_path / "x.json")


def test_freeze_turns_numbers_into_python_ones_and_nan_and_inf_into_their_names():
    raw = {"n": np.int64(3), "x": np.float32(0.5), "bad": [math.nan, math.inf, -math.inf], "t": (1, True, None)}
    assert serialize.thaw(serialize.freeze(raw, "m")) == {
        "n": 3,
        "x": 0.5,
        "bad": ["nan", "inf", "-inf"],
        "t": [1, True, None],
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": [object()]}}, r"m\['a'\]\['b'\]\[0\] is of type object, which JSON cannot hold"),
        ({"a": {1: 2}}, r"m\['a'\] has the key 1, but JSON knows only text keys"),
        ({"a": {1, 2}}, r"m\['a'\] is of type set"),
    ],
)
def test_freeze_names_what_json_cannot_hold(value, message):
    with pytest.raises(OptionError, match=message):
        serialize.freeze(value, "m")


def test_every_error_of_a_file_is_an_error_of_the_library(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(KappaError):
        Ranking.from_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        Ranking.from_json(tmp_path / "none.json")


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="devices are POSIX")
def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path, monkeypatch):
    """os.replace() as root would."""
    monkeypatch.setattr(serialize.os, "replace", lambda *_: pytest.fail("something was replaced"))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    for path in ("/dev/null", pipe, link):
        with pytest.raises(RankingFileError, match=r"cannot write .*: it is a device or a pipe; give the name"):
            Ranking([]).to_json(path)
    assert sorted(tmp_path.iterdir()) == [link, pipe]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"path": "HERE/models/m.safetensors"}, "../models/m.safetensors"),
        ({"path": "HERE/hub/models--org--name/snapshots/0", "id": "org/name"}, "org/name"),
        ({"kind": "mapping"}, None),
    ],
)
def test_a_file_to_be_shared_says_nothing_of_where_it_was_written(source, expected, tmp_path):
    (tmp_path / "shared").mkdir()
    known = {key: value.replace("HERE", str(tmp_path)) for key, value in source.items()}
    ranking = Ranking([make_entry("a")], (), {"source": known})
    selection = Selection(ranking.entries, True, {"source": known})
    for written, where in ((ranking, "metadata"), (selection, "settings")):
        written.to_json(tmp_path / "shared" / "f.json", relative=True)
        text = (tmp_path / "shared" / "f.json").read_text()
        assert str(tmp_path) not in text
        assert json.loads(text)[where]["source"].get("path") == expected
        written.to_json(tmp_path / "shared" / "f.json")
        assert json.loads((tmp_path / "shared" / "f.json").read_text())[where]["source"] == known
