"""The report of a study: nothing that has not run on all bases is shown as a result."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from test_forgetting_statistics import made_up, small_plan

from benchmarks.forgetting import analysis, described, kept, report
from benchmarks.forgetting.plan import PLANS, Plan


def study(plan: Plan, effect: float = 0.0) -> list[dict[str, Any]]:
    jobs = [job for job in plan.jobs() if job["what"] == "run"]
    return made_up(jobs, np.random.default_rng(1), effect)


def without(records: list[dict[str, Any]], method: str, base: int) -> list[dict[str, Any]]:
    return [each for each in records if (each["method"], each["base"]) != (method, base)]


def test_a_study_whose_primary_comparison_lacks_a_base_has_no_answer():
    plan = small_plan()
    records = without(study(plan, effect=-3.0), "low", 7)
    assert report.answer(records, plan) == "**This study is not complete: nothing here is a result.**"
    said = "\n".join(report.tables(records, plan))
    assert "| mixture: low against random | 7 |" in said  # how far it has come


def test_an_answer_says_which_way_and_how_sure_it_is():
    plan = small_plan()
    less = report.answer(study(plan, effect=-3.0), plan)
    assert "**low forgot less than random selections of the same kind** (p = 0.008, two-sided, 8 bases)" in less
    assert "**low forgot more than random" in report.answer(study(plan, effect=3.0), plan)
    assert "**low could not be told from random selections" in report.answer(study(plan), plan)


def test_a_comparison_that_lacks_a_base_is_counted_and_not_shown():
    plan = small_plan()
    whole = study(plan)
    assert "| mixture: other against random | 8 |" in "\n".join(report.tables(whole, plan))
    part = without(whole, "other", 3)
    assert report.answer(part, plan) == report.answer(whole, plan)
    said = "\n".join(report.tables(part, plan))
    assert "other against" not in said
    assert "| other |" not in said  # nor means over seven bases among the methods
    assert "1 of the 1 other comparisons of the plan have not run on all bases." in said
    assert [row["name"] for row in report.rows(part, plan)] == ["mixture: low against random"]
    lacking_a_draw = [each for each in whole if (each["method"], each["draw"], each["base"]) != ("random", 5, 2)]
    assert report.answer(lacking_a_draw, plan).startswith("**This study is not complete")


def test_a_base_that_lacks_one_run_of_one_task_makes_the_comparison_incomplete():
    plan = small_plan()
    analysed = {**plan.analysis, "targets": {"new": [0.9, 0.7], "hard": [0.9]}}
    plan = Plan(**{**vars(plan), "tasks": ["new", "hard"], "analysis": analysed})
    whole = study(plan)
    assert "**low could not be told" in report.answer(whole, plan)
    one = next(
        i for i, each in enumerate(whole) if (each["method"], each["base"], each["task"]) == ("random", 7, "hard")
    )
    part = whole[:one] + whole[one + 1 :]
    assert report.answer(part, plan) == "**This study is not complete: nothing here is a result.**"
    assert report.rows(part, plan) == []


def test_what_is_described_has_no_p_value():
    described = {"kind": "mixture", "method": "other", "draws": "random"}
    plan = small_plan()
    plan = Plan(**{**vars(plan), "analysis": {**plan.analysis, "comparisons": [], "described": [described]}})
    rows = report.rows(study(plan), plan)
    assert [(row["said"], "p" in row) for row in rows] == [("primary", True), ("described", False)]


def test_each_learning_rate_has_its_own_outcome():
    plan = small_plan(bases=2, draws=2)
    records = study(plan)
    by_rate = described.at_rates(records, plan)
    assert list(by_rate) == [0.1, 0.2]
    for rate, cells in by_rate.items():
        done = cells["mixture", 1, "new"]["low", None, 0]
        (run,) = [r for r in records if (r["base"], r["method"], r["lr"]) == (1, "low", rate)]
        if run["status"] == "ok":
            assert (done.rate, done.end) == (rate, run["endpoints"]["20"])
        else:
            assert math.isnan(done.rate)
    assert "| mixture | new | low | 0.1 |" in report._rates_table(records, report.shown(records, plan), plan)


def test_comparisons_at_one_rate_are_those_of_runs_at_that_rate():
    plan = small_plan(bases=4, draws=3)
    records = study(plan)
    only = Plan(**{**vars(plan), "rates": [0.1]})
    found = analysis.outcomes([each for each in records if each["lr"] == 0.1], only)
    alone = analysis.contrast(found, only, plan.analysis["primary"])
    said = described.tables(records, report.shown(records, plan), plan)["Comparisons at one learning rate for all"]
    assert f"| mixture: low against random | 0.1 | {alone.effect:.3f} |" in said
    assert "| mixture: other against random | 0.2 |" in said
    two = Plan(**{**vars(plan), "seeds": [0, 1]})  # of which one is missing
    assert all(not cell for cells in described.at_rates(records, two).values() for cell in cells.values())


def test_a_comparison_that_lacks_a_rate_is_shown_at_the_rates_that_it_has():
    plan = small_plan(bases=4, draws=3)
    plan = Plan(**{**vars(plan), "bases": {"mixture": [0, 1], "dense": [0, 1]}})
    asked = [{"kind": "dense", "method": "low", "draws": "random"}]
    plan = Plan(**{**vars(plan), "analysis": {**plan.analysis, "comparisons": asked}})
    records = [each for each in study(plan) if each["kind"] == "mixture" or each["lr"] == 0.2]
    said = described.tables(records, report.shown(records, plan), plan)
    for heading in ("Comparisons at one learning rate for all", "After the same number of steps"):
        assert "| dense: low against random | 0.2 |" in said[heading]
        assert "| dense: low against random | 0.1 |" not in said[heading]
    assert "dense" not in said["The first stretch read on a curve"]
    part = [each for each in records if (each["kind"], each["base"], each["draw"]) != ("dense", 1, 2)]
    assert not any("dense" in text for text in described.tables(part, report.shown(part, plan), plan).values())


def known(plan, forgotten):
    """Runs in which all learn the same but "other", which gets nowhere at the lower rate."""
    records = []
    for job in (job for job in plan.jobs() if job["what"] == "run"):
        gets_there = not (job["method"] == "other" and job["lr"] == 0.1)
        end = {"new": 1.8 if gets_there else 2.8, "validation": 1.0, "forgotten": forgotten[job["base"], job["lr"]]}
        records.append({**job, "status": "ok", "start": {"new": 2.8}, "endpoints": {"20": end | {"kl": 0.1}}})
    return records


def test_a_lower_rate_is_held_against_the_next_one_where_both_got_to_a_target():
    plan = small_plan(bases=2, draws=1)
    records = known(plan, {(0, 0.1): 0.3, (0, 0.2): 0.4, (1, 0.1): 0.1, (1, 0.2): 0.3})
    found = {one.method: one for one in described.slower(records, report.shown(records, plan), plan)}
    assert set(found) == {"low", "random"}  # "other" never gets there at the lower rate
    # From 2.8 to 1.8 the targets 0.9 * 2.8 and 0.7 * 2.8 lie 28% and 84% of the way.
    low = found["low"]
    assert (low.compared, low.reached) == (4, 4)
    assert low.gain == pytest.approx(-(0.1 + 0.2) / 2 * (0.28 + 0.84) / 2)
    assert low.share == pytest.approx((0.75 + 1 / 3) / 2)
    assert low.interval == pytest.approx((-0.2 * 0.56, -0.1 * 0.56))
    assert "| mixture | new | low | 0.1 against 0.2 | 4 of 4 | -0.0840 |" in described._slower_table([low])


def test_a_method_that_is_complete_in_one_kind_only_is_not_shown_of_the_other():
    plan = small_plan(bases=2, draws=1)
    plan = Plan(**{**vars(plan), "bases": {"mixture": [0, 1], "dense": [0, 1]}})
    records = [each for each in study(plan) if (each["kind"], each["base"]) != ("dense", 1)]
    assert "| dense |" not in "\n".join(report.tables(records, plan))


def test_the_first_stretch_is_read_on_the_power_that_meets_two_endpoints():
    path = ((3.0, 0.0), (2.0, 0.1), (1.0, 0.4), (0.5, 0.9))  # 0.1 times the square of what was learned, at first
    assert described.bent_at(path, 2.5) == pytest.approx(0.1 * 0.5**2)
    assert analysis.forgotten_at(path, 2.5) == pytest.approx(0.05)
    for target in (2.0, 1.5, 0.7, 0.2, 3.0):
        assert described.bent_at(path, target) == analysis.forgotten_at(path, target)
    for odd in (((3.0, 0.0), (2.0, -0.1), (1.0, 0.4)), ((3.0, 0.0), (2.0, 0.1)), ((3.0, 0.0), (3.1, 0.1), (1.0, 0.4))):
        assert described.bent_at(odd, 2.5) == analysis.forgotten_at(odd, 2.5)


def test_after_the_same_steps_methods_are_counted_that_learned_more_or_less_than_every_draw():
    plan = small_plan(bases=2, draws=2)
    records = known(plan, {(base, rate): 0.1 * (base + 1) for base in (0, 1) for rate in (0.1, 0.2)})
    for each in records:
        end = each["endpoints"]["20"]
        if each["method"] == "low":
            end["new"], end["forgotten"] = end["new"] - 0.1, end["forgotten"] + 0.05
    said = described.tables(records, report.shown(records, plan), plan)["After the same number of steps"]
    assert "| mixture: low against random | 0.1 | 2 of 2 | 0 of 2 | 0.0500 | 0.050 to 0.050 |" in said
    assert "| mixture: other against random | 0.1 | 0 of 2 | 2 of 2 | 0.0000 | 0.000 to 0.000 |" in said


def test_most_selections_that_learn_best_at_the_last_rate_are_a_warning():
    plan = small_plan(bases=2, draws=2)
    assert "learned best at 0.2, which is an end" in report.edges(analysis.outcomes(study(plan), plan), plan)


def test_an_incomplete_study_is_not_published(tmp_path):
    plan = small_plan(bases=2, draws=2)
    with (tmp_path / "journal.jsonl").open("w") as stream:
        for each in without(study(plan), "low", 1):
            stream.write(json.dumps(each) + "\n")
    with pytest.raises(ValueError, match="runs of the primary comparison are missing"):
        kept.keep(plan, tmp_path, tmp_path, tmp_path)
    assert not (tmp_path / kept.RUNS).exists()


def test_a_published_study_says_what_its_runs_say(tmp_path):
    plan = small_plan(bases=2, draws=2)
    records = [each | {"commit": "c", "clean": True, "versions": {"torch": "0"}} for each in study(plan)]
    with (tmp_path / "journal.jsonl").open("w") as stream:
        for each in [*records, records[0] | {"id": "of another plan"}]:
            stream.write(json.dumps(each) + "\n")
    files = kept.keep(plan, tmp_path, tmp_path, tmp_path)
    assert all(file.stat().st_size > 100 for file in files)
    assert {file.name for file in files} == {kept.RUNS, kept.DOCUMENT, "forgetting-frontier-mixture-new.png"}
    document = json.loads((tmp_path / kept.DOCUMENT).read_text())
    assert (document["commits"], document["plan"]) == ({"c": len(records)}, plan.digest())
    again = [json.loads(line) for line in (tmp_path / kept.RUNS).read_text().splitlines()]
    assert len(again) == len(records)
    assert json.dumps(report.rows(again, plan)) == json.dumps(document["rows"])  # to the last digit


def test_the_further_question_to_dense_models_is_asked_of_the_runs_of_the_study():
    """The lowest are the runs that are there; only the draws are new, at the rate at which the lowest learned best."""
    study, margins = (Plan.read(PLANS / f"{name}.json") for name in ("study", "margins"))
    known = {job["id"]: job for job in study.jobs()}
    shared = [job for job in margins.jobs() if job["id"] in known]
    assert Counter(job.get("method", "base") for job in shared) == {"base": 8, "kappa-low": 16}
    new = [job for job in margins.jobs() if job["id"] not in known]
    assert {(job["method"], job["lr"]) for job in new} == {("random-margins", 0.003)}
    assert len(new) == 8 * 2 * 12
    low, drawn = (method["recipe"]["select"] for method in margins.methods.values())
    assert drawn == {**low, "order": "random", "match": ["margins"]}
    assert margins.analysis["targets"] == study.analysis["targets"]


def test_the_same_is_to_be_asked_of_new_bases():
    margins, new = (Plan.read(PLANS / f"{name}.json") for name in ("margins", "new-bases"))
    assert not set(margins.bases["dense"]) & set(new.bases["dense"])
    assert len(new.bases["dense"]) == 8
    for name in ("pretraining", "training", "tasks", "rates", "seeds"):
        assert getattr(new, name) == getattr(margins, name)
    assert margins.methods.items() <= new.methods.items()
    assert new.analysis["primary"] == margins.analysis["primary"]
    study = Plan.read(PLANS / "study.json")
    assert new.methods["random-types"]["recipe"] == study.methods["random-types"]["recipe"]
    assert len(new.analysis["comparisons"]) == 1


def test_the_published_study_says_what_its_runs_say():
    records, plan = kept.runs()
    document = json.loads((kept.provenance.RESULTS / kept.DOCUMENT).read_text())
    assert document["plan"] == plan.digest(), "the plan was changed after the runs"
    assert json.dumps(report.rows(records, plan)) == json.dumps(document["rows"])
    assert {each["id"] for each in records} <= {job["id"] for job in plan.jobs()}


def test_the_published_answer_is_what_a_slow_twin_finds():
    """From the lines alone, without the code of the analysis: numpy interpolates, and all signs are counted."""
    lines = [json.loads(line) for line in (kept.provenance.RESULTS / kept.RUNS).read_text().splitlines()]
    runs = [each for each in lines if each["what"] == "run" and each["stage"] == 1]
    best: dict[tuple[Any, ...], Any] = {}
    for each in sorted(runs, key=lambda each: each["endpoints"]["120"]["validation"], reverse=True):
        best[each["base"], each["task"], each["method"], each["draw"]] = each  # the lowest comes last
    forgotten = {}
    for key, each in best.items():
        path = [(each["start"]["new"], 0.0), *((e["new"], e["forgotten"]) for e in each["endpoints"].values())]
        for share in (0.8, 0.7, 0.6):
            target = share * path[0][0]
            after = next((i for i, (loss, _) in enumerate(path) if loss <= target), None)
            value = math.inf
            if after is not None:
                xs, ys = zip(*path[after - 1 : after + 1], strict=True)
                value = float(np.interp(-target, [-x for x in xs], ys))
            forgotten[(*key, share)] = value
    effects = []
    for base in range(8):
        places = []
        for task in ("catalogues-de", "headers"):
            for share in (0.8, 0.7, 0.6):
                draws = [forgotten[base, task, "experts-random", i, share] for i in range(12)]
                mine = forgotten[base, task, "experts-kappa-low", 0, share]
                behind = sum(d < mine for d in draws) + sum(d == mine for d in draws) / 2
                places.append((behind + 0.5) / 13 - 0.5)
        effects.append(np.mean(places))
    signs = np.array([[1 if number >> bit & 1 else -1 for bit in range(8)] for number in range(256)])
    p = np.mean(np.abs(signs @ np.array(effects)) >= abs(sum(effects)) - 1e-12)
    document = json.loads((kept.provenance.RESULTS / kept.DOCUMENT).read_text())
    assert document["rows"][0]["effects"] == pytest.approx(effects)
    assert document["rows"][0]["p"] == p


def test_pages_that_say_it_in_words_say_what_was_found(root):
    """Sentences that no program writes: they have to change with the answer."""
    records, plan = kept.runs()
    compared = analysis.contrasts(report.shown(records, plan), plan)
    low, _ = dense(compared)
    assert kept.sentence().count("could not be told by what it forgot from") == 2
    assert "(more than most of them on 7 models, p = 0.0625). On 8" in kept.sentence()
    assert "(less than most of them on 7 models, p = 0.0625, and 0.19 by Holm with 6 comparisons)" in kept.sentence()
    assert compared.primary.complete
    assert low.complete
    assert compared.primary.p > report.LEVEL, "the sentences below say that nothing was found"
    assert compared.adjusted[low.name] > report.LEVEL, "the sentences below say that nothing was found"
    said = {
        "kappa_fast/report/templates/page.html": "it could not be told by what was forgotten from training random",
        "docs/index.md": "could not tell the lowest from random ones of the same kind by what they forgot",
        "docs/first-training.md": "could not tell the lowest from random ones of the same kind by what they forgot",
        "docs/evidence.md": "experts with the lowest kappa showed no protection.** Validation",
    }
    for page, words in said.items():
        assert words in " ".join((root / page).read_text().split()), page


def dense(compared: analysis.Contrasts) -> list[analysis.Contrast]:
    """The lowest and the highest beside draws of the same types."""
    return [
        next(one for one in compared.tested if one.name.startswith(f"dense: kappa-{end} 20%"))
        for end in ("low", "high")
    ]


def test_what_the_page_says_of_dense_models_is_what_its_runs_say(root):
    """Sentences that no program writes."""
    records, plan = kept.runs()
    shown = report.shown(records, plan)
    compared = analysis.contrasts(shown, plan)
    low, high = dense(compared)
    page = " ".join((root / "docs/evidence.md").read_text().split())
    less, more = (-low.gain_interval[1], -low.gain_interval[0])
    shares = [
        analysis.contrast(shown, plan, asked_of(plan, "kappa-low") | {"tasks": [task]}).gain for task in plan.tasks
    ]
    assert (
        f"{-low.gain:.3f} nats less at the same loss (95% interval {less:.3f} to {more:.3f}; {-shares[0]:.3f} on the "
        f"catalogues and {-shares[1]:.3f} on the headers)"
    ) in page
    assert f"less one half is {low.effect:.3f} ({low.effect_interval[0]:.3f} to {low.effect_interval[1]:.3f})" in page
    assert "below 0 in seven bases" in page
    assert sum(effect < 0 for effect in low.effects) == 7
    assert f"p is {low.p:.4f}, and {compared.adjusted[low.name]:.2f} with Holm's correction" in page
    assert "In dense models the highest forgot more than the draws in all eight bases, which holds with Holm's" in page
    assert min(high.effects) > 0
    (lora,) = [one for one in compared.tested if one.name.startswith("dense: kappatune-lora")]
    assert [name for name, p in compared.adjusted.items() if p <= report.LEVEL] == [high.name, lora.name]
    assert max(lora.effects) < 0
    less, more = -lora.gain_interval[1], -lora.gain_interval[0]
    assert (
        f"in all eight bases: {-lora.gain:.3f} nats less at the same loss (95% interval {less:.3f} to {more:.3f})"
        in page
    )
    by_rate = described.at_rates(records, plan)
    slow = [analysis.contrast(by_rate[rate], plan, asked_of(plan, "kappatune-lora")) for rate in plan.rates]
    assert min(slow[0].gain, slow[1].gain) > 0 > slow[2].gain
    assert sum(not one.complete for one in compared.tested) == 1
    first, *others = mean_at(shown, "catalogues-de", "kappatune-lora") - mean_at(shown, "catalogues-de", "random-types")
    assert first < 0 < min(others)
    assert max(mean_at(shown, "headers", "kappatune-lora") - mean_at(shown, "headers", "random-types")) < 0
    full = analysis.contrast(shown, plan, asked_of(plan, "full"))
    assert full.gain_interval[0] < 0 < full.gain_interval[1]


def test_what_the_page_says_of_the_further_question_is_what_its_runs_say(root):
    records, plan = kept.further_runs()
    one = analysis.contrast(report.shown(records, plan), plan, plan.analysis["primary"])
    document = json.loads((kept.provenance.RESULTS / kept.files_of(plan)[1]).read_text())
    assert document["plan"] == plan.digest(), "the plan was changed after the runs"
    assert json.dumps(report.rows(records, plan)) == json.dumps(document["rows"])
    page = " ".join((root / "docs/evidence.md").read_text().split())
    low, high = -one.gain_interval[1], -one.gain_interval[0]
    assert f"{-one.gain:.3f} nats less at the same loss (95% interval {low:.3f} to {high:.3f}), p = {one.p:.4f}" in page
    assert "the lowest of dense models forgot less**, on all eight bases" in page
    assert max(one.effects) < 0
    assert (
        "It forgot less than random matrices with as many of each type and in each layer (less than" in kept.sentence()
    )


def test_what_the_page_says_of_dense_models_beside_the_plan_is_what_their_runs_say():
    records, plan = kept.runs()
    by_rate = described.at_rates(records, plan)
    lows, highs = (
        [analysis.contrast(by_rate[rate], plan, asked_of(plan, method)) for rate in plan.rates]
        for method in ("kappa-low", "kappa-high")
    )
    assert 0 > lows[0].gain > lows[1].gain > lows[2].gain
    assert [low.effect_interval[1] < 0 for low in lows] == [False, False, True]
    assert highs[0].gain_interval[1] < 0
    for (kind, base, task), cell in by_rate[0.0003].items():
        assert not any(math.isfinite(sum(done.at)) for key, done in cell.items() if key[0] != "full")
        if kind == "dense":
            slow, fast = cell["full", None, 0].at, by_rate[0.003][kind, base, task]["kappa-low", 0.2, 0].at
            assert all(a < b < math.inf for a, b in zip(slow, fast, strict=True))


def test_what_the_page_says_of_draws_alone_is_what_their_runs_say():
    """Slopes, and by how much kappa differs among the draws of a base."""
    records, plan = kept.runs()
    shown = report.shown(records, plan)
    slopes = []
    for task in plan.tasks:
        free, held = (analysis.explain(shown, plan, "dense", task, ["random-types"], at) for at in (False, True))
        assert free is not None
        assert held is not None
        assert min(free.interval[0], held.interval[0]) > 0
        slopes.append(free.slope)
        free, held = (analysis.explain(shown, plan, "mixture", task, ["experts-random"], at) for at in (False, True))
        assert free is not None
        assert held is not None
        assert free.slope < 0
        assert held.interval[0] < 0 < held.interval[1]
    cells = [cell for (kind, _, task), cell in shown.items() if (kind, task) == ("dense", "catalogues-de")]
    drawn = [[done.said["log_kappa"] for key, done in cell.items() if key[0] == "random-types"] for cell in cells]
    width = float(np.mean([max(some) - min(some) for some in drawn]))
    assert 0.15 < width < 0.25
    assert 0.08 < slopes[0] * width < 0.12
    assert 0.2 < slopes[1] / slopes[0] < 0.3


def mean_at(shown: Any, task: str, method: str) -> Any:
    """Forgetting of a method of dense models at each target, in the mean over bases and draws."""
    cells = [cell for (kind, _, its_task), cell in shown.items() if (kind, its_task) == ("dense", task)]
    return np.mean([done.at for cell in cells for key, done in cell.items() if key[0] == method], axis=0)


def asked_of(plan: Plan, method: str) -> dict[str, Any]:
    return next(each for each in plan.analysis["comparisons"] if (each["kind"], each["method"]) == ("dense", method))


def test_what_the_page_says_of_the_layers_of_dense_selections_is_so(root):
    runs = [each for each in kept.runs()[0] if each["what"] == "run" and (each["kind"], each["lr"]) == ("dense", 0.003)]
    lowest = [
        each["selected"]["layers"] for each in runs if each["method"] == "kappa-low" and each["task"] == "headers"
    ]
    assert sum("1" not in layers for layers in lowest) == 7
    drawn = [each["selected"]["layers"] for each in runs if each["method"] == "random-types"]
    first = [np.mean([layers.get("0", 0.0) for layers in some]) for some in (lowest, drawn)]
    assert 1.7 < first[0] / first[1] < 2
    page = " ".join((root / "docs/evidence.md").read_text().split())
    assert "take nothing of the second layer in seven bases, and of the first nearly twice what the draws take" in page
