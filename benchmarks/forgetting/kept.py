"""What the documents show of the study: runs in benchmarks/results/, figures in docs/, and the text made from them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import record as provenance

from . import analysis, bases, report, usage
from .journal import Journal
from .markdown import interval, number, table
from .plan import PLANS, Plan
from .study import JOURNAL

ROOT = Path(__file__).resolve().parents[2]
RUNS, DOCUMENT = "forgetting.jsonl", "forgetting.json"


def keep(plan: Plan, folder: Path, results: Path = provenance.RESULTS, docs: Path = ROOT / "docs") -> list[Path]:
    """Writes the compact runs of a plan, what they come to, and the figures; returns the files.

    Raises:
        ValueError: runs of the primary comparison are missing.
    """
    wanted = {job["id"] for job in plan.jobs()}
    whole = [each for each in Journal(folder / JOURNAL).records().values() if each["id"] in wanted]
    records = [report.compact(each) for each in whole]  # what is said is what these say, to the last digit
    found = report.shown(records, plan)
    compared = analysis.contrasts(found, plan)
    if not compared.primary.complete:
        raise ValueError(f"{folder}: runs of the primary comparison are missing; --status counts them")
    report.write_compact(records, results / RUNS)
    provenance.write(results / DOCUMENT, report.rows(records, plan))
    document = json.loads((results / DOCUMENT).read_text())
    commits = Counter(each["commit"] for each in records if "commit" in each)
    versions = next(each["versions"] for each in whole if "versions" in each)
    document |= {"versions": versions, "commit": commits.most_common(1)[0][0], "commits": dict(commits)}
    if (folder / f"{bases.base_name('mixture', 0)}.safetensors").exists():
        document["usage"] = usage.usage(plan, folder)
    document |= {"clean": all(each.get("clean") for each in whole), "plan": plan.digest()}
    (results / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")
    drawn = report.figures(found, records, plan, docs, "forgetting-")
    return [results / RUNS, results / DOCUMENT, *(docs / f"{name}.png" for name in drawn)]


def runs(results: Path = provenance.RESULTS) -> tuple[list[dict[str, Any]], Plan]:
    """The runs that are kept, and the plan of the study."""
    records = [json.loads(line) for line in (results / RUNS).read_text().splitlines()]
    return records, Plan.read(PLANS / "study.json")


def sentence() -> str:
    """The answer of the primary comparison, for README.md."""
    records, plan = runs()
    one = _primary(records, plan)
    told = "forgot less than" if one.effect < 0 else "forgot more than"
    verdict = told if one.p <= report.LEVEL else "could not be told by what it forgot from"
    return (
        f"In a first study, on {len(one.bases)} small mixtures of experts, training the quarter of the experts with "
        f"the lowest kappa {verdict} training random experts of the same layers and types (p = {one.p:.3g})."
    )


def answer() -> str:
    """The first paragraph of docs/evidence.md."""
    records, plan = runs()
    one = _primary(records, plan)
    counted = analysis.counts(records, plan)
    bad = sum(number for name, number in counted.items() if name not in ("planned", "missing", "ok"))
    done = counted["planned"] - counted["missing"]
    return (
        f"**{sentence()}** {report.sizes(one)} {done:,} of {counted['planned']:,} planned runs are done; "
        f"{bad or 'none'} of them failed or diverged."
    )


def tables() -> str:
    """The tables of docs/evidence.md."""
    records, plan = runs()
    found: list[dict[str, Any]] = json.loads((provenance.RESULTS / DOCUMENT).read_text()).get("usage", [])
    if not found:  # the bases were not beside the journal
        return "\n\n".join(report.tables(records, plan, "###"))
    rows = [
        [each["text"], each["type"], number(each["mean"], 2), interval(*each["interval"], digits=2)] for each in found
    ]
    used = "### Kappa of experts and their share of the tokens\n\n" + table(
        ["text", "matrices", "Spearman's correlation", "95%"], rows
    )
    return "\n\n".join([*report.tables(records, plan, "###"), used])


def _primary(records: list[dict[str, Any]], plan: Plan) -> analysis.Contrast:
    return analysis.contrast(report.shown(records, plan), plan, plan.analysis["primary"])
