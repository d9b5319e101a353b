"""The page on a model of one's own: the answer in its first paragraph, then what was planned, tables and figures."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from . import analysis, own, report, single
from .journal import Journal
from .markdown import number, table
from .plan import Plan
from .study import JOURNAL

_READING = (
    "Behind: how many of the draws forgot less, or as much, by their ranks averaged over texts and targets. p: how "
    "often a draw would stand there or better, one-sided. Nats: forgetting less the mean of the draws, where all reach "
    "the target; deviations: the same in standard deviations of the draws."
)


def write(plan: Plan, question: own.Question, folder: Path, out: Path) -> Path:
    """Writes report.md, summary.json, compact.jsonl and the figures to ``out``; returns the page."""
    records = list(Journal(folder / JOURNAL).records().values())
    found = analysis.outcomes(records, plan)
    counted = analysis.counts(records, plan)
    main = single.standing(found, plan, plan.analysis["primary"])
    others = [one for asked in plan.analysis["described"] if (one := single.standing(found, plan, asked)) is not None]
    out.mkdir(parents=True, exist_ok=True)
    sections = [
        f"# Does it forget less? {plan.name}",
        answer(main, others, question),
        "Runs: " + ", ".join(f"{number} {name}" for name, number in counted.items()) + ".",
        "## What was planned, before anything was compared\n\n" + (folder / "beforehand.txt").read_text().rstrip(),
        "## Among the random draws\n\n" + _standings([one for one in (main, *others) if one]) + "\n\n" + _READING,
        "## Methods\n\n" + report.methods_table(found, plan),
        _edges(report.edges(found, plan)),
        *(f"![{name}]({name}.png)" for name in report.frontiers(found, plan, out)),
    ]
    page = out / "report.md"
    page.write_text("\n\n".join(section for section in sections if section) + "\n")
    summary = {"plan": plan.digest(), "runs": counted, "primary": main and asdict(main)}
    (out / "summary.json").write_text(
        json.dumps(summary | {"described": [asdict(one) for one in others]}, indent=1) + "\n"
    )
    with (out / "compact.jsonl").open("w") as stream:
        for record in sorted(records, key=lambda record: str(record["id"])):
            stream.write(json.dumps(report.compact(record), separators=(",", ":")) + "\n")
    return page


def answer(main: single.Standing | None, others: list[single.Standing], question: own.Question) -> str:
    """The first paragraph."""
    if main is None:
        return "**There is no answer yet: runs are missing.** The same command goes on where it stopped."
    behind, draws = main.behind, main.draws
    place = (
        f"training the {question.share:.0%} with the lowest kappa forgot less than {draws - behind} of {draws} random "
        f"selections of the same kind (p = {main.p:.3f}, one-sided; with {draws} draws it cannot be below "
        f"{single.smallest_p(draws):.3f})"
    )
    if main.reached == 0:
        verdict = "**No answer: the lowest kappa reached none of its targets on the new text.**"
    elif main.p <= single.LEVEL:
        verdict = "**Yes, on this model and these texts.**"
    elif (1 + draws - behind) / (1 + draws) <= single.LEVEL:
        verdict = "**No: on this model and these texts it forgot more than others.**"
    else:
        verdict = "**Not to be told from chance on this model and these texts.**"
    size = ""
    if math.isfinite(main.gain):
        less = "less" if main.gain < 0 else "more"
        deviations = f", {abs(main.deviations):.1f} standard deviations" if math.isfinite(main.deviations) else ""
        size = f" It forgot {abs(main.gain):.4f} nats per token {less} than their mean{deviations}."
    least = min(others, key=lambda one: one.behind, default=None)
    beside = ""
    if least is not None:
        beside = f" Of the others {least.method} forgot least: {least.behind} of {draws} draws stand before it."
    return f"{verdict} Here {place}.{size}{beside} One model is one case, and says nothing of others."


def _standings(found: list[single.Standing]) -> str:
    head = ["method", "behind", "p", "nats", "deviations", "targets reached"]
    rows = [
        [
            one.method,
            f"{one.behind} of {one.draws}",
            f"{one.p:.3f}",
            number(one.gain, 4),
            number(one.deviations, 2),
            f"{one.reached} of {one.targets}",
        ]
        for one in found
    ]
    return table(head, rows)


def _edges(said: str) -> str:
    return said and f"{said} Give --rates that go further, in another folder."
