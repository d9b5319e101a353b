"""The command line in pipelines: JSON and CSV on stdout, quiet, exit codes of gates, words, a selection as a file."""

from __future__ import annotations

import csv
import io
import json
import logging
import re

import pytest
import torch
from make_entries import make_entry, non_finite
from safetensors.torch import save_file
from typer.testing import CliRunner

import kappa_fast
from kappa_fast.cli import app
from kappa_fast.cli.output import Lines
from kappa_fast.cli.words import as_options
from kappa_fast.execution.progress import Progress

RANK = kappa_fast.rank


def run(*arguments: object):
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return found.exit_code, found.stdout, found.stderr


@pytest.fixture
def checkpoint(tmp_path):
    drawn = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.q.weight": torch.randn(32, 24, generator=drawn) for i in range(4)}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def ranked(checkpoint, tmp_path):
    assert run("rank", checkpoint, "--no-cache", "--json", tmp_path / "r.json", "--quiet") == (0, "", "")
    return tmp_path / "r.json"


def test_json_and_csv_go_to_stdout_and_nothing_else_does(checkpoint, tmp_path):
    code, out, err = run("rank", checkpoint, "--no-cache", "--json", "-")
    assert (code, err) == (0, "")
    (tmp_path / "again.json").write_text(out)
    assert len(kappa_fast.Ranking.from_json(tmp_path / "again.json")) == 4
    code, out, _ = run("rank", checkpoint, "--no-cache", "--csv", "-")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["layer"] for row in rows] == [
        str(e.layer) for e in kappa_fast.Ranking.from_json(tmp_path / "again.json")
    ]
    assert {"key", "rows", "columns", "kappa", "index"} <= set(rows[0])
    code, out, _ = run("plan", checkpoint, "--no-measure", "--json", "-")
    assert code == 0
    plan = json.loads(out)
    assert (plan["name"], plan["settings"]["rtol"]) == ("model.safetensors", 0.01)


def test_limit_zero_shows_no_row_and_quiet_nothing(checkpoint, tmp_path):
    _, out, _ = run("rank", checkpoint, "--no-cache", "--limit", 0)
    assert out.splitlines()[0] == "... 4 more"
    assert "(ranking.skipped" not in out
    _, out, _ = run("rank", checkpoint, "--no-cache", "--limit", 0, "--summary", "layer", "--threads", 1)
    assert re.search(r"^layer +number +median", out, re.MULTILINE)
    assert "threads: 1" in out
    torch.set_num_threads(2)
    assert run("rank", checkpoint, "--no-cache", "-q", "--csv", tmp_path / "r.csv") == (0, "", "")
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 5


def test_what_a_gate_should_not_let_pass_has_an_exit_code_of_its_own(tmp_path):
    save_file({"a.weight": torch.full((32, 32), float("nan"))}, tmp_path / "nan.safetensors")
    code, out, err = run("rank", tmp_path / "nan.safetensors", "--no-cache")
    assert code == 4
    assert "warning: NaN or inf in 1 matrices, 'a.weight' among them" in err
    assert "a.weight" in out
    save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "small.safetensors")
    assert run("rank", tmp_path / "small.safetensors", "--no-cache")[0] == 5
    before, after = [make_entry("a", 2.0)], [make_entry("a", 9.0)]
    for name, entries in (("a", before), ("b", after), ("nan", [non_finite("a")])):
        kappa_fast.Ranking(entries).to_json(tmp_path / f"{name}.json")
    compare = ("compare", tmp_path / "a.json")
    assert run(*compare, tmp_path / "b.json", "--fail-above", 2)[0] == 3
    assert run(*compare, tmp_path / "nan.json", "--fail-above", 2)[0] == 4
    assert run(*compare, tmp_path / "nowhere.json")[0] == 1
    assert run(*compare)[0] == 2
    shown = run("--help")[1]
    for number, words in ((3, "--fail-above"), (4, "NaNs or infinities"), (5, "nothing was left"), (130, "Ctrl-C")):
        assert re.search(rf"\b{number}\b[^,]*{words}", " ".join(shown.split())), number


def test_short_help_and_completion_are_there():
    assert run("-h") == run("--help")
    assert run("rank", "-h") == run("rank", "--help")
    assert "--install-completion" in run("--help")[1]


def test_a_selection_is_written_and_what_it_took_is_said(ranked, tmp_path):
    code, out, err = run("select", ranked, "--max-params", "0.3", "--json", tmp_path / "s.json", "--summary", "layer")
    assert (code, err) == (0, "")
    selection = kappa_fast.Selection.from_json(tmp_path / "s.json")
    assert selection == kappa_fast.Ranking.from_json(ranked).select(max_params=0.3)
    assert "trainable params: 768 || all params: 3,072 || trainable%: 25.0000" in out
    assert re.search(r"layers\.\d\.q\.weight with 768 weights did not fit \(--fill goes on to smaller ones\)", out)
    assert "the cut is certain" in out
    assert re.search(r"taken +share", out)
    names = ("--include", "[01]", "--excluding", r"\.0\.")
    code, out, _ = run("select", ranked, "--top-p", 1, "--max-kappa", 1e9, *names, "--json", "-")
    (tmp_path / "t.json").write_text(out)
    assert kappa_fast.Selection.from_json(tmp_path / "t.json").names == ("layers.1.q.weight",)
    assert run("select", ranked)[0] == 2
    assert "give a budget: --max-params" in run("select", ranked)[2]
    assert "is a selection" in run("select", tmp_path / "s.json", "--top-p", 1)[2]
    assert run("select", ranked, "--top-p", 1, "--quiet") == (0, "", "")


def test_export_leaves_out_and_says_what_including_needs(ranked):
    code, out, _ = run("export", ranked, "--format", "names", "--top-p", 1, "--excluding", r"\.[012]\.")
    assert (code, out) == (0, "layers.3.q.weight\n")
    code, _, err = run("export", ranked, "--format", "names", "--top-p", 1, "--including", "norm")
    assert code == 2
    assert "--including norm names parameters of the model, whose config.json is not known" in err


def test_export_takes_parameters_of_the_model_that_config_describes(tmp_path):
    pytest.importorskip("transformers")
    from families import build

    model = build("llama")
    model.save_pretrained(tmp_path / "m")
    assert run("rank", tmp_path / "m", "--no-cache", "-q", "--json", tmp_path / "r.json")[0] == 0
    chosen = ("export", tmp_path / "r.json", "--format", "names", "--num-tensors", 1)
    code, out, err = run(*chosen, "--including", r"model\.norm")
    assert (code, err) == (0, "")
    assert "model.norm.weight" in out.splitlines()
    assert len(out.splitlines()) == 2


def test_several_rankings_are_a_series(ranked, tmp_path):
    whole = kappa_fast.Ranking.from_json(ranked)
    files = [tmp_path / f"checkpoint-{i}.json" for i in range(3)]
    for file in files:
        whole.to_json(file)
    code, out, _ = run("compare", *files, "--csv", tmp_path / "c.csv", "--plot", tmp_path / "c.svg")
    assert code == 0
    assert out.splitlines()[0].split() == ["tensor", "checkpoint-0", "checkpoint-1", "checkpoint-2", "ratio"]
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + 3 * 4
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    document = json.loads(run("compare", *files, "--json", "-", "--label", "a", "--label", "b", "--label", "c")[1])
    assert document["labels"] == ["a", "b", "c"]
    assert "give two files" in run("compare", *files, "--top-p", 0.5)[2]
    document = json.loads(run("compare", *files[:2], "--json", "-")[1])
    assert document["names"] == ["model.safetensors"] * 2
    assert run("compare", *files[:2], "--html", tmp_path / "c.html", "-q") == (0, "", "")
    assert (tmp_path / "c.html").exists()


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        (
            "rank again with top=5, top_per_group=True, or select less",
            "rank again with --top 5, --top-per-group, or select less",
        ),
        ("select(max_params=0.2, max_kappa=5) reaches", "--max-params 0.2, --max-kappa 5 reaches"),
        ("embedding or output head (embeddings=True ranks it)", "embedding or output head (--embeddings ranks it)"),
        ("match=('type', 'layer') leaves: match='margins'", "--match type --match layer leaves: --match margins"),
        ("select with unit='expert'", "select with --unit expert"),
        ("certify=True; certify='selection'", "--certify all; --certify selection"),
        ("leave it out with excluding('a.b')", "leave it out with --excluding 'a.b'"),
        ("use num_tensors, top_p or max_kappa", "use --num-tensors, --top-p or --max-kappa"),
        ("'model.top_p' and model.max_dim stay", "'model.top_p' and model.max_dim stay"),
        ("the top entries, a unit, a device", "the top entries, a unit, a device"),
    ],
)
def test_messages_speak_of_options_of_the_command_line(python, shell):
    assert as_options(python) == shell


def test_a_plain_line_tells_how_far_a_job_is(capsys):
    lines = Lines(every=0)
    lines(Progress(1200, 4000, 3e12, 12e12, 90.0))
    assert (
        capsys.readouterr().err == "ranking: 1,200 of 4,000 matrices, 25% of the work in 90.0 s, about 4.50 min left\n"
    )
    later = Lines(every=100)
    later(Progress(1, 2, 1.0, 2.0, 1.0))
    assert capsys.readouterr().err == ""


def test_the_log_is_shown_on_demand(checkpoint):
    level = logging.getLogger("kappa_fast").level
    assert "taken" in run("rank", checkpoint, "--no-cache", "-q", "-vv")[2]
    assert "taken" not in run("rank", checkpoint, "--no-cache", "-q", "-v")[2]
    assert logging.getLogger("kappa_fast").level == level
