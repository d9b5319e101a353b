"""A study that goes on in another folder: what is known is not made again, and runs of two bases are not mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_forgetting_report import study
from test_forgetting_statistics import small_plan

from benchmarks.forgetting import bases, kept, report, weights
from benchmarks.forgetting.journal import Journal
from benchmarks.forgetting.plan import PLANS, Plan
from benchmarks.forgetting.study import JOURNAL, left_over

PRETRAINING = {"corpus": "made-a", "steps": 20, "length": 32, "size": 4, "lr": 0.003, "windows": 20}


def small_study(file: Path) -> Plan:
    """One tiny base and four runs, in a file for the command line."""
    smoke = json.loads((PLANS / "smoke.json").read_text())
    recipe = {"train": "all"}
    made = smoke | {
        "pretraining": PRETRAINING,
        "bases": {"dense-tiny": [0]},
        "tasks": ["made-b"],
        "rates": [0.001, 0.01],
        "methods": {"full": {"recipe": recipe}, "again": {"recipe": recipe, "draws": [1]}},
    }
    file.write_text(json.dumps(made))
    return Plan.read(file)


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "benchmarks.forgetting", *arguments]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_study_goes_on_in_another_folder_with_what_is_known(root, tmp_path):
    plan = small_study(tmp_path / "plan.json")
    arguments = ["--plan", str(tmp_path / "plan.json"), "--workers", "2", "--folder"]
    assert "0 results are missing" in run(root, *arguments, str(tmp_path / "first")).stdout
    first = Journal(tmp_path / "first" / JOURNAL).records()
    some = [each for each in first.values() if each["what"] == "base" or each["method"] == "full"]
    report.write_compact(some, tmp_path / "known.jsonl")
    known = ["--known", str(tmp_path / "known.jsonl")]
    assert (
        "of 5 results 3 are missing, 1 of them bases"
        in run(root, *arguments, str(tmp_path / "b"), "--status", *known).stdout
    )
    done = run(root, *arguments, str(tmp_path / "second"), *known)
    assert "0 results are missing" in done.stdout, done.stdout + done.stderr
    second = Journal(tmp_path / "second" / JOURNAL).records()
    assert {(each["what"], each.get("method")) for each in second.values()} == {("base", None), ("run", "again")}
    for key, each in second.items():
        assert each.get("endpoints") == first[key].get("endpoints")
        assert each.get("weights") == first[key].get("weights")
    # The same with a base that does not come to the weights that are known.
    other = [each | ({"weights": "0" * 16} if each["what"] == "base" else {}) for each in some]
    report.write_compact(other, tmp_path / "known.jsonl")
    for _ in range(2):  # nor does it pass at the second try
        done = run(root, *arguments, str(tmp_path / "third"), *known)
        assert "2 runs have no base" in done.stdout
        (base,) = Journal(tmp_path / "third" / JOURNAL).records().values()
        assert base["status"] == "failed"
        assert "its weights have the hash" in base["error"]
        assert f"{'0' * 16}. Another processor or version of torch" in base["error"]
    assert len(plan.jobs()) == 5


def test_a_base_is_there_if_its_file_holds_its_weights(tmp_path):
    plan = small_study(tmp_path / "plan.json")
    (base,) = [job for job in plan.jobs() if job["what"] == "base"]
    record = {**base, "status": "ok", **bases.pretrain("dense-tiny", 0, PRETRAINING, tmp_path)}
    known = {base["id"]: record}
    runs = [job for job in plan.jobs() if job["what"] == "run"]
    assert left_over(plan, tmp_path, known) == runs
    assert left_over(plan, tmp_path) == plan.jobs()  # nobody says so
    file = weights.file_of("dense-tiny", 0, tmp_path)
    values = load_file(file)
    for damage in ("other", "torn", "gone"):
        if damage == "other":
            next(iter(values.values())).view(-1)[0] += 1
            save_file(values, file)
        elif damage == "torn":
            file.write_bytes(file.read_bytes()[:-8])
        else:
            file.unlink()
        assert left_over(plan, tmp_path, known) == plan.jobs(), damage
    done = {job["id"]: {**job, "status": "ok"} for job in runs}
    assert left_over(plan, tmp_path, known | done) == []  # nobody needs the weights
    assert left_over(plan, tmp_path, done | {base["id"]: record | {"status": "failed"}}) == []


def test_the_hash_of_a_file_is_that_of_the_model(tmp_path):
    bases.pretrain("mixture-tiny", 0, PRETRAINING, tmp_path)
    model = bases.load("mixture-tiny", 0, tmp_path)
    assert weights.digest_of(weights.file_of("mixture-tiny", 0, tmp_path)) == bases.weights_digest(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert weights.digest_of(weights.file_of("mixture-tiny", 0, tmp_path)) != bases.weights_digest(model)


def based(plan: Plan) -> list[dict[str, Any]]:
    """Made-up runs, with their bases and texts."""
    origin = {"commit": "c", "clean": True, "versions": {"torch": "0"}}
    cells: list[dict[str, Any]] = [dict(type="q_proj", layer=0, before=1.0, after=2.0, spread=[0.0, 0.0])]
    said = {"parameters": 1, "curve": [[0, 5.0], [1, 2.0]], "late_gain": 0.0, "kappas": cells}
    found = [
        {**job, "status": "ok", "weights": f"w{job['base']}", **said, **origin}
        for job in plan.jobs()
        if job["what"] == "base"
    ]
    texts = {"corpora": {"old": "o", "new": "n"}}
    return found + [each | texts | origin for each in study(plan)]


def write(records: list[dict[str, Any]], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / JOURNAL).write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def test_what_was_published_stays_where_a_journal_has_only_the_rest(tmp_path):
    plan = small_plan(bases=2, draws=2)
    whole = based(plan)
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    kept.keep(plan, write(whole, tmp_path / "all"), once, once)
    rest = [each for each in whole if each.get("method") == "other"]
    part = [each for each in whole if each.get("method") != "other"]
    kept.keep(plan, write(part, tmp_path / "part"), twice, twice)
    document = json.loads((twice / kept.DOCUMENT).read_text())
    (twice / kept.DOCUMENT).write_text(json.dumps(document | {"usage": ["said before"]}))
    again = [each for each in whole if each["what"] == "base"]  # pre-trained again, to the same weights
    kept.keep(plan, write([*again, *rest], tmp_path / "rest"), twice, twice)
    assert (twice / kept.RUNS).read_text() == (once / kept.RUNS).read_text()
    documents = [json.loads((where / kept.DOCUMENT).read_text()) for where in (once, twice)]
    assert documents[1].pop("usage") == ["said before"]
    assert json.dumps(documents[0]["rows"]) == json.dumps(documents[1]["rows"])
    assert documents[0].keys() == documents[1].keys()
    kept.keep(plan, write([], tmp_path / "nothing"), twice, twice)
    assert (twice / kept.RUNS).read_text() == (once / kept.RUNS).read_text()
    assert json.loads((twice / kept.DOCUMENT).read_text())["versions"] == {"torch": "0"}


def test_runs_of_other_bases_or_texts_are_not_put_to_those_that_are_published(tmp_path):
    plan = small_plan(bases=2, draws=2)
    whole = based(plan)
    kept.keep(plan, write(whole, tmp_path / "all"), tmp_path, tmp_path)
    before = (tmp_path / kept.RUNS).read_text()
    other = [whole[0] | {"weights": "others"}]
    with pytest.raises(ValueError, match="mixture-0: has other weights than the runs that are published"):
        kept.keep(plan, write(other, tmp_path / "weights"), tmp_path, tmp_path)
    other = [whole[-1] | {"corpora": {"old": "o", "new": "another"}}]
    with pytest.raises(ValueError, match="mixture: runs have two texts new, with the hashes"):
        kept.keep(plan, write(other, tmp_path / "texts"), tmp_path, tmp_path)
    assert (tmp_path / kept.RUNS).read_text() == before


def test_a_further_plan_is_published_beside_the_study_with_the_runs_that_it_shares(tmp_path):
    plan = small_plan(bases=3, draws=2)
    methods = {"low": plan.methods["low"], "like": {"recipe": {"select": {"match": ["margins"]}}, "draws": 2}}
    primary = {"kind": "mixture", "method": "low", "draws": "like"}
    analysed = {**plan.analysis, "primary": primary, "comparisons": []}
    further = Plan(**{**vars(plan), "name": kept.FURTHER, "methods": methods, "analysis": analysed})
    runs_file, document_file = (tmp_path / name for name in kept.files_of(further))
    asked = based(further)
    with pytest.raises(ValueError, match="runs of the primary comparison are missing"):
        kept.keep(further, write([each for each in asked if each.get("method") != "low"], tmp_path / "x"), tmp_path)
    kept.keep(plan, write(based(plan), tmp_path / "study"), tmp_path, tmp_path)
    before = (tmp_path / kept.RUNS).read_bytes()
    new = [each for each in asked if each["what"] == "base" or each["method"] == "like"]
    assert kept.keep(further, write(new, tmp_path / "further"), tmp_path) == [runs_file, document_file]
    assert (tmp_path / kept.RUNS).read_bytes() == before
    lines = [json.loads(line) for line in runs_file.read_text().splitlines()]
    assert Counter(each["method"] for each in lines) == {"like": 3 * 2 * 2}
    document = json.loads(document_file.read_text())
    assert [row["name"] for row in document["rows"]] == ["mixture: low against like"]
    assert document["commits"] == {"c": 12}
    kept.keep(further, write([], tmp_path / "nothing"), tmp_path)
    assert json.loads(document_file.read_text())["rows"] == document["rows"]
    with pytest.raises(ValueError, match="mixture-0: has other weights than the runs that are published"):
        kept.keep(further, write([new[0] | {"weights": "others"}], tmp_path / "weights"), tmp_path)


def test_another_plan_does_not_take_the_place_of_the_published_study(tmp_path):
    plan = small_plan(bases=2, draws=2)
    kept.keep(plan, write(based(plan), tmp_path / "all"), tmp_path, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("forgetting.*")}
    assert set(before) == {kept.RUNS, kept.DOCUMENT}
    other = Plan(**{**vars(plan), "name": "new-bases", "bases": {"mixture": [8, 9]}})
    with pytest.raises(ValueError, match=r"forgetting.jsonl: has \d+ results that 'new-bases' does not plan"):
        kept.keep(other, write(based(other), tmp_path / "other"), tmp_path, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("forgetting.*")} == before


def test_known_results_are_read_by_id_and_a_missing_file_is_an_error(root, tmp_path):
    records = study(small_plan(bases=1, draws=1))
    report.write_compact(records, tmp_path / "known.jsonl")
    assert Journal(tmp_path / "known.jsonl").records().keys() == {each["id"] for each in records}
    done = run(root, "--folder", str(tmp_path), "--status", "--known", str(tmp_path / "nothing.jsonl"))
    assert done.returncode == 2
    assert f"--known: there is no file {tmp_path / 'nothing.jsonl'}" in done.stderr
