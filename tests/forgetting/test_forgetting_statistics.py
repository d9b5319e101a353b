"""The tests of the study of forgetting: right where the answer is known, and silent where there is nothing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from benchmarks.forgetting import analysis, described, statistics
from benchmarks.forgetting.plan import PLANS, Plan


def small_plan(bases: int = 8, draws: int = 12) -> Plan:
    """One task, two learning rates, one method and its draws, and another that is only tested besides."""
    return Plan(
        name="made up",
        pretraining={},
        bases={"mixture": list(range(bases))},
        training={"budgets": [10, 20]},
        tasks=["new"],
        rates=[0.1, 0.2],
        seeds=[0],
        methods={
            "low": {"recipe": {"select": {}}},
            "other": {"recipe": {"select": {"order": "highest"}}},
            "random": {"recipe": {"select": {"order": "random"}}, "draws": draws},
        },
        analysis={
            "budget": 20,
            "targets": {"new": [0.9, 0.7]},
            "primary": {"kind": "mixture", "method": "low", "draws": "random"},
            "comparisons": [{"kind": "mixture", "method": "other", "draws": "random"}],
            "regression": ["low", "random"],
            "resamples": 100,
        },
    )


def made_up(jobs: list[dict[str, Any]], chance: np.random.Generator, effect: float = 0.0) -> list[dict[str, Any]]:
    """Results in which bases differ, one learning rate is better, some do not get to a target and some fail.

    effect: what the method "low" forgets more than it would, in standard deviations of the draws.
    """
    of_base = {job["base"]: chance.normal() for job in jobs}
    of_selection: dict[tuple[Any, ...], float] = {}
    records = []
    for job in jobs:
        key = (job["base"], job["method"], job["draw"])
        skill = of_selection.setdefault(key, chance.normal())
        forgotten = math.exp(of_base[job["base"]] + 0.4 * (skill + effect * (job["method"] == "low")) + job["lr"])
        noise = chance.normal(size=2) * 0.05
        ends = {
            "10": {"new": 2.2 + noise[0], "validation": 2.2, "forgotten": forgotten / 2, "kl": 0.1},
            "20": {
                "new": 2.0 + 2 * noise[1] - job["lr"],
                "validation": 2.0 - job["lr"],
                "forgotten": forgotten,
                "kl": 0.2,
            },
        }
        said = {"log_kappa": float(chance.normal()), "layers": {"0": skill, "1": 1 - skill}}
        status = "failed" if chance.random() < 0.03 else "ok"
        found = {"status": status, "start": {"new": 2.8}, "endpoints": ends if status == "ok" else {}, "selected": said}
        records.append({**job, **found})
    return records


def p_values(studies: int, effect: float = 0.0) -> list[float]:
    plan, chance = small_plan(), np.random.default_rng(1)
    jobs = [job for job in plan.jobs() if job["what"] == "run"]
    asked = plan.analysis["primary"]
    return [
        analysis.contrast(analysis.outcomes(made_up(jobs, chance, effect), plan), plan, asked).p for _ in range(studies)
    ]


def test_p_values_of_200_studies_of_nothing_are_uniform():
    """Simulated results, not simulated training: from the choice of learning rates on it is the code of the study."""
    found = np.sort(p_values(200))
    places = np.arange(1, 201) / 200
    distance = max(np.max(places - found), np.max(found - places + 1 / 200))
    assert distance < 1.36 / math.sqrt(200) + 2 / 2**8  # Kolmogorov's bound at 5%, and the steps of the p-values
    assert 2 <= np.sum(found <= 0.05) <= 19  # 10 are expected: 99.9% of binomials


def test_an_effect_of_one_and_a_half_deviations_is_mostly_found_with_eight_bases():
    found = p_values(40, effect=-1.5)
    assert np.mean(np.array(found) < 0.05) > 0.7
    assert min(found) == 2 / 2**8


def test_sign_flips_are_all_changes_of_sign():
    effects = np.array([0.3, -0.1, 0.25, 0.4])
    sums = [
        abs(sum(s * e for s, e in zip(signs, effects, strict=True))) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert statistics.sign_flip(effects.tolist()) == np.mean(sums >= effects.sum() - 1e-12)
    assert statistics.sign_flip([0.1] * 8) == 2 / 2**8
    assert statistics.sign_flip([0.1, -0.1]) == 1.0
    assert statistics.sign_flip([0.2] * 20) < 0.001  # random changes of sign, the given one among them
    assert math.isnan(statistics.sign_flip([]))


def test_the_place_among_draws_takes_what_was_not_reached_for_the_worst():
    assert statistics.percentile(0.5, [1.0, 2.0, math.inf]) == 0.5 / 4
    assert statistics.percentile(math.inf, [1.0, 2.0, 3.0]) == 3.5 / 4
    assert statistics.percentile(math.inf, [math.inf] * 3) == 0.5
    places = [statistics.percentile(i, [j for j in range(13) if j != i]) for i in range(13)]
    assert np.allclose(np.mean(places), 0.5)


def test_holm_is_that_of_the_textbook():
    adjusted = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": math.nan})
    assert adjusted["d"] == pytest.approx(0.025)  # for five comparisons, also where one has no value yet
    assert adjusted["a"] == pytest.approx(0.04)
    assert adjusted["c"] == adjusted["b"] == pytest.approx(0.09)
    assert math.isnan(adjusted["e"])


def test_a_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    chance = np.random.default_rng(0)
    intervals = [statistics.bootstrap(chance.normal(1.0, 1.0, 20).tolist(), 400, seed) for seed in range(200)]
    assert 0.87 < np.mean([low <= 1.0 <= high for low, high in intervals]) <= 0.99
    assert statistics.bootstrap([1.0, math.nan, 1.0], 50) == (1.0, 1.0)


def test_the_regression_within_bases_finds_slopes_through_levels_of_bases():
    chance = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 13)
    factors = chance.normal(size=(104, 2))
    outcome = 10.0 * groups + factors @ [2.0, -1.0] + 0.01 * chance.normal(size=104)
    slopes, share = statistics.regression(outcome, factors, groups)
    assert np.allclose(slopes, [2.0, -1.0], atol=0.01)
    assert share > 0.99


def test_forgetting_at_a_target_lies_between_endpoints_and_never_beyond_them():
    path = [(3.0, 0.0), (2.0, 0.4), (1.5, 0.6)]
    assert analysis.forgotten_at(path, 2.5) == pytest.approx(0.2)
    assert analysis.forgotten_at(path, 1.75) == pytest.approx(0.5)
    assert analysis.forgotten_at(path, 1.4) == math.inf
    assert analysis.forgotten_at(path, 3.0) == 0.0


def test_each_method_counts_at_the_learning_rate_that_its_validation_chose():
    plan = small_plan()
    jobs = [job for job in plan.jobs() if job["what"] == "run" and job["base"] == 0 and job["method"] == "low"]
    records = made_up(jobs, np.random.default_rng(3))
    for record in records:
        record["status"] = "ok"
        record["endpoints"] = {"20": {"new": 2.0, "validation": record["lr"], "forgotten": 1.0}}
    ((done,),) = [cell.values() for cell in analysis.outcomes(records, plan).values()]
    assert done.rate == 0.1
    records[0]["endpoints"] = {"10": records[0]["endpoints"]["20"]}  # it diverged before the end
    ((done,),) = [cell.values() for cell in analysis.outcomes(records, plan).values()]
    assert done.rate == 0.2
    assert analysis.outcomes(records[:1], plan) == {}  # a method counts when all of its runs are there


def test_failed_runs_are_counted_and_are_the_worst():
    plan = small_plan()
    jobs = [job for job in plan.jobs() if job["what"] == "run"]
    records = made_up(jobs, np.random.default_rng(4))
    for record in records:
        record |= {"status": "failed", "endpoints": {}} if record["method"] == "low" else {"status": "ok"}
    counted = analysis.counts(records, plan)
    assert counted == {"planned": len(jobs), "failed": 16, "ok": len(jobs) - 16, "missing": 0}
    found = analysis.outcomes([r for r in records if r["status"] == "failed" or r["endpoints"]], plan)
    contrast = analysis.contrast(found, plan, plan.analysis["primary"])
    assert contrast.censored == contrast.compared > 0
    assert contrast.effect > 0.2


def test_the_study_can_find_what_it_tests():
    """Eight bases give no p-value below 2/256: more tests than this and Holm could never reject."""
    plan = Plan.read(PLANS / "study.json")
    assert all(len(seeds) >= 8 for seeds in plan.bases.values())
    assert len(plan.analysis["comparisons"]) * 2 / 2**8 < 0.05
    assert len(plan.rates) >= 3
    assert len(plan.training["budgets"]) >= 3
    assert plan.training["windows"] >= 200
    assert len(plan.tasks) >= 2
    assert sum(job["what"] == "run" for job in plan.jobs()) >= 1000
    for asked in [plan.analysis["primary"], *plan.analysis["comparisons"], *plan.analysis["described"]]:
        method, draws = plan.methods[asked["method"]], plan.methods[asked["draws"]]
        assert asked.get("fraction") in method.get("fractions", [None])
        assert asked.get("draws_fraction", asked.get("fraction")) in draws.get("fractions", [None])
        assert all(asked["kind"] in m.get("kinds", [asked["kind"]]) for m in (method, draws))
    assert plan.methods[plan.analysis["primary"]["draws"]]["draws"] >= 12


def test_among_draws_the_slope_of_kappa_is_told_from_that_of_the_loss():
    """What a lower kappa forgets directly, and what it forgets because it has learned more."""
    plan, chance, found = small_plan(), np.random.default_rng(0), {}
    for base in range(8):
        cell = {}
        for draw in range(12):
            share, kappa = chance.random(), chance.normal(3)
            loss = 2.0 + 0.1 * kappa + 0.2 * share + 0.3 * chance.normal()
            ends = {"forgotten": base + 0.5 * kappa - 1.5 * loss + 0.7 * share, "new": loss}
            said = {"log_kappa": kappa, "layers": {"0": share, "1": 1 - share}}
            for method, of in (("random", draw), ("other", draw + 20)):
                end = ends if method == "random" else ends | {"forgotten": 0.0}
                cell[method, None, of] = analysis.Outcome(0.1, (), (), "ok", end, said)
        found["mixture", base, "new"] = cell
    free, held = (analysis.explain(found, plan, "mixture", "new", ["random"], at) for at in (False, True))
    assert free.selections == held.selections == 96
    assert free.interval[0] < 0.35 < free.interval[1]  # 0.5 less 1.5 times the 0.1 by which the loss follows
    assert held.slope == pytest.approx(0.5)
    assert held.interval == pytest.approx((0.5, 0.5))
    plan = Plan(**{**vars(plan), "analysis": {**plan.analysis, "regression": ["low", "random"]}})
    said = described._draws_table(found, plan)
    assert "| mixture | new | random | 96 |" in said
    assert "| 0.5000 | 0.500 to 0.500 |" in said
    assert "| low |" not in said


@pytest.mark.parametrize(("selections", "told"), [(2, False), (4, True)])
def test_layers_explain_nothing_where_they_are_as_many_as_what_they_explain(selections, told):
    """Each base has a mean of its own and each layer a slope: two selections of eight bases leave nothing over."""
    plan = small_plan()
    plan = Plan(**{**vars(plan), "analysis": {**plan.analysis, "regression": ["random"]}})
    chance = np.random.default_rng(0)
    found = {}
    for base in range(8):
        cell = {}
        for draw in range(selections):
            shares = dict(zip("01234567", chance.dirichlet(np.ones(8)).tolist(), strict=True))
            said = {"log_kappa": chance.normal(3), "layers": shares}
            cell["random", None, draw] = analysis.Outcome(0.1, (), (), "ok", {"forgotten": chance.normal()}, said)
        found["mixture", base, "new"] = cell
    one = analysis.explain(found, plan, "mixture", "new")
    assert (one is not None) == told
    if one is not None:
        assert one.selections == 32
        assert one.by_layers < 0.9
