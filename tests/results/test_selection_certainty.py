"""Selections of what is not wholly resolved: what a bound, a NaN or an interval leaves open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_entries import bounded, make_entry, non_finite
from selections import TEN, around, outcome, ranking, resolved_entries

from kappa_fast.errors import OptionError
from kappa_fast.results.entries import TensorKappa
from kappa_fast.results.ranking import Ranking
from kappa_fast.results.selection import Selection


def test_rank_deficient_entries_come_last_and_only_counts_reach_them():
    whole = ranking([make_entry("d", math.inf), make_entry("a", 5.0), make_entry("b", 1e9)])
    assert whole.select(num_tensors=2).keys == ("a", "b")
    assert whole.select(num_tensors=3).keys == ("a", "b", "d")
    assert whole.select(top_p=1.0).keys == ("a", "b", "d")
    assert whole.select(max_kappa=1e300).keys == ("a", "b")
    assert whole.select(max_params=1.0).keys == ("a", "b")
    for budget in ({"max_kappa": 1e300}, {"max_params": 1.0}):
        with pytest.raises(OptionError, match="no matrix of full rank is resolved; num_tensors and top_p select"):
            ranking([make_entry("d", math.inf)]).select(**budget)


def test_non_finite_entries_are_never_selected_but_count_for_top_p():
    whole = ranking([make_entry("a", 5.0), make_entry("b", 6.0), non_finite("n"), non_finite("m")])
    assert whole.select(num_tensors=4).keys == ("a", "b")
    assert whole.select(top_p=0.5).keys == ("a", "b")
    assert whole.select(max_kappa=1e300).keys == ("a", "b")
    assert whole.select(max_params=1.0).keys == ("a", "b")


def test_one_bad_matrix_decides_for_its_unit():
    entries = [make_entry("a", 2.0, part=".q"), non_finite("a", part=".k"), make_entry("b", 9.0, part=".q")]
    entries += [make_entry("b", math.inf, part=".k"), make_entry("c", 50.0)]
    whole = ranking(entries)
    assert whole.select(num_tensors=1, unit="parameter").names == ("c",)
    assert whole.select(num_tensors=3, unit="parameter").names == ("b", "c")


def resolved_to(entries: Sequence[TensorKappa], top: int, slack: float) -> list[TensorKappa]:
    """What rank(top=top) gives: for the rest a lower bound between the last of the top and their own kappa."""
    ordered = list(Ranking(entries))
    cutoff = ordered[min(top, len(ordered)) - 1].kappa
    return [
        *ordered[:top],
        *(bounded(e.name, cutoff + slack * (e.kappa - cutoff), group=e.group, shape=e.shape) for e in ordered[top:]),
    ]


def test_a_selection_beyond_what_was_resolved_says_which_top_it_needs():
    part = ranking(resolved_to(TEN, 3, 0.5))
    assert part.select(num_tensors=3).keys == ("w0", "w1", "w2")
    with pytest.raises(
        OptionError, match=r"select\(num_tensors=5\) reaches beyond .*: rank again with top=5, or select less"
    ):
        part.select(num_tensors=5)
    with pytest.raises(OptionError, match=r"select\(top_p=0\.4\) reaches beyond .*: rank again with top=4,"):
        part.select(top_p=0.4)
    with pytest.raises(OptionError, match="rank again without top"):
        part.select(num_tensors=99)
    with pytest.raises(OptionError, match=r"top=5, top_per_group=True"):
        part.select(num_tensors=5, per_group=True)
    with pytest.raises(OptionError, match=r"top=0\.5, top_per_group=True"):
        part.select(top_p=0.5, per_group=True)
    with pytest.raises(OptionError, match=r"select\(max_params=1\.0\) .* without top"):
        part.select(max_params=1.0)
    with pytest.raises(OptionError, match=r"select\(max_kappa=5\) .* with top=6"):
        ranking(
            [*TEN[:3], bounded("x", 4.5), bounded("y", 4.9), *(bounded(f"z{i}", 6.0 + i) for i in range(5))]
        ).select(max_kappa=5)


@given(
    resolved_entries(),
    st.integers(1, 12),
    st.floats(0.0, 1.0),
    st.sampled_from(
        [
            *({"num_tensors": 3}, {"top_p": 0.5}, {"max_kappa": 4.0}, {"max_params": 60}, {"max_params": 0.3}),
            *(
                {"max_params": 60, "fill": True},
                {"max_params": 60, "max_kappa": 4.0},
                {"num_tensors": 3, "max_kappa": 9.0},
            ),
            {"top_p": 0.5, "max_params": 0.3, "max_kappa": 100.0, "fill": True},
        ]
    ),
)
def test_a_partly_resolved_ranking_selects_what_the_whole_one_does_or_names_a_top_that_does(
    entries, top, slack, budget
):
    expected = outcome(ranking(entries), **budget)
    part = outcome(ranking(resolved_to(entries, top, slack)), **budget)
    if isinstance(part, str) and "rank again" in part:
        advised = part.partition("with top=")[2].partition(",")[0]
        top = int(advised) if advised else len(entries)
        part = outcome(ranking(resolved_to(entries, top, slack)), **budget)
    if isinstance(expected, Selection):
        assert isinstance(part, Selection), part
        assert part.keys == expected.keys
    else:
        assert isinstance(part, str)
        assert "selects nothing" in part


def test_a_bound_beyond_the_cut_does_not_matter():
    part = ranking([make_entry("a", 2.0), make_entry("b", 3.0), bounded("c", 2.5), bounded("d", 9.0)])
    assert part.select(num_tensors=1).keys == ("a",)
    assert part.select(max_kappa=2.2).keys == ("a",)
    with pytest.raises(OptionError, match="with top=2"):
        part.select(num_tensors=2)


def test_a_unit_with_an_unresolved_matrix_is_bounded():
    entries = [
        make_entry("a", 4.0, part=".q"),
        make_entry("a", 4.0, part=".k"),
        make_entry("b", 2.0, part=".q"),
        bounded("b", 8.5, part=".k"),
    ]
    # b is at least sqrt(2 * 8.5) = 4.12.
    assert ranking(entries).select(num_tensors=1, unit="parameter").names == ("a",)
    with pytest.raises(OptionError, match="rank again without top"):
        ranking(entries).select(num_tensors=2, unit="parameter")
    undecided = [*entries[:3], bounded("b", 7.5, part=".k")]
    with pytest.raises(OptionError, match="rank again without top"):
        ranking(undecided).select(num_tensors=1, unit="parameter")


def test_a_ranking_resolved_per_group_selects_per_group_and_not_across():
    entries = [make_entry("q0", 100.0, group="q"), make_entry("m0", 2.0, group="m")]
    entries += [bounded("q1", 110.0, group="q"), bounded("m1", 3.0, group="m")]
    assert ranking(entries).select(num_tensors=1, per_group=True).keys == ("m0", "q0")
    assert ranking(entries).select(num_tensors=1).keys == ("m0",)
    with pytest.raises(OptionError, match="with top=2, or"):
        ranking(entries).select(num_tensors=2)


def test_bounds_of_kappa_decide_nothing_where_another_score_orders():
    part = ranking([make_entry("a", 5.0, score=1.0), bounded("b", 7.0)])
    with pytest.raises(OptionError, match="rank again without top"):
        part.select(num_tensors=1)
    assert part.select(max_kappa=6.0).keys == ("a",)


def test_an_interrupted_ranking_warns_and_is_never_certain():
    with pytest.warns(UserWarning, match="the ranking was interrupted, so matrices .* may be missing") as caught:
        selection = ranking(TEN, partial=True).select(num_tensors=3)
    assert caught[0].filename == __file__
    assert not selection.boundary_certain


def test_the_boundary_is_certain_if_no_interval_straddles_it():
    entries = [around("a", 10.0, 0.01), around("b", 10.1, 0.01), around("c", 20.0, 0.01)]
    certain = [ranking(entries).select(num_tensors=count).boundary_certain for count in (1, 2, 3)]
    assert certain == [False, True, True]
    assert ranking([*entries[:2], bounded("c", 20.0)]).select(num_tensors=2).boundary_certain
    assert not ranking([*entries[:2], bounded("c", 10.15)]).select(num_tensors=2).boundary_certain


def test_the_boundary_of_max_kappa_is_its_value():
    entries = [around("a", 10.0, 0.01), around("b", 11.0, 0.01)]
    assert ranking(entries).select(max_kappa=10.5).boundary_certain
    assert not ranking(entries).select(max_kappa=10.05).boundary_certain
    assert not ranking(entries).select(max_kappa=10.95).boundary_certain


def test_the_boundary_of_max_params_needs_to_know_what_did_not_fit():
    big, small = around("big", 20.0, 0.01, shape=(9, 9)), around("small", 20.1, 0.01, shape=(2, 2))
    entries = [around("a", 10.0, 0.01, shape=(4, 4)), big, small]
    # Were small ahead of big, it would fit: big is not certainly the one to stop at.
    assert ranking(entries).select(max_params=30).keys == ("a",)
    assert not ranking(entries).select(max_params=30).boundary_certain
    assert ranking(entries).select(max_params=17).boundary_certain
    assert ranking([*entries[:2], around("small", 30.0, 0.01, shape=(2, 2))]).select(max_params=30).boundary_certain


def test_which_group_gets_what_the_shares_leave_is_certain_only_if_the_next_matrices_are():
    # Eight weights remain: too few for w1, enough for w5, which may well come first.
    vague = [around("w1", 3.89, 0.01, group="k", shape=(9, 1)), around("w5", 3.9, 0.01, group="k", shape=(6, 1))]
    exact = [make_entry("w3", 1.0, group="q", shape=(4, 1)), make_entry("w4", 2.0, group="q", shape=(40, 1))]
    selection = ranking([*vague, *exact]).select(max_params=12, per_group=True)
    assert selection.keys == ("w3",)
    assert not selection.boundary_certain
    truth = [make_entry("w1", 3.9, group="k", shape=(9, 1)), make_entry("w5", 3.89, group="k", shape=(6, 1)), *exact]
    assert ranking(truth).select(max_params=12, per_group=True).keys == ("w3", "w5")
    apart = [vague[0], around("w5", 4.9, 0.01, group="k", shape=(6, 1))]
    assert ranking([*apart, *exact]).select(max_params=12, per_group=True).boundary_certain


def test_a_tie_between_groups_is_certain_only_if_the_keys_that_break_it_are():
    def with_q(*kappas: TensorKappa) -> Selection:
        q = [make_entry("w1", 1.0, group="q", shape=(4, 1)), *kappas]
        k = [make_entry(f"w{i}", float(i), group="k", shape=(4, 1)) for i in (3, 4, 5)]
        return ranking([*q, *k]).select(max_params=12, per_group=True)

    def pair(two: float, eight: float, width: float) -> list[TensorKappa]:
        return [around(f"w{i}", x, width, group="q", shape=(4, 1)) for i, x in ((2, two), (8, eight))]

    # The next of k is w4. As the next of q, w2 comes before it and w8 does not.
    assert set(with_q(*pair(5.0, 4.9, 0.0)).keys) == {"w1", "w3", "w4"}
    assert set(with_q(*pair(4.9, 5.0, 0.0)).keys) == {"w1", "w3", "w2"}
    assert with_q(*pair(5.0, 4.9, 0.0)).boundary_certain
    assert not with_q(*pair(5.0, 4.9, 0.1)).boundary_certain
    assert not with_q(*pair(4.9, 5.0, 0.1)).boundary_certain


def test_a_group_of_unequal_matrices_may_get_what_the_shares_leave_for_certain():
    entries = [make_entry(f"w{i}", 1.0 + i, group="q", shape=(size, 1)) for i, size in enumerate((4, 6, 9))]
    entries += [make_entry(f"v{i}", 1.0 + i, group="k", shape=(8, 1)) for i in range(2)]
    selection = ranking(entries).select(max_params=18, per_group=True)
    assert selection.keys == ("v0", "w0", "w1")
    assert selection.boundary_certain


@given(resolved_entries(), st.data())
def test_a_certain_selection_is_what_any_true_kappas_within_the_intervals_would_give(entries, data):
    widths = [data.draw(st.sampled_from([0.0, 0.01, 0.3])) for _ in entries]
    known = [around(e.name, e.kappa, w, group=e.group, shape=e.shape) for e, w in zip(entries, widths, strict=True)]
    truth = [
        make_entry(e.name, data.draw(st.floats(max(1.0, e.lower), e.upper)), group=e.group, shape=e.shape)
        for e in known
    ]
    budgets: list[dict[str, Any]] = [{"num_tensors": 2}, {"top_p": 0.5}, {"max_kappa": 4.0}, {"max_params": 50}]
    budgets += [{"max_params": 50, "fill": True}, {"max_params": 50, "max_kappa": 4.0, "fill": True}]
    budget = data.draw(st.sampled_from(budgets))
    per_group = data.draw(st.booleans())
    selection = outcome(ranking(known), per_group=per_group, **budget)
    if isinstance(selection, Selection) and selection.boundary_certain:
        expected = ranking(truth).select(per_group=per_group, **budget)
        assert set(selection.keys) == set(expected.keys)


def test_another_score_is_certain_only_if_kappas_are_exact_or_nothing_is_left():
    exact = [make_entry("a", 5.0, score=1.0), make_entry("b", 6.0, score=0.5)]
    vague = [around("a", 5.0, 0.01, score=1.0), around("b", 6.0, 0.01, score=0.5)]
    assert ranking(exact).select(num_tensors=1).boundary_certain
    assert not ranking(vague).select(num_tensors=1).boundary_certain
    assert ranking(vague).select(num_tensors=2).boundary_certain


def test_units_are_certain_by_the_means_of_their_intervals():
    entries = [around("a", 10.0, 0.05, part=part) for part in (".q", ".k")]
    entries += [around("b", 11.5, 0.05, part=part) for part in (".q", ".k")]
    assert ranking(entries).select(num_tensors=1, unit="parameter").boundary_certain
    entries[-1] = around("b", 11.5, 0.3, part=".k")
    assert not ranking(entries).select(num_tensors=1, unit="parameter").boundary_certain
