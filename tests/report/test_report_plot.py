"""The heat map as a picture: what is in it, that it repeats, and that matplotlib is left as it was."""

from __future__ import annotations

import io
import math
import pickle
import re
import sys
from xml.etree import ElementTree

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from make_entries import bounded, make_entry, non_finite

from kappa_fast.errors import MissingExtraError, OptionError, RankingFileError
from kappa_fast.report import plot
from kappa_fast.report.plot import render_plot
from kappa_fast.results.names import group_of, layer_of
from kappa_fast.results.ranking import Ranking


def named(name, kappa=10.0, make=make_entry):
    return make(name, kappa, layer=layer_of(name), group=group_of(name))


def nan(name, _, **fields):
    return non_finite(name, **fields)


PLAIN = Ranking(
    named(f"model.layers.{layer}.mlp.{p}_proj.weight", 4.0**layer) for layer in range(6) for p in ("up", "down")
)
MIXED = Ranking(
    [
        *PLAIN,
        named("model.layers.0.self_attn.q_proj.weight", math.inf),
        named("model.layers.1.self_attn.q_proj.weight", 50.0, bounded),
        named("model.layers.2.self_attn.q_proj.weight", make=nan),
        *(named(f"model.layers.3.mlp.experts.{expert}.up_proj.weight", 3.0) for expert in range(8)),
        named("lm_head.weight"),
    ],
    metadata={"source": {"path": "/models/Tiny-MoE"}},
)


def svg_texts(content):
    """The texts of a picture, which matplotlib notes in a comment before the outlines of each."""
    ElementTree.fromstring(content)
    return re.findall(r"<!-- (.*?) -->", content.decode())


def test_the_picture_names_layers_types_and_what_is_special():
    texts = svg_texts(render_plot(MIXED, "svg"))
    assert {"kappa of Tiny-MoE", "layer", "mlp.up_proj", "self_attn.q_proj", "mlp.experts.*.up_proj (x8)"} <= set(texts)
    assert [text for text in texts if text in "012345"] == list("012345")
    assert {"rank deficient", "only bounded from below", "NaN or inf among the weights"} <= set(texts)
    assert {"inf", "bounded", "nan"} <= set(texts)
    assert "not shown: 1 of 24 matrices, which have no place in the map" in texts
    assert "several matrices in a cell: geometric mean of those with a finite kappa" in texts


def test_a_picture_without_anything_special_explains_nothing():
    content = render_plot(PLAIN, "svg")
    assert not {"rank deficient", "only bounded from below", "bounded", "inf"} & set(svg_texts(content))
    assert b"<pattern" not in content
    assert render_plot(MIXED, "svg").count(b"<pattern") == 3


def test_a_cell_with_some_bounded_members_is_colored_and_hatched():
    experts = [named(f"layers.0.experts.{i}.up_proj.weight", 5.0, make_entry if i else bounded) for i in range(3)]
    content = render_plot(Ranking(experts), "svg")
    assert content.count(b"<pattern") == 2  # its color and the legend's
    assert "hatched and colored: that is so of some of the matrices in the cell" in svg_texts(content)


def test_the_lowest_kappa_is_dark_and_the_highest_bright():
    picture = matplotlib.image.imread(io.BytesIO(render_plot(PLAIN, "png")))[..., :3]

    def rows_of(color):
        hits = np.all(np.abs(picture - np.array(color[:3])) < 0.002, axis=2)
        return np.flatnonzero(hits.sum(axis=1) > 60)

    colors = matplotlib.colormaps["viridis"]
    darkest, brightest = rows_of(colors(0.0)), rows_of(colors(1.0))
    assert darkest.size > 10
    assert brightest.size > 10
    assert darkest.max() < brightest.min()  # layer 0 is above layer 5


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_ranking_gives_the_same_bytes_whatever_the_user_has_set(kind):
    first = render_plot(MIXED, kind)
    with matplotlib.rc_context({"font.size": 22, "axes.facecolor": "red", "savefig.dpi": 30, "svg.fonttype": "none"}):
        before = dict(matplotlib.rcParams)
        assert render_plot(MIXED, kind) == first
        assert dict(matplotlib.rcParams) == before


def test_neither_pyplot_nor_a_backend_is_touched(run_python, root, tmp_path):
    code = """
import sys, matplotlib
before = dict.items(matplotlib.rcParams)
before = {k: repr(v) for k, v in before}
from kappa_fast.results.ranking import Ranking
from kappa_fast.report import plot
from kappa_fast.results.entries import TensorKappa
entry = TensorKappa(
    "h.0.w", (), "", (), 0, "h.*.w", (4, 2), "float32", 8, 3.0, 3.0, 3.0, 3.0, 1.0, 3.0, True, "svd64", 0.1, "ok"
)
Ranking([entry]).plot("x.png")
after = {k: repr(v) for k, v in dict.items(matplotlib.rcParams)}
print("matplotlib.pyplot" in sys.modules, after == before)
"""
    assert run_python(code, cwd=tmp_path, env={"PYTHONPATH": str(root)}).split() == ["False", "True"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["h.0.$\\frac{x$.w", "h.0.重み.w", "h.0.--><b>.w", "h.0.\ud800\n.w"])
def test_no_name_breaks_the_picture(name):
    ranking = Ranking([named(name)], metadata={"source": {"path": f"/models/{name}"}})
    assert len(svg_texts(render_plot(ranking, "svg"))) >= 4
    assert render_plot(ranking, "png").startswith(b"\x89PNG")


def test_more_cells_than_one_can_read_have_no_numbers(monkeypatch):
    assert "1.0e3" in svg_texts(render_plot(PLAIN, "svg"))
    monkeypatch.setattr(plot, "_MAX_NUMBERS", 11)
    texts = svg_texts(render_plot(PLAIN, "svg"))
    assert texts.count("1.0e3") == 1  # at the scale
    assert "mlp.up_proj" in texts


@pytest.mark.parametrize(("layers", "types"), [(1, 1), (6, 6), (32, 9), pytest.param(61, 12, marks=pytest.mark.slow)])
def test_the_picture_grows_with_the_model(layers, types):
    entries = [named(f"layers.{i}.m{k}.w", 2.0 + i + k) for i in range(layers) for k in range(types)]
    height, width, _ = matplotlib.image.imread(io.BytesIO(render_plot(Ranking(entries), "png"))).shape
    assert height > 30 * layers  # pixels, enough for text of seven points at 144 dots per inch
    assert width > 120 * types
    assert max(height, width) < 3000


def test_the_format_follows_the_name_of_the_file(tmp_path):
    PLAIN.plot(tmp_path / "x.PNG")
    PLAIN.plot(str(tmp_path / "x.svg"))
    assert (tmp_path / "x.PNG").read_bytes() == render_plot(PLAIN, "png")
    assert (tmp_path / "x.svg").read_bytes() == render_plot(PLAIN, "svg")
    PLAIN.plot(tmp_path / "x.pdf")
    assert (tmp_path / "x.pdf").read_bytes() == render_plot(PLAIN, "pdf")
    assert render_plot(PLAIN, "pdf").startswith(b"%PDF")
    for name in ("x.gif", "x", "png"):
        with pytest.raises(OptionError, match=rf"cannot plot to .*{name}: end the name in \.png, \.svg or \.pdf"):
            PLAIN.plot(tmp_path / name)


def test_a_ranking_without_layers_is_drawn_as_bars():
    whole = Ranking([make_entry("lm_head.weight", 3.0), make_entry("embed.weight", 9.0), make_entry("x", math.inf)])
    texts = svg_texts(render_plot(whole, "svg"))
    assert {"lm_head.weight", "embed.weight", "kappa"} <= set(texts)
    with pytest.raises(OptionError, match="nothing to plot: no ranked matrix has a finite kappa"):
        render_plot(Ranking([make_entry("x", math.inf)]), "svg")


def test_the_figure_is_returned_and_can_be_drawn_into_axes():
    from matplotlib.figure import Figure

    assert isinstance(PLAIN.plot(), Figure)
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert PLAIN.plot(ax=left) is figure
    assert Ranking([make_entry("lm_head.weight", 3.0)]).plot(ax=right) is figure
    assert len(left.patches) == len(PLAIN)
    assert len(figure.axes) == 3  # with the color bar


def test_cells_say_how_much_of_them_a_selection_takes():
    experts = [
        make_entry(f"layers.{layer}.experts.{e}.w", 2.0 + e + layer, layer=layer, group="layers.*.experts.*.w")
        for layer in range(2)
        for e in range(8)
    ]
    whole = Ranking(experts)
    texts = svg_texts(render_plot(whole, "svg", whole.select(max_kappa=9.0)))
    assert "7/8" in texts
    figure = whole.plot(selection=whole.select(max_kappa=9.0))
    assert sum(patch.get_linewidth() > 1 for patch in figure.axes[0].patches) == 2
    assert not any("/" in text for text in svg_texts(render_plot(whole, "svg")))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RankingFileError, match=r"cannot write .*nowhere.x\.png: No such file"):
        PLAIN.plot(tmp_path / "nowhere" / "x.png")


def test_notebooks_show_the_picture(tmp_path):
    """Formatters of IPython ask for it by this name; those of pyplot are not there where nobody imports it."""
    shown = PLAIN.plot(tmp_path / "x.png")._repr_png_()
    assert shown == (tmp_path / "x.png").read_bytes()
    assert pickle.loads(pickle.dumps(PLAIN.plot()))._repr_png_() == shown


def test_the_extra_is_named_where_matplotlib_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        MissingExtraError, match=r"plot\(\) needs the package 'matplotlib': pip install 'kappa_fast\[report\]"
    ):
        PLAIN.plot(tmp_path / "x.png")
