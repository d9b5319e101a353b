"""The harness asks of a model of one's own: it plans within the budget, says what it can tell, and refuses the rest."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build
from make_entries import make_entry

from benchmarks.forgetting import bases, example, methods, own, own_plan, own_report, runs, scores, single, texts
from benchmarks.forgetting.analysis import WORST, Outcome
from benchmarks.forgetting.own import OwnError, Question
from benchmarks.forgetting.own_plan import Offer
from benchmarks.forgetting.plan import Plan
from kappa_fast import Ranking


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model with its tokenizer, a text that it knows and one that it does not."""
    folder = tmp_path_factory.mktemp("own")
    example.make(folder, "tiny", steps=40, length=32, batch=8)
    return folder


def asked(made: Path, **others) -> Question:
    usual = dict(
        model=str(made / "model"),
        learn={"learn": (str(made / "learn.txt"),)},
        keep=(str(made / "keep.txt"),),
        steps=8,
        length=32,
        size=4,
        rates=(0.01,),
    )
    return Question(**(usual | others))


# What so many draws can tell


@pytest.mark.parametrize("draws", [19, 39, 99])
def test_the_effect_that_is_said_to_be_found_is_found_as_often_as_is_said(draws):
    effect = single.detectable(draws)
    chance = np.random.default_rng(0)
    method = chance.normal(size=4000) - effect
    behind = (chance.normal(size=(4000, draws)) <= method[:, None]).sum(1)
    found = np.mean((1 + behind) / (1 + draws) <= single.LEVEL + 1e-12)
    assert found == pytest.approx(single.POWER, abs=0.025)


def test_more_draws_tell_smaller_effects_and_too_few_tell_none():
    effects = [single.detectable(draws) for draws in (19, 39, 59, 99)]
    assert effects == sorted(effects, reverse=True)
    assert effects[0] < 3
    assert single.detectable(18) == math.inf
    assert single.smallest_p(19) == 0.05


def test_the_page_on_evidence_says_what_draws_can_tell(root):
    text = " ".join((root / "docs" / "evidence.md").read_text().split())
    first, *others = (f"{single.detectable(draws):.1f}" for draws in (19, 39, 99))
    assert f"an effect of {first} standard deviations of the draws; with 39 one of {others[0]}" in text
    assert f"with 99 one of {others[1]}" in text


def plan_of(draws: int, tasks: tuple[str, ...] = ("a", "b")) -> Plan:
    against = {"kind": "own", "method": "kappa-low", "draws": "random", "fraction": 0.2}
    methods = {
        "kappa-low": {"recipe": {}, "fractions": [0.2]},
        "random": {"recipe": {}, "fractions": [0.2], "draws": draws},
    }
    targets = {task: [0.9, 0.8] for task in tasks}
    analysis = {"budget": 8, "targets": targets, "primary": against, "described": []}
    return Plan("own", {"model": "m"}, {"own": [0]}, {}, list(tasks), [0.01], [0], methods, analysis)


def outcome_of(*at: float) -> Outcome:
    return Outcome(0.01, ((3.0, 0.0), (2.0, 1.0)), at, "ok")


def study_of(method: list[list[float]], draws: list[list[list[float]]]) -> dict:
    """By task: forgetting of the method at each target, and of every draw."""
    return {
        ("own", 0, task): {("kappa-low", 0.2, 0): outcome_of(*method[i])}
        | {("random", 0.2, j): outcome_of(*draw) for j, draw in enumerate(draws[i])}
        for i, task in enumerate(("a", "b"))
    }


def test_p_values_of_a_selection_that_is_like_the_draws_are_uniform():
    chance, plan, found = np.random.default_rng(0), plan_of(9), []
    for _ in range(600):
        skill = chance.normal(size=10)  # of a selection, the same on both tasks
        values = skill[None, :, None] + 0.3 * chance.normal(size=(2, 10, 2))
        values[chance.random(values.shape) < 0.1] = WORST
        study = study_of(values[:, 0].tolist(), values[:, 1:].tolist())
        found.append(single.standing(study, plan, plan.analysis["primary"]).p)
    for level in (0.1, 0.3, 0.5, 0.8):
        share = np.mean(np.array(found) <= level + 1e-12)
        assert share == pytest.approx(level, abs=3.5 * math.sqrt(level * (1 - level) / 600))
    assert min(found) == single.smallest_p(9)


def test_a_method_that_forgets_least_has_the_smallest_p_and_one_that_arrives_nowhere_the_largest():
    plan = plan_of(4)
    draws = [[[1.0, 2.0], [2.0, 3.0], [3.0, WORST], [1.5, 2.5]]] * 2
    best = single.standing(study_of([[0.5, 1.0], [0.5, 1.9]], draws), plan, plan.analysis["primary"])
    assert (best.behind, best.p, best.reached) == (0, 1 / 5, 4)
    assert best.gain == pytest.approx(0.5 - 1.875)  # only where all reach the target
    assert best.deviations < -1
    lost = single.standing(study_of([[WORST, WORST]] * 2, draws), plan, plan.analysis["primary"])
    assert (lost.behind, lost.p, lost.reached) == (4, 1.0, 0)
    middle = single.standing(study_of([[1.2, 2.2]] * 2, draws), plan, plan.analysis["primary"])
    assert middle.behind == 1
    incomplete = {
        cell: {k: v for k, v in of.items() if k[2] != 3} for cell, of in study_of([[1, 1]] * 2, draws).items()
    }
    assert single.standing(incomplete, plan, plan.analysis["primary"]) is None


@pytest.mark.parametrize(
    ("behind", "draws", "said"),
    [(0, 19, "Yes, on this model"), (19, 19, "it forgot more than others"), (5, 19, "Not to be told from chance")],
)
def test_the_first_paragraph_says_what_the_ranks_say(behind, draws, said, made):
    one = single.Standing("kappa-low 20%", draws, behind, (1 + behind) / (1 + draws), -0.1, -1.0, 3, 3)
    text = own_report.answer(one, [], asked(made))
    assert said in text
    assert f"forgot less than {draws - behind} of {draws}" in text
    assert "cannot be below 0.050" in text


# What a budget carries


def test_a_plan_takes_the_budget_and_no_more_and_more_time_is_worth_more():
    worth = []
    for budget in (150, 400, 1000, 3000, 10_000):
        offer = own_plan.best(budget, 10, 2, tasks=2, rates=3, draws=99)
        assert own_plan.time_of(offer, 10, 2) <= budget
        worth.append(offer.worth)
    assert worth == sorted(worth)
    assert own_plan.best(10_000_000, 10, 2, 2, 3, 99) == Offer(2, 3, 99, len(own_plan.CONTROLS))
    assert own_plan.best(10_000_000, 10, 2, 2, 3, 26).draws == 19  # no more than there are


def test_a_budget_that_is_too_small_is_refused_with_what_would_do():
    with pytest.raises(
        OwnError, match=r"1\.7 minutes are too little .* takes 20\.0 seconds, .* has 10 of them\. Give 1\.9"
    ) as e:
        own_plan.best(100, 20, 2, tasks=1, rates=3, draws=99)
    assert own_plan.best(116, 20, 2, 1, 3, 99) == Offer(1, 2, 4, 0)
    assert "--steps" in str(e.value)
    with pytest.raises(OwnError, match="3 random selections are too few"):
        own_plan.best(1e9, 1, 1, 1, 3, 3)


def test_it_says_beforehand_what_it_can_tell(made):
    question, way = asked(made), {"said": "matrices", "like": "random ones", "caution": "Depth."}
    plan = plan_of(39, ("learn",))
    plan.training.update(budgets=[8], size=4, length=32)
    text = own_plan.words(question, plan, Offer(1, 1, 39, 0), way, 2.0, 2, 99)
    assert "the smallest p-value is 1/40 = 0.025" in text
    assert f"{single.detectable(39):.1f} standard deviations of the draws" in text
    assert "One model is one case" in text
    assert "Depth." in text
    few = own_plan.words(question, plan, Offer(1, 1, 9, 0), way, 2.0, 2, 9)
    assert "No effect of any size can be told from chance at 5%" in few
    assert "about 9 different draws" in few


@pytest.mark.parametrize(("family", "expected"), [("llama", "types and sizes"), ("mixtral", "layers and types")])
def test_experts_are_compared_with_experts_and_dense_matrices_by_type(family, expected, made):
    ranking = scores.rank(build(family))
    way = own_plan._way(ranking, asked(made, share=0.5))
    assert expected in way["like"]
    assert ("depth" in way["caution"]) == (family == "llama")
    if family == "mixtral":
        assert own_plan._distinct(ranking, way, 0.5) >= own_plan.FEWEST_DISTINCT


def test_dense_matrices_are_compared_within_types_and_layers_where_that_leaves_enough_draws(made):
    entries = [
        make_entry(f"layers.{i}.{name}", 2.0 + (7 * i + 5 * j) % 31, group=f"layers.*.{name}", layer=i, shape=(8, 8))
        for i in range(16)
        for j, name in enumerate(("q", "k", "v", "o"))
    ]
    ranking = Ranking(entries, (), {"num_parameters": sum(entry.numel for entry in entries)})
    way = own_plan._way(ranking, asked(made, share=0.3))
    assert "as many of each type and in each layer" in way["like"]
    assert not way["caution"]
    low, drawn = (methods.pick(ranking, way[name], 0.3, 3) for name in ("low", "random"))
    for field in ("group", "layer"):
        assert Counter(getattr(e, field) for e in low) == Counter(getattr(e, field) for e in drawn)
    assert low.keys != drawn.keys
    assert own_plan._distinct(ranking, way, 0.3) == max(own_plan.DRAWS)


def test_a_share_that_leaves_no_choice_is_refused(made):
    ranking = scores.rank(own.load({"model": str(made / "model")}, 0))
    way = own_plan._way(ranking, asked(made))
    assert own_plan._distinct(ranking, way, 0.2) >= own_plan.FEWEST_DISTINCT
    for share in (1.0, 0.001):
        with pytest.raises(OwnError, match="no comparison at this --share"):
            own_plan._distinct(ranking, way, share)


# What is refused


def test_a_model_without_a_tokenizer_or_that_is_not_causal_is_refused(made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("token*"):
        file.unlink()
    with pytest.raises(OwnError, match="has no tokenizer, which turns texts into what it reads"):
        own.prepare(asked(made, model=str(tmp_path / "bare")), tmp_path / "a")
    build("bert").save_pretrained(tmp_path / "encoder")
    with pytest.raises(OwnError, match="is no causal language model: its config names Bert"):
        own.prepare(asked(made, model=str(tmp_path / "encoder")), tmp_path / "b")
    with pytest.raises(OwnError, match="is no model of transformers"):
        own.prepare(asked(made, model=str(tmp_path / "nothing")), tmp_path / "c")


def test_a_tokenizer_of_another_model_is_refused(made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 50}))
    with pytest.raises(OwnError, match=r"makes a token \d+, and the model knows 50: this tokenizer"):
        own.prepare(asked(made, model=str(tmp_path / "small")), tmp_path / "study")


def test_texts_that_do_not_serve_are_refused(made, tmp_path):
    short, coded, lines = tmp_path / "short.txt", tmp_path / "coded.txt", tmp_path / "lines.jsonl"
    short.write_text("Too short for anything.")
    coded.write_bytes(b"\xff\xfe\x00")
    lines.write_text('{"text": "one"}\n{"other": 2}\n')
    for given, said in (
        (
            {"keep": (str(short),)},
            r"the texts to keep are too short: they have \d pieces of 32 tokens for test, and 50",
        ),
        ({"learn": {"new": (str(short),)}}, r"the texts to learn \(new\) are too short"),
        ({"keep": (str(coded),)}, "cannot be read as text in UTF-8"),
        ({"keep": (str(lines),)}, 'line 2: no JSON object with "text"'),
        ({"keep": (str(tmp_path / "no.txt"),)}, "there is no file"),
        ({"length": 4096}, "reads at most 512 tokens: give --length 512"),
        ({"steps": 4}, "4 steps are too few"),
    ):
        with pytest.raises(OwnError, match=said):
            own.prepare(asked(made, **given), tmp_path / "study")


def test_a_folder_with_another_question_is_refused(made, tmp_path):
    own.prepare(asked(made), tmp_path)
    own.prepare(asked(made), tmp_path)
    with pytest.raises(OwnError, match=r"holds another study \(share was 0.2 and is 0.3\)"):
        own.prepare(asked(made, share=0.3), tmp_path)


def test_a_pilot_that_learns_nothing_is_an_error(made):
    plan = plan_of(4, ("learn",))
    job = next(job for job in plan.jobs() if job["what"] == "run")
    record = {**job, "status": "ok", "start": {"validation": 2.0}, "endpoints": {"8": {"validation": 1.999}}}
    with pytest.raises(OwnError, match="the pilot on learn learned nothing"):
        own_plan._seen([record], plan)
    with pytest.raises(OwnError, match="the pilot on learn has failed: no room"):
        own_plan._seen([record | {"status": "failed", "error": "Traceback\nno room"}], plan)
    good = record | {"endpoints": {"8": {"validation": 1.0}}, "seconds": {"wall": 3.0}}
    assert own_plan._seen([good], plan) == (3.0, {"learn": [0.75, 0.65, 0.55]})


# Texts and measures


def test_documents_are_cut_where_paragraphs_end_and_occur_once(tmp_path):
    (tmp_path / "a.md").write_text("\n\n".join(f"Paragraph {i}. " + "word " * 100 for i in range(20)))
    (tmp_path / "b.md").write_text((tmp_path / "a.md").read_text())
    (tmp_path / "c.jsonl").write_text('{"text": "a line"}\n\n{"text": "another"}\n')
    found = own.documents([str(tmp_path)])
    assert found[-2:] == ["a line", "another"]
    assert all(text.startswith("Paragraph") and len(text) >= own.PIECE for text in found[:-3])
    assert len(found) == len(set(found))


def test_held_out_documents_are_whole_and_in_one_part_only(made):
    question = asked(made)
    coder = example.tokenizer()
    parts = own._parts(coder, own.documents(question.keep), own.PARTS)
    total = sum(map(len, parts.values()))
    for part, share in own.PARTS:
        assert len(parts[part]) == pytest.approx(share * total, abs=2 * own.PIECE)
    decoded = {part: set(coder.decode(tokens).split("<end>")) - {""} for part, tokens in parts.items()}
    assert set().union(*decoded.values()) == set(own.documents(question.keep))
    assert sum(map(len, decoded.values())) == len(own.documents(question.keep))


def test_losses_are_the_same_however_many_windows_are_taken_at_once(made, tmp_path, monkeypatch):
    """Large vocabularies leave room for few windows: KL is then that of some of them, all else is unchanged."""
    question = asked(made)
    settings = own.prepare(question, tmp_path) | {"windows": 60, "validation": 20}
    old, new = (texts.load(name, tmp_path / "texts") for name in ("keep", "learn"))
    base, other = (own.load({"model": question.model}, 0) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    whole = runs._Measure(base, old, new, settings, tmp_path / "whole.pt")(other)
    monkeypatch.setattr(bases, "at_once", lambda model, windows, most=50: 7)
    measure = runs._Measure(base, old, new, settings, tmp_path / "parts.pt")
    parts = measure(other)
    assert all(
        parts[name] == pytest.approx(whole[name], abs=1e-6) for name in ("old", "new", "validation", "forgotten")
    )
    assert measure.compared.shape == (7, question.length)
    logs = [bases.log_probabilities(model, measure.compared).double() for model in (base, other)]
    expected = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert parts["kl"] == pytest.approx(expected, rel=1e-5)
    assert expected > 0.001


def test_a_device_is_where_a_run_computes(made, tmp_path):
    """On a CPU the same to the last bit, whether it is named or not."""
    question = asked(made, learn={"learn": (str(made / "learn.txt"),)})
    settings = own.prepare(question, tmp_path) | {"windows": 50, "validation": 10, "budgets": [2]}
    noted = own.base({"kind": "own", "base": 0}, {"model": question.model}, settings, tmp_path)
    assert noted["curve"][0][1] < math.log(257)
    job = {"kind": "own", "base": 0, "task": "learn", "recipe": {"select": {"top_p": 0.5}}, "fraction": None}
    job |= {"draw": 0, "lr": 0.01, "seed": 0}
    found = [runs.fine_tune(job, settings | more, tmp_path) for more in ({}, {"device": "cpu"})]
    assert found[0]["curve"] == found[1]["curve"]
    assert found[0]["endpoints"] == found[1]["endpoints"]


@pytest.mark.slow
def test_the_worked_example_runs_writes_its_page_and_goes_on(root, made, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ask = ["--model", str(made / "model"), "--learn", str(made / "learn.txt"), "--keep", str(made / "keep.txt")]
    ask += ["--steps", "8", "--length", "32", "--size", "4", "--rates", "0.01", "--folder", str(tmp_path)]
    ask += ["--draws", "4", "--workers", "2"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.forgetting", *ask, *more]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)

    refused = run("--budget", "2s")
    assert refused.returncode == 1
    assert "too little for any comparison" in refused.stderr
    planned = run("--budget", "1h", "--only-plan")
    assert planned.returncode == 0, planned.stderr
    assert "the smallest p-value is 1/5 = 0.200" in planned.stdout
    assert not (tmp_path / "report").exists()
    done = run("--budget", "1h")
    assert done.returncode == 0, done.stderr
    assert "a pilot at" not in done.stdout
    assert "is kept, whatever the budget is now" in done.stdout
    page = (tmp_path / "report" / "report.md").read_text()
    assert page.split("\n\n")[1].startswith("**Not to be told from chance")
    assert "10 planned, 10 ok, 0 missing" in page
    assert (tmp_path / "report" / "frontier-own-learn.png").stat().st_size > 5000
    before = (tmp_path / "journal.jsonl").read_text()
    assert run("--budget", "1h").returncode == 0
    assert (tmp_path / "journal.jsonl").read_text() == before
    lost = run("--budget", "1h", "--share", "0.3")
    assert "holds another study" in lost.stderr
