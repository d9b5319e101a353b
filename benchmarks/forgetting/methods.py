"""Methods as data: what of a base is trained, and how.

    {"train": "all"}                                             every weight; "head": only what a task adds
    {"select": {"max_params": 0.2, "order": "highest"}, ...}     options of Ranking.select
    {"lora": {"r": 8, "lora_alpha": 16}, "select": {...}}        adapters on what is selected
    {"lora": {...}, "kappatune": 0.2}                            adapters where PEFT's selector puts them

``score`` names another order than that by kappa (scores.py), ``within`` = "cells" selects within every layer and type
on its own, "layers" within every layer whatever the types, and ``include`` narrows the candidates. ``fraction`` of the
plan stands for the text "fraction".
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import kappa_fast
from kappa_fast import Ranking, Selection

from . import bases, scores


@dataclass(frozen=True)
class Prepared:
    """A model of which the right part trains, and what there is to say of that part."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    said: dict[str, Any]

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def prepare(model: nn.Module, method: Mapping[str, Any], fraction: float | None, draw: int, lr: float) -> Prepared:
    """Makes the choice on the base and sets up its training. Every optimizer is AdamW without weight decay."""
    options: dict[str, Any] = {"lr": lr, "weight_decay": 0.0}
    whole = sum(p.numel() for p in model.parameters())
    if method.get("train") == "all":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), **options)
        return Prepared(model, optimizer, {"trained": whole, "share": 1.0})
    if method.get("train") == "head":
        model.requires_grad_(False)
        nothing = torch.zeros((), requires_grad=True)  # an optimizer wants something
        return Prepared(model, torch.optim.AdamW([nothing], **options), {"trained": 0, "share": 0.0})
    if "lora" in method:
        adapted, said = _adapted(model, method, fraction, draw)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        said["trained"] = sum(p.numel() for p in trained)
        return Prepared(adapted, torch.optim.AdamW(trained, **options), said | {"share": said["trained"] / whole})
    selection = choose(model, method, fraction, draw)
    said = describe(selection) | {"trained": selection.num_params, "share": selection.num_params / whole}
    return Prepared(model, kappa_fast.wrap(torch.optim.AdamW, model, selection, **options), said)


def choose(model: nn.Module, method: Mapping[str, Any], fraction: float | None, draw: int) -> Selection:
    """The matrices that a method trains, or adapts."""
    return pick(scores.scored(scores.rank(model), model, method.get("score", "kappa")), method, fraction, draw)


def pick(ranking: Ranking, method: Mapping[str, Any], fraction: float | None, draw: int) -> Selection:
    """What a method takes from a ranking in the order of its score."""
    options: dict[str, Any] = {n: fraction if value == "fraction" else value for n, value in method["select"].items()}
    if options.get("order") == "random":
        options["seed"] = draw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if method.get("within") not in ("cells", "layers"):
            return ranking.select(include=method.get("include"), **options)
        layers = sorted({entry.layer for entry in ranking if entry.layer is not None})
        parts = [ranking.filter(layers=layer, include=method.get("include")) for layer in layers]
        each_type = method["within"] == "cells"
        found = [part.select(per_group=each_type, **options) for part in parts if len(part)]
    union = found[0]
    for part in found[1:]:
        union = union | part
    return union


def _adapted(
    model: nn.Module, method: Mapping[str, Any], fraction: float | None, draw: int
) -> tuple[nn.Module, dict[str, Any]]:
    from peft import LoraConfig, get_peft_model

    from kappa_fast.integrations.peft import find_kappa_target_modules, lora_config

    torch.manual_seed(0)  # of the adapters' own initial values
    if "kappatune" in method:
        targets = find_kappa_target_modules(model, top_p=method["kappatune"])
        config = LoraConfig(**targets, **method["lora"])
        said: dict[str, Any] = {"targets": {name: len(found) for name, found in targets.items() if found}}
    else:
        selection = choose(model, method, fraction, draw)
        config = lora_config(selection, partial="widen", model=model, **method["lora"])
        said = describe(selection)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config), said


def describe(selection: Selection) -> dict[str, Any]:
    """Shares of the selected weights by layer and by type, the mean log kappa, and a digest of the keys."""
    total = max(1, selection.num_params)
    finite = [entry for entry in selection if entry.status == "ok"]
    logs = torch.tensor([entry.kappa for entry in finite], dtype=torch.float64).log()
    return {
        "matrices": len(selection),
        "layers": _shares(((str(e.layer), e.numel) for e in selection), total),
        "types": _shares(((bases.type_of(e), e.numel) for e in selection), total),
        "log_kappa": float(logs.mean()) if len(logs) else None,
        "keys": hashlib.sha256("\n".join(sorted(selection.keys)).encode()).hexdigest()[:16],
    }


def _shares(pairs: Iterable[tuple[str, int]], total: int) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for name, numel in pairs:
        counts[name] += numel
    return {name: round(count / total, 6) for name, count in sorted(counts.items())}
