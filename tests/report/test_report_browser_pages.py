"""The page of a report in a browser: legible at every width, safe from what it shows, and whole for every ranking."""

from __future__ import annotations

import math
import random
import re

import pytest
from browser import MISSING, READ_COLORS, View, contrast, find_chromium
from hypothesis import given, settings
from hypothesis import strategies as st
from make_entries import bounded, entry_lists, make_entry, non_finite, skipped
from report_rankings import named

from kappa_fast.results.entries import Skipped
from kappa_fast.results.ranking import Ranking

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_chromium() is None, reason=MISSING)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["minilm", "top", "odd"])
def test_every_text_stands_out_from_what_is_behind_it_in_both_themes(name, scheme, rankings, open_page):
    view = open_page(rankings[name], scheme=scheme)
    view.page.eval_on_selector_all("details", "all => all.forEach((d) => (d.open = true))")
    if view.page.locator(".cell[aria-expanded]").count():
        view.page.click(".cell[aria-expanded] >> nth=0")

    def check(dark):
        page = view.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", page))) < 3 * 64) == dark
        assert view.page.get_attribute("#theme", "aria-pressed") == str(dark).lower()
        colors = view.page.evaluate(READ_COLORS)
        assert len(colors) > 100
        assert [found for found in colors if contrast(found[1], found[2]) < 4.5] == []

    check(scheme == "dark")
    view.page.click("#theme")
    check(scheme == "light")


@pytest.mark.parametrize("width", [360, 800, 1600])
@pytest.mark.parametrize("name", ["minilm", "odd"])
def test_the_page_is_as_wide_as_the_window(name, width, rankings, open_page):
    view = open_page(rankings[name], width=width)
    view.page.eval_on_selector_all("details", "all => all.forEach((d) => (d.open = true))")
    assert view.page.evaluate("document.documentElement.scrollWidth") <= width
    for target in ("#theme", "#cut-value", "#search", "#curve", "#rows"):
        box = view.page.locator(target).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_unfolded_experts_are_in_view_on_a_narrow_screen_too(rankings, open_page):
    view = open_page(rankings["mixtral"], width=360)
    view.page.click("#map .cell[aria-expanded] >> nth=2")  # the last column: the map is scrolled to it
    assert view.page.evaluate("document.getElementById('map').scrollLeft") > 100
    for cell in view.page.locator(".unfolded .cell").all():
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def test_hostile_names_are_shown_as_they_are_and_do_nothing(open_page):
    names = [HOSTILE, "h.0.\u202egnp\n.w", "h.1.<b>bold</b>.w", "h.2.${7*7}.w"]
    entries = [named(name, 2.0 + i, aliases=(HOSTILE,), method=HOSTILE) for i, name in enumerate(names)]
    view = open_page(Ranking(entries, [Skipped(HOSTILE, (1, 2), HOSTILE)], {"source": {"path": "/x/<i>a</i>"}}))
    view.page.eval_on_selector_all("details", "all => all.forEach((d) => (d.open = true))")
    shown = [cells["key"] for _, cells in view.rows()]
    assert shown == [HOSTILE, "h.0.\\u{202e}gnp\\u{a}.w", "h.1.<b>bold</b>.w", "h.2.${7*7}.w"]
    assert view.page.locator("img, i, #map b, #rows b").count() == 0
    view.page.hover("#map .cell >> nth=0")
    assert HOSTILE in view.page.inner_text("#tip")
    assert view.page.title() == "Condition numbers of i>"


def test_the_policy_stops_a_script_and_a_picture_that_got_into_the_page_after_all(rankings, browser, tmp_path):
    rankings["minilm"].to_html(tmp_path / "page.html")
    view = View(browser, tmp_path / "page.html")
    view.page.evaluate(
        "() => { document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.1:9/x.png\">');"
        " const s = document.createElement('script'); s.textContent = 'window.owned = 1'; document.body.append(s); }"
    )
    view.page.wait_for_timeout(200)
    assert view.page.evaluate("window.owned") is None
    assert sum("Content Security Policy" in text for text in view.complaints) >= 2
    view.close()


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [non_finite("h.0.w", layer=0)],
        [make_entry("w", math.inf)],
        [bounded("h.0.w", 5.0, layer=0)],
        [make_entry("h.0.w", 3.0, layer=0)],
        [make_entry("h.0.w", 3.0, layer=0, numel=0, shape=(0, 0), lower=1.0, upper=math.inf, method="reference")],
    ],
)
def test_rankings_with_next_to_nothing_open_too(entries, open_page):
    view = open_page(Ranking(entries))
    assert len(view.rows()) == len(entries)
    view.page.focus("#curve")
    for key in ("Home", "ArrowRight", "Enter"):
        view.page.keyboard.press(key)


@settings(max_examples=15)
@given(entries=entry_lists, left_out=st.lists(skipped, max_size=3))
def test_whatever_a_ranking_accepts_opens_and_can_be_worked_with(entries, left_out, browser, tmp_path_factory):
    file = tmp_path_factory.mktemp("any") / "page.html"
    ranking = Ranking(entries, left_out, {"num_parameters": 10**6})
    ranking.to_html(file)
    view = View(browser, file)
    assert [position for position, _ in view.rows()] == list(range(len(ranking)))
    for kind in view.page.eval_on_selector_all("#cut-kind option", "all => all.map((o) => o.value)"):
        view.page.select_option("#cut-kind", kind)
    for header in view.page.locator("#rows th button").all():
        header.click()
    view.page.focus("#curve")
    view.page.keyboard.press("End")
    view.page.eval_on_selector_all("details", "all => all.forEach((d) => (d.open = true))")
    if view.page.locator("#map .cell").count():
        view.page.focus("#map .cell >> nth=0")
        view.page.keyboard.press("Enter")
    assert view.complaints == []
    view.close()


def test_only_the_rows_in_view_are_in_the_document(open_page):
    rng = random.Random(0)
    names = [f"layers.{i // 300}.experts.{i % 300}.w" for i in range(9000)]
    ranking = Ranking(named(name, 2 + rng.random() * 50) for name in names)
    view = open_page(ranking)
    assert view.page.locator("#rows tbody tr[data-position]").count() < 80
    view.sort("kappa")
    view.sort("kappa")
    assert view.page.inner_text("#rows tbody tr[data-position] >> nth=0 >> td.key") == ranking[-1].key
    view.page.evaluate("rows.scrollTop = rows.scrollHeight")
    view.page.wait_for_timeout(100)
    assert view.page.inner_text("#rows tbody tr[data-position] >> nth=-1 >> td.key") == ranking[0].key
    view.page.click("#map .cell >> nth=0")
    assert view.page.locator(".unfolded .cell").count() == 300


def test_a_statistic_can_be_chosen_for_colors_curve_and_histogram(browser, tmp_path):
    entries = []
    for i in range(8):
        flat = -0.1 * (i + 1)
        known = dict(
            flatness=flat, flatness_lower=flat, flatness_upper=flat, flatness_by_shape=flat, stable_rank=2.0**i
        )
        entries.append(named(f"layers.{i // 2}.{'qk'[i % 2]}.weight", 10.0 + i, **known))
    entries.append(named("layers.4.q.weight", math.inf, flatness=-math.inf))
    Ranking(entries).to_html(tmp_path / "r.html")
    view = View(browser, tmp_path / "r.html")
    page = view.page
    cells = lambda: page.locator("#map .cell").all_inner_texts()  # noqa: E731
    assert cells()[:3] == ["10.0", "11.0", "12.0"]
    colors = page.locator("#map .cell").evaluate_all("all => all.map((cell) => cell.style.backgroundColor)")
    page.select_option("#shown", "flatness")
    assert cells() == [*(f"-{0.1 * (i + 1):.3f}" for i in range(8)), "singular"]
    turned = page.locator("#map .cell").evaluate_all("all => all.map((cell) => cell.style.backgroundColor)")
    assert [turned[0], turned[7]] == [colors[7], colors[0]]  # the flattest has the lowest kappa
    assert turned[8] == ""
    assert page.inner_text("#legend").split("\n")[:4] == ["flatness", "-0.800", "-0.450", "-0.100"]
    assert "linear scale" in page.inner_text("#map-help")
    assert (
        page.locator("#histogram svg").get_attribute("aria-label").startswith("Histogram of flatness for all types: 8")
    )
    assert page.locator("#curve").get_attribute("aria-valuemax") == "8"
    assert "flatness -0.1000" in page.locator("#map .cell").first.get_attribute("aria-label")
    page.select_option("#shown", "stable_rank")
    assert cells()[:4] == ["1.00", "2.00", "4.00", "8.00"]
    assert page.inner_text("#legend").split("\n")[:4] == ["stable rank", "1.00", "11.3", "128"]
    page.select_option("#shown", "sensitivity")
    assert cells()[:2] == ["0.0100", "0.0100"]
    page.select_option("#shown", "kappa")
    assert cells()[:3] == ["10.0", "11.0", "12.0"]
    assert page.locator("#map .cell").evaluate_all("all => all.map((cell) => cell.style.backgroundColor)") == colors
    view.close()


def test_budgets_of_a_ranking_without_kappa_take_what_select_takes(browser, tmp_path):
    entries = []
    for i in range(6):
        flat = -0.1 * (i + 1)
        known = dict(flatness=flat, flatness_lower=flat, flatness_upper=flat, flatness_by_shape=flat)
        unknown = dict(kappa=math.nan, lower=1.0, upper=math.inf, sigma_max=math.nan, sigma_min=math.nan, score=0.0)
        entries.append(named(f"layers.{i}.q.weight", status="scored", **unknown, **known))
    ranking = Ranking(entries, (), {"num_parameters": 6 * 512}).by("-flatness")
    ranking.to_html(tmp_path / "r.html")
    view = View(browser, tmp_path / "r.html")
    assert view.page.input_value("#shown") == "flatness"
    view.set_budget("num_tensors", 2)
    assert view.chosen() == [0, 1]
    assert "certain: exact" in view.page.inner_text("#cut-result")
    assert "kappa" not in view.page.inner_text("#cut-result")
    assert view.page.locator("#cut-kind option[value=max_kappa]").count() == 0
    view.close()
