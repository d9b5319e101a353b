"""``kappa-fast plan``: the options of rank, a text for people, a file for programs, and errors in one line."""

from __future__ import annotations

import importlib
import inspect
import json

import pytest
from hub_server import store_in_cache
from models import weights
from safetensors.torch import save_file
from typer.testing import CliRunner

import kappa_fast
from kappa_fast import planning
from kappa_fast.cli import app
from kappa_fast.cli import plan as plan_command
from kappa_fast.cli import rank as rank_command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "model.safetensors"
    save_file(weights(layers__0__up__weight=(48, 24), layers__1__up__weight=(48, 24), tiny__weight=(4, 32)), path)
    return path


def run(*arguments):
    found = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    return found.exit_code, found.stdout, found.stderr


def test_the_options_are_those_of_rank_with_the_same_defaults():
    ours, theirs = (inspect.signature(command).parameters for command in (plan_command.plan, rank_command.rank))
    assert "progress" in set(theirs) - set(ours)  # and whatever else concerns results only
    assert set(ours) - set(theirs) == {"measure", "device_model", "ranks"}
    for name in set(ours) & set(theirs):
        assert ours[name].default == theirs[name].default, name
    assert ours["path"].annotation == theirs["path"].annotation  # files, directories, ids of the hub
    python = inspect.signature(planning.plan).parameters
    assert set(python) - {"source"} == set(ours) - {
        "path",
        "json",
        "limit",
        "all_rows",
        "debug",
        "quiet",
        "verbose",
        "threads",
    }
    assert set(python) - {"measure", "device_model", "ranks"} <= set(inspect.signature(kappa_fast.rank).parameters)


def test_a_model_of_the_hub_is_planned_as_rank_would_rank_it(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_CACHE", str(tmp_path))
    store_in_cache(tmp_path, "org/name", {"model.safetensors": checkpoint.read_bytes()})
    code, out, err = run("org/name", "--no-measure")
    assert (code, err) == (0, "")
    assert "2 matrices to be ranked" in out
    code, _, err = run("org/other", "--no-measure")
    assert code == 1
    assert "HF_HUB_OFFLINE" in err  # and not that this is no id


def test_every_option_reaches_plan(checkpoint, monkeypatch):
    seen = {}
    real = planning.plan

    def plan(source, **options):
        seen.update(options)
        return real(source, measure=False)

    monkeypatch.setattr(planning, "plan", plan)
    given = ["--top", "0.5", "--top-per-group", "--rtol", "1e-3", "--certify", "selection", "--include", "a"]
    given += ["--exclude", "b", "--embeddings", "--routers", "--fused", "stored", "--min-dim", "2", "--max-dim", "99"]
    given += ["--device", "cpu", "--backend", "torch", "--memory-budget", "1GB", "--no-measure"]
    given += ["--score=-flatness", "--statistics", "outliers", "--statistics", "spectrum"]
    assert run(checkpoint, *given, "--device-model", "a100", "--ranks", "8")[0] == 0
    expected = dict(top=0.5, top_per_group=True, rtol=1e-3, certify="selection", include=["a"], exclude=["b"])
    expected |= dict(embeddings=True, routers=True, fused="stored", min_dim=2, max_dim=99, device="cpu")
    expected |= dict(score="-flatness", statistics=["outliers", "spectrum"])
    expected |= dict(backend="torch", memory_budget="1GB", measure=False, device_model="a100", ranks=8)
    assert seen == expected


def test_the_text_has_groups_counts_and_a_time_and_stderr_is_quiet(checkpoint, tmp_path):
    code, out, err = run(checkpoint, "--device-model", "h100", "--json", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    assert "layers.*.up.weight  48x24  float32       2" in out
    assert "2 matrices to be ranked, 1 parameters skipped" in out
    assert "skipped: 1 too small: its smaller side is below --min-dim 16" in out
    for words in ("computing   about ", "reading     about ", "together    ", "h100        not under "):
        assert words in out
    assert f"written to {tmp_path / 'plan.json'}" in out
    assert json.loads((tmp_path / "plan.json").read_text())["count"] == 2


def test_without_measurement_no_time_is_claimed(checkpoint):
    code, out, _ = run(checkpoint, "--no-measure")
    assert code == 0
    assert "computing" not in out
    assert "reading " not in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device-model", "abacus"], 2, "device_model='abacus' has no published figures here"),
        (["--top", "most"], 2, "--top most: give a count"),
        (["--certify", "selection"], 2, "give --top as well"),
        (["--json", "/dev/null"], 2, "--json /dev/null: give the name of a file to write the plan to"),
        (["--json", "/no/such/folder/plan.json"], 1, "cannot be written: No such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(checkpoint, arguments, code, message):
    found, out, err = run(checkpoint, *arguments)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert message in err


def test_a_path_that_is_not_there_is_a_failure(tmp_path):
    code, _, err = run(tmp_path / "nothing")
    assert code == 1
    assert "nothing: no such file or directory" in err
