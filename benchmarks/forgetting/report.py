"""Tables and figures of a study, from its journal: what docs/evidence.md shows comes from here."""

from __future__ import annotations

import json
import math
import statistics as plain
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import analysis, described
from .analysis import Cell, Contrast, Key, Outcome
from .journal import Journal
from .markdown import interval, number, table
from .plan import Plan
from .study import JOURNAL

READING = (
    "\n\nPlace: among the random draws of the same base, 0 below all and 1 above all, averaged over tasks and targets; "
    "below 1/2 it forgets less than most. Nats: forgetting less the mean of the draws, where all reach the target. "
    "Intervals: bootstrap over bases. p: changes of sign over bases, two-sided."
)
MEASURED = {"new": "new", "forgotten": "forgotten", "kl": "KL"}  # headings of what a run measures, by name
_NO_ANSWER = "**This study is not complete: nothing here is a result.**"
LEVEL = 0.05
_AT_TARGETS = (
    "\n\nNew, forgotten and KL: after {} steps. At the targets: the mean of those that reach each one, so that rows in "
    "which fewer reach it cannot be compared.\n\n"
)
_WHATEVER_WAS_LEARNED = (
    "\n\nForgetting after the longest budget, whatever was learned: below 0 a lower kappa forgets more, and may have "
    "learned more. Layers explain nothing among selections that all have the same share of each."
)


def write(plan: Plan, folder: Path, out: Path) -> str:
    """Writes report.md, summary.json, compact.jsonl and the figures to ``out``, and returns the text."""
    records = list(Journal(folder / JOURNAL).records().values())
    counted = analysis.counts(records, plan)
    out.mkdir(parents=True, exist_ok=True)
    found = shown(records, plan)
    sections = [
        f"# {plan.name}\n",
        answer(records, plan),
        "Runs: " + ", ".join(f"{number} {name}" for name, number in counted.items()) + ". Plan " + plan.digest() + ".",
        *tables(records, plan),
        *(f"![{name}]({name}.png)" for name in figures(found, records, plan, out)),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    (out / "report.md").write_text(text)
    summary = {"plan": plan.digest(), "runs": counted, **asdict(analysis.contrasts(found, plan))}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_compact(records, out / "compact.jsonl")
    return text


def shown(records: list[dict[str, Any]], plan: Plan) -> Mapping[Cell, Mapping[Key, Outcome]]:
    """Outcomes of methods that have run on all bases; before the primary comparison is complete, whatever is there."""
    found = analysis.outcomes(records, plan)
    whole = analysis.complete(found, plan)
    return whole if analysis.contrast(whole, plan, plan.analysis["primary"]).complete else found


def answer(records: list[dict[str, Any]], plan: Plan) -> str:
    """What the primary comparison says, in a paragraph; that there is no answer as long as runs of it are missing."""
    one = analysis.contrast(shown(records, plan), plan, plan.analysis["primary"])
    if not one.complete:
        return _NO_ANSWER
    if one.p > LEVEL:
        verdict = "could not be told from random selections of the same kind"
    else:
        verdict = f"forgot {'less' if one.effect < 0 else 'more'} than random selections of the same kind"
    method = one.name.partition(": ")[2].partition(" against")[0]
    return f"**{method} {verdict}** (p = {one.p:.3f}, two-sided, {len(one.bases)} bases). {sizes(one)}"


def sizes(one: Contrast) -> str:
    """How large a difference is, in places and in nats."""
    return (
        "Its place among the draws less one half, below 0 where it forgot less than most, is "
        f"{number(one.effect)} in the mean over bases (95% interval {interval(*one.effect_interval)}). Its forgetting "
        f"less the mean of the draws is {number(one.gain, 4)} nats per token (95% interval "
        f"{interval(*one.gain_interval)})."
    )


def tables(records: list[dict[str, Any]], plan: Plan, level: str = "##") -> list[str]:
    """All tables of a study, each with its heading; comparisons that have not run on all bases are named only."""
    found = shown(records, plan)
    compared = analysis.contrasts(found, plan)
    primary = compared.primary.complete
    every = [*compared.tested, *compared.described]
    missing = [one.name for one in every if not one.complete] if primary else []
    tested, others = (
        [one for one in some if one.bases and one.name not in missing] for some in (compared.tested, compared.described)
    )
    left = (
        f"{len(missing)} of the {len(every)} other comparisons of the plan have not run on all bases."
        if missing
        else ""
    )
    headed = {
        "Bases": _bases_table(records, plan),
        "Primary comparison": contrast_table([compared.primary]) + READING,
        "Other comparisons that are tested": contrast_table(tested, compared.adjusted) if tested else "",
        "Described, not tested": contrast_table(others, {}) if others else "",
        "Still to be run": left,
        "Methods": methods_table(found, plan) + _AT_TARGETS.format(plan.analysis["budget"]) + edges(found, plan),
        "Learning rates": _rates_table(records, found, plan),
        **described.tables(records, found, plan),
        "What explains forgetting among selections": _explained_table(found, plan) + _WHATEVER_WAS_LEARNED,
    }
    return [f"{level} {head}\n\n{text.rstrip()}" for head, text in headed.items() if text]


def rows(records: list[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """The comparisons that have run on all bases, as data."""
    compared = analysis.contrasts(shown(records, plan), plan)
    found = [{"said": "primary", **asdict(compared.primary)}]
    found += [{"said": "tested", "holm": compared.adjusted[one.name], **asdict(one)} for one in compared.tested]
    found += [{"said": "described", **asdict(one)} for one in compared.described]
    for one in found:
        if one["said"] == "described":
            del one["p"]
    return [one for one in found if one["complete"]]


def write_compact(records: list[dict[str, Any]], file: Path) -> None:
    """The records without their curves, a line each."""
    with file.open("w") as stream:
        for record in sorted(records, key=lambda record: str(record["id"])):
            stream.write(json.dumps(compact(record), separators=(",", ":")) + "\n")


def compact(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what the plan says or a run shows again: the recipe, the curve of a run, the versions."""
    dropped = {"recipe", "versions", "source", "clean", "needs", *(["curve"] if record["what"] == "run" else [])}
    return {key: _rounded(value) for key, value in record.items() if key not in dropped}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _bases_table(records: list[dict[str, Any]], plan: Plan) -> str:
    rows = []
    for kind in plan.bases:
        of_kind = [r for r in records if r["what"] == "base" and r["kind"] == kind and r["status"] == "ok"]
        if of_kind:
            moved = [abs(c["after"] - c["before"]) for r in of_kind for c in r["kappas"]]
            rows.append(
                [
                    kind,
                    str(len(of_kind)),
                    f"{of_kind[0]['parameters']:,}",
                    f"{plain.fmean(r['curve'][0][1] for r in of_kind):.3f}",
                    f"{plain.fmean(r['curve'][-1][1] for r in of_kind):.3f}",
                    f"{max(r['late_gain'] for r in of_kind):.2%}",
                    f"{plain.median(moved):.2f}",
                ]
            )
    head = ["bases", "number", "parameters", "loss before", "after", "gain of the last tenth", "change of log kappa"]
    return table(head, rows) if rows else ""


def contrast_table(found: list[Contrast], adjusted: Mapping[str, float] | None = None) -> str:
    """With p-values for one that stands alone, with Holm's for several, without any where they are only described."""
    tests = [] if adjusted == {} else ["p"] if adjusted is None else ["p", "p (Holm)"]
    head = ["comparison", "bases", "place - 1/2", "95%", *tests, "nats", "95%", "censored"]
    rows = []
    for c in found:
        values = [c.p, *([adjusted[c.name]] if adjusted else [])] if tests else []
        row = [c.name, str(len(c.bases)), number(c.effect), interval(*c.effect_interval)]
        row += [number(value, 4) for value in values]
        rows.append([*row, number(c.gain, 4), interval(*c.gain_interval), f"{c.censored} of {c.compared}"])
    return table(head, rows)


def _rates_table(records: list[dict[str, Any]], found: Mapping[Cell, Mapping[Key, Outcome]], plan: Plan) -> str:
    """What each method comes to at each learning rate, where the tables above have it at its best one."""
    there = {(kind, *key[:2]) for (kind, _, _), cell in found.items() for key in cell}
    rows: dict[Any, list[list[str]]] = defaultdict(list)
    for rate, cells in described.at_rates(records, plan).items():
        for (kind, task, method, fraction), members in _pooled(cells).items():
            if (kind, method, fraction) in there:
                name = method + (f" {fraction:.0%}" if fraction else "")
                ends = [done.end for done in members if done.status == "ok"]
                means = [number(plain.fmean(end[side] for end in ends)) if ends else "-" for side in MEASURED]
                rows[kind, task, method, fraction].append([kind, task, name, f"{rate:g}", *means])
                rows[kind, task, method, fraction][-1] += _at_targets(members, plan, task)
    head = ["base", "task", "method", "learning rate", *MEASURED.values(), "at the targets", "reached"]
    return table(head, [row for of_method in rows.values() for row in of_method]) if rows else ""


def _at_targets(members: list[Outcome], plan: Plan, task: str) -> list[str]:
    """Mean forgetting of those that reach each target, and how many do."""
    at = []
    for i in range(len(plan.analysis["targets"][task])):
        reached = [done.at[i] for done in members if math.isfinite(done.at[i])]
        at.append(number(plain.fmean(reached)) if reached else "-")
    hits = sum(math.isfinite(value) for done in members for value in done.at)
    return [" / ".join(at), f"{hits} of {sum(len(done.at) for done in members)}"]


def edges(found: Mapping[Cell, Mapping[Key, Outcome]], plan: Plan) -> str:
    """A warning where the best learning rate is the first or the last of those that were tried."""
    best = [
        done.rate for cell in found.values() for key, done in cell.items() if done.status == "ok" and key[0] != "full"
    ]
    if len(plan.rates) < 2 or not best:
        return ""
    at = {rate: sum(one == rate for one in best) for rate in (min(plan.rates), max(plan.rates))}
    rate, count = max(at.items(), key=lambda item: item[1])
    if count <= len(best) / 2:
        return ""
    return (
        f"**{count} of {len(best)} selections learned best at {rate:g}, which is an end of the learning rates that "
        "were tried.** Others beyond it may be better."
    )


def _pooled(found: Mapping[Cell, Mapping[Key, Outcome]]) -> dict[tuple[str, str, str, float | None], list[Outcome]]:
    pooled: dict[tuple[str, str, str, float | None], list[Outcome]] = defaultdict(list)
    for (kind, _, task), cell in sorted(found.items()):
        for (method, fraction, _), done in cell.items():
            pooled[kind, task, method, fraction].append(done)
    return pooled


def methods_table(
    found: Mapping[Cell, Mapping[Key, Outcome]],
    plan: Plan,
    measures: Mapping[str, str] = MEASURED,
) -> str:
    """A row for each method, fraction and task: means over bases and draws; ``measures`` are headings by name."""
    head = ["base", "task", "method", "share", "learning rates", *measures.values(), "at the targets", "reached"]
    rows = []
    for (kind, task, method, fraction), members in _pooled(found).items():
        whole = [done for done in members if done.status == "ok"]
        share = plain.fmean(done.said.get("share", math.nan) for done in whole) if whole else math.nan
        rates = sorted({done.rate for done in whole})
        ends = [plain.fmean(done.end[name] for done in whole) if whole else math.nan for name in measures]
        name = method + (f" {fraction:.0%}" if fraction else "")
        rows.append([kind, task, name, number(share), ", ".join(f"{rate:g}" for rate in rates), *map(number, ends)])
        rows[-1] += _at_targets(members, plan, task)
    return table(head, rows)


def _explained_table(found: Mapping[Cell, Mapping[Key, Outcome]], plan: Plan) -> str:
    head = ["base", "task", "selections", "variance by layers", "with kappa", "nats per unit of log kappa", "95%"]
    rows = []
    for kind in plan.bases:
        for task in plan.tasks:
            one = analysis.explain(found, plan, kind, task)
            if one is not None:
                rows.append([kind, task, str(one.selections), number(one.by_layers), number(one.with_kappa)])
                rows[-1] += [number(one.slope, 4), interval(*one.interval)]
    return table(head, rows)


def figures(
    found: Mapping[Cell, Mapping[Key, Outcome]],
    records: list[dict[str, Any]],
    plan: Plan,
    out: Path,
    prefix: str = "",
) -> list[str]:
    """All of a study: frontiers, and kappas by type and layer where bases were pre-trained; returns their names."""
    names = frontiers(found, plan, out, prefix)
    for kind in plan.bases:
        if any(r["what"] == "base" and r["kind"] == kind and r["status"] == "ok" for r in records):
            names.append(_kappas_figure(records, kind, out, prefix))
    return names


def frontiers(found: Mapping[Cell, Mapping[Key, Outcome]], plan: Plan, out: Path, prefix: str = "") -> list[str]:
    """Loss on the new text against forgetting, a figure for each kind and task with runs; returns their names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = []
    pooled = _pooled(found)
    for kind, task in sorted({key[:2] for key in pooled}):
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(
            xlabel="loss on the new text, nats per token", ylabel="rise of loss on the old text, nats per token"
        )
        axes.set_title(f"{kind}, {task}: means over bases, each method at its own best learning rate")
        draws = list(_of_each_draw(found, kind, task))
        for path in draws:
            axes.plot(*path, "-", color="0.85", linewidth=0.8, zorder=1)
        for i, ((_, _, method, fraction), members) in enumerate(
            (key, members) for key, members in pooled.items() if key[:2] == (kind, task)
        ):
            paths = [done.path for done in members if done.status == "ok"]
            if paths:
                label = method + (f" {fraction:.0%}" if fraction else "")
                style = "--" if "random" in method else "-"
                mark = "osv^D<>*"[i // 10 % 8]
                axes.plot(*_mean_path(paths), style, marker=mark, color=f"C{i % 10}", label=label, markersize=4)
        if axes.lines:
            axes.legend(fontsize=7, ncols=2, title="gray: single draws" if draws else None)
        axes.invert_xaxis()
        names.append(f"{prefix}frontier-{kind}-{task}")
        figure.savefig(out / f"{names[-1]}.png", dpi=110, metadata={"Software": None})
    return names


def _of_each_draw(found: Mapping[Cell, Mapping[Key, Outcome]], kind: str, task: str) -> list[list[list[float]]]:
    """The mean path over bases of every random draw."""
    draws: dict[Key, list[tuple[tuple[float, float], ...]]] = defaultdict(list)
    for (its_kind, _, its_task), cell in found.items():
        for key, done in cell.items():
            if (its_kind, its_task) == (kind, task) and "random" in key[0] and done.status == "ok":
                draws[key].append(done.path)
    return [_mean_path(paths) for paths in draws.values()]


def _mean_path(paths: list[tuple[tuple[float, float], ...]]) -> list[list[float]]:
    return [[plain.fmean(path[j][side] for path in paths) for j in range(len(paths[0]))] for side in (0, 1)]


def _kappas_figure(records: list[dict[str, Any]], kind: str, out: Path, prefix: str) -> str:
    """Kappa by type and layer, before and after pre-training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["what"] == "base" and record["kind"] == kind and record["status"] == "ok":
            for cell in record["kappas"]:
                cells[cell["type"]][cell["layer"]].append((cell["before"], cell["after"]))
    figure = Figure(figsize=(2.2 * len(cells), 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(cells), sharex=True, squeeze=False)[0]
    for axis, (name, layers) in zip(axes, sorted(cells.items()), strict=True):
        numbers = sorted(layers)
        for side, label in ((0, "before"), (1, "after")):
            axis.plot(
                numbers, [plain.fmean(pair[side] for pair in layers[n]) for n in numbers], "o-", label=label, ms=3
            )
        axis.set(title=name, xlabel="layer")
    axes[0].set_ylabel("mean log kappa")
    axes[0].legend(fontsize=7)
    name = f"{prefix}kappas-{kind}"
    figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
    return name
