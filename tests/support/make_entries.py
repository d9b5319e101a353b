"""Entries for the tests of what comes after the numerics: made by hand, or drawn by hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from kappa_fast.results.entries import Skipped, TensorKappa


def make_entry(name: str = "layers.0.q_proj.weight", kappa: float = 10.0, **fields: Any) -> TensorKappa:
    """An entry whose interval is kappa itself, unless other fields are given; its status follows from kappa."""
    status = fields.pop("status", "ok" if math.isfinite(kappa) else "rank_deficient")
    values: dict[str, Any] = dict(
        name=name,
        aliases=(),
        part="",
        index=(),
        layer=None,
        group="all",
        shape=(32, 16),
        dtype="float32",
        kappa=kappa,
        lower=kappa,
        upper=kappa,
        sigma_max=1.0,
        sigma_min=1 / kappa,
        score=kappa,
        certified=False,
        method="gram64",
        sensitivity=0.01,
        status=status,
    )
    if status == "rank_deficient":
        values |= dict(kappa=math.inf, score=math.inf, lower=kappa if math.isfinite(kappa) else 1e15, upper=math.inf)
    if status in ("bounded", "non_finite"):
        values |= dict(kappa=math.nan, score=math.nan, sigma_max=math.nan, sigma_min=math.nan, sensitivity=math.nan)
        bounds = (kappa, math.inf) if status == "bounded" else (math.nan, math.nan)
        values |= dict(lower=bounds[0], upper=bounds[1])
    values |= fields
    values.setdefault("numel", values["shape"][0] * values["shape"][1])
    return TensorKappa(**values)


def bounded(name: str, lower: float, **fields: Any) -> TensorKappa:
    return make_entry(name, lower, status="bounded", **fields)


def non_finite(name: str, **fields: Any) -> TensorKappa:
    return make_entry(name, status="non_finite", **fields)


_ints = st.integers(-(2**70), 2**70)
_bounds = st.none() | _ints
_floats = st.floats(allow_nan=True, allow_infinity=True)
# Every code point there is, lone surrogates too: names come from files of strangers.
_texts = st.text(st.characters(codec=None, exclude_categories=()), max_size=12)
_numbers = st.floats(allow_nan=False)


@st.composite
def entries(draw: st.DrawFn) -> TensorKappa:
    """Any entry that a ranking accepts: what decides its place in the order is a number, the rest is arbitrary."""
    status = draw(st.sampled_from(["ok", "rank_deficient", "bounded", "non_finite"]))
    return TensorKappa(
        name=draw(_texts),
        aliases=tuple(draw(st.lists(_texts, max_size=2))),
        part=draw(_texts),
        index=tuple(draw(st.lists(_ints | st.builds(slice, _bounds, _bounds, _bounds), max_size=3))),
        layer=draw(st.none() | _ints),
        group=draw(_texts),
        shape=(draw(st.integers(0, 2**40)), draw(st.integers(0, 2**40))),
        dtype=draw(_texts),
        numel=draw(st.integers(0, 2**70)),
        kappa=draw(_floats),
        lower=draw(_numbers if status == "bounded" else _floats),
        upper=draw(_floats),
        sigma_max=draw(_floats),
        sigma_min=draw(_floats),
        score=draw(_numbers if status in ("ok", "rank_deficient") else _floats),
        certified=draw(st.booleans()),
        method=draw(_texts),
        sensitivity=draw(_floats),
        status=status,
        quantization=draw(st.none() | _texts),
    )


@st.composite
def statistics(draw: st.DrawFn) -> dict[str, float | None]:
    """Statistics that do not contradict each other, some or all of them unknown."""
    above_one = st.none() | st.floats(1, allow_nan=False)
    found: dict[str, float | None] = {
        name: draw(above_one) for name in ("stable_rank", "participation_ratio", "demmel", "frobenius")
    }
    if draw(st.booleans()):
        below_zero = st.floats(max_value=0, allow_nan=False)
        names = ("flatness_lower", "flatness", "flatness_upper")
        found |= zip(names, sorted(draw(st.tuples(below_zero, below_zero, below_zero))), strict=True)
        found["flatness_by_shape"] = draw(st.none() | _numbers)
    return found


@st.composite
def consistent_entries(draw: st.DrawFn) -> TensorKappa:
    """Any entry that a file may hold: its numbers do not contradict each other."""
    entry = draw(entries())
    above_one = st.floats(1, allow_nan=False, allow_infinity=False)
    lower, kappa, upper = sorted(draw(st.tuples(above_one, above_one, above_one)))
    least, most = sorted(draw(st.tuples(st.floats(0, allow_nan=False), st.floats(0, allow_nan=False))))
    known = {"ok": (kappa, lower, upper), "rank_deficient": (math.inf, lower, math.inf)}
    known |= {"bounded": (math.nan, lower, math.inf), "non_finite": (math.nan, math.nan, math.nan)}
    found = known[entry.status]
    settled = entry.status in ("ok", "rank_deficient")
    return replace(
        entry,
        numel=math.prod(entry.shape),
        kappa=found[0],
        lower=found[1],
        upper=found[2],
        sigma_max=draw(st.sampled_from([most, math.nan])),
        sigma_min=least,
        certified=settled and entry.certified,
        sensitivity=draw(st.floats(0)),
        **draw(statistics()),
    )


entry_lists = st.lists(entries(), max_size=5, unique_by=lambda entry: entry.key)
consistent_lists = st.lists(consistent_entries(), max_size=5, unique_by=lambda entry: entry.key)
skipped = st.builds(Skipped, _texts, st.lists(st.integers(0, 2**40), max_size=4).map(tuple), _texts)
plain_json = st.recursive(
    st.none() | st.booleans() | _ints | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(_texts, children, max_size=3),
    max_leaves=8,
)
metadata = st.dictionaries(_texts, plain_json, max_size=3)
