"""``kappa-fast report`` writes what to_html() and plot() write."""

from __future__ import annotations

import json
import re

import pytest
from make_entries import bounded, make_entry
from typer.testing import CliRunner

from kappa_fast.cli import app
from kappa_fast.report.page import render_page
from kappa_fast.report.plot import render_plot
from kappa_fast.results.ranking import Ranking


@pytest.fixture
def path(tmp_path):
    entries = [make_entry(f"layers.{i}.w", 10.0 + i, layer=i, group="layers.*.w") for i in range(4)]
    Ranking([*entries, bounded("layers.4.w", 20.0, group="layers.*.w")], (), {"num_parameters": 5 * 512}).to_json(
        tmp_path / "r.json"
    )
    return tmp_path / "r.json"


def run(*arguments):
    found = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return found.exit_code, found.stdout, found.stderr


def test_the_page_is_written_beside_the_ranking(path):
    page = path.with_suffix(".html")
    assert run(path) == (0, f"written to {page}\n", "")
    assert page.read_text() == render_page(Ranking.from_json(path))


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        (["--max-params", "0.5"], dict(max_params=0.5)),
        (
            ["--num-tensors", "2", "--unit", "parameter", "--per-group"],
            dict(num_tensors=2, unit="parameter", per_group=True),
        ),
    ],
)
def test_a_budget_is_shown_and_a_plot_is_written_on_demand(path, tmp_path, options, budget):
    page, picture = tmp_path / "page.html", tmp_path / "map.svg"
    code, out, _ = run(path, "-o", page, "--plot", picture, *options)
    assert (code, out) == (0, f"written to {page}\nwritten to {picture}\n")
    ranking = Ranking.from_json(path)
    assert page.read_text() == render_page(ranking, ranking.select(**budget))
    assert picture.read_bytes() == render_plot(ranking, "svg", ranking.select(**budget))


def test_what_colors_show_is_chosen_on_the_command_line(path, tmp_path):
    assert run(path, "--show", "sigma_max", "--plot", tmp_path / "p.svg")[0] == 0
    assert '"first":"sigma_max"' in path.with_suffix(".html").read_text()
    assert "sigma max of" in (tmp_path / "p.svg").read_text()
    code, _, err = run(path, "--show", "alpha")
    assert (code, err) == (2, "error: --show alpha: no matrix of the ranking has a finite alpha\n")


def test_the_reference_implementations_file_is_read(tmp_path):
    (tmp_path / "condition_numbers.json").write_text(json.dumps({"layers.0.w": 12.5, "layers.1.w": float("inf")}))
    assert run(tmp_path / "condition_numbers.json", "--plot", tmp_path / "x.png")[0] == 0
    assert "layers.0.w" in (tmp_path / "condition_numbers.html").read_text()


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--num-tensors", "9"], 2, "reaches beyond what was resolved"),
        (["--max-params", "x"], 2, "--max-params x: give a count"),
        (["--per-group"], 2, "--per-group and --unit go with a budget"),
        (["--plot", "x.gif"], 2, "end the name in .png, .svg or .pdf"),
        (["-o", "nowhere/x.html"], 1, "cannot write nowhere/x.html: No such file or directory"),
        (["-o", "r.json"], 2, "r.json would be written over r.json"),
        (["-o", "x.svg", "--plot", "x.svg"], 2, "x.svg would be written over r.json or over the page"),
    ],
)
def test_wrong_use_is_named_and_writes_nothing(path, options, code, text, monkeypatch):
    monkeypatch.chdir(path.parent)
    before = path.read_bytes()
    found = run("r.json", *options)
    assert found[0] == code
    assert text in found[2]
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    code, _, error = run(tmp_path / "none.json")
    assert code == 1
    assert "none.json: no such file" in error


@pytest.fixture(scope="module")
def document(root):
    return (root / "docs" / "reports.md").read_text()


def test_the_example_in_the_document_runs_as_written(document, path, monkeypatch):
    (example,) = re.findall(r"^```python\n(.+?)^```", document, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(path.parent)
    path.rename("minilm.json")
    exec(example, {})
    assert (path.parent / "minilm.html").read_text().startswith("<!doctype html>")
    assert (path.parent / "minilm.svg").exists()


def test_the_commands_in_the_document_have_the_options_that_it_names(document, capsys):
    lines = re.findall(r"^    kappa-fast (\w+)(.*)$", document, re.MULTILINE)
    assert [command for command, _ in lines] == ["rank", "report"]
    for command, rest in lines:
        with pytest.raises(SystemExit):
            app([command, "--help"], prog_name="kappa-fast")
        shown = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", rest):
            assert re.search(rf"^ +{option}\b", shown, re.MULTILINE), option


def test_the_picture_in_the_document_is_small(root):
    assert (root / "docs" / "minilm.png").stat().st_size < 100_000
