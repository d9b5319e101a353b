"""The page of a study of sentences: where methods stand among their random draws, by each measure of what is lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import analysis, report, single
from .journal import Journal
from .markdown import number, table
from .plan import Plan
from .sentences import MEASURES
from .study import JOURNAL

_READING = (
    "Behind: how many of the random draws lost less, or as much, by their ranks averaged over targets. More: what is "
    "lost beyond the mean of the draws, where all reach the target, and the same in standard deviations of the draws. "
    "There is one base, so this describes it, and nothing is tested."
)


def write(plan: Plan, folder: Path, out: Path) -> str:
    """Writes report.md, summary.json, compact.jsonl and the figures to ``out``, and returns the text."""
    records = list(Journal(folder / JOURNAL).records().values())
    counted = analysis.counts(records, plan)
    out.mkdir(parents=True, exist_ok=True)
    sections = [f"# {plan.name}", _answer(records, plan)]
    sections += ["Runs: " + ", ".join(f"{number} {name}" for name, number in counted.items()) + "."]
    summary: dict[str, Any] = {"plan": plan.digest(), "runs": counted}
    for measure in plan.analysis["measures"]:
        found = by_measure(records, plan, measure)
        stands = _standings(found, plan)
        summary[measure] = [asdict(one) for one, _ in stands]
        sections.append(f"## {MEASURES[measure].capitalize()}\n\n" + _table(stands))
    sections.append(_READING)
    found = by_measure(records, plan, plan.analysis["measures"][0])
    columns = {"new": "loss of the task", "accuracy": "accuracy"} | {name: MEASURES[name] for name in MEASURES}
    sections.append("## Methods after the longest budget\n\n" + report.methods_table(found, plan, columns))
    sections += [f"![{name}]({name}.png)" for name in report.frontiers(found, plan, out)]
    text = "\n\n".join(sections) + "\n"
    (out / "report.md").write_text(text)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    with (out / "compact.jsonl").open("w") as stream:
        for record in sorted(records, key=lambda record: str(record["id"])):
            stream.write(json.dumps(report.compact(record), separators=(",", ":")) + "\n")
    return text


def by_measure(
    records: list[dict[str, Any]], plan: Plan, measure: str
) -> dict[analysis.Cell, dict[analysis.Key, analysis.Outcome]]:
    """Outcomes in which that measure is what was forgotten."""
    changed = []
    for record in records:
        ends = {steps: end | {"forgotten": end[measure]} for steps, end in record.get("endpoints", {}).items()}
        changed.append(record | {"endpoints": ends})
    return analysis.outcomes([record for record in changed if record["what"] == "run"], plan)


def _standings(
    found: Mapping[analysis.Cell, Mapping[analysis.Key, analysis.Outcome]], plan: Plan
) -> list[tuple[single.Standing, str]]:
    asked = [plan.analysis["primary"], *plan.analysis["described"]]
    stands = [(single.standing(found, plan, each), each["draws"]) for each in asked]
    return [(one, draws) for one, draws in stands if one is not None]


def _table(stands: list[tuple[single.Standing, str]]) -> str:
    head = ["method", "among", "behind", "more", "deviations", "targets reached"]
    rows = [
        [
            one.method,
            draws,
            f"{one.behind} of {one.draws}",
            number(one.gain, 4),
            number(one.deviations, 2),
            f"{one.reached} of {one.targets}",
        ]
        for one, draws in stands
    ]
    return table(head, rows)


def _answer(records: list[dict[str, Any]], plan: Plan) -> str:
    """One sentence for each measure, of the primary comparison."""
    said = []
    for measure in plan.analysis["measures"]:
        one = single.standing(by_measure(records, plan, measure), plan, plan.analysis["primary"])
        if one is None:
            return "**This study is not complete: nothing here is a result.**"
        said.append(f"{MEASURES[measure]}: less than {one.draws - one.behind} of {one.draws} draws")
    method = plan.analysis["primary"]["method"]
    return f"**What {method} lost beside random selections of the same kind:** " + "; ".join(said) + "."
