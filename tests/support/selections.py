"""Rankings of made-up entries, and what select() does with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from make_entries import make_entry

from kappa_fast.errors import OptionError
from kappa_fast.results.entries import TensorKappa
from kappa_fast.results.ranking import Ranking
from kappa_fast.results.selection import Selection

TEN = [make_entry(f"w{i}", 2.0 + i, shape=(16, 2 + i)) for i in range(10)]


def ranking(entries: Sequence[TensorKappa], **metadata: Any) -> Ranking:
    return Ranking(entries, (), {"num_parameters": sum(entry.numel for entry in entries), **metadata})


def around(name: str, kappa: float, relative: float, **fields: Any) -> TensorKappa:
    return make_entry(name, kappa, lower=kappa * (1 - relative), upper=kappa * (1 + relative), **fields)


@st.composite
def resolved_entries(draw: st.DrawFn) -> list[TensorKappa]:
    """Resolved entries of several groups and sizes, with ties."""
    kappas = draw(st.lists(st.sampled_from([2.0, 3.0, 3.0, 4.5]) | st.floats(1.0, 1e6), min_size=1, max_size=12))
    groups, rows = st.sampled_from(["q", "k", "mlp"]), st.integers(1, 9)
    return [
        make_entry(f"w{i}", kappa, group=draw(groups), shape=(draw(rows), draw(rows))) for i, kappa in enumerate(kappas)
    ]


def outcome(whole: Ranking, **budget: Any) -> Selection | str:
    try:
        return whole.select(**budget)
    except OptionError as error:
        return str(error)
