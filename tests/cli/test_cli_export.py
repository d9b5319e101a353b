"""``kappa-fast export`` writes what Selection.export gives, from a ranking with a budget or from a selection."""

from __future__ import annotations

import json

import pytest
from families import build
from typer.testing import CliRunner

import kappa_fast
from kappa_fast.cli import app


@pytest.fixture(scope="module")
def ranking(tmp_path_factory):
    found = kappa_fast.rank(build("mixtral"), progress=False)
    path = tmp_path_factory.mktemp("export") / "ranking.json"
    found.to_json(path)
    return found, path


def run(*arguments):
    found = CliRunner().invoke(app, ["export", *map(str, arguments)])
    return found.exit_code, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        (["--top-p", "0.3", "--unit", "parameter"], dict(top_p=0.3, unit="parameter")),
        (["--num-tensors", "2", "--unit", "expert", "--per-group"], dict(num_tensors=2, unit="expert", per_group=True)),
        (["--max-params", "0.5", "--unit", "parameter"], dict(max_params=0.5, unit="parameter")),
        (["--max-params", "9000", "--unit", "expert"], dict(max_params=9000, unit="expert")),
        (["--max-kappa", "1e9"], dict(max_kappa=1e9)),
    ],
)
def test_a_ranking_is_exported_with_a_budget(ranking, options, budget):
    found, path = ranking
    assert run(path, "--format", "axolotl", *options) == (0, found.select(**budget).to_axolotl(), "")


def test_a_selection_is_exported_as_it_is(ranking, tmp_path):
    selection = ranking[0].select(num_tensors=3, unit="parameter")
    selection.to_json(tmp_path / "selection.json")
    assert run(tmp_path / "selection.json", "--format", "names")[1] == selection.to_names()
    code, _, error = run(tmp_path / "selection.json", "--format", "names", "--top-p", "0.1")
    assert code == 2
    assert "is a selection already: leave the budget out" in error


def test_a_file_is_written_and_named(ranking, tmp_path):
    target = tmp_path / "esft.json"
    code, out, _ = run(ranking[1], "--format", "regex", "--max-kappa", "1e9", "--unit", "parameter", "--output", target)
    assert (code, out) == (0, f"written to {target}\n")
    assert target.read_text().startswith("^(?:")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--format", "names"], 2, "a ranking needs a budget"),
        (
            ["--format", "names", "--num-tensors", "1", "--unit", "expert", "--max-params", "x"],
            2,
            "--max-params x: give a count",
        ),
        (["--format", "llama-factory", "--top-p", "0.3"], 2, "takes ranges of layers only"),
        (["--format", "esft", "--top-p", "0.3"], 2, "select with --unit expert"),
    ],
)
def test_wrong_use_is_named(ranking, arguments, code, text):
    found = run(ranking[1], *arguments)
    assert found[0] == code
    assert text in found[2]


def test_a_file_that_is_no_ranking_is_named(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"format": "other"}))
    code, _, error = run(tmp_path / "other.json", "--format", "names", "--top-p", "0.5")
    assert code == 1
    assert "other.json" in error
