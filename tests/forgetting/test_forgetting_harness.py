"""The harness of the study of forgetting: repeatable runs, a journal to go on from, an effect that it finds."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.forgetting import bases, methods, runs, scores, texts
from benchmarks.forgetting.journal import Journal
from benchmarks.forgetting.plan import PLANS, Plan

PRETRAINING = {"corpus": "made-a", "steps": 20, "length": 32, "size": 4, "lr": 0.003, "windows": 20}
TRAINING = {"corpus": "made-a", "budgets": [5, 10], "warm": 2, "size": 4, "length": 32, "windows": 20, "validation": 10}
LOW = {"select": {"top_p": 0.5}, "include": "experts", "within": "cells"}
RANDOM = {"select": {"top_p": 0.5, "order": "random"}, "include": "experts", "within": "cells"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tiny bases."""
    made = tmp_path_factory.mktemp("study")
    for kind in ("dense-tiny", "mixture-tiny"):
        bases.pretrain(kind, 0, PRETRAINING, made)
    return made


def job(recipe: dict[str, Any], kind: str = "mixture-tiny", **others: Any) -> dict[str, Any]:
    usual = dict(kind=kind, base=0, task="made-b", recipe=recipe, fraction=None, draw=0, lr=0.01, seed=0)
    return usual | others


def run(module: list[str], root: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "benchmarks.forgetting", *module]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=1800, **options)


def test_identical_seeds_give_identical_curves(folder):
    found = [runs.fine_tune(job(LOW), TRAINING, folder) for _ in range(2)]
    assert found[0]["curve"] == found[1]["curve"]
    assert found[0]["endpoints"] == found[1]["endpoints"]
    other = runs.fine_tune(job(LOW, seed=1), TRAINING, folder)
    assert other["curve"] != found[0]["curve"]
    assert other["batches"] != found[0]["batches"]


def test_all_methods_of_a_seed_see_the_same_batches(folder):
    recipes = [LOW, RANDOM, {"train": "all"}, {"lora": {"r": 2, "lora_alpha": 4}, "select": {"top_p": 1.0}}]
    found = [runs.fine_tune(job(recipe, lr=rate), TRAINING, folder) for recipe in recipes for rate in (0.001, 0.01)]
    assert {one["status"] for one in found} == {"ok"}
    assert len({one["batches"] for one in found}) == 1
    assert len({json.dumps(one["start"]) for one in found}) == 1
    assert len({json.dumps(one["curve"]) for one in found}) == len(found)


def test_a_base_is_the_same_from_the_same_seed(folder, tmp_path):
    again = bases.pretrain("dense-tiny", 0, PRETRAINING, tmp_path)
    assert again["weights"] == bases.weights_digest(bases.load("dense-tiny", 0, folder))
    assert again["curve"][-1][1] < again["curve"][0][1] - 1
    assert bases.pretrain("dense-tiny", 1, PRETRAINING, tmp_path)["weights"] != again["weights"]


def test_a_short_budget_changes_nothing_for_a_long_one(folder):
    """The branches with a falling learning rate leave no trace in the level part that goes on."""
    both = runs.fine_tune(job(LOW), TRAINING, folder)["endpoints"]
    alone = runs.fine_tune(job(LOW), TRAINING | {"budgets": [10]}, folder)["endpoints"]
    assert list(both) == ["5", "10"]
    assert both["10"] == alone["10"]


def test_what_is_not_chosen_does_not_move(folder):
    model = bases.load("mixture-tiny", 0, folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prepared = methods.prepare(model, LOW, None, 0, 0.01)
    chosen = methods.choose(bases.load("mixture-tiny", 0, folder), LOW, None, 0)
    for batch in texts.load("made-b", folder / "texts").batches(0, 3, 4, 32):
        prepared.model(input_ids=batch, labels=batch).loss.backward()
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
    moved = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    for entry in chosen:
        assert moved[entry.name][entry.index].any()
        moved[entry.name][entry.index] = False
    assert not any(part.any() for part in moved.values())


def test_random_experts_match_the_lowest_in_every_layer_and_type(folder):
    model = bases.load("mixture-tiny", 0, folder)
    low = methods.choose(model, LOW, None, 0)
    drawn = [methods.choose(model, RANDOM, None, draw) for draw in range(6)]

    def cells(selection: Any) -> Counter[Any]:
        return Counter((e.layer, bases.type_of(e), e.shape) for e in selection)

    assert set(cells(low).values()) == {2}
    assert all(cells(one) == cells(low) for one in drawn)
    assert len({one.keys for one in drawn}) > 3
    ranking = scores.rank(model)
    for layer, kind, _ in cells(low):
        cell = [e for e in ranking if e.layer == layer and bases.type_of(e) == kind]
        assert {e.key for e in cell[:2]} <= set(low.keys)


STUDY = Plan.read(PLANS / "study.json")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_every_method_of_the_study_trains_what_it_says(kind, folder):
    """On tiny bases: each takes its share, moves weights, and leaves embeddings alone unless it trains all."""
    batch = texts.load("made-b", folder / "texts").batches(0, 1, 4, 32)[0]
    for name, method in STUDY.methods.items():
        if kind not in method.get("kinds", [kind]):
            continue
        shape = bases.SHAPES[f"{kind}-tiny"] | {"num_hidden_layers": bases.SHAPES[kind]["num_hidden_layers"]}
        model = bases.build(kind, 0, shape)
        fraction = max(method.get("fractions", [None]), key=lambda share: share or 0)
        prepared = methods.prepare(model, method["recipe"], fraction, 1, 0.01)
        before = {key: p.detach().clone() for key, p in prepared.model.named_parameters()}
        prepared.model(input_ids=batch, labels=batch).loss.backward()
        prepared.optimizer.step()
        moved = {key for key, p in prepared.model.named_parameters() if not torch.equal(p, before[key])}
        assert moved, name
        assert any("embed" in key for key in moved) == (name == "full"), name
        assert 0 < prepared.said["share"] <= (1 if "lora" in name or fraction is None else fraction), name
        if "attention" in name:
            assert all("self_attn" in key for key in moved), name
        if "experts" in name:
            assert all("experts" in key for key in moved), name


def test_other_scores_are_what_they_say(folder):
    model = bases.load("dense-tiny", 0, folder)
    ranking = scores.rank(model)
    assert [e.layer for e in scores.scored(ranking, model, "depth")] == sorted(e.layer for e in ranking)
    generator = torch.Generator().manual_seed(0)
    entry = ranking[0]
    gaussian = torch.randn(300, 200, generator=generator, dtype=torch.float64)
    orthonormal = torch.linalg.qr(gaussian).Q
    assert abs(scores.flatness(entry, 3 * gaussian)) < 0.02  # a Gaussian of any scale is as flat as one
    assert scores.flatness(entry, orthonormal) == pytest.approx(1 - math.log(3) / 2, abs=0.01)  # Marchenko and Pastur
    assert scores.stable_rank(entry, orthonormal) == pytest.approx(200)
    sigma = np.linalg.svd(gaussian.numpy(), compute_uv=False)
    edge = (np.quantile(sigma, 0.75) - np.quantile(sigma, 0.25)) / 1.349 * (1 + math.sqrt(2 / 3))
    expected = sigma[sigma > edge].sum() / sigma[sigma <= edge].sum() / sigma[0]
    assert scores.signal_to_noise(entry, gaussian.T) == pytest.approx(expected)


def test_a_corpus_has_no_document_in_two_parts_and_is_kept(tmp_path):
    first = texts.load("made-a", tmp_path)
    assert texts.load("made-a", tmp_path).digest == first.digest == texts.make("made-a").digest
    documents = {part: {bytes(d) for d in bytes_of(tokens)} for part, tokens in first.parts.items()}
    assert not documents["train"] & (documents["test"] | documents["validation"])
    assert not documents["test"] & documents["validation"]
    windows = first.windows("test", 50, 32)
    assert windows.shape == (50, 32)
    with pytest.raises(ValueError, match=r"made-a has \d+ pieces of 32 tokens for test, and 100000 are asked"):
        first.windows("test", 100_000, 32)
    with pytest.raises(ValueError, match="'nothing' is no corpus: there are python, catalogues"):
        texts.make("nothing")


def bytes_of(tokens: torch.Tensor) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in tokens.tolist():
        if token == texts.END:
            found.append([])
        else:
            found[-1].append(token)
    return [document for document in found if document]


def test_a_torn_line_is_cut_off_and_a_broken_one_is_an_error(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    with journal.locked():
        journal.add({"id": "a", "what": "run", "status": "ok"})
    with journal.file.open("ab") as stream:
        stream.write(b'{"id": "b", "wha')
    assert list(journal.records()) == ["a"]
    with journal.locked():
        journal.add({"id": "c", "what": "run", "status": "ok"})
        with pytest.raises(BlockingIOError), Journal(journal.file).locked():
            pass
    assert list(journal.records()) == ["a", "c"]
    journal.file.write_bytes(b"no JSON\n" + journal.file.read_bytes())
    with pytest.raises(ValueError, match="line 1: no JSON"):
        journal.records()


def test_a_change_of_settings_is_another_run_and_a_change_of_the_analysis_is_not():
    plan = Plan.read(PLANS / "smoke.json")
    ids = {j["id"] for j in plan.jobs()}
    assert len(ids) == len(plan.jobs())
    longer = Plan(**{**vars(plan), "training": {**plan.training, "size": 5}})
    assert {j["id"] for j in longer.jobs() if j["what"] == "run"}.isdisjoint(ids)
    assert {j["id"] for j in longer.jobs() if j["what"] == "base"} <= ids
    other = Plan(**{**vars(plan), "analysis": {}})
    assert {j["id"] for j in other.jobs()} == ids
    assert other.digest() != plan.digest()


def test_a_base_comes_right_before_the_first_run_that_needs_it():
    jobs = STUDY.jobs()
    order = {name: i for i, name in enumerate(STUDY.methods)}
    done: set[str] = set()
    for job, before in zip(jobs, [None, *jobs], strict=False):
        if job["what"] == "run":
            assert job["needs"] in done
            if before is not None and before["what"] == "run":
                assert (before["stage"], order[before["method"]]) <= (job["stage"], order[job["method"]])
        done.add(job["id"])
    first = next(i for i, job in enumerate(jobs) if job["what"] == "run")
    assert [job["kind"] for job in jobs[:first]] == ["mixture"]


@pytest.mark.slow
def test_the_smoke_study_runs(root, tmp_path):
    done = run(["--smoke", "--folder", str(tmp_path), "--workers", "2"], root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "44 results" in done.stdout
    report = (tmp_path / "report" / "report.md").read_text()
    assert "40 planned, 40 ok, 0 missing" in report
    assert "not complete" not in report
    assert (tmp_path / "report" / "frontier-mixture-tiny-made-b.png").stat().st_size > 5000
    compact = [json.loads(line) for line in (tmp_path / "report" / "compact.jsonl").read_text().splitlines()]
    assert len(compact) == 44


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_where_it_stopped(root, tmp_path):
    arguments = ["--plan", str(PLANS / "smoke.json"), "--folder", str(tmp_path), "--workers", "2"]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    first = subprocess.Popen([sys.executable, "-m", "benchmarks.forgetting", *arguments], cwd=root, env=env)
    journal = Journal(tmp_path / "journal.jsonl")
    while len(journal.records()) < 8 and first.poll() is None:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(0.5)
    with journal.locked():  # the runs ended with it, or at least hold no lock
        pass
    before = journal.records()
    assert 8 <= len(before) < 44
    assert "44 results" in run([*arguments, "--status"], root).stdout
    done = run(arguments, root)
    assert done.returncode == 0, done.stderr
    assert "0 results are missing" in done.stdout
    lines = [json.loads(line) for line in journal.file.read_text().splitlines()]
    assert len(lines) == len({line["id"] for line in lines}) == 44  # nothing was done twice
    assert all(journal.records()[key] == record for key, record in before.items())


@pytest.mark.slow
def test_a_planted_effect_is_found_and_shuffled_scores_find_nothing(root, tmp_path):
    """Bases whose old knowledge lies in known experts: training the others wins, on eight bases of eight."""
    arguments = ["--plan", str(PLANS / "planted.json"), "--folder", str(tmp_path)]
    done = run([*arguments, "--workers", "2"], root)
    assert "0 results are missing" in done.stdout, done.stdout + done.stderr
    assert run([*arguments, "--report"], root).returncode == 0
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["primary"]["p"] < 0.01
    assert summary["primary"]["effect"] < -0.3
    high, shuffled = summary["tested"]
    assert high["effect"] > 0.2
    assert shuffled["p"] > 0.05
    assert abs(shuffled["effect"]) < 0.25
