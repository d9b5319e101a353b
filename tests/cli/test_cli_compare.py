"""``kappa-fast compare``: two files of rankings, a verdict for CI, and every other file refused in one line."""

from __future__ import annotations

import json

import pytest
from make_entries import make_entry
from typer.testing import CliRunner

from kappa_fast import Ranking
from kappa_fast.cli import app


@pytest.fixture
def files(tmp_path):
    """Three rankings: the second is the first with one matrix that doubled, the third is of another model."""
    names = [f"layers.{i}.weight" for i in range(4)]
    base = {"num_parameters": 2048, "settings": {"rtol": 1e-2}, "source": {"fingerprint": "f"}}
    first = Ranking([make_entry(n, 10.0 + i) for i, n in enumerate(names)], (), base)
    second = Ranking([make_entry(n, 20.0 if i == 0 else 10.0 + i) for i, n in enumerate(names)], (), base)
    other = Ranking([make_entry("z.weight")], (), base)
    for name, ranking in (("a", first), ("b", second), ("other", other)):
        ranking.to_json(tmp_path / f"{name}.json")
    return tmp_path


def run(*arguments):
    found = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    return found.exit_code, found.stdout, found.stderr


def test_the_moves_are_shown_and_nothing_fails(files):
    code, out, err = run(files / "a.json", files / "b.json")
    assert (code, err) == (0, "")
    assert "layers.0.weight" in out
    assert "4 matrices in both, 0 only in the first, 0 only in the second" in out
    assert "kappa: 1 certainly up, 0 certainly down, 0 changed within their intervals, 3 identical" in out


@pytest.mark.parametrize(("ratio", "code"), [("1.9", 3), ("2", 0), ("1", 3)])
def test_fail_above_fails_only_beyond_the_ratio(files, ratio, code):
    found, out, err = run(files / "a.json", files / "b.json", "--fail-above", ratio)
    assert found == code
    assert "layers.0.weight" in out
    expected = f"failed: 1 certainly moved by more than {ratio}, 'layers.0.weight' by at least 2\n"
    assert err == (expected if code else "")


def test_a_budget_compares_selections_and_the_file_has_it_all(files):
    target = files / "c.json"
    code, out, _ = run(files / "a.json", files / "b.json", "--max-params", "0.5", "--json", target)
    assert code == 0
    assert "selected by --max-params 0.5: 2 and 2, 1 of them in both: 33.3% of the matrices" in out
    assert "  - layers.0.weight\n  + layers.2.weight" in out
    assert f"written to {target}" in out
    read = json.loads(target.read_text())
    assert read["selection"]["both"] == ["layers.1.weight"]
    assert read["counts"]["up"] == 1


def test_the_options_of_a_selection_are_those_of_export(files):
    code, out, _ = run(
        files / "a.json", files / "b.json", "--num-tensors", 1, "--per-group", "--unit", "parameter", "--all"
    )
    assert code == 0
    assert "selected by --num-tensors 1, --per-group, --unit parameter: 1 and 1, 0 of them in both" in out
    assert "selected by --top-p 0.5:" in run(files / "a.json", files / "b.json", "--top-p", 0.5)[1]
    assert "selected by --max-kappa 11.0:" in run(files / "a.json", files / "b.json", "--max-kappa", 11)[1]


def test_what_is_unfair_is_a_warning_and_no_failure(files):
    ranking = Ranking.from_json(files / "b.json")
    metadata = {"settings": {"rtol": 1e-3}, "source": {"fingerprint": "g"}}
    Ranking(ranking.entries[1:], (), metadata).to_json(files / "b.json")
    code, _, err = run(files / "a.json", files / "b.json")
    assert code == 0
    assert err.splitlines() == [
        "warning: rtol is 0.01 and 0.001: intervals of one are wider than those of the other",
        "warning: the sources differ in names, shapes or dtypes: are they the same model?",
    ]


def refused(result, code, message):
    assert (result[0], result[1]) == (code, "")
    assert result[2].startswith("error: ")
    assert result[2].count("\n") == 1
    assert message in result[2]


def test_other_files_are_refused_by_what_they_are(files):
    a = files / "a.json"
    Ranking.from_json(a).select(num_tensors=1).to_json(files / "selection.json")
    refused(run(a, files / "selection.json"), 2, "is a selection: give the ranking that it was selected from")
    refused(run(files / "missing.json", a), 1, "missing.json: no such file")
    refused(run(files, a), 1, f"cannot read {files}: Is a directory")
    (files / "text.json").write_text("kappa")
    refused(run(a, files / "text.json"), 1, "text.json is not valid JSON")
    (files / "plan.json").write_text('{"format": "kappa_fast plan", "version": 1}')
    refused(run(a, files / "plan.json"), 1, "is not a file of the format 'kappa_fast ranking'")
    refused(run(a, files / "other.json"), 2, "the rankings have no matrix in common")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-above", "0.5"], "--fail-above 0.5: give a factor from 1 on"),
        (["--fail-above", "inf"], "--fail-above inf: give a factor from 1 on"),
        (["--fail-above", "nan"], "--fail-above nan: give a factor from 1 on"),
        (["--max-params", "half"], "--max-params half: give a count"),
        (["--per-group"], "--per-group and --unit say how a budget selects"),
        (["--unit", "expert"], "--per-group and --unit say how a budget selects"),
        (["--json", "."], "give the name of a file to write the comparison to"),
        (["--json", "/dev/null"], "give the name of a file to write the comparison to"),
    ],
)
def test_wrong_use_is_said_in_one_line(files, arguments, message):
    refused(run(files / "a.json", files / "b.json", *arguments), 2, message)


def test_the_rankings_that_are_compared_are_not_written_over(files):
    before = (files / "a.json").read_bytes()
    (files / "link.json").symlink_to(files / "a.json")
    for target in ("a.json", "link.json"):
        result = run(files / "a.json", files / "b.json", "--json", files / target)
        refused(result, 2, "is one of the files that are read: give another name")
    assert (files / "a.json").read_bytes() == before


@pytest.fixture
def scored(tmp_path):
    """Two rankings of five matrices: flatness in the same order but for one exchange, kappa in the reverse order."""
    for name, places in (("a", [0, 1, 2, 3, 4]), ("b", [1, 0, 2, 3, 4])):
        entries = [
            make_entry(
                f"layers.{i}.weight",
                10.0 + (i if name == "a" else -i),
                flatness=-1.0 + place / 10,
                flatness_lower=-1.0 + place / 10,
                flatness_upper=-1.0 + place / 10,
                flatness_by_shape=0.0,
            )
            for i, place in enumerate(places)
        ]
        Ranking(entries).to_json(tmp_path / f"{name}.json")
    return tmp_path


def test_the_rank_correlation_is_that_of_the_score_that_is_asked_for(scored):
    files = scored / "a.json", scored / "b.json"
    code, out, _ = run(*files)
    assert code == 0
    assert "rank correlation (Spearman) -1.0000 over 5" in out
    for score in ("flatness", "-flatness"):
        code, out, _ = run(*files, f"--score={score}", "--json", scored / "c.json")
        assert code == 0
        assert "rank correlation (Spearman) of flatness 0.9000 over 5" in out  # 1 - 6 * 2 / (5 * 24)
        document = json.loads((scored / "c.json").read_text())
        assert (document["score"], document["correlated"]) == ("flatness", 5)
        assert document["correlation"] == pytest.approx(0.9)


def test_a_score_that_is_none_or_that_nobody_has_is_told(scored):
    files = scored / "a.json", scored / "b.json"
    code, _, err = run(*files, "--score", "alpha")
    assert (code, "again with --score alpha" in err) == (2, True), err
    assert run(*files, "--score", "flatnes")[0] == 2
    code, _, err = run(*files, scored / "a.json", "--score", "flatness")
    assert (code, "compare two rankings" in err) == (2, True)
