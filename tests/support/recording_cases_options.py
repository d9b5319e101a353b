"""Cases of a recording: every option of rank(), on sources of every kind, and the plans for the same calls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from recording_sources import Cases, Stored, gaussian, model, model_tensors, trained_like

import kappa_fast
from kappa_fast.planning import plan


def by_size(entry: kappa_fast.TensorKappa) -> float:
    """A score that is no kappa."""
    return entry.kappa * math.log(entry.numel)


OPTIONS: Mapping[str, dict[str, Any]] = {
    "none": {},
    "top 1": {"top": 1},
    "top 5": {"top": 5},
    "top 1000": {"top": 1000},
    "top 0.1": {"top": 0.1},
    "top 1.0": {"top": 1.0},
    "top 2 per group": {"top": 2, "top_per_group": True},
    "top 0.3 per group": {"top": 0.3, "top_per_group": True},
    "rtol 0.3": {"rtol": 0.3},
    "rtol 1e-6": {"rtol": 1e-6},
    "certify": {"certify": True},
    "certify, rtol 1e-5": {"certify": True, "rtol": 1e-5},
    "certify, top 3": {"certify": True, "top": 3},
    "certify selection, top 3": {"certify": "selection", "top": 3},
    "certify selection, top 0.2 per group": {"certify": "selection", "top": 0.2, "top_per_group": True},
    "score": {"score": by_size},
    "score, negative": {"score": lambda entry: -entry.kappa},
    "score, an int": {"score": lambda entry: len(entry.name)},
    "score, top 3": {"score": by_size, "top": 3},
    "score, certify selection": {"score": by_size, "top": 3, "certify": "selection"},
    "include a text": {"include": "down_proj"},
    "include a list": {"include": ["q_proj", r"layers\.1\."]},
    "include a tuple": {"include": ("o_proj",)},
    "include a generator": {"include": iter(["q_proj", "o_proj"])},
    "include nothing": {"include": []},
    "include what is not there": {"include": "nowhere"},
    "exclude a text": {"exclude": "experts"},
    "exclude a list": {"exclude": ["experts", "self_attn"]},
    "include and exclude": {"include": "self_attn", "exclude": r"[kv]_proj"},
    "exclude everything": {"exclude": ""},
    "embeddings": {"embeddings": True},
    "routers": {"routers": True, "min_dim": 1},
    "everything": {"embeddings": True, "routers": True, "min_dim": 1},
    "stored": {"fused": "stored"},
    "min_dim 32": {"min_dim": 32},
    "max_dim 64": {"max_dim": 64},
    "min_dim and max_dim": {"min_dim": 24, "max_dim": 48},
    "memory 1 byte": {"memory_budget": 1},
    "memory 200 KB": {"memory_budget": "200KB"},
    "memory 1.5 MiB": {"memory_budget": "1.5 MiB"},
    "backend torch": {"backend": "torch"},
    "device cpu": {"device": "cpu"},
    "device object": {"device": torch.device("cpu")},
    "adapters base": {"adapters": "base"},
    "adapters merged": {"adapters": "merged"},
}
COMBINED: Mapping[str, dict[str, Any]] = {
    "top, certify selection, waves": {"top": 4, "certify": "selection", "memory_budget": 1, "include": "experts"},
    "everything, stored, certify": {
        "embeddings": True,
        "routers": True,
        "min_dim": 1,
        "fused": "stored",
        "certify": True,
    },
    "top per group, tight, excluded": {"top": 1, "top_per_group": True, "rtol": 1e-5, "exclude": r"\[0\]|layers\.2"},
}
ONLY_OF_RANK = ("score", "adapters")


def spread() -> dict[str, torch.Tensor]:
    """Matrices of ladder sizes in two groups, far apart and close together: what top= and its probes decide on."""
    found = {f"layers.{i}.a.weight": trained_like(200 + 4 * i, 168, seed=40 + i) * (1 + i) for i in range(4)}
    found |= {f"layers.{i}.b.weight": gaussian(168, 168 + i, seed=50 + i) for i in range(4)}
    found["layers.9.a.weight"] = torch.zeros(200, 168)
    found["layers.8.a.weight"] = torch.full((200, 168), float("nan"))
    return found


def cases(stored: Stored) -> Cases:
    """All options on a mapping, most on a module and a directory, those of top= on harder matrices, and their plans."""
    tensors, module, directory = model_tensors(), model(), stored.sharded()
    for name, options in {**OPTIONS, **COMBINED}.items():
        if not name.startswith("adapters"):
            yield f"mapping, {name}", partial(kappa_fast.rank, tensors, progress=False, **_fresh(options))
        yield f"module, {name}", partial(kappa_fast.rank, module, progress=False, **_fresh(options))
    sharded = (
        "none",
        "certify selection, top 3",
        "include and exclude",
        "everything",
        "stored",
        "memory 1 byte",
        *COMBINED,
    )
    for name in sharded:
        options = {**OPTIONS, **COMBINED}[name]
        yield f"directory, {name}", partial(kappa_fast.rank, directory, progress=False, **options)
        yield f"file, {name}", partial(kappa_fast.rank, str(stored.single()), progress=False, **options)
    for name in ("none", "top 1", "top 5", "top 0.1", "top 2 per group", "certify, top 3", "certify selection, top 3"):
        for budget in ("64MB", 1):
            options = {**OPTIONS[name], "memory_budget": budget}
            yield f"spread, {name}, memory {budget}", partial(kappa_fast.rank, spread(), progress=False, **options)
    yield "a function for progress", lambda: _progress(tensors)
    yield "a function for progress, top", lambda: _progress(spread(), top=2, certify="selection")
    yield from _plans(stored)


def _fresh(options: dict[str, Any]) -> dict[str, Any]:
    """A generator can be given once."""
    return (
        {**options, "include": iter(["q_proj", "o_proj"])} if hasattr(options.get("include"), "__next__") else options
    )


def _progress(tensors: Mapping[str, torch.Tensor], **options: Any) -> dict[str, Any]:
    """What a function is told, without the seconds."""
    seen: list[Any] = []
    ranking = kappa_fast.rank(tensors, progress=seen.append, memory_budget=1, **options)
    told = [[p.matrices_done, p.matrices_total, p.operations_done, p.operations_total] for p in seen]
    return {"told": told, "ranking": ranking}


def _plans(stored: Stored) -> Cases:
    """The plans, and whether their settings are those of the ranking."""
    sources: dict[str, Any] = {"mapping": model_tensors(), "module": model(), "directory": stored.sharded()}
    with torch.device("meta"):
        sources["meta"] = model()
    for name, options in {**OPTIONS, **COMBINED}.items():
        if not any(option in options for option in ONLY_OF_RANK):
            given = {"memory_budget": "64MB", **_fresh(options)}
            yield f"plan of mapping, {name}", partial(plan, sources["mapping"], measure=False, **given)
    for source in ("module", "directory", "meta"):
        for name in ("none", "everything", "stored", "certify selection, top 3"):
            given = {"memory_budget": "64MB", **OPTIONS[name]}
            yield f"plan of {source}, {name}", partial(plan, sources[source], measure=False, **given)
    for ranks in (1, 2, 7):
        yield f"plan, {ranks} ranks", partial(plan, sources["directory"], measure=False, ranks=ranks, memory_budget=1)
    for device in ("h200", "l40s"):
        given = {"device_model": device, "certify": True, "memory_budget": "64MB"}
        yield f"plan, floor of {device}", partial(plan, sources["mapping"], measure=False, **given)
        given |= {"top": 3, "certify": "selection"}
        yield f"plan, floor of {device}, top", partial(plan, sources["mapping"], measure=False, **given)
    few = {name: tensor for name, tensor in model_tensors().items() if "layers.0.self_attn" in name}
    yield "plan, measured", partial(plan, few, memory_budget="64MB", ranks=2)
    yield "plan, totals", lambda: _totals(sources["directory"])


def _totals(source: Any) -> list[Any]:
    found = plan(source, measure=False)
    return [found.count, found.numel, found.operations, found.nbytes, found.seconds, found.seconds_of_ranks]
