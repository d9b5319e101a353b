"""The thresholds of the page take what Ranking.select() takes, for every value of every budget, and are as certain."""

import math
import random

import pytest
from make_entries import make_entry

from kappa_fast import OptionError, Ranking
from kappa_fast.report.thresholds import thresholds
from kappa_fast.results.scores import score_of


def a_ranking(rng: random.Random) -> Ranking:
    has_bounds, is_by_kappa = rng.random() < 0.4, rng.random() < 0.75
    entries = []
    for i in range(rng.randint(1, 14)):
        kappa, shape = round(10 + 4 * rng.random(), 1), (rng.choice([16, 16, 32, 64, 512]), 16)
        lower, upper = kappa - rng.choice([0, 0.1, 0.5]), kappa + rng.choice([0, 0.1, 0.5])
        status = rng.choices(["ok", "rank_deficient", "bounded"], [7, 1, 2 * has_bounds])[0]
        if status != "ok":
            kappa, upper = math.inf if status == "rank_deficient" else math.nan, math.inf
        score = kappa if is_by_kappa else round(5 * rng.random(), 1)
        numbers = {
            "kappa": kappa,
            "lower": lower,
            "upper": upper,
            "score": score,
        }
        entries.append(make_entry(f"h.{i}.w", status=status, shape=shape, numel=math.prod(shape), **numbers))
    return Ranking(entries, (), {"num_parameters": sum(entry.numel for entry in entries)})


def a_ranking_by_flatness(rng: random.Random) -> Ranking:
    """With intervals that overlap, matrices without kappa, and singular ones of which some are proven."""
    entries = []
    for i in range(rng.randint(1, 12)):
        flatness, shape = -round(rng.random(), 1) - 0.05, (rng.choice([16, 16, 32, 64]), 16)
        known = dict(flatness=flatness, flatness_by_shape=0.0)
        known |= dict(flatness_lower=flatness - rng.choice([0, 0.08]), flatness_upper=flatness + rng.choice([0, 0.05]))
        status = rng.choices(["scored", "rank_deficient", "ok"], [6, 1, 2])[0]
        if status == "rank_deficient":
            known |= dict(flatness=-math.inf, flatness_lower=-math.inf, lower=rng.choice([1e15, math.inf]))
        if status == "scored":
            known |= dict(kappa=math.nan, lower=1.0, upper=math.inf, score=0.0)
        numel = math.prod(shape)
        kappa = math.inf if status == "rank_deficient" else 5.0
        entries.append(make_entry(f"h.{i}.w", **{"kappa": kappa, **known}, status=status, shape=shape, numel=numel))
    whole = Ranking(entries, (), {"num_parameters": sum(entry.numel for entry in entries)})
    return whole.by(rng.choice(["flatness", "-flatness"]))


def outcome(ranking: Ranking, name: str, value: float) -> tuple[set[int], bool] | None:
    """What the script of the page does with a table; None where it says that the ranking is not resolved so far."""
    table = thresholds(ranking.entries, interrupted=False, score=score_of(ranking.metadata))[name]
    if table["beyond"] is not None and value >= table["beyond"]:
        return None
    chosen, end = set(), 0.0
    for i in table["order"] or range(table["number"]):
        entry = ranking[i]
        end = {"num_tensors": end + 1, "max_kappa": entry.kappa, "max_params": end + entry.numel}[name]
        if end > value:
            break
        chosen.add(i)
    return chosen, any(begin <= value and (end is None or value < end) for begin, end in table["certain"])


@pytest.mark.parametrize("name", ["num_tensors", "max_params"])
def test_thresholds_of_another_score_take_what_select_takes(name):
    rng, certain = random.Random(5), set()
    for _ in range(80):
        ranking = a_ranking_by_flatness(rng)
        values = range(1, len(ranking) + 2) if name == "num_tensors" else [256 * rng.randint(1, 12) for _ in range(9)]
        for value in values:
            try:
                selection = ranking.select(**{name: value})
            except OptionError:  # nothing fits
                continue
            expected = {i for i, entry in enumerate(ranking) if entry.key in selection}, selection.boundary_certain
            assert outcome(ranking, name, value) == expected, (name, value, ranking)
            certain.add(selection.boundary_certain)
        steps = thresholds(ranking.entries, interrupted=False, score=score_of(ranking.metadata))["max_kappa"]
        if any(entry.status == "scored" for entry in ranking):
            assert steps == {"number": 0, "order": None, "certain": [], "beyond": None}
    assert certain == {True, False}


@pytest.mark.parametrize("name", ["num_tensors", "max_kappa", "max_params"])
def test_thresholds_take_what_select_takes(name):
    rng = random.Random(7)
    verdicts = set()
    for _ in range(60):
        ranking = a_ranking(rng)
        limits = {x + step for e in ranking for x in (e.lower, e.kappa, e.upper) for step in (0, 0.05)}
        values = {
            "num_tensors": range(1, len(ranking) + 3),
            "max_kappa": sorted(x for x in limits if math.isfinite(x)),
            "max_params": [256 * rng.randint(1, 40) + rng.choice([-1, 0, 0]) for _ in range(20)],
        }
        for value in values[name]:
            found = outcome(ranking, name, value)
            try:
                selection = ranking.select(**{name: value})
                chosen = {i for i, entry in enumerate(ranking) if entry.key in selection.keys}
                expected = chosen, selection.boundary_certain
            except OptionError as error:
                expected = None if "beyond" in str(error) else "nothing"
            verdicts.add(expected[1] if isinstance(expected, tuple) else expected)
            assert ("nothing" if found is not None and not found[0] else found) == expected, (ranking, value)
    assert verdicts >= {True, False, None}


def test_no_cut_of_an_interrupted_ranking_is_certain():
    entries = a_ranking(random.Random(1)).entries
    assert all(not table["certain"] for table in thresholds(entries, interrupted=True).values())
