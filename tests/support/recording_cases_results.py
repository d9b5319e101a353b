"""Cases of a recording: what is taken from rankings by budgets, and parts and summaries of them."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Mapping
from functools import partial
from typing import Any

from recording_plain import Text
from recording_sources import Cases, Stored, model_tensors

import kappa_fast
from kappa_fast import Ranking, Selection, Skipped, TensorKappa

NAN, INF = float("nan"), float("inf")
BUDGETS: Mapping[str, list[Any]] = {
    "num_tensors": [1, 3, 7, 1000],
    "top_p": [0.01, 0.2, 0.5, 1.0, 1],
    "max_kappa": [1.5, 8, 20.5, 1e9],
    "max_params": [1, 1500, 5000, 0.02, 0.2, 0.9, 1.0],
}
BY_UNIT: list[dict[str, Any]] = [
    {"num_tensors": 4},
    {"top_p": 0.3},
    {"max_kappa": 9.0},
    {"max_params": 0.3},
    {"max_params": 0.3, "fill": True},
]
SEVERAL: list[dict[str, Any]] = [
    {"max_params": 3000, "fill": True},
    {"max_params": 3000, "fill": True, "per_group": True},
    {"max_params": 0.5, "max_kappa": 7.5},
    {"num_tensors": 5, "top_p": 0.5, "max_kappa": 9, "max_params": 0.9, "fill": True},
    {"num_tensors": 3, "include": "up"},
    {"num_tensors": 3, "include": ["up", "q_proj"], "exclude": r"layers\.0"},
    {"top_p": 0.5, "exclude": "down", "per_group": True, "unit": "parameter"},
]
FILTERS: list[dict[str, Any]] = [
    {"layers": 1},
    {"layers": range(1, 8)},
    {"groups": "down"},
    {"include": "up", "exclude": r"\.2\."},
    {"layers": [0, 2], "groups": ["layers.*.up.weight"]},
]


def entry(name: str, kappa: float, spread: float = 0.0, **fields: Any) -> TensorKappa:
    """An entry made by hand, with an interval of so much to both sides."""
    values: dict[str, Any] = dict(
        name=name,
        aliases=(),
        part="",
        index=(),
        layer=None,
        group="all",
        shape=(32, 16),
        dtype="float32",
        numel=512,
        kappa=kappa,
        lower=max(1.0, kappa * (1 - spread)),
        upper=kappa * (1 + spread),
        sigma_max=1.0,
        sigma_min=1 / kappa,
        score=kappa,
        certified=False,
        method="cholesky64",
        sensitivity=0.01,
        status="ok",
    )
    return TensorKappa(**{**values, **fields})


def by_hand() -> Ranking:
    """Every status, intervals that overlap, two groups and what was skipped."""
    up, down = "layers.*.up.weight", "layers.*.down.weight"
    unknown = dict(score=NAN, sigma_max=NAN, sigma_min=NAN, sensitivity=NAN)
    entries = [entry(f"layers.{i}.up.weight", 2.0 + i, 0.3 * (i % 2), layer=i, group=up) for i in range(6)]
    entries += [
        entry("layers.7.down.weight", 4.5, layer=7, group=down, shape=(64, 48), numel=3072, certified=True),
        entry("layers.8.down.weight", 4.5, 0.01, layer=8, group=down, dtype="bfloat16"),
        entry("singular", INF, status="rank_deficient", **unknown | dict(score=INF), lower=1e15, upper=INF),
        entry("bounded", NAN, status="bounded", **unknown, lower=40.0, upper=INF),
        entry("broken", NAN, status="non_finite", **unknown, lower=NAN, upper=NAN),
    ]
    skipped = (Skipped("norm.weight", (16, 1), "too small"), Skipped("embed.weight", (100, 16), "an embedding"))
    settings = {"score": "kappa", "top": 9}
    return Ranking(entries, skipped, {"num_parameters": 9000, "settings": settings, "note": [1.5, None]})


def ranked(**options: Any) -> Ranking:
    """Of the model of mappings."""
    return kappa_fast.rank(model_tensors(), progress=False, **options)


def chosen(ranking: Ranking, **options: Any) -> dict[str, Any]:
    """A selection, told without its entries."""
    return told(ranking.select(**options))


def told(selection: Selection) -> dict[str, Any]:
    """What a selection says of itself."""
    return {
        "keys": selection.keys,
        "names": selection.names,
        "certain": selection.boundary_certain,
        "settings": selection.settings,
        "budgets": selection.budgets,
        "num_params": selection.num_params,
        "share": selection.share,
        "kappa_range": selection.kappa_range,
        "include": selection.include,
        "exclude": selection.exclude,
        "words": [Text(selection.describe()), Text(selection.unfit()), Text(repr(selection))],
    }


def cases(stored: Stored) -> Cases:
    whole, hand = ranked(), by_hand()
    yield from _selections(
        {"model": whole, "by hand": hand, "top 5": ranked(top=5), "grouped": ranked(top=1, top_per_group=True)}
    )
    yield from _sets(whole)
    yield from _parts({"model": whole, "by hand": hand})


def _selections(rankings: Mapping[str, Ranking]) -> Cases:
    for (name, ranking), (budget, values) in itertools.product(rankings.items(), BUDGETS.items()):
        for value in values:
            alone = {budget: value}
            yield f"select {name}, {alone}", partial(chosen, ranking, **alone)
            yield f"select {name}, {alone}, per group", partial(chosen, ranking, per_group=True, **alone)
    for name in ("model", "by hand"):
        for unit, options in itertools.product(("matrix", "expert", "parameter"), BY_UNIT):
            yield f"select {name}, by {unit}, {options}", partial(chosen, rankings[name], unit=unit, **options)
        for options in SEVERAL:
            yield f"select {name}, {options}", partial(chosen, rankings[name], **options)


def _sets(ranking: Ranking) -> Cases:
    a, b = ranking.select(num_tensors=8), ranking.select(max_params=0.5, include="down_proj")
    yield "selections, union", lambda: a | b
    yield "selections, intersection", lambda: told(a & b)
    yield "selections, difference", lambda: told(a - b)
    yield "selections, more", lambda: told(a.including("norm", "lm_head").excluding(r"experts\.down"))
    yield "selections, patterns united", lambda: told(a.including("norm") | b.excluding("x"))
    yield (
        "selections, membership",
        lambda: [a.keys[0] in a, "nowhere" in a, b[0] in a, len(a), a == b, a == copy.copy(a)],
    )
    yield "selections, pickled", lambda: [pickle.loads(pickle.dumps(made)) == made for made in (a, b, ranking)]
    yield "selections, items", lambda: [a[0], a[a.keys[1]], a[1:3]]
    yield "selections, no such key", lambda: a["nowhere"]
    yield "selections of two rankings", lambda: a | by_hand().select(num_tensors=1)


def _parts(rankings: Mapping[str, Ranking]) -> Cases:
    for name, ranking in rankings.items():
        for options in FILTERS:
            yield f"filter {name}, {options}", partial(ranking.filter, **options)
        for by in ("group", "layer"):
            yield f"summary {name}, by {by}", partial(_summary, ranking, by, None)
            yield f"summary {name}, by {by}, selected", partial(_summary, ranking, by, ranking.select(num_tensors=4))
        for item in (0, slice(1, 3), ranking[2].key, "nowhere", ranking.skipped[0].name, 1000):
            yield f"{name}, item {item}", partial(ranking.__getitem__, item)
        yield f"{name}, membership", partial(_membership, ranking)


def _membership(ranking: Any) -> list[bool | int]:
    return [len(ranking), ranking[0].key in ranking, ranking[1] in ranking]


def _summary(ranking: Ranking, by: Any, selection: Selection | None) -> list[Any]:
    found = ranking.summary(by, selection=selection)
    return [found, Text(found.to_text()), frame(found.to_dataframe())]


def frame(made: Any) -> dict[str, Any]:
    """Of pandas: the columns, their kinds and their values; missing ones are None."""
    rows = made.astype(object).where(made.notna(), None).values.tolist()
    return {"columns": list(made.columns), "kinds": [str(kind) for kind in made.dtypes], "rows": rows}
