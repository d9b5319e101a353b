"""Pictures and tables of rankings that another score than kappa has sorted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from make_entries import make_entry

from kappa_fast import OptionError, Ranking
from kappa_fast.report.grid import make_grid
from kappa_fast.report.shown import KAPPA, Shown


def sorted_by(score: str) -> Ranking:
    """Two layers of two types; flatness -0.5 to -2, stable rank 2 to 5, kappa unknown."""
    entries = []
    for i in range(4):
        flat = -0.5 * (i + 1)
        known = dict(flatness=flat, flatness_lower=flat, flatness_upper=flat, stable_rank=2.0 + i, frobenius=1.0)
        name, layer = f"layers.{i // 2}.{'qk'[i % 2]}.weight", i // 2
        group = f"layers.*.{'qk'[i % 2]}.weight"
        unknown = dict(kappa=math.nan, lower=1.0, upper=math.inf, sigma_max=math.nan, sigma_min=math.nan)
        entries.append(make_entry(name, layer=layer, group=group, status="scored", **unknown, **known))
    return Ranking([replace(entry, score=0.0) for entry in entries]).by(score)


def texts_of(figure) -> list[str]:
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    return found + [text.get_text() for text in figure.texts]


def test_a_plot_shows_the_statistic_that_the_ranking_is_sorted_by():
    texts = texts_of(sorted_by("-flatness").plot())
    assert {"-0.500", "-1.00", "-1.50", "-2.00"} <= set(texts)
    assert any(text.startswith("flatness of") for text in texts)
    assert "2.00" in texts_of(sorted_by("stable_rank").plot())


def test_a_plot_of_what_is_not_known_is_refused():
    with pytest.raises(OptionError, match="there is nothing to plot: no ranked matrix has a finite kappa"):
        Ranking([make_entry("a", math.inf)]).plot()


def test_a_cell_with_several_matrices_shows_a_mean_that_fits_the_statistic():
    entries = [
        make_entry(
            f"layers.0.experts.{i}.w", layer=0, group="g", stable_rank=s, flatness=f, flatness_lower=f, flatness_upper=f
        )
        for i, (s, f) in enumerate([(2.0, -1.0), (8.0, -3.0)])
    ]
    (cell,) = make_grid(entries, Shown("stable_rank")).cells
    assert cell.kappa == pytest.approx(4.0)
    (cell,) = make_grid(entries, Shown("flatness", logarithmic=False)).cells
    assert (cell.kappa, cell.low, cell.high) == (-2.0, -3.0, -1.0)
    (cell,) = make_grid(entries, KAPPA).cells
    assert cell.kappa == pytest.approx(10.0)


def test_the_table_shows_the_score_of_entries_without_kappa():
    lines = sorted_by("-flatness").to_text(width=120).splitlines()
    assert "score" in lines[0].split()
    assert "0.5000" in lines[1].split()
    assert "cholesky" not in lines[1]


def test_the_page_has_the_scores_of_entries_without_kappa():
    from kappa_fast.report.data import page_data

    data = page_data(sorted_by("-flatness"), None)
    assert data["entries"]["score"] == [0.5, 1.0, 1.5, 2.0]
    assert data["tables"]["status"] == ["scored"]


def test_the_page_offers_what_the_entries_have_and_begins_with_the_score():
    from kappa_fast.report.data import page_data

    ranking = sorted_by("-flatness")
    data = page_data(ranking, None)
    assert data["shown"]["first"] == "flatness"
    choices = [["kappa", True], ["stable_rank", True], ["flatness", False], ["frobenius", True]]
    choices.append(["sensitivity", True])
    assert sorted(data["shown"]["choices"]) == sorted(choices)
    assert data["entries"]["statistics"] == {
        "stable_rank": [2.0, 3.0, 4.0, 5.0],
        "flatness": [-0.5, -1.0, -1.5, -2.0],
        "frobenius": [1.0] * 4,
    }
    assert page_data(ranking, None, "stable_rank")["shown"]["first"] == "stable_rank"
    assert page_data(Ranking([make_entry()]), None)["shown"] == {
        "first": "kappa",
        "choices": [["kappa", True], ["sigma_max", True], ["sensitivity", True]],
    }


def test_what_is_shown_can_be_another_statistic_than_the_score(tmp_path):
    ranking = sorted_by("-flatness")
    texts = texts_of(ranking.plot(show="stable_rank"))
    assert {"2.00", "3.00", "4.00", "5.00"} <= set(texts)
    assert any(text.startswith("stable rank of") for text in texts)
    ranking.to_html(tmp_path / "p.html", show="-stable_rank")
    assert '"first":"stable_rank"' in (tmp_path / "p.html").read_text()
    for call in (ranking.plot, lambda **options: ranking.to_html(tmp_path / "q.html", **options)):
        with pytest.raises(OptionError, match=r"show='alpha': no matrix of the ranking has a finite alpha"):
            call(show="alpha")
        with pytest.raises(OptionError, match=r"show='flatnes': .*did you mean 'flatness'"):
            call(show="flatnes")
    assert not (tmp_path / "q.html").exists()


def test_a_singular_matrix_has_a_word_of_its_own_where_another_statistic_is_shown():
    singular = make_entry("layers.2.q.weight", math.inf, layer=2, group="layers.*.q.weight", flatness=-math.inf)
    regular = make_entry("layers.2.k.weight", 3.0, layer=2, group="layers.*.k.weight")
    ranking = Ranking([*sorted_by("-flatness"), singular, regular])
    assert "singular" in texts_of(ranking.plot(show="flatness"))
    assert "inf" in texts_of(ranking.plot(show="kappa"))
