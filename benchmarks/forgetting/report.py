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

from . import analysis
from .analysis import Cell, Contrast, Key, Outcome
from .journal import Journal
from .plan import Plan
from .study import JOURNAL

_READING = (
    "\n\nPlace: among the random draws of the same base, 0 below all and 1 above all, averaged over tasks and targets; "
    "below 1/2 it forgets less than most. Nats: forgetting less the mean of the draws, where all reach the target. "
    "Intervals: bootstrap over bases. p: changes of sign over bases, two-sided."
)
MEASURED = {"new": "new", "forgotten": "forgotten", "kl": "KL"}  # headings of what a run measures, by name
_NO_ANSWER = "**This study is not complete: nothing here is a result.**"


def write(plan: Plan, folder: Path, out: Path) -> str:
    """Writes report.md, summary.json, compact.jsonl and the figures to ``out``, and returns the text."""
    records = list(Journal(folder / JOURNAL).records().values())
    found = analysis.outcomes(records, plan)
    compared = analysis.contrasts(found, plan)
    counted = analysis.counts(records, plan)
    out.mkdir(parents=True, exist_ok=True)
    sections = [
        f"# {plan.name}\n",
        *([_NO_ANSWER] if counted["missing"] else []),
        "Runs: " + ", ".join(f"{number} {name}" for name, number in counted.items()) + ". Plan " + plan.digest() + ".",
        _bases_table(records, plan),
        "## Primary comparison\n\n" + _contrast_table([compared.primary]) + _READING,
        "## Other comparisons that are tested\n\n" + _contrast_table(compared.tested, compared.adjusted),
        "## Described, not tested\n\n" + _contrast_table(compared.described, {}),
        "## Methods\n\n" + methods_table(found, plan),
        "## What explains forgetting among selections\n\n" + _explained_table(found, plan),
        *(f"![{name}]({name}.png)" for name in _figures(found, records, plan, out)),
    ]
    text = "\n\n".join(sections) + "\n"
    (out / "report.md").write_text(text)
    summary = {"plan": plan.digest(), "runs": counted, **asdict(compared)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    with (out / "compact.jsonl").open("w") as stream:
        for record in sorted(records, key=lambda record: record["id"]):
            stream.write(json.dumps(compact(record), separators=(",", ":")) + "\n")
    return text


def compact(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what can be found by running it again: the curve of a run, the recipe, the versions."""
    dropped = {"recipe", "versions", "source", "clean", *(["curve"] if record["what"] == "run" else [])}
    return {key: _rounded(value) for key, value in record.items() if key not in dropped}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def table(head: list[str], rows: list[list[str]]) -> str:
    """Of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float, digits: int = 3) -> str:
    """With so many digits; "-" where there is none."""
    return "-" if not math.isfinite(value) else f"{value:.{digits}f}"


def _interval(low: float, high: float) -> str:
    return f"{number(low)} to {number(high)}"


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
    return "## Bases\n\n" + table(head, rows)


def _contrast_table(found: list[Contrast], adjusted: Mapping[str, float] | None = None) -> str:
    """With p-values for one that stands alone, with Holm's for several, without any where they are only described."""
    tests = [] if adjusted == {} else ["p"] if adjusted is None else ["p", "p (Holm)"]
    head = ["comparison", "bases", "place - 1/2", "95%", *tests, "nats", "95%", "censored"]
    rows = []
    for c in found:
        values = [c.p, *([adjusted[c.name]] if adjusted else [])] if tests else []
        row = [c.name, str(len(c.bases)), number(c.effect), _interval(*c.effect_interval)]
        row += [number(value, 4) for value in values]
        rows.append([*row, number(c.gain, 4), _interval(*c.gain_interval), f"{c.censored} of {c.compared}"])
    return table(head, rows)


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
        at = []
        for i in range(len(plan.analysis["targets"][task])):
            reached = [done.at[i] for done in members if math.isfinite(done.at[i])]
            at.append(number(plain.fmean(reached)) if reached else "-")
        hits = sum(math.isfinite(value) for done in members for value in done.at)
        name = method + (f" {fraction:.0%}" if fraction else "")
        every = sum(len(done.at) for done in members)
        rows.append([kind, task, name, number(share), ", ".join(f"{rate:g}" for rate in rates), *map(number, ends)])
        rows[-1] += [" / ".join(at), f"{hits} of {every}"]
    return table(head, rows)


def _explained_table(found: Mapping[Cell, Mapping[Key, Outcome]], plan: Plan) -> str:
    head = ["base", "task", "selections", "variance by layers", "with kappa", "nats per unit of log kappa", "95%"]
    rows = []
    for kind in plan.bases:
        for task in plan.tasks:
            one = analysis.explain(found, plan, kind, task)
            if one is not None:
                rows.append([kind, task, str(one.selections), number(one.by_layers), number(one.with_kappa)])
                rows[-1] += [number(one.slope, 4), _interval(*one.interval)]
    return table(head, rows)


def _figures(
    found: Mapping[Cell, Mapping[Key, Outcome]], records: list[dict[str, Any]], plan: Plan, out: Path
) -> list[str]:
    """All of a study: frontiers, and kappas by type and layer where bases were pre-trained."""
    names = frontiers(found, plan, out)
    for kind in plan.bases:
        if any(r["what"] == "base" and r["kind"] == kind and r["status"] == "ok" for r in records):
            names.append(_kappas_figure(records, kind, out))
    return names


def frontiers(found: Mapping[Cell, Mapping[Key, Outcome]], plan: Plan, out: Path) -> list[str]:
    """Loss on the new text against forgetting, a figure for each kind and task; returns their names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = []
    pooled = _pooled(found)
    for kind in plan.bases:
        for task in plan.tasks:
            figure = Figure(figsize=(8, 5.5), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.add_subplot(
                xlabel="loss on the new text, nats per token", ylabel="rise of loss on the old text"
            )
            axes.set_title(f"{kind}, {task}: means over bases, each method at its own best learning rate")
            for i, ((_, _, method, fraction), members) in enumerate(
                (key, members) for key, members in pooled.items() if key[:2] == (kind, task)
            ):
                paths = [done.path for done in members if done.status == "ok"]
                if not paths:
                    continue
                mean = [[plain.fmean(path[j][side] for path in paths) for j in range(len(paths[0]))] for side in (0, 1)]
                label = method + (f" {fraction:.0%}" if fraction else "")
                style = "--" if "random" in method else "-"
                axes.plot(*mean, style, marker="osv^D<>*"[i // 10 % 8], color=f"C{i % 10}", label=label, markersize=4)
            if axes.lines:
                axes.legend(fontsize=6, ncols=2)
            axes.invert_xaxis()
            names.append(f"frontier-{kind}-{task}")
            figure.savefig(out / f"{names[-1]}.png", dpi=110, metadata={"Software": None})
    return names


def _kappas_figure(records: list[dict[str, Any]], kind: str, out: Path) -> str:
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
    figure.savefig(out / f"kappas-{kind}.png", dpi=110, metadata={"Software": None})
    return f"kappas-{kind}"
