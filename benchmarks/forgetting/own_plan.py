"""What a budget of time carries for one model, and what it will be able to tell, before anything is compared."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kappa_fast import OptionError, Ranking

from . import bases, own, scores, single
from .journal import Journal
from .plan import Plan
from .study import JOURNAL, go_on

DRAWS = (99, 59, 39, 19, 9, 4)  # random selections; from 19 on a p-value can be as small as 5%
ENOUGH = 19
FEWEST_DISTINCT = 5
ENOUGH_DISTINCT = 90  # of 99 draws: there are so many that two seldom are the same
LEAST_IN_CELL = 4  # experts of one layer and type, from which on they are compared with each other
MARGIN = 1.15  # over the time of the pilot: several runs at once slow each other down
PILOT = 1_000_000  # the number of its draw: none that is compared
LEARNED = 0.005  # of the loss on the new text: a pilot that gains less shows no target
TARGETS = (0.5, 0.7, 0.9)  # of the pilot's gain on the validation text
CONTROLS = ("kappa-high", "full", "lora-all", "first-layers", "last-layers")  # in the order of their worth


@dataclass(frozen=True)
class Offer:
    """One comparison: how many tasks, learning rates, random draws, and controls besides."""

    tasks: int
    rates: int
    draws: int
    controls: int

    @property
    def runs(self) -> int:
        return self.tasks * self.rates * (1 + self.draws + self.controls)

    @property
    def worth(self) -> tuple[int, ...]:
        """What counts first: enough draws to tell anything, learning rates for each, the other end, all tasks."""
        some = min(self.controls, 1)
        return min(self.draws, ENOUGH), self.rates, some, self.tasks, self.controls, self.draws


@dataclass(frozen=True)
class Made:
    """A plan and what is said of it."""

    plan: Plan
    words: str

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self.plan))


def offers(tasks: int, rates: int, draws: int) -> Iterator[Offer]:
    """All that could be done; at least two learning rates, unless only one is given."""
    for t, r, d, c in itertools.product(range(1, tasks + 1), range(1, rates + 1), DRAWS, range(len(CONTROLS) + 1)):
        if r >= min(2, rates) and d <= draws:
            yield Offer(t, r, d, c)


def best(budget: float, seconds: float, workers: int, tasks: int, rates: int, draws: int) -> Offer:
    """The offer that is worth most within the budget.

    Args:
        budget: seconds of the clock.  seconds: of one run.  draws: how many different ones there are at most.

    Raises:
        OwnError: not even the smallest fits, or there are too few different draws.
    """
    every = list(offers(tasks, rates, draws))
    if not every:
        raise own.OwnError(f"{draws} random selections are too few: a comparison has at least {min(DRAWS)}")
    fitting = [offer for offer in every if time_of(offer, seconds, workers) <= budget]
    if not fitting:
        least = min(every, key=lambda offer: offer.runs)
        raise own.OwnError(
            f"{words_of(budget)} are too little for any comparison: one run takes {words_of(seconds)}, and the "
            f"smallest has {least.runs} of them. Give {words_of(time_of(least, seconds, workers))} or more, a smaller "
            "--steps, or a smaller model"
        )
    return max(fitting, key=lambda offer: offer.worth)


def time_of(offer: Offer, seconds: float, workers: int) -> float:
    """Seconds of the clock that an offer takes."""
    return math.ceil(offer.runs / workers) * seconds * MARGIN


def words_of(seconds: float) -> str:
    """A time as people say it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def make(
    question: own.Question,
    settings: Mapping[str, Any],
    budget: float,
    folder: Path,
    workers: int,
    say: Callable[[str], None],
) -> Made:
    """Times a run of each task, and plans.

    Raises:
        OwnError: the budget or the model allows no comparison, or the pilot learned nothing.
    """
    started = time.monotonic()
    torch.set_num_threads(1)  # runs are forked from this process
    model = own.load({"model": question.model}, 0)
    ranking = scores.rank(model)
    way = _way(ranking, question)
    distinct = _distinct(ranking, way, question.share)
    most = min(distinct, question.draws)
    rates = sorted(question.rates)
    middle = rates[len(rates) // 2]
    pilot = _plan(question, settings, list(question.learn), way, [middle], {})
    say(f"a pilot at the learning rate {middle:g}, on {', '.join(pilot.tasks)}")
    go_on(pilot, folder, 1, lambda line: None)
    records = Journal(folder / JOURNAL).records().values()
    seconds, targets = _seen(records, pilot)
    left = budget - (time.monotonic() - started)
    offer = best(left, seconds, workers, len(targets), len(rates), most)
    chosen = rates[-offer.rates :] if offer.rates < len(rates) else rates
    tasks = list(targets)[: offer.tasks]
    plan = _plan(question, settings, tasks, way, chosen, targets, offer)
    return Made(plan, words(question, plan, offer, way, seconds, workers, distinct))


def _way(ranking: Ranking, question: own.Question) -> dict[str, Any]:
    """Recipes of the lowest, the highest and the random: experts among experts of their layer, or matrices.

    Draws of matrices match types and layers where that leaves enough of them, else types.
    """
    cells: dict[tuple[int | None, str], int] = {}
    for entry in ranking:
        if "experts" in entry.group:
            cells[entry.layer, bases.type_of(entry)] = cells.get((entry.layer, bases.type_of(entry)), 0) + 1
    share = f"{question.share:.0%}"
    if cells and min(cells.values()) >= LEAST_IN_CELL:
        return _recipes({"top_p": "fraction"}, {"include": "experts", "within": "cells"}, ()) | {
            "said": f"experts, {share} of those of every layer and type",
            "like": "random experts of the same layers and types",
            "caution": "",
        }
    select: dict[str, Any] = {"max_params": "fraction", "fill": True}
    said = f"matrices, up to {share} of the weights"
    way = _recipes(select, {}, ("margins",)) | {
        "said": said,
        "like": "random matrices, as many of each type and in each layer",
        "caution": "",
    }
    try:
        if _different(ranking, way, question.share) >= ENOUGH_DISTINCT:
            return way
    except OptionError:
        pass  # the draws by type say what is wrong, if that is not the margins
    return _recipes(select, {}, ("type",)) | {
        "said": said,
        "like": "random matrices of the same types and sizes",
        "caution": "Draws lie in other layers than the lowest, so that depth may be what makes a difference.",
    }


def _recipes(select: dict[str, Any], common: dict[str, Any], match: tuple[str, ...]) -> dict[str, Any]:
    drawn = {"order": "random"} | ({"match": list(match)} if match else {})
    return {
        "low": {"select": select, **common},
        "high": {"select": select | {"order": "highest"}, **common},
        "random": {"select": select | drawn, **common},
    }


def _distinct(ranking: Ranking, way: Mapping[str, Any], share: float) -> int:
    """How many different draws a hundred seeds give, beside the lowest themselves.

    Raises:
        OwnError: nothing can be selected, or too few selections are possible.
    """
    try:
        different = _different(ranking, way, share)
    except OptionError as error:
        raise own.OwnError(f"this model has no comparison at this --share: {error}") from error
    if different < FEWEST_DISTINCT:
        raise own.OwnError(
            f"this model has {different} random selections like the lowest that differ from them, and "
            f"{FEWEST_DISTINCT} are the least: give another --share"
        )
    return different if different < ENOUGH_DISTINCT else max(DRAWS)


def _different(ranking: Ranking, way: Mapping[str, Any], share: float) -> int:
    """Raises OptionError where nothing can be selected."""
    from .methods import pick

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        low = {pick(ranking, way["low"], share, 0).keys}
        drawn = {pick(ranking, way["random"], share, bases.hash_of("draw", 0, i) % 2**31).keys for i in range(99)}
    return len(drawn - low)


def _seen(records: Any, pilot: Plan) -> tuple[float, dict[str, list[float]]]:
    """Seconds of a run, and the targets of each task as shares of the loss of the base.

    They come from a random selection that is compared with nothing, and from its loss on the validation text.
    """
    jobs = {job["id"] for job in pilot.jobs() if job["what"] == "run"}
    records = list(records)
    runs = {record["task"]: record for record in records if record["id"] in jobs}
    failed = next((record["error"] for record in records if record["what"] == "base" and record["status"] != "ok"), "")
    seconds, targets = 0.0, {}
    for task in pilot.tasks:
        run = runs.get(task)
        if run is None or run["status"] != "ok":
            error = (run or {}).get("error") or failed or "it diverged"
            raise own.OwnError(f"the pilot on {task} has failed: {error.strip().splitlines()[-1]}")
        before, after = run["start"]["validation"], list(run["endpoints"].values())[-1]["validation"]
        gain = 1 - after / before
        if gain < LEARNED:
            raise own.OwnError(
                f"the pilot on {task} learned nothing (the loss went from {before:.3f} to {after:.3f}): give more "
                "--steps, higher --rates, or a text that the model does not know yet"
            )
        targets[task] = [float(f"{1 - part * gain:.4g}") for part in TARGETS]
        seconds = max(seconds, run["seconds"]["wall"])
    return seconds, targets


def _plan(
    question: own.Question,
    settings: Mapping[str, Any],
    tasks: list[str],
    way: Mapping[str, Any],
    rates: list[float],
    targets: Mapping[str, list[float]],
    offer: Offer | None = None,
) -> Plan:
    """Without an offer: the pilot alone."""
    fractions = [question.share]
    methods: dict[str, dict[str, Any]] = {}
    described = []
    if offer is None:
        methods["pilot"] = {"recipe": way["random"], "fractions": fractions, "draws": [PILOT]}
    else:
        methods["kappa-low"] = {"recipe": way["low"], "fractions": fractions}
        methods["random"] = {"recipe": way["random"], "fractions": fractions, "draws": offer.draws}
        for name in CONTROLS[: offer.controls]:
            recipe, fraction = _control(name, way, question.share)
            methods[name] = {"recipe": recipe} | ({"fractions": [fraction]} if fraction else {})
            described.append(_against(name, question.share) | {"fraction": fraction})
    return Plan(
        name=f"{question.model}: {', '.join(tasks)}",
        pretraining={"model": question.model},
        bases={own.KIND: [0]},
        training=dict(settings),
        tasks=tasks,
        rates=rates,
        seeds=[0],
        methods=methods,
        analysis={
            "budget": settings["budgets"][-1],
            "targets": {task: targets[task] for task in tasks} if targets else {},
            "primary": _against("kappa-low", question.share) | {"fraction": question.share},
            "comparisons": [],
            "described": described,
            "resamples": 100,
            "exclusions": "none: failed and diverged runs and targets that are not reached share the last rank",
        },
    )


def _against(method: str, share: float) -> dict[str, Any]:
    return {"kind": own.KIND, "method": method, "draws": "random", "draws_fraction": share}


def _control(name: str, way: Mapping[str, Any], share: float) -> tuple[dict[str, Any], float | None]:
    whole: dict[str, Any] = {"max_params": "fraction", "fill": True}
    if name == "kappa-high":
        return way["high"], share
    if name == "full":
        return {"train": "all"}, None
    if name == "lora-all":
        return {"lora": {"r": 8, "lora_alpha": 16}, "select": {"top_p": 1.0}}, None
    order = {"order": "highest"} if name == "last-layers" else {}
    return {"select": whole | order, "score": "depth"}, share


def words(
    question: own.Question,
    plan: Plan,
    offer: Offer,
    way: Mapping[str, Any],
    seconds: float,
    workers: int,
    distinct: int,
) -> str:
    """The plan in sentences, with what it can tell and what not."""
    others = [name for name in plan.methods if name not in ("kappa-low", "random")]
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    left = [task for task in question.learn if task not in plan.tasks]
    effect = single.detectable(offer.draws)
    lines = [
        f"Compared: {way['said']}; those with the lowest kappa against {offer.draws} draws of {way['like']}"
        + (f"; besides {', '.join(others)}." if others else "."),
        f"On {', '.join(plan.tasks)}, {plan.training['budgets'][-1]} steps of {plan.training['size']} pieces of "
        f"{plan.training['length']} tokens, at the learning rates {rates}, one order of batches: {offer.runs} runs.",
        f"A run takes {words_of(seconds)}, so with {workers} at once {words_of(time_of(offer, seconds, workers))}.",
        f"With {offer.draws} draws the smallest p-value is 1/{offer.draws + 1} = {single.smallest_p(offer.draws):.3f}.",
    ]
    if math.isfinite(effect):
        lines.append(
            f"At a level of {single.LEVEL:.0%} it finds, four times in five, a kappa-lowest selection that forgets "
            f"{effect:.1f} standard deviations of the draws less. A smaller effect is a place among draws, no proof."
        )
    else:
        lines.append(
            f"No effect of any size can be told from chance at {single.LEVEL:.0%}: that takes {ENOUGH} draws. It will "
            "say where the lowest stand among the draws, and nothing more."
        )
    if distinct < max(DRAWS):
        lines.append(f"There are about {distinct} different draws of this kind.")
    if way["caution"]:
        lines.append(way["caution"])
    if left:
        lines.append(f"The budget does not carry {', '.join(left)}.")
    lines.append(
        "One model is one case: what is found holds for this model, these texts and these settings. Whether low kappa "
        "protects in general is a question to many models."
    )
    return "\n".join(lines)
