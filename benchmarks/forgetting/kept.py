"""What the documents show of the study: runs in benchmarks/results/, figures in docs/, and the text made from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record as provenance

from . import analysis, described, report, usage
from .journal import Journal
from .markdown import interval, number, table
from .plan import PLANS, Plan
from .study import JOURNAL
from .weights import base_name, file_of

ROOT = Path(__file__).resolve().parents[2]
RUNS, DOCUMENT = "forgetting.jsonl", "forgetting.json"
DENSE = "dense: kappa-low 20% against random-types"
FURTHER = "margins"  # the plan that asks more of bases of the study


def files_of(plan: Plan) -> tuple[str, str]:
    """Names of the runs and of the document that are published of a plan."""
    return (f"forgetting-{FURTHER}.jsonl", f"forgetting-{FURTHER}.json") if plan.name == FURTHER else (RUNS, DOCUMENT)


def keep(plan: Plan, folder: Path, results: Path = provenance.RESULTS, docs: Path = ROOT / "docs") -> list[Path]:
    """Writes the compact runs of a plan, what they come to, and the figures of the study; returns the files.

    Runs that were published before and are not in the journal of ``folder`` stay, with what was said of their bases.
    What the further plan shares with the study is not written again.

    Raises:
        ValueError: runs of the primary comparison are missing; a base or a text is another one than before; or what is
            published is of another plan.
    """
    runs_file, document_file = (results / name for name in files_of(plan))
    shared = Journal(results / RUNS).records() if plan.name == FURTHER else {}
    before = _document(document_file)
    wanted = {job["id"] for job in plan.jobs()}
    there = [each for each in Journal(folder / JOURNAL).records().values() if each["id"] in wanted]
    whole = [each for each in there if each["id"] not in shared]
    new = {each["id"]: report.compact(each) for each in there}  # what is said is what these say, to the last digit
    kept = Journal(runs_file).records() if before else {}
    if lost := kept.keys() - wanted:
        raise ValueError(
            f"{runs_file}: has {len(lost)} results that {plan.name!r} does not plan and that would be lost"
        )
    old = shared | kept
    _same_bases(old, new)
    records = [each for key, each in (old | new | shared).items() if key in wanted]
    own = [each for each in records if each["id"] not in shared]
    _same_texts(records)
    found = report.shown(records, plan)
    compared = analysis.contrasts(found, plan)
    if not compared.primary.complete:
        raise ValueError(f"{folder}: runs of the primary comparison are missing; --status counts them")
    report.write_compact(own, runs_file)
    provenance.write(document_file, report.rows(records, plan))
    document = _document(document_file) | _origin(own, whole, before) | {"plan": plan.digest()}
    drawn = []
    if plan.name != FURTHER:
        if all(file_of("mixture", seed, folder).exists() for seed in plan.bases["mixture"]):
            document["usage"] = usage.usage(plan, folder)
        elif "usage" in before:
            document["usage"] = before["usage"]
        drawn = report.figures(found, records, plan, docs, "forgetting-")
    document_file.write_text(json.dumps(document, indent=1) + "\n")
    return [runs_file, document_file, *(docs / f"{name}.png" for name in drawn)]


def _origin(
    records: Iterable[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Commits and versions of all runs, of which ``whole`` are not compact; and whether nothing was changed in them."""
    commits = Counter(each["commit"] for each in records if "commit" in each)
    versions = [each["versions"] for each in whole if "versions" in each]
    return {
        "versions": versions[0] if versions else before["versions"],
        "commit": commits.most_common(1)[0][0],
        "commits": dict(commits),
        "clean": all(each.get("clean") for each in whole) and before.get("clean", True),
    }


def _document(file: Path) -> dict[str, Any]:
    """What was published; empty before the first time."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _same_bases(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> None:
    for key, each in new.items():
        if each["what"] == "base" and each.get("weights") != old.get(key, each).get("weights"):
            name = base_name(each["kind"], each["base"])
            raise ValueError(f"{name}: has other weights than the runs that are published; they cannot be put together")


def _same_texts(records: Iterable[Mapping[str, Any]]) -> None:
    """Of the runs of a kind."""
    seen: dict[tuple[str, str], str] = {}
    for each in records:
        for name, digest in each.get("corpora", {}).items():
            if seen.setdefault((each["kind"], name), digest) != digest:
                raise ValueError(
                    f"{each['kind']}: runs have two texts {name}, with the hashes {seen[each['kind'], name]} and "
                    f"{digest}; they cannot be put together"
                )


def runs(results: Path = provenance.RESULTS) -> tuple[list[dict[str, Any]], Plan]:
    """The runs that are kept, and the plan of the study."""
    return list(Journal(results / RUNS).records().values()), Plan.read(PLANS / "study.json")


def further_runs(results: Path = provenance.RESULTS) -> tuple[list[dict[str, Any]], Plan]:
    """The runs of the further plan, with those that it shares with the study."""
    plan = Plan.read(PLANS / f"{FURTHER}.json")
    wanted = {job["id"] for job in plan.jobs()}
    records = Journal(results / RUNS).records() | Journal(results / files_of(plan)[0]).records()
    return [each for each in records.values() if each["id"] in wanted], plan


def sentence() -> str:
    """The answer of the primary comparison, and that of dense models when it is there, for README.md."""
    records, plan = runs()
    one = _primary(records, plan)
    said = (
        f"In a first study, on {len(one.bases)} small mixtures of experts, training the quarter of the experts with "
        f"the lowest kappa {_verdict(one, one.p)} training random experts of the same layers and types "
        f"({_most(one)}, p = {one.p:.3g})"
    )
    compared = analysis.contrasts(report.shown(records, plan), plan)
    dense = next(each for each in compared.tested if each.name == DENSE)
    if not dense.complete:
        return said + "."
    p = compared.adjusted[dense.name]
    said = (
        f"{said}. On {len(dense.bases)} small dense models training the fifth of the weights with the lowest kappa "
        f"{_verdict(dense, p)} training random matrices of the same types ({_most(dense)}, p = {dense.p:.3g}, and "
        f"{p:.2g} by Holm with {len(compared.tested)} comparisons)."
    )
    asked = _further()
    if not asked.complete:
        return said
    return (
        f"{said} It {_verdict(asked, asked.p)} random matrices with as many of each type and in each layer "
        f"({_most(asked)}, p = {asked.p:.2g}), in a test of the same dense models that was planned after the former "
        "was seen."
    )


def _most(one: analysis.Contrast) -> str:
    """In how many bases it stood on the side on which it stood in most."""
    less, more = sum(effect < 0 for effect in one.effects), sum(effect > 0 for effect in one.effects)
    return f"less than most of them on {less} models" if less > more else f"more than most of them on {more} models"


def _verdict(one: analysis.Contrast, p: float) -> str:
    told = "forgot less than" if one.effect < 0 else "forgot more than"
    return told if p <= report.LEVEL else "could not be told by what it forgot from"


def answer() -> str:
    """The first paragraph of docs/evidence.md."""
    records, plan = runs()
    one = _primary(records, plan)
    counted = analysis.counts(records, plan)
    bad = sum(number for name, number in counted.items() if name not in ("planned", "missing", "ok"))
    done = counted["planned"] - counted["missing"]
    return (
        f"**{sentence()}** For the mixtures: {_small(report.sizes(one))} {done:,} of {counted['planned']:,} planned "
        f"runs are done; {bad or 'none'} of them failed or diverged."
    )


def _small(said: str) -> str:
    return said[0].lower() + said[1:]


def tables() -> str:
    """The tables of docs/evidence.md."""
    records, plan = runs()
    found: list[dict[str, Any]] = _document(provenance.RESULTS / DOCUMENT).get("usage", [])
    if not found:  # the bases were not beside the journal
        return "\n\n".join(report.tables(records, plan, "###"))
    rows = [
        [each["text"], each["type"], number(each["mean"], 2), interval(*each["interval"], digits=2)] for each in found
    ]
    used = "### Kappa of experts and their share of the tokens\n\n" + table(
        ["text", "matrices", "Spearman's correlation", "95%"], rows
    )
    return "\n\n".join([*report.tables(records, plan, "###"), used])


def further() -> str:
    """The paragraph and the tables of the further question."""
    records, plan = further_runs()
    found = report.shown(records, plan)
    one = _further()
    if not one.complete:
        return "It has not been run yet."
    less = sum(effect < 0 for effect in one.effects)
    said = (
        f"**The fifth of the weights with the lowest kappa {_verdict(one, one.p)} random matrices with as many of each "
        f"type and in each layer** (p = {one.p:.3g}, {len(one.bases)} dense bases). {report.sizes(one)} Its "
        f"place is below 0 in {less} bases."
    )
    tables = [
        "#### Beside draws of the same types and layers\n\n" + report.contrast_table([one]) + report.READING,
        "#### After the same number of steps, beside these draws\n\n"
        + described.same_steps({plan.rates[0]: found}, [plan.analysis["primary"]], plan),
    ]
    return "\n\n".join([said, *tables])


def _further() -> analysis.Contrast:
    records, plan = further_runs()
    return analysis.contrast(report.shown(records, plan), plan, plan.analysis["primary"])


def _primary(records: list[dict[str, Any]], plan: Plan) -> analysis.Contrast:
    return analysis.contrast(report.shown(records, plan), plan, plan.analysis["primary"])
