"""A plan as data: bases x tasks x methods x fractions x learning rates x seeds, and how the results are to be read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLANS = Path(__file__).parent / "plans"


@dataclass(frozen=True)
class Plan:
    """What a plan file says.

    Attributes:
        name: of the study.
        pretraining: corpus, steps, length, size, lr, windows; or the model that is there already.
        bases: seeds by kind.
        training: corpus (what is to be kept), budgets, warm, size, length, windows, validation.
        tasks: corpora to learn.
        rates: learning rates for each method.
        seeds: orders of batches for each base.
        methods: by name: recipe (methods.py), kinds, and fractions, draws, rates and stage where not the usual.
        analysis: targets, budget, comparisons, exclusions (analysis.py).
    """

    name: str
    pretraining: dict[str, Any]
    bases: dict[str, list[int]]
    training: dict[str, Any]
    tasks: list[str]
    rates: list[float]
    seeds: list[int]
    methods: dict[str, dict[str, Any]]
    analysis: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> Plan:
        """Raises TypeError for a name that is none, KeyError for a method without a recipe."""
        plan = cls(**json.loads(file.read_text()))
        for name, method in plan.methods.items():
            unknown = set(method) - {"recipe", "kinds", "fractions", "draws", "rates", "stage"}
            if unknown or "recipe" not in method:
                raise KeyError(f"{file}: the method {name!r} has {sorted(unknown)} or no recipe")
        return plan

    def digest(self) -> str:
        """Of all that it says, 16 digits."""
        return _digest(vars(self), 16)

    def jobs(self) -> list[dict[str, Any]]:
        """Everything to do, in order; each base comes before the first run that needs it.

        It goes stage by stage, method by method and base by base: what has run on all bases can be told first.
        """
        order = {name: i for i, name in enumerate(self.methods)}
        runs = sorted(self._runs(), key=lambda job: (job["stage"], order[job["method"]], job["place"]))
        bases = {job["id"]: job for job in self._bases()}
        found = []
        for job in runs:
            if job["needs"] in bases:
                found.append(bases.pop(job["needs"]))
            del job["place"]
            found.append(job)
        return [*found, *bases.values()]

    def _bases(self) -> Iterator[dict[str, Any]]:
        for kind, seeds in self.bases.items():
            for seed in seeds:
                yield self._base(kind, seed)

    def _base(self, kind: str, seed: int) -> dict[str, Any]:
        job = {"what": "base", "kind": kind, "base": seed}
        return {"id": _digest([job, self.pretraining]), **job}

    def _runs(self) -> Iterator[dict[str, Any]]:
        for kind, seeds in self.bases.items():
            for place, base in enumerate(seeds):
                needs = self._base(kind, base)["id"]
                for name, method in self.methods.items():
                    if kind in method.get("kinds", [kind]):
                        for job in self._of_method(name, method):
                            job = {"what": "run", "kind": kind, "base": base, "needs": needs} | job
                            told = {key: value for key, value in job.items() if key not in ("stage", "method")}
                            yield {"id": _digest([told, self.training]), **job, "place": place}

    def _of_method(self, name: str, method: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for task in self.tasks:
            for fraction in method.get("fractions", [None]):
                for draw in numbers(method.get("draws", 1)):
                    for rate in method.get("rates", self.rates):
                        for seed in self.seeds:
                            yield {
                                "task": task,
                                "method": name,
                                "recipe": method["recipe"],
                                "fraction": fraction,
                                "draw": draw,
                                "lr": rate,
                                "seed": seed,
                                "stage": method.get("stage", 1),
                            }


def numbers(draws: int | list[int]) -> list[int]:
    """Of draws, which a method has by how many or by which."""
    return list(range(draws)) if isinstance(draws, int) else draws


def _digest(value: Any, digits: int = 12) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]
