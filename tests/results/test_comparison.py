"""Two rankings compared: what is the same matrix, what changed, and which of the changes are certain."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace

import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_entries import bounded, entry_lists, make_entry, non_finite
from safetensors.torch import load_file

import kappa_fast
from kappa_fast import Ranking, Skipped
from kappa_fast.cli.demo import find_weights
from kappa_fast.results.compare import _same_size, spearman
from kappa_fast.results.comparison import Change
from kappa_fast.results.pairing import pair


def span(name: str, lower: float, upper: float, **fields):
    return make_entry(name, (lower + upper) / 2, lower=lower, upper=upper, **fields)


def keys(changes) -> list[str]:
    return [change.key for change in changes]


@pytest.fixture(scope="module")
def minilm():
    weights = {n: w for n, w in load_file(find_weights()).items() if w.is_floating_point()}
    return weights, kappa_fast.rank(weights, progress=False)


def test_after_two_matrices_of_a_trained_model_were_changed_exactly_those_moved(minilm):
    weights, before = minilm
    up, down = "encoder.layer.2.attention.self.key.weight", "encoder.layer.4.intermediate.dense.weight"
    moved = dict(weights)
    left, sigma, right = torch.linalg.svd(weights[up].double(), full_matrices=False)
    sigma[-1] /= 3
    moved[up] = (left * sigma @ right).float()
    left, sigma, right = torch.linalg.svd(weights[down].double(), full_matrices=False)
    sigma[0] /= 2
    moved[down] = (left * sigma @ right).float()
    found = before.compare(kappa_fast.rank(moved, progress=False))
    assert found.counts == {"identical": 35, "within": 0, "up": 1, "down": 1, "incomparable": 0}
    assert keys(found.moved("up")) == [up]
    assert keys(found.moved("down")) == [down]
    assert found.moved("up")[0].ratio == pytest.approx(3, rel=0.05)
    assert found.moved("up")[0].at_least == pytest.approx(3, rel=0.1)
    assert keys(found.exceeding(2.5)) == [up]
    assert keys(found.exceeding(1.2)) == [up, down]
    assert (found.only_before, found.only_after, found.caveats) == ((), (), ())
    assert 0.9 < found.correlation < 1


def test_a_model_compared_with_itself_is_identical(minilm):
    found = minilm[1].compare(minilm[1])
    assert found.counts["identical"] == len(minilm[1]) == len(found)
    assert found.correlation == 1
    assert found.exceeding(1) == []
    assert found.overlap(max_params=0.2).jaccard == 1


def test_the_same_weights_in_bfloat16_are_compared_with_a_caveat_and_change_in_their_intervals_or_not(minilm):
    weights, before = minilm
    found = before.compare(kappa_fast.rank({n: w.bfloat16() for n, w in weights.items()}, progress=False))
    assert found.caveats == ("dtype is float32 and bfloat16 in 37 matrices: kappa is that of the rounded weights",)
    assert found.counts["identical"] == 0
    assert found.counts["up"] + found.counts["down"] > 0


def test_real_training_moves_what_trains_and_nothing_else():
    model = families.build("mixtral")
    before = kappa_fast.rank(model, progress=False)
    selection = before.select(num_tensors=3)
    optimizer = kappa_fast.wrap(torch.optim.SGD, model, selection, lr=5.0)
    for seed in range(3):
        model(**families.batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = before.compare(kappa_fast.rank(model, progress=False))
    assert {c.key for c in found if c.verdict != "identical"} == set(selection.keys)


@pytest.mark.parametrize(
    ("before", "after", "verdict", "at_least"),
    [
        (span("a", 10, 11), span("a", 12, 13), "up", 12 / 11),
        (span("a", 12, 13), span("a", 10, 11), "down", 12 / 11),
        (span("a", 10, 11), span("a", 11, 12), "within", 1),
        (span("a", 10, 11), span("a", 10, 11), "identical", 1),
        (span("a", 10, 11), bounded("a", 20), "up", 20 / 11),
        (span("a", 10, 30), bounded("a", 20), "within", 1),
        (bounded("a", 20), span("a", 10, 10.5), "down", 20 / 10.5),
        (bounded("a", 20), bounded("a", 20), "identical", 1),
        (bounded("a", 20), bounded("a", 30), "within", 1),
        (span("a", 10, 11), make_entry("a", 1e15, status="rank_deficient"), "up", 1e15 / 11),
        (make_entry("a", math.inf), make_entry("a", math.inf), "identical", 1),
        (span("a", 10, 11), non_finite("a"), "incomparable", math.inf),
        (non_finite("a"), span("a", 10, 11), "incomparable", 1),
        (non_finite("a"), non_finite("a"), "identical", 1),
        (make_entry("a", 10, lower=1, upper=math.inf), span("a", 40, 41), "within", 1),
    ],
)
def test_a_change_is_certain_only_if_the_intervals_do_not_touch(before, after, verdict, at_least):
    change = Change(before, after)
    assert change.verdict == verdict
    assert change.at_least == pytest.approx(at_least)


intervals = st.tuples(st.floats(1, 1e6), st.floats(1, 2)).map(lambda pair: (pair[0], pair[0] * pair[1]))


@given(intervals, intervals, st.floats(0, 1), st.floats(0, 1))
def test_no_pair_of_true_kappas_moved_less_than_what_is_called_certain(a, b, s, t):
    change = Change(span("a", *a), span("a", *b))
    true = (a[0] + s * (a[1] - a[0]), b[0] + t * (b[1] - b[0]))
    ratio = true[1] / true[0]
    assert max(ratio, 1 / ratio) >= change.at_least * (1 - 1e-12)
    if change.verdict in ("up", "down"):
        assert (ratio > 1) == (change.verdict == "up")


@given(entry_lists, entry_lists)
def test_whatever_files_of_strangers_hold_is_compared_or_refused(first, second):
    one, other = Ranking(first), Ranking([*second, *(e for e in first[:2] if e.key not in {s.key for s in second})])
    if not any(_same_size(one.entries[i], other.entries[j]) for i, j in pair(one.entries, other.entries)):
        with pytest.raises(kappa_fast.OptionError, match="in common"):
            one.compare(other)
        return
    found = one.compare(other)
    assert found.to_text()
    assert len(found) + len(found.only_before) == len(one)
    assert len(found) + len(found.only_after) <= len(other)


def ranking(*names: str, **metadata) -> Ranking:
    return Ranking([make_entry(name, 10.0 + i) for i, name in enumerate(names)], (), metadata)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.0.q_proj.weight", "module.model.layers.0.q_proj.weight"),
        ("model.layers.0.q_proj.weight", "_orig_mod.model.layers.0.q_proj.weight"),
        ("model.layers.0.q_proj.weight", "base_model.model.model.layers.0.q_proj.base_layer.weight"),
        ("model.layers.0.q_proj.weight", "model.layers.0._checkpoint_wrapped_module.q_proj.weight"),
        ("_fsdp_wrapped_module.layers.0.q_proj.weight", "module.layers.0.q_proj.weight"),
        ("layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("bert.encoder.layer.0.weight", "encoder.layer.0.weight"),
    ],
)
def test_wrappers_and_base_prefixes_are_seen_through(ours, theirs):
    for a, b in ((ours, theirs), (theirs, ours)):
        first = ranking(*(a.replace(".0.", f".{i}.") for i in range(4)))
        second = ranking(*(b.replace(".0.", f".{i}.") for i in reversed(range(4))))
        found = first.compare(second)
        assert {(c.before.name, c.after.name) for c in found} == {
            (a.replace(".0.", f".{i}."), b.replace(".0.", f".{i}.")) for i in range(4)
        }


def test_parts_of_a_parameter_are_matrices_of_their_own():
    parts = ("[0].gate", "[0].up", "[1].gate")
    one = Ranking([make_entry("mlp.experts.w", part=p, kappa=k) for p, k in zip(parts, (3.0, 4.0, 5.0), strict=True)])
    other = Ranking([make_entry("module.mlp.experts.w", part=p, kappa=7.0) for p in parts[:2]])
    found = one.compare(other)
    assert [(c.before.part, c.after.part) for c in found] == [("[0].gate", "[0].gate"), ("[0].up", "[0].up")]
    assert [lone.key for lone in found.only_before] == ["mlp.experts.w[1].gate"]


def test_tied_names_pair_and_names_that_fit_several_do_not():
    one = Ranking([make_entry("embed.weight", aliases=("head.weight",))])
    other = Ranking([make_entry("head.weight", aliases=("other.weight",))])
    assert len(one.compare(other)) == 1
    twice = Ranking([make_entry("module.a.weight"), make_entry("_orig_mod.a.weight"), make_entry("b.weight")])
    found = Ranking([make_entry("a.weight"), make_entry("b.weight")]).compare(twice)
    assert keys(found) == ["b.weight"]
    assert len(found.only_after) == 2


def test_the_tensor_of_an_expert_on_disk_is_the_part_of_the_parameter_that_lists_it_as_an_alias():
    disk = [f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight" for i in range(3)]
    fused = [
        make_entry("model.layers.0.mlp.experts.gate_up_proj", part=f"[{i}].gate", aliases=(name,), kappa=10.0 + i)
        for i, name in enumerate(disk)
    ]
    found = ranking(*disk).compare(Ranking(fused))
    assert [(c.before.name, c.after.part) for c in found] == [(n, f"[{i}].gate") for i, n in enumerate(disk)]
    assert found.counts["identical"] == 3
    # The other names of a whole parameter are those of all its parts, and so of none.
    parts = [make_entry("w", part=f"[{i}]", aliases=("tied",)) for i in range(2)]
    with pytest.raises(kappa_fast.OptionError, match="no matrix in common"):
        ranking("tied").compare(Ranking(parts))


def test_a_prefix_is_no_reason_to_pair_what_only_looks_alike():
    one = ranking("encoder.layers.0.weight", "encoder.layers.1.weight")
    towers = [f"{tower}.encoder.layers.{i}.weight" for tower in ("text", "vision") for i in (0, 1)]
    with pytest.raises(kappa_fast.OptionError, match="no matrix in common"):
        one.compare(ranking(*towers))
    assert len(one.compare(ranking(*towers[:2], "vision.other.weight"))) == 2
    one = ranking("a.weight", "b.weight", "proj.weight", "c.weight", "d.weight")
    assert keys(one.compare(ranking("a.weight", "vision.proj.weight"))) == ["a.weight"]


def test_no_entry_is_in_two_pairs():
    one = [make_entry("a", aliases=("b", "c")), make_entry("module.b"), make_entry("x.c")]
    other = [make_entry("c", aliases=("a",)), make_entry("b"), make_entry("module.c")]
    pairs = pair(one, other)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)


def test_what_only_one_ranking_has_comes_with_the_reason_of_the_other():
    one = ranking("a.weight", "b.weight", "c.weight")
    other = Ranking([make_entry("a.weight")], [Skipped("b.weight", (32, 16), "excluded by the pattern 'b'")])
    found = one.compare(other)
    assert {(lone.key, lone.reason) for lone in found.only_before} == {
        ("b.weight", "excluded by the pattern 'b'"),
        ("c.weight", ""),
    }
    assert "only in the first: b.weight (skipped in the second: excluded by the pattern 'b')" in str(found)


def test_rankings_of_different_models_are_refused_with_names_of_both():
    with pytest.raises(
        kappa_fast.OptionError, match=r"no matrix in common: the first holds 'a.weight', the second 'z.q'"
    ):
        ranking("a.weight").compare(ranking("z.q"))
    with pytest.raises(kappa_fast.OptionError, match="no matrix in common: the first holds nothing"):
        ranking().compare(ranking("z.q"))
    with pytest.raises(kappa_fast.OptionError, match=r"1 names in common, but each with another shape, such as 'a'"):
        Ranking([make_entry("a")]).compare(Ranking([make_entry("a", shape=(64, 16))]))


@pytest.mark.parametrize("other", [None, "after.json", []])
def test_only_rankings_are_compared(other):
    with pytest.raises(kappa_fast.OptionError, match=r"compare\(\) takes a Ranking, not .*: Ranking.from_json\(path\)"):
        ranking("a").compare(other)


def test_a_matrix_of_another_shape_is_left_out_with_a_caveat_and_a_transposed_one_is_not():
    one = Ranking([make_entry("a"), make_entry("b"), make_entry("c")])
    other = Ranking([make_entry("a", shape=(99, 16)), make_entry("b", shape=(16, 32)), make_entry("c")])
    found = one.compare(other)
    assert keys(found) == ["b", "c"]
    assert found.caveats == ("1 matrices have another shape in the second ranking and are left out, such as 'a'",)
    assert [lone.key for lone in found.only_before] == ["a"]


def test_what_makes_the_comparison_unfair_is_said():
    one = ranking("a", "b", settings={"rtol": 1e-2, "fused": "split", "score": "kappa", "certify": False})
    other = ranking("a", settings={"rtol": 1e-3, "fused": "stored", "score": "mine", "certify": True}, partial=True)
    caveats = one.compare(other).caveats
    assert [caveat.partition(":")[0] for caveat in caveats] == [
        "rtol is 0.01 and 0.001",
        "certify is False and True",
        "fused is 'split' and 'stored'",
        "score is 'kappa' and 'mine'",
        "the second ranking was interrupted",
    ]
    top = Ranking([make_entry("a"), bounded("b", 20)])
    assert one.compare(top).status_changes == ()
    assert one.compare(top).caveats == ("1 matrices of the second ranking are only bounded (top=)",)


def test_a_ranking_of_the_reference_implementation_has_no_certain_change(tmp_path):
    (tmp_path / "condition_numbers.json").write_text(json.dumps({"a": 5.0, "b": 900.0}))
    other = Ranking.from_json(tmp_path / "condition_numbers.json")
    found = ranking("a", "b").compare(other)
    assert found.counts["within"] == 2
    assert found.exceeding(1) == []
    assert keys(found.moved("down")) == ["a"]
    assert found.caveats == ("the second ranking has no intervals, so that no change is certain",)
    assert math.isnan(found.overlap(num_tensors=1).params)


def test_a_status_that_changed_is_listed_and_nan_counts_as_a_move_beyond_everything():
    one = ranking("a", "b", "c")
    other = Ranking([make_entry("a", math.inf), non_finite("b"), make_entry("c", 12.0)])
    found = one.compare(other)
    assert {c.key for c in found.status_changes} == {"a", "b"}
    assert keys(found.exceeding(1e6)) == ["b", "a"]
    assert "status: a: ok -> rank_deficient" in str(found)
    assert "status: b: ok -> non_finite" in str(found)
    back = other.compare(one)
    assert "b" not in keys(back.exceeding(1))


@pytest.mark.parametrize("ratio", [0.5, -1, math.nan, math.inf, True, "2"])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(kappa_fast.OptionError, match=r"ratio=.*: give a factor from 1 on"):
        ranking("a").compare(ranking("a")).exceeding(ratio)


def test_the_overlap_of_selections_is_counted_in_matrices_and_weights():
    one = Ranking(
        [make_entry(n, k, shape=s) for n, k, s in (("a", 1.0, (32, 16)), ("b", 2.0, (64, 16)), ("c", 3.0, (32, 16)))]
    )
    other = Ranking(
        [
            make_entry(n, k, shape=s)
            for n, k, s in (("module.a", 1.0, (32, 16)), ("module.b", 9.0, (64, 16)), ("module.c", 3.0, (32, 16)))
        ]
    )
    found = one.compare(other).overlap(num_tensors=2)
    assert (found.both, found.only_before, found.only_after) == (("a",), ("b",), ("module.c",))
    assert found.jaccard == pytest.approx(1 / 3)
    assert found.params == pytest.approx(512 / (512 + 1024 + 512))
    text = one.compare(other).to_text(overlap=found)
    assert (
        "selected by num_tensors=2: 2 and 2, 1 of them in both: 33.3% of the matrices, 25.0% of their weights" in text
    )
    assert "  - b\n  + module.c" in text


def test_a_budget_that_one_ranking_cannot_serve_is_refused_by_which():
    one = ranking("a", "b")
    other = Ranking([make_entry("a"), bounded("b", 20)])
    with pytest.raises(kappa_fast.OptionError, match=r"the second ranking: select\(num_tensors=2\) reaches beyond"):
        one.compare(other).overlap(num_tensors=2)
    with pytest.raises(kappa_fast.OptionError, match=r"the first ranking: select\(\) takes one or more of"):
        one.compare(other).overlap()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, math.inf, math.inf], [1, 2, 3, 3], 1),
        ([1, 2, 2, 3], [1, 3, 2, 4], 3 / math.sqrt(10)),  # by hand: ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
        ([1, 1], [1, 2], math.nan),
        ([], [], math.nan),
    ],
)
def test_spearman_is_the_correlation_of_mean_ranks(first, second, expected):
    assert spearman(first, second) == pytest.approx(expected, nan_ok=True)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=40))
def test_spearman_is_what_pandas_says(pairs):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(pairs, columns=["a", "b"])
    if min(frame.nunique()) > 1:
        assert spearman(*zip(*pairs, strict=True)) == pytest.approx(frame["a"].rank().corr(frame["b"].rank()))


@pytest.mark.slow
def test_forty_thousand_experts_are_compared_in_seconds(tmp_path):
    generator = random.Random(0)
    one = [
        make_entry(f"model.layers.{i // 256}.mlp.experts.{i % 256}.w1.weight", 5 + 100 * generator.random())
        for i in range(40_000)
    ]
    other = [replace(e, name=f"module.{e.name}", kappa=2 * e.kappa, lower=2 * e.lower, upper=2 * e.upper) for e in one]
    first, second = (
        Ranking(one, (), {"num_parameters": 40_000 * 512}),
        Ranking(other, (), {"num_parameters": 40_000 * 512}),
    )
    started = time.process_time()
    found = first.compare(second)
    assert found.counts["up"] == 40_000
    assert len(found.exceeding(1.9)) == 40_000
    assert found.overlap(max_params=0.1).jaccard == 1
    assert "... 39,990 more that moved" in found.to_text()
    found.to_json(tmp_path / "comparison.json")
    assert time.process_time() - started < 60  # quadratic work would take an hour
    assert len(json.loads((tmp_path / "comparison.json").read_text())["changes"]) == 40_000


def test_without_any_rows_the_changes_of_status_are_still_counted():
    before, after = Ranking([span("a", 2, 3), span("b", 2, 3)]), Ranking([non_finite("a"), span("b", 2, 3)])
    assert "... 1 more with another status" in before.compare(after).to_text(limit=0)


def test_the_text_has_the_largest_moves_both_ways_and_the_file_has_everything(tmp_path):
    one = ranking(*(f"m{i}" for i in range(6)))
    other = Ranking(
        [span(f"m{i}", *bounds) for i, bounds in enumerate([(20, 21), (30, 31), (11, 14), (13, 13), (7, 8), (5, 6)])]
    )
    found = one.compare(other)
    text = found.to_text(limit=1)
    assert "m1" in text
    assert "m0" not in text
    assert "... 3 more that moved" in text
    assert "kappa: 2 certainly up, 2 certainly down, 1 changed within their intervals, 1 identical" in text
    assert found.to_text(limit=None).splitlines()[1].split()[0] == "m1"
    found.to_json(tmp_path / "c.json", found.overlap(num_tensors=2))
    read = json.loads((tmp_path / "c.json").read_text())
    assert read["format"] == "kappa_fast comparison"
    assert read["counts"] == dict(found.counts)
    assert [c["key"] for c in read["changes"]] == keys(found)
    assert read["changes"][1]["at_least"] == 30 / 11
    assert read["selection"]["only_before"] == list(found.overlap(num_tensors=2).only_before)
    with pytest.raises(kappa_fast.OptionError, match="limit=-1: give a count"):
        found.to_text(limit=-1)
    assert "2 certainly up" in repr(found)


def test_what_the_digits_of_the_table_do_not_show_is_only_counted():
    one = Ranking([make_entry("a", 10, lower=9, upper=11), make_entry("b", 10, lower=9, upper=11)])
    other = Ranking([make_entry("a", 10.01, lower=9, upper=11), make_entry("b", 10.1, lower=9, upper=11)])
    text = str(one.compare(other))
    assert [line.split()[0] for line in text.splitlines()[:3]] == ["tensor", "b", "2"]
    assert "2 changed within their intervals" in text


def test_rankings_without_kappa_say_so_and_are_identical_where_their_statistics_are():
    def scored(name: str, flatness: float) -> kappa_fast.TensorKappa:
        known = dict(lower=1.0, upper=math.inf, sigma_max=math.nan, sigma_min=math.nan, sensitivity=math.nan)
        ends = dict(flatness_lower=flatness, flatness_upper=flatness)
        return make_entry(name, math.nan, status="scored", score=flatness, flatness=flatness, **ends, **known)

    one = Ranking([scored("a", -0.5), scored("b", -0.25)])
    found = one.compare(Ranking([scored("a", -0.5), scored("b", -0.75)]), score="flatness")
    assert [change.verdict for change in found] == ["identical", "within"]
    assert [caveat[:56] for caveat in found.caveats] == [
        "2 matrices of the first ranking have no kappa, since its",
        "2 matrices of the second ranking have no kappa, since it",
    ]
    assert one.compare(Ranking([make_entry("a"), make_entry("b")])).status_changes == ()


def test_names_of_strangers_are_escaped():
    nasty = "evil\x1b[31m\nname"
    text = str(ranking(nasty, "x").compare(Ranking([make_entry(nasty, 99.0)])))
    assert "\x1b" not in text
    assert "evil\\x1b[31m\\nname" in text


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert"])
def test_a_model_is_the_same_as_its_checkpoint(family, tmp_path):
    model = families.build(family)
    model.save_pretrained(tmp_path)
    found = kappa_fast.rank(model, min_dim=4).compare(kappa_fast.rank(tmp_path, min_dim=4))
    assert found.caveats == ()
    assert {change.verdict for change in found.changes} == {"identical"}
