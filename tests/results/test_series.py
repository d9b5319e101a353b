"""Several checkpoints as a series, and comparisons as frames, pictures and pages."""

from __future__ import annotations

import io
import json
import math

import pytest
from make_entries import bounded, make_entry

from kappa_fast.errors import OptionError
from kappa_fast.results.ranking import Ranking

pandas = pytest.importorskip("pandas")


def at(step: int, *, wrapped: bool = False) -> Ranking:
    entries = [
        make_entry(
            ("model." if wrapped else "") + f"layers.{layer}.{part}.weight",
            (10.0 + layer) * (1 + step * (0.2 if part == "q" else 0.001)),
            layer=layer,
            group=("model." if wrapped else "") + f"layers.*.{part}.weight",
        )
        for layer in range(4)
        for part in ("q", "up")
        if not (step == 2 and layer == 3)
    ]
    source = {"path": f"run/checkpoint-{step}"}
    return Ranking(entries, (), {"source": source, "settings": {"rtol": 0.01}})


STEPS = [at(0), at(1), at(2), at(3, wrapped=True)]
RUN = STEPS[0].series(*STEPS[1:], labels=["base", "a", "b", "c"])


def test_a_series_follows_each_matrix_by_the_latest_name_that_it_had():
    assert RUN.labels == ("base", "a", "b", "c")
    assert len(RUN) == 8
    track = RUN["layers.3.q.weight"]
    assert [entry is None for entry in track.entries] == [False, False, True, False]
    assert math.isnan(track.kappas[2])
    assert track.ratio == pytest.approx(1.6)
    assert RUN.moved()[0].ratio == pytest.approx(1.6)
    with pytest.raises(KeyError, match="no matrix 'nobody' in this series"):
        RUN["nobody"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_its_table_fits_the_page_and_says_what_it_leaves_out(width):
    text = RUN.to_text(width=width, limit=3)
    assert max(map(len, text.splitlines())) <= width
    assert "... 5 more" in text
    assert text.splitlines()[0].split()[-1] == "ratio"
    many = STEPS[0].series(*[at(i % 2) for i in range(12)])
    narrow = many.to_text(width=60)
    assert "of them not shown" in narrow
    assert {"1", "13"} <= set(narrow.splitlines()[0].split())
    assert "<table>" in RUN._repr_html_()


def test_what_is_no_series_is_refused():
    with pytest.raises(OptionError, match="two or more rankings, and got 1"):
        STEPS[0].series()
    with pytest.raises(OptionError, match="and got a str"):
        STEPS[0].series("b.json")
    with pytest.raises(OptionError, match="give 2 labels, each another one"):
        STEPS[0].series(STEPS[1], labels=["a", "a"])
    with pytest.raises(OptionError, match="no matrix in common"):
        STEPS[0].series(Ranking([make_entry("other")]))


def test_frames_can_be_written_by_everything_that_writes_frames(tmp_path):
    entries = [
        make_entry("experts", 3.0, part="[3].gate", index=(3, slice(0, 8)), layer=2, aliases=("a", "b")),
        make_entry("head", math.inf, quantization="nf4"),
        bounded("x", 4.0),
    ]
    frame = Ranking(entries).to_dataframe()
    assert str(frame["layer"].dtype) == "Int64"
    assert frame["layer"].isna().tolist() == [False, True, True]
    assert frame["index"].tolist() == ["3, 0:8", "", ""]
    assert frame["aliases"].tolist() == ["a b", "", ""]
    frames = {
        "ranking": frame,
        "comparison": STEPS[0].compare(STEPS[1]).to_dataframe(),
        "series": RUN.to_dataframe(),
        "summary": STEPS[0].summary("layer").to_dataframe(),
        "empty": Ranking([]).to_dataframe(),
    }
    for name, found in frames.items():
        for kind in ("csv", "json", "parquet", "feather", "excel"):
            if kind in ("parquet", "feather"):
                pytest.importorskip("pyarrow")
            if kind == "excel":
                continue  # test_frames_go_into_a_workbook
            path = tmp_path / f"{name}.{kind}"
            getattr(found, f"to_{kind}")(path)
            if kind in ("parquet", "feather"):
                again = getattr(pandas, f"read_{kind}")(path)
                pandas.testing.assert_frame_equal(again, found)


def test_frames_go_into_a_workbook(tmp_path):
    pytest.importorskip("openpyxl")
    entries = [make_entry("experts", 3.0, part="[3]", index=(3,), aliases=("a",)), make_entry("head", math.inf)]
    for found in (Ranking(entries).to_dataframe(), RUN.to_dataframe()):
        found.to_excel(tmp_path / "x.xlsx")
        assert len(pandas.read_excel(tmp_path / "x.xlsx")) == len(found)


def test_no_cell_of_a_frame_holds_more_than_a_number_or_a_text():
    entries = [make_entry("e", 3.0, part="[3]", index=(3, slice(None, None, 2)), aliases=("a",)), make_entry("h", 2.0)]
    for found in (Ranking(entries).to_dataframe(), RUN.to_dataframe(), STEPS[0].compare(STEPS[1]).to_dataframe()):
        for value in found.to_numpy().ravel():
            assert value is pandas.NA or isinstance(value, (str, int, float, bool)), value
    assert Ranking(entries).to_dataframe()["index"][1] == "3, ::2"


def test_a_comparison_has_a_row_for_each_matrix():
    frame = STEPS[0].compare(STEPS[1]).to_dataframe()
    first = frame.set_index("key").loc["layers.0.q.weight"]
    assert (first["verdict"], first["layer"], first["rows"]) == ("up", 0, 32)
    assert first["kappa_after"] / first["kappa_before"] == pytest.approx(first["ratio"])


def test_a_document_says_what_was_compared_and_how(tmp_path):
    STEPS[0].compare(STEPS[1]).to_json(tmp_path / "c.json")
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["names"] == ["checkpoint-0", "checkpoint-1"]
    assert document["settings"] == [{"rtol": 0.01}, {"rtol": 0.01}]
    assert document["sources"][1] == {"path": "run/checkpoint-1"}
    RUN.to_json(tmp_path / "s.json")
    again = json.loads((tmp_path / "s.json").read_text())
    assert (again["format"], again["labels"]) == ("kappa_fast series", ["base", "a", "b", "c"])
    assert again["tracks"][0]["values"][0]["kappa"] == RUN.tracks[0].kappas[0]


def texts_of(figure) -> str:
    pytest.importorskip("matplotlib")
    page = io.BytesIO()
    figure.savefig(page, format="svg")
    return page.getvalue().decode()


def test_lines_are_drawn_for_each_layer_and_type(tmp_path):
    pytest.importorskip("matplotlib")
    figure = RUN.plot(tmp_path / "s.pdf")
    assert (tmp_path / "s.pdf").read_bytes().startswith(b"%PDF")
    panels = [axes for axes in figure.axes if axes.get_ylabel() == "kappa"]
    assert len(panels) == 2
    assert [len(axes.lines) for axes in panels] == [4, 4]
    one = RUN.plot(group="layers.*.up.weight")
    assert len([axes for axes in one.axes if axes.get_ylabel() == "kappa"]) == 1
    with pytest.raises(OptionError, match=r"group='nobody': give one of 'layers"):
        RUN.plot(group="nobody")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert RUN.plot(ax=axes) is axes.figure
    assert len(axes.lines) == 4


def test_changes_are_drawn_by_layer_and_type_or_as_bars(tmp_path):
    pytest.importorskip("matplotlib")
    figure = STEPS[0].compare(STEPS[3]).plot(tmp_path / "c.png")
    assert "1.60x" in texts_of(figure)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    flat = Ranking([make_entry("head", 2.0)]).compare(Ranking([make_entry("head", 3.0)])).plot()
    assert len(flat.axes[0].patches) == 1
    with pytest.raises(OptionError, match=r"cannot plot to x\.gif"):
        STEPS[0].compare(STEPS[1]).plot("x.gif")
    singular = Ranking([make_entry("head", math.inf)])
    with pytest.raises(OptionError, match="no matrix has a finite kappa in both rankings"):
        singular.compare(singular).plot()


def test_a_page_of_a_comparison_needs_nothing_else_and_runs_nothing(tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    evil = "<img src=x onerror=alert(1)>"
    before, after = Ranking([make_entry(evil, 2.0)]), Ranking([make_entry(evil, 3.0)], (), {"partial": True})
    before.compare(after).to_html(tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert "<script" not in page
    assert evil not in page
    assert "default-src 'none'" in page
    assert "1.50x" in page
    assert "the second ranking was interrupted" in page
    assert "data:image/svg+xml;base64," in page
    before.compare(after).to_html(tmp_path / "d.html")
    assert (tmp_path / "d.html").read_text() == page
    singular = Ranking([make_entry("head", math.inf)])
    singular.compare(singular).to_html(tmp_path / "e.html")
    assert "<img" not in (tmp_path / "e.html").read_text()
