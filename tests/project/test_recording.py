"""The recording of rankings that tells whether a change has changed a number: it repeats, and sees what differs."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import recording
from recording_plain import Place, plain

AREAS = ("matrices", "errors")
NUMBER, ERROR, WARNING = "matrices: small 1e+03 float64", "errors: rank, {'rtol': 0}", "errors: an interrupted ranking"
CASES = "|".join(f"{re.escape(name)}$" for name in (NUMBER, ERROR, WARNING))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return recording.record(AREAS, CASES, say=lambda _: None)


def written(folder: Path, name: str, cases: dict[str, Any]) -> Path:
    recording.write(folder / name, cases)
    return folder / name


def compared(folder: Path, before: dict[str, Any], after: dict[str, Any], *options: str) -> int:
    files = (written(folder, "a.json", before), written(folder, "b.json", after))
    return recording.main(["--compare", *options, *map(str, files)])


def test_a_recording_repeats_to_the_last_bit(recorded, tmp_path, capsys):
    again = recording.record(AREAS, CASES, say=lambda _: None)
    assert list(again) == [NUMBER, ERROR, WARNING]
    assert compared(tmp_path, recorded, again) == 0
    assert capsys.readouterr().out == "3 cases are the same\n"


def test_a_number_that_changed_in_its_last_bit_is_found_and_named(recorded, tmp_path, capsys):
    changed = copy.deepcopy(recorded)
    (entry,) = changed[NUMBER]["result"]["entries"]
    entry["kappa"] *= 1 + 2**-52
    for options in ((), ("--numbers-only",)):
        assert compared(tmp_path, recorded, changed, *options) == 1
        said = capsys.readouterr().out
        assert "result.entries[0: w].kappa: " in said
        assert f"    {NUMBER}\n" in said
        assert said.endswith("1 of 3 cases differ\n")


def change_of_kind(cases: dict[str, Any]) -> None:
    cases[ERROR]["error"]["type"] = "SourceError"


def change_of_order(cases: dict[str, Any]) -> None:
    cases[NUMBER]["result"] = dict(reversed(cases[NUMBER]["result"].items()))


def change_of_type(cases: dict[str, Any]) -> None:
    cases[NUMBER]["result"]["entries"][0]["numel"] *= 1.0


def another_caller(cases: dict[str, Any]) -> None:
    cases[WARNING]["warnings"][0]["points"] = "elsewhere"


def one_case_less(cases: dict[str, Any]) -> None:
    del cases[WARNING]


@pytest.mark.parametrize("change", [change_of_kind, change_of_order, change_of_type, another_caller, one_case_less])
def test_so_is_every_other_change_of_what_is_no_word(change, recorded, tmp_path):
    changed = copy.deepcopy(recorded)
    change(changed)
    assert compared(tmp_path, recorded, changed, "--numbers-only") == 1
    assert compared(tmp_path, changed, recorded, "--numbers-only") == 1


def test_other_words_differ_unless_numbers_alone_count(recorded, tmp_path):
    changed = copy.deepcopy(recorded)
    changed[ERROR]["error"]["text"]["$text"] += "!"
    assert compared(tmp_path, recorded, changed) == 1
    assert compared(tmp_path, recorded, changed, "--numbers-only") == 0


@pytest.mark.parametrize("holder", ["metadata", "settings", "anything"])
def test_words_about_the_source_are_marked_as_words_wherever_they_stand(holder, tmp_path):
    said = {holder: {"source": {"evidence": {"it is called so": ["a", "b"]}, "layouts": {"a": "as is usual"}}}}
    found = plain([said], Place(tmp_path))[0][holder]["source"]
    assert found == {
        "evidence": [[{"$text": "it is called so"}, ["a", "b"]]],
        "layouts": {"a": {"$text": "as is usual"}},
    }


def test_nothing_of_this_machine_is_in_a_recording(recorded, root):
    text = json.dumps(recorded)
    assert str(root) not in text
    assert "recording-" not in text
    assert recorded[NUMBER]["result"]["metadata"]["seconds"] == "<seconds>"
