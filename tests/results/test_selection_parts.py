"""What a budget took and what did not fit, several budgets, filters, set operations, summaries."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_entries import bounded, make_entry, non_finite
from selections import TEN, around, ranking, resolved_entries

import kappa_fast
from kappa_fast.errors import OptionError
from kappa_fast.results.ranking import Ranking
from kappa_fast.results.selection import Selection

BIG = [
    make_entry("a", 2.0, shape=(10, 10)),
    make_entry("b", 3.0, shape=(90, 10)),
    make_entry("c", 4.0, shape=(10, 5)),
    make_entry("d", 5.0, shape=(100, 10)),
    make_entry("e", 6.0, shape=(5, 5)),
]


def test_what_did_not_fit_is_said_and_filling_goes_on_to_what_does():
    whole = Ranking(BIG, (), {"num_parameters": 2075})
    first = whole.select(max_params=200)
    assert first.keys == ("a",)
    assert first.share == 100 / 2075
    said = "Selection(1 matrices of 1 parameters; 100 weights (4.8193% of the model); kappa 2 to 2; max_params=200; "
    said += "b with 900 weights did not fit (fill=True goes on to smaller ones); boundary certain)"
    assert repr(first) == said
    assert first.describe() == "trainable params: 100 || all params: 2,075 || trainable%: 4.8193"
    filled = whole.select(max_params=200, fill=True)
    assert filled.keys == ("a", "c", "e")
    assert filled.unfit() == "b with 900 weights and 1 more did not fit"
    assert filled.boundary_certain
    assert whole.select(max_params=2075).unfit() == ""
    again = Selection(filled.entries, True, dict(filled.settings))
    assert again.share == filled.share


def test_a_share_that_nobody_knows_is_left_out():
    entries = [make_entry("a", 2.0, shape=(0, 0), numel=0)]
    found = Ranking(entries, (), {"num_parameters": 10}).select(num_tensors=1)
    assert math.isnan(found.share)
    assert "%" not in repr(found)
    assert math.isnan(ranking([make_entry("a")]).select(num_tensors=1).excluding("b").share) is False
    assert math.isnan(Ranking([make_entry("a")]).select(num_tensors=1).share)


def test_filling_is_certain_only_where_no_order_within_the_intervals_takes_others():
    entries = [
        make_entry("a", 2.0, shape=(10, 10)),
        around("b", 3.0, 0.2, shape=(10, 8)),
        around("c", 3.1, 0.2, shape=(10, 9)),
        make_entry("d", 9.0, shape=(10, 20)),
    ]
    whole = ranking(entries)
    for room, keys, certain in [
        (100, ("a",), True),  # none of b and c fits
        (185, ("a", "b"), False),  # whichever comes first
        (270, ("a", "b", "c"), True),
        (170, (("b", "a")[::-1])[:1], True),
    ]:
        found = whole.select(max_params=room, fill=True)
        assert (found.keys, found.boundary_certain) == (keys, certain), room
    with pytest.raises(OptionError, match=r"fill=True goes on to matrices that fit .*: give max_params"):
        whole.select(num_tensors=1, fill=True)
    with pytest.raises(OptionError, match="fill='yes': give True or False"):
        whole.select(max_params=1, fill="yes")


BUDGETS = st.sampled_from(
    [
        {"max_params": 60, "fill": True},
        {"max_params": 60, "max_kappa": 4.0},
        {"num_tensors": 3, "max_kappa": 3.0},
        {"max_params": 0.4, "max_kappa": 50.0, "num_tensors": 5, "fill": True},
    ]
)


@given(resolved_entries(), BUDGETS, st.data())
def test_what_is_certain_is_taken_wherever_in_their_intervals_the_kappas_are(entries, budget, data):
    widths = data.draw(st.lists(st.sampled_from([0.0, 0.05, 0.6]), min_size=len(entries), max_size=len(entries)))
    wide = [
        replace(e, lower=max(1.0, e.kappa * (1 - w)), upper=e.kappa * (1 + w))
        for e, w in zip(entries, widths, strict=True)
    ]
    try:
        found = ranking(wide).select(**budget)
    except OptionError:
        return
    if not found.boundary_certain:
        return
    moved = []
    for entry in wide:
        kappa = entry.lower + data.draw(st.floats(0, 1)) * (entry.upper - entry.lower)
        kappa = min(max(kappa, entry.lower), entry.upper)
        moved.append(replace(entry, kappa=kappa, score=kappa))
    other = ranking(moved).select(**budget)
    assert set(other.keys) == set(found.keys)


@given(resolved_entries(), BUDGETS)
def test_several_budgets_take_what_each_of_them_would(entries, budget):
    whole = ranking(entries)
    fill = {"fill": True} if budget.get("fill") else {}
    apart = []
    for name, value in budget.items():
        if name != "fill":
            try:
                apart.append(set(whole.select(**{name: value}, **(fill if name == "max_params" else {})).keys))
            except OptionError:
                apart.append(set())
    try:
        found = set(whole.select(**budget).keys)
    except OptionError as error:
        assert "selects nothing" in str(error)  # noqa: PT017 - any other OptionError is a failure
        found = set()
    assert found == set.intersection(*apart)


def test_several_budgets_are_kept_with_the_selection(tmp_path):
    found = ranking(TEN).select(max_params=1.0, max_kappa=4.0)
    assert found.budgets == {"max_kappa": 4.0, "max_params": 1.0}
    assert "max_kappa=4.0; max_params=1.0" in repr(found)
    found.to_json(tmp_path / "s.json")
    assert Selection.from_json(tmp_path / "s.json") == found
    assert found.keys == ranking(TEN).select(max_kappa=4.0).keys


NAMED = [
    make_entry("model.layers.0.q_proj.weight", 2.0, layer=0, group="model.layers.*.q_proj.weight"),
    make_entry("model.layers.1.q_proj.weight", 9.0, layer=1, group="model.layers.*.q_proj.weight"),
    make_entry("model.layers.0.up_proj.weight", 3.0, layer=0, group="model.layers.*.up_proj.weight", shape=(64, 16)),
    make_entry("model.layers.1.up_proj.weight", 4.0, layer=1, group="model.layers.*.up_proj.weight", shape=(64, 16)),
    make_entry("head.weight", math.inf, group="head.weight", aliases=("tied.weight",)),
    make_entry("model.experts", 5.0, part="[3].gate", index=(3,), layer=None, group="model.experts.gate"),
]
WHOLE = Ranking(NAMED, (), {"num_parameters": 10_000, "source": {"fingerprint": "x"}})


def test_candidates_are_chosen_by_name_and_shares_stay_those_of_the_model():
    found = WHOLE.select(max_params=0.1, include="q_proj")
    assert found.keys == (NAMED[0].key,)
    assert found.settings["include"] == ("q_proj",)
    assert WHOLE.select(top_p=1.0, include=["tied", "up"], exclude=r"\.1\.").keys == (NAMED[2].key, NAMED[4].key)
    with pytest.raises(OptionError, match="nothing to select: no entry has a matching name"):
        WHOLE.select(top_p=1.0, include="nobody")
    with pytest.raises(OptionError, match=r"'\(' is not a regular expression"):
        WHOLE.select(top_p=1.0, include="(")


def test_a_ranking_is_filtered_by_layers_names_and_groups():
    assert {e.key for e in WHOLE.filter(layers=1)} == {NAMED[1].key, NAMED[3].key}
    assert {e.key for e in WHOLE.filter(layers=range(2), include="up")} == {NAMED[2].key, NAMED[3].key}
    assert {e.key for e in WHOLE.filter(groups="model.layers.*.up_proj.weight")} == {NAMED[2].key, NAMED[3].key}
    assert {e.key for e in WHOLE.filter(groups=["q_proj", "^head"])} == {NAMED[0].key, NAMED[1].key, NAMED[4].key}
    found = WHOLE.filter(exclude="layers").filter(include="experts")
    assert [e.key for e in found] == ["model.experts[3].gate"]
    assert found.metadata["filters"] == ({"exclude": "layers"}, {"include": "experts"})
    assert found.select(num_tensors=1).share == WHOLE.select(num_tensors=1, include="experts").share
    for wrong in (1.5, "0", [True], object()):
        with pytest.raises(OptionError, match=r"layers=.*: give a number or several"):
            WHOLE.filter(layers=wrong)


def test_selections_are_sets():
    low, narrow = WHOLE.select(max_kappa=4.0), WHOLE.select(top_p=1.0, include="q_proj")
    assert [e.kappa for e in low | narrow] == [2.0, 3.0, 4.0, 9.0]
    assert (low & narrow).keys == (NAMED[0].key,)
    assert (low - narrow).keys == (NAMED[2].key, NAMED[3].key)
    assert (low | narrow).share == sum(e.numel for e in low | narrow) / 10_000
    assert (low | narrow).settings["unit"] == "matrix"
    assert NAMED[0] in low
    assert NAMED[0].key in low
    assert "tied.weight" in WHOLE.select(num_tensors=6)
    assert "model.experts" in WHOLE.select(num_tensors=6)  # by the name of the parameter
    assert "nobody" not in low
    assert 3 not in low
    assert low[0] is low.entries[0]
    assert low[NAMED[3].key] == NAMED[3]
    assert low[1:] == low.entries[1:]
    with pytest.raises(KeyError, match="no entry 'nobody' in this selection"):
        low["nobody"]
    with pytest.raises(TypeError):
        low | "nobody"


def test_selections_that_cannot_be_combined_say_why():
    low = WHOLE.select(max_kappa=4.0)
    other = Ranking([replace(NAMED[0], kappa=2.5, lower=2.5, upper=2.5, score=2.5)]).select(num_tensors=1)
    with pytest.raises(OptionError, match=r"different rankings: kappa of .*q_proj\.weight' is 2\.0 in one and"):
        low | other
    foreign = Ranking([make_entry("x")], (), {"source": {"fingerprint": "y"}}).select(num_tensors=1)
    with pytest.raises(OptionError, match="of different models"):
        low - foreign
    assert (low.including("norm") | low.including("bias")).include == ("norm", "bias")
    assert (low.including("norm") - low).include == ("norm",)
    assert (low.including("norm") - low.including("norm")).include == ()
    for one, two, how in [
        (low.including("norm").excluding("bias"), low, "or"),
        (low, low.including("norm"), "sub"),
        (low, low.including("norm"), "and"),
    ]:
        with pytest.raises(OptionError, match=r"cannot be combined, because .*combine selections first"):
            getattr(one, f"__{how}__")(two)
    assert (low.excluding("q_proj") | low).keys == low.keys


def test_a_summary_has_a_row_for_each_group_or_layer():
    selection = WHOLE.select(max_kappa=4.0)
    groups = WHOLE.summary(selection=selection)
    rows = {row.name: row for row in groups}
    up = rows["model.layers.*.up_proj.weight"]
    assert (up.count, up.numel, up.median, up.lowest, up.highest, up.taken, up.share) == (
        2,
        2048,
        3.5,
        3.0,
        4.0,
        2,
        1.0,
    )
    assert rows["model.layers.*.q_proj.weight"].share == 0.5
    assert rows["head.weight"].median == math.inf
    assert [row.median for row in groups] == sorted(row.median for row in groups)
    layers = WHOLE.summary("layer")
    assert [row.name for row in layers] == ["0", "1", ""]
    assert layers[0].lowest == 2.0
    with pytest.raises(OptionError, match="by='expert': give 'group' or 'layer'"):
        WHOLE.summary("expert")
    odd = Ranking([bounded("b", 3.0), non_finite("n")]).summary()
    assert math.isnan(odd[0].median)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_summaries_fit_the_page(width):
    for by in ("group", "layer"):
        text = WHOLE.summary(by, selection=WHOLE.select(max_kappa=4.0)).to_text(width)
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert len(set(lines)) == len(lines) == 1 + len(WHOLE.summary(by))
        assert "median" in lines[0]
        assert "share" in lines[0]
    assert "taken" not in WHOLE.summary().to_text(width)


def test_a_summary_is_a_frame_too():
    pandas = pytest.importorskip("pandas")
    frame = WHOLE.summary("layer").to_dataframe()
    assert list(frame.columns) == ["layer", "count", "numel", "median", "lowest", "highest", "taken", "share"]
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 3


def test_notebooks_show_tables_in_which_nothing_of_a_file_is_markup(tmp_path):
    from kappa_fast.planning import plan

    evil = make_entry("<script>alert(1)</script>", 2.0)
    whole = Ranking([evil, *NAMED], (), {"num_parameters": 10_000})
    shown = [
        whole._repr_html_(),
        whole.select(num_tensors=2)._repr_html_(),
        whole.compare(Ranking([replace(evil, kappa=8.0, lower=8.0, upper=8.0)]))._repr_html_(),
        whole.summary()._repr_html_(),
        plan({"<b>w</b>": __import__("torch").zeros(32, 32)}, measure=False)._repr_html_(),
    ]
    for html in shown:
        assert html.startswith("<div>")
        assert "<table>" in html
        assert "<script>" not in html
        assert "<b>" not in html
    assert "2.000" in shown[0]
    assert "trainable%" in shown[1]
    long = Ranking([make_entry(f"w{i}", 2.0 + i) for i in range(50)])
    assert "... 30 more" in long._repr_html_()
    assert long._repr_html_().count("<tr>") == 21
    assert kappa_fast.Ranking([])._repr_html_()
