"""The grid behind the heat maps: every entry has one place, cells tell the truth about their members."""

from __future__ import annotations

import itertools
import math
import statistics

import matplotlib
import pytest
from hypothesis import given
from make_entries import bounded, entry_lists, make_entry, non_finite

from kappa_fast.report import grid
from kappa_fast.report.colors import viridis
from kappa_fast.report.grid import color_range, make_grid, shorten_groups
from kappa_fast.report.plot import _luminance
from kappa_fast.results.names import group_of, layer_of
from kappa_fast.results.ranking import Ranking


def named(name, kappa=10.0, make=make_entry, part=""):
    return make(name, kappa, layer=layer_of(name), group=group_of(name) + part.partition("]")[2], part=part)


MOE = [
    *(named(f"model.layers.{layer}.self_attn.{p}_proj.weight", 100) for layer in (10, 2) for p in "ovkq"),
    *(
        named("model.layers.2.mlp.experts.gate_up_proj", 3.0 + expert, part=f"[{expert}].{half}")
        for half in ("up", "gate")
        for expert in range(12)
    ),
    *(named(f"model.layers.10.mlp.experts.{expert}.down_proj.weight", 2.0**expert) for expert in range(11)),
    named("lm_head.weight"),
]


@given(entry_lists)
def test_every_entry_is_in_one_cell_or_beside(entries):
    ranking = Ranking(entries).entries
    found = make_grid(ranking)
    places = [i for cell in found.cells for i in cell.members] + list(found.beside)
    assert sorted(places) == list(range(len(ranking)))
    for cell in found.cells:
        for i in cell.members:
            assert ranking[i].layer == found.layers[cell.row]
            assert ranking[i].group == found.columns[cell.column].group


def test_attention_comes_first_and_projections_in_the_order_of_the_data():
    found = make_grid(MOE)
    labels = [column.label for column in found.columns]
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    experts = ["mlp.experts.gate_up_proj.gate", "mlp.experts.gate_up_proj.up", "mlp.experts.*.down_proj"]
    assert labels[:4] == attention
    assert sorted(labels[4:]) == sorted(experts)
    assert labels.index(experts[0]) < labels.index(experts[1])
    assert found.layers == (2, 10)
    assert [column.depth for column in found.columns] == [
        {**dict.fromkeys(experts[:2], 12), experts[2]: 11}.get(label, 1) for label in labels
    ]


def test_members_are_in_the_order_of_their_numbers():
    entries = Ranking(MOE).entries
    cells = {found.columns[cell.column].label: cell for found in [make_grid(entries)] for cell in found.cells}
    parts = [entries[i].part for i in cells["mlp.experts.gate_up_proj.up"].members]
    assert parts == [f"[{expert}].up" for expert in range(12)]
    names = [entries[i].name for i in cells["mlp.experts.*.down_proj"].members]
    assert names == [f"model.layers.10.mlp.experts.{expert}.down_proj.weight" for expert in range(11)]


def test_a_cell_has_the_geometric_mean_of_what_is_finite_and_the_worst_status():
    kappas = [2.0, 8.0, 32.0]
    members = [named(f"layers.0.mlp.experts.{i}.up_proj.weight", kappa) for i, kappa in enumerate(kappas)]
    others = {
        "ok": [],
        "bounded": [named("layers.0.mlp.experts.3.up_proj.weight", 50.0, bounded)],
        "rank_deficient": [named("layers.0.mlp.experts.4.up_proj.weight", math.inf)],
        "non_finite": [named("layers.0.mlp.experts.5.up_proj.weight", make=lambda name, _, **f: non_finite(name, **f))],
    }
    so_far = list(members)
    for status, more in others.items():
        so_far += more
        (cell,) = make_grid(so_far).cells
        assert cell.status == status
        assert cell.kappa == pytest.approx(statistics.geometric_mean(kappas), rel=1e-14)
        assert (cell.low, cell.high) == (2.0, 32.0)
        (alone,) = make_grid(more).cells or [cell]
        assert status == "ok" or math.isnan(alone.kappa)


def test_labels_are_short_and_never_the_same():
    groups = [
        *("encoder.block.*.layer.*.SelfAttention.q.weight", "decoder.block.*.layer.*.SelfAttention.q.weight"),
        *("model.layers.*.mlp.up_proj.weight", "lm_head.weight", "h.*.w", "h.*.w.weight", "*", "", "x.*.weight"),
    ]
    labels = shorten_groups(groups)
    assert labels["model.layers.*.mlp.up_proj.weight"] == "mlp.up_proj"
    assert labels["encoder.block.*.layer.*.SelfAttention.q.weight"] == "encoder.block.*.layer.*.SelfAttention.q"
    assert len(set(labels.values())) == len(groups)


def test_what_is_too_much_for_a_picture_is_beside_it(monkeypatch):
    monkeypatch.setattr(grid, "MAX_LAYERS", 3)
    monkeypatch.setattr(grid, "MAX_COLUMNS", 2)
    entries = Ranking(named(f"layers.{layer}.{p}.weight") for layer in range(5) for p in "abc"[: 1 + layer % 3]).entries
    found = make_grid(entries)
    assert found.layers == (0, 1, 2)
    assert {column.label for column in found.columns} == {"a", "b"}
    assert len(found.cells) == 5
    assert {entries[i].name for i in found.beside} == {
        *("layers.2.c.weight", "layers.3.a.weight", "layers.4.a.weight", "layers.4.b.weight"),
    }


def test_the_scale_spans_what_the_cells_show():
    cells = make_grid([*MOE, named("layers.0.x", math.inf), named("layers.1.x", 1e9, bounded)]).cells
    shown = [cell.kappa for cell in cells if cell.kappa == cell.kappa]
    assert color_range(cells) == (min(shown), max(shown))  # of what is shown, not of what is behind a cell
    assert max(shown) < max(entry.kappa for entry in MOE)
    assert color_range(make_grid([named("layers.0.x", math.inf)]).cells) == (1, 10)


def test_the_colors_are_those_of_viridis_and_rise_in_luminance():
    theirs = matplotlib.colormaps["viridis"]
    ours = viridis()
    levels = []
    for i, color in enumerate(ours):
        channels = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        assert max(abs(a - b) for a, b in zip(channels, theirs(i / 255)[:3], strict=True)) <= 6 / 255
        levels.append(_luminance(channels))
    assert all(b > a - 0.001 for a, b in itertools.pairwise(levels))  # channels are rounded
    assert viridis(1) == ["#440154"]
