from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from dataclasses import FrozenInstanceError, replace

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_entries import make_entry, non_finite
from selections import TEN, outcome, ranking, resolved_entries

from kappa_fast.errors import OptionError
from kappa_fast.results.cuts import fraction_count
from kappa_fast.results.entries import TensorKappa
from kappa_fast.results.ranking import Ranking
from kappa_fast.results.units import expert_of, geometric_mean

BUDGETS = ("num_tensors", "top_p", "max_kappa", "max_params")


def test_no_budget_is_refused():
    with pytest.raises(
        OptionError, match="takes one or more of num_tensors, top_p, max_kappa, max_params, and got none"
    ):
        ranking(TEN).select()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_tensors", [0, -1, 2.0, True, "3", math.nan]),
        ("top_p", [0, 0.0, 1.1, -0.1, math.nan, True, "0.2", 2]),
        ("max_kappa", [0.99, -1, math.inf, math.nan, "5", True]),
        ("max_params", [0, -5, 0.0, 1.5, -0.1, math.nan, True, "10", math.inf]),
    ],
)
def test_a_budget_out_of_its_range_is_refused(name, values):
    for value in values:
        with pytest.raises(OptionError, match=rf"{name}=.*: give a "):
            ranking(TEN).select(**{name: value})


def test_an_unknown_unit_is_refused():
    with pytest.raises(OptionError, match="unit='layer' is unknown: use one of 'matrix', 'expert', 'parameter'"):
        ranking(TEN).select(num_tensors=1, unit="layer")


def test_nothing_to_select_is_an_error_that_says_why():
    with pytest.raises(OptionError, match="nothing to select: the ranking has no entries"):
        ranking([]).select(num_tensors=1)
    with pytest.raises(OptionError, match="nothing to select: the ranking has only entries with a nan or inf"):
        ranking([non_finite("a")]).select(num_tensors=1)


def test_num_tensors_takes_that_many_or_all_there_are():
    assert ranking(TEN).select(num_tensors=3).keys == ("w0", "w1", "w2")
    assert len(ranking(TEN).select(num_tensors=99)) == 10


@pytest.mark.parametrize(("top_p", "count"), [(0.05, 1), (0.1, 1), (0.29, 2), (0.3, 3), (0.999, 9), (1.0, 10), (1, 10)])
def test_top_p_rounds_down_and_takes_at_least_one(top_p, count):
    assert len(ranking(TEN).select(top_p=top_p)) == count


@given(st.integers(1, 500), st.floats(0.0, 1.0, exclude_min=True))
def test_a_fraction_means_as_many_as_it_does_for_peft(size, fraction):
    # The rule of KappaTuneSelector.get_best_targets(top_p=...).
    assert fraction_count(size, fraction) == max(1, int(size * fraction))
    assert 1 <= fraction_count(size, fraction) <= size


@given(resolved_entries(), st.integers(1, 14))
def test_the_selected_are_a_prefix_of_the_ranking(entries, count):
    whole = ranking(entries)
    assert whole.select(num_tensors=count).entries == whole.entries[:count]


@given(resolved_entries(), st.randoms(), st.sampled_from(["matrix", "expert", "parameter"]), st.booleans())
def test_the_order_of_the_entries_that_came_in_changes_no_selection(entries, chance, unit, per_group):
    shuffled = list(entries)
    chance.shuffle(shuffled)
    for budget in ({"top_p": 0.4}, {"max_params": 0.7}):
        assert outcome(ranking(shuffled), unit=unit, per_group=per_group, **budget) == outcome(
            ranking(entries), unit=unit, per_group=per_group, **budget
        )


def test_ties_are_broken_by_key():
    assert ranking([make_entry("b", 3.0), make_entry("a", 3.0)]).select(num_tensors=1).keys == ("a",)


@given(resolved_entries(), st.floats(1.0, 1e6))
def test_max_kappa_takes_exactly_those_up_to_it(entries, value):
    expected = {entry.key for entry in entries if entry.kappa <= value}
    if expected:
        assert set(ranking(entries).select(max_kappa=value).keys) == expected
    else:
        with pytest.raises(OptionError, match=r"select\(max_kappa=.*\) selects nothing: the smallest kappa is"):
            ranking(entries).select(max_kappa=value)


def test_max_kappa_reads_kappa_where_the_ranking_is_sorted_by_another_score():
    scored = ranking(
        [make_entry("a", 50.0, score=1.0), make_entry("b", 5.0, score=2.0), make_entry("c", 4.0, score=3.0)]
    )
    assert scored.select(max_kappa=10).keys == ("b", "c")
    assert scored.select(num_tensors=2).keys == ("a", "b")


@given(resolved_entries(), st.integers(1, 400))
def test_max_params_takes_the_longest_prefix_that_fits(entries, budget):
    whole = ranking(entries)
    sums = list(itertools.accumulate(entry.numel for entry in whole))
    count = sum(total <= budget for total in sums)
    if count:
        selection = whole.select(max_params=budget)
        assert selection.entries == whole.entries[:count]
        assert selection.num_params == sums[count - 1] <= budget
    else:
        message = rf"{budget} weights have no room for {whole[0].key} with {sums[0]}, .* something is {sums[0]}$"
        with pytest.raises(OptionError, match=message):
            whole.select(max_params=budget)
        assert whole.select(max_params=sums[0]).keys == (whole[0].key,)


def test_max_params_stops_at_the_first_that_does_not_fit_even_if_a_later_one_would():
    entries = [
        make_entry("a", 1.0, shape=(4, 4)),
        make_entry("big", 2.0, shape=(40, 40)),
        make_entry("c", 3.0, shape=(4, 4)),
    ]
    assert ranking(entries).select(max_params=100).keys == ("a",)


def test_a_fraction_is_of_all_parameters_of_the_model():
    whole = Ranking(
        [make_entry("a", 2.0, shape=(10, 10)), make_entry("b", 3.0, shape=(10, 10))], (), {"num_parameters": 1000}
    )
    assert whole.select(max_params=0.2).keys == ("a", "b")
    assert whole.select(max_params=0.1999).keys == ("a",)
    assert whole.select(max_params=1.0).keys == ("a", "b")
    with pytest.raises(OptionError, match="1 weights have no room for a with 100"):
        whole.select(max_params=1)


@pytest.mark.parametrize("metadata", [{}, {"num_parameters": None}, {"num_parameters": 0}])
def test_a_fraction_of_an_unknown_number_is_refused(metadata):
    with pytest.raises(
        OptionError, match=r"max_params=0\.5 is a fraction, but metadata\['num_parameters'\] does not say"
    ):
        Ranking(TEN, (), metadata).select(max_params=0.5)
    assert Ranking(TEN, (), metadata).select(max_params=32).keys == ("w0",)


def test_max_params_on_the_file_of_the_reference_implementation_says_that_sizes_are_unknown(tmp_path):
    (tmp_path / "c.json").write_text('{"a": 2.0, "b": 3.0}')
    whole = Ranking.from_json(tmp_path / "c.json")
    with pytest.raises(OptionError, match=r"the size of a is unknown \(method 'reference'\): rank the model itself"):
        whole.select(max_params=0.5)
    selection = whole.select(top_p=0.5)
    assert selection.keys == ("a",)
    assert not selection.boundary_certain
    assert (selection.num_params, "sizes unknown" in repr(selection)) == (0, True)


@given(resolved_entries(), st.integers(1, 4))
def test_per_group_is_the_same_as_selecting_in_each_group(entries, count):
    together = set(ranking(entries).select(num_tensors=count, per_group=True).keys)
    for group in {entry.group for entry in entries}:
        members = [entry for entry in entries if entry.group == group]
        alone = set(ranking(members).select(num_tensors=count).keys)
        assert {entry.key for entry in members} & together == alone


@given(resolved_entries(), st.integers(1, 400))
def test_per_group_shares_max_params_out_by_the_weights_of_each_group(entries, budget):
    whole = ranking(entries)
    total = sum(entry.numel for entry in entries)
    groups = [[entry for entry in whole if entry.group == group] for group in {entry.group for entry in entries}]
    if isinstance(selection := outcome(whole, max_params=budget, per_group=True), str):
        assert re.search(r"smallest max_params that selects something is \d+$", selection)
        enough = int(selection.split()[-1])
        assert len(whole.select(max_params=enough, per_group=True)) >= 1
        with pytest.raises(OptionError):
            whole.select(max_params=enough - 1, per_group=True)
        return
    assert selection.num_params <= budget
    left = budget - selection.num_params
    for members in groups:
        share = budget * sum(entry.numel for entry in members) // total
        sums = [0, *itertools.accumulate(entry.numel for entry in members)]
        floor = sum(taken <= share for taken in sums) - 1
        taken = [entry in selection for entry in members]
        assert taken == sorted(taken, reverse=True)  # the lowest of the group
        assert floor <= sum(taken) <= floor + 1  # what the share says, rounded down or up
        if sum(taken) == floor < len(members):
            assert members[floor].numel > left  # nothing is left over that would fit
    assert list(selection) == [entry for entry in whole if entry.key in selection.keys]


def test_twenty_percent_per_group_are_twenty_percent():
    entries = [
        make_entry(f"layers.{layer}.{name}", 2.0 + layer, group=name, shape=(4, 4), layer=layer)
        for name in ("q", "k", "v", "o", "gate", "up", "down")
        for layer in range(8)
    ]
    selection = ranking(entries).select(max_params=0.2, per_group=True)
    assert selection.share == 11 / 56  # 7/56 where every group rounds its 1.6 down
    assert {sum(e.group == group for e in selection) for group in {e.group for e in entries}} == {1, 2}
    assert selection.boundary_certain
    assert selection.took() == "11 of 56 in 7 groups: 19.6%"
    assert "11 of 56 in 7 groups: 19.6%" in repr(selection)
    assert ranking(entries).select(top_p=0.2, per_group=True).took() == "7 of 56 in 7 groups: 12.5%"
    assert ranking(entries).select(top_p=0.2).took() == ""


def test_top_p_per_group_counts_in_each_group():
    entries = [make_entry(f"q{i}", 100.0 + i, group="q") for i in range(4)]
    entries += [make_entry(f"m{i}", 2.0 + i, group="m") for i in range(10)]
    selected = ranking(entries).select(top_p=0.25, per_group=True)
    assert selected.keys == ("m0", "m1", "q0")


def fused_experts() -> list[TensorKappa]:
    """Two fused experts and an attention matrix; expert 1 has the lowest matrix, expert 0 the lower mean."""
    parts = {"gate_up_proj": (".gate", ".up"), "down_proj": ("",)}
    kappas = {0: iter([4.0, 4.0, 4.0]), 1: iter([2.0, 8.0, 9.0])}
    entries = [
        make_entry(
            f"layers.0.mlp.experts.{name}",
            next(kappas[expert]),
            part=f"[{expert}]{half}",
            group=f"{name}{half}",
            shape=(8, 4),
        )
        for name, halves in parts.items()
        for expert in (0, 1)
        for half in halves
    ]
    return [*entries, make_entry("layers.0.self_attn.q_proj.weight", 5.0, group="q", shape=(4, 4))]


def test_an_expert_is_taken_as_a_whole_by_the_geometric_mean_of_its_matrices():
    whole = ranking(fused_experts())
    assert whole.select(num_tensors=1).keys == ("layers.0.mlp.experts.gate_up_proj[1].gate",)
    selection = whole.select(num_tensors=1, unit="expert")
    assert sorted(selection.keys) == [
        "layers.0.mlp.experts.down_proj[0]",
        "layers.0.mlp.experts.gate_up_proj[0].gate",
        "layers.0.mlp.experts.gate_up_proj[0].up",
    ]
    assert set(selection.names) == {"layers.0.mlp.experts.down_proj", "layers.0.mlp.experts.gate_up_proj"}
    # (2 * 8 * 9)^(1/3) = 5.24: the attention matrix comes before the other expert.
    assert len(whole.select(num_tensors=2, unit="expert")) == 4
    assert len(whole.select(max_kappa=5.24, unit="expert")) == 4
    assert len(whole.select(max_kappa=5.25, unit="expert")) == 7
    assert len(whole.select(max_params=3 * 32 + 15, unit="expert")) == 3


def test_a_parameter_is_taken_as_a_whole():
    selection = ranking(fused_experts()).select(num_tensors=1, unit="parameter")
    assert selection.names == ("layers.0.mlp.experts.gate_up_proj",)
    assert len(selection) == 4


def test_experts_of_one_kind_share_a_group():
    whole = ranking(fused_experts())
    selection = whole.select(num_tensors=1, unit="expert", per_group=True)
    assert len(selection) == 4
    assert "layers.0.self_attn.q_proj.weight" in selection.keys


@pytest.mark.parametrize(
    ("name", "part", "expert"),
    [
        ("model.layers.7.mlp.experts.gate_up_proj", "[3].gate", "model.layers.7.mlp.experts[3]"),
        ("model.layers.7.mlp.experts.gate_up_proj", "[3].up", "model.layers.7.mlp.experts[3]"),
        ("model.layers.7.mlp.experts.down_proj", "[3]", "model.layers.7.mlp.experts[3]"),
        ("model.layers.7.mlp.experts.3.gate_proj.weight", "", "model.layers.7.mlp.experts[3]"),
        ("model.layers.7.mlp.experts.3.gate_up_proj.weight", ".gate", "model.layers.7.mlp.experts[3]"),
        ("model.layers.7.block_sparse_moe.experts.31.w1.weight", "", "model.layers.7.block_sparse_moe.experts[31]"),
        ("encoder.block.1.layer.1.mlp.experts.expert_5.wi.weight", "", "encoder.block.1.layer.1.mlp.experts[5]"),
        ("transformer.blocks.2.ffn.experts.mlp.w1", "[4]", "transformer.blocks.2.ffn.experts[4]"),
        ("model.layers.0.block_sparse_moe.input_linear.weight", "[2]", "model.layers.0.block_sparse_moe[2]"),
        ("model.layers.0.block_sparse_moe.output_linear.weight", "[2]", "model.layers.0.block_sparse_moe[2]"),
        ("experts.0.weight", "", "experts[0]"),
        ("mlp.experts", "[0]", "mlp.experts[0]"),
        ("features.conv1.weight", "[2]", "features.conv1.weight[2]"),
        ("model.layers.7.mlp.shared_experts.gate_proj.weight", "", None),
        ("model.layers.7.mlp.shared_experts.0.gate_proj.weight", "", None),
        ("model.layers.7.self_attn.qkv_proj.weight", ".q", None),
    ],
)
def test_the_expert_of_a_matrix_is_read_from_its_name(name, part, expert):
    assert expert_of(make_entry(name, part=part)) == expert


def test_fused_and_unfused_checkpoints_select_the_same_experts():
    fused = ranking(fused_experts()).select(num_tensors=2, unit="expert")
    single = [
        replace(
            entry,
            name=entry.name.replace("experts.", f"experts.{entry.part[1]}.") + f".{entry.part[4:]}.weight",
            part="",
        )
        if entry.part
        else entry
        for entry in fused_experts()
    ]
    unfused = ranking(single).select(num_tensors=2, unit="expert")
    assert sorted(entry.kappa for entry in fused) == sorted(entry.kappa for entry in unfused)


@given(st.lists(st.floats(1e-300, 1.7976931348623157e308), min_size=1, max_size=6), st.randoms())
def test_the_geometric_mean_lies_between_its_numbers_in_any_order(values, chance):
    mean = geometric_mean(values)
    shuffled = list(values)
    chance.shuffle(shuffled)
    assert geometric_mean(shuffled) == mean
    assert min(values) * (1 - 1e-12) <= mean
    assert mean / (1 + 1e-12) <= max(values)
    exact = mpmath.root(mpmath.fprod(mpmath.mpf(value) for value in values), len(values))
    assert abs(mean - exact) <= 1e-12 * exact


def test_scores_without_a_geometric_mean_are_refused_for_units_of_several_matrices():
    entries = [make_entry("a", 5.0, part=".q", score=-1.0), make_entry("a", 6.0, part=".k", score=2.0)]
    with pytest.raises(OptionError, match=r"the scores of a have no geometric mean, because one of them is -1\.0"):
        ranking(entries).select(num_tensors=1, unit="parameter")
    assert ranking(entries).select(num_tensors=1).keys == ("a.q",)


def test_a_selection_tells_names_keys_sizes_and_kappas():
    entries = [
        make_entry("experts.w1", 2.0, part="[0]"),
        make_entry("q", 3.0),
        make_entry("experts.w1", 4.0, part="[1]"),
        make_entry("other", 9.0),
    ]
    selection = ranking(entries, source={"fingerprint": "f00"}).select(num_tensors=3)
    assert len(selection) == 3
    assert list(selection) == list(selection.entries)
    assert selection.keys == ("experts.w1[0]", "q", "experts.w1[1]")
    assert selection.names == ("experts.w1", "q")
    assert selection.num_params == 3 * 512
    assert selection.kappa_range == (2.0, 4.0)
    assert dict(selection.settings) == {
        "budget": "num_tensors",
        "value": 3,
        "per_group": False,
        "unit": "matrix",
        "source": {"fingerprint": "f00"},
        "num_parameters": 2048,
    }
    assert repr(selection) == (
        "Selection(3 matrices of 2 parameters; 1,536 weights (75.0000% of the model); kappa 2 to 4; num_tensors=3; "
        "boundary certain)"
    )


def test_excluding_drops_entries_by_key_name_or_alias_and_keeps_the_patterns():
    entries = [
        make_entry("a", 2.0, part="[0]"),
        make_entry("a", 3.0, part="[1]"),
        make_entry("embed", 4.0, aliases=("lm_head",)),
    ]
    selection = ranking(entries).select(num_tensors=3)
    assert selection.excluding(r"\[0\]").keys == ("a[1]", "embed")
    assert selection.excluding("^a$").keys == ("embed",)
    assert selection.excluding("lm_head").keys == ("a[0]", "a[1]")
    both = selection.excluding("lm_head").excluding("norm", "bias")
    assert both.exclude == ("lm_head", "norm", "bias")
    assert len(selection) == 3
    assert "excluding lm_head, norm, bias" in repr(both)


def test_excluding_everything_leaves_an_empty_selection():
    empty = ranking(TEN).select(num_tensors=2).excluding("w").including("norm")
    assert (len(empty), empty.names, empty.num_params) == (0, (), 0)
    assert all(math.isnan(value) for value in empty.kappa_range)
    assert "including norm; excluding w" in repr(empty)


def test_including_keeps_the_patterns_for_the_model():
    selection = ranking(TEN).select(num_tensors=2)
    more = selection.including("embed_tokens").including(r"norm\.weight$", "bias")
    assert more.include == ("embed_tokens", r"norm\.weight$", "bias")
    assert more.entries == selection.entries
    assert selection.include == ()


@pytest.mark.parametrize("pattern", ["(", "*", 3, None])
@pytest.mark.parametrize("method", ["including", "excluding"])
def test_a_pattern_that_is_no_regular_expression_is_refused(method, pattern):
    selection = ranking(TEN).select(num_tensors=2)
    with pytest.raises(OptionError, match=r"is not a regular expression \(.*\): re\.escape\(name\) makes one"):
        getattr(selection, method)(pattern)


def test_nothing_in_a_selection_can_be_changed():
    selection = ranking(TEN).select(num_tensors=2)
    with pytest.raises(FrozenInstanceError):
        selection.entries = ()
    with pytest.raises(TypeError):
        selection.settings["value"] = 3
    with pytest.raises(TypeError):
        hash(selection)


def test_copies_and_pickles_are_equal_and_other_things_are_not():
    selection = ranking(TEN).select(num_tensors=2).including("norm")
    assert pickle.loads(pickle.dumps(selection)) == selection
    assert copy.deepcopy(selection) == selection
    assert selection != ranking(TEN).select(num_tensors=2)
    assert selection != selection.entries


@pytest.mark.parametrize("name", BUDGETS)
def test_every_budget_is_remembered_as_it_was_given(name):
    value = {"num_tensors": 2, "top_p": 0.25, "max_kappa": 4.0, "max_params": 0.5}[name]
    selection = ranking(TEN).select(**{name: value})
    assert (selection.settings["budget"], selection.settings["value"]) == (name, value)
