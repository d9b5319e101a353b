"""How much the experts of a mixture are used, beside their kappa: what a choice by kappa chooses besides."""

from __future__ import annotations

import math
import re
import statistics as plain
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import kappa_fast
from kappa_fast.results.compare import spearman

from . import bases, statistics, texts
from .plan import Plan

_EXPERT = re.compile(r"experts\.\w+\[(\d+)")  # of a stack of experts, as transformers fuses them
WINDOWS = 60


def usage(plan: Plan, folder: Path, kind: str = "mixture") -> list[dict[str, Any]]:
    """For every text and type of matrix: Spearman's correlation of kappa and share of tokens over experts of a layer.

    The mean over layers is that of a base; means over bases, and bootstrap intervals over bases.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for base in plan.bases[kind]:
        model = bases.load(kind, base, folder).eval()
        logs = log_kappas(model)
        for name in (plan.training["corpus"], *plan.tasks):
            windows = texts.load(name, folder / "texts").windows("test", WINDOWS, int(plan.training["length"]))
            shares = routed(model, windows)
            for matrix in sorted({matrix for _, matrix in logs}):
                of_layers = [spearman(logs[layer, matrix], share) for layer, share in enumerate(shares)]
                found[name, matrix].append(plain.fmean(of_layers))
    resamples = int(plan.analysis["resamples"])
    return [
        {"text": name, "type": matrix, "mean": plain.fmean(values), "interval": statistics.bootstrap(values, resamples)}
        for (name, matrix), values in found.items()
    ]


def log_kappas(model: torch.nn.Module) -> dict[tuple[int, str], list[float]]:
    """Of the experts of each layer and type, in order."""
    found: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for entry in kappa_fast.rank(model, progress=False):
        expert = _EXPERT.search(entry.key)
        if expert is not None and entry.layer is not None:
            found[entry.layer, bases.type_of(entry)][int(expert[1])] = math.log(entry.kappa)
    return {cell: [logs[i] for i in range(len(logs))] for cell, logs in found.items()}


@torch.no_grad()
def routed(model: torch.nn.Module, windows: torch.Tensor) -> list[list[float]]:
    """For each layer the share of the tokens' choices that every expert gets."""
    config = model.config
    logits = model(input_ids=windows, output_router_logits=True).router_logits
    shares = []
    for each in logits:
        chosen = each.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
        counted = torch.bincount(chosen, minlength=config.num_local_experts)
        shares.append((counted / counted.sum()).tolist())
    return shares
