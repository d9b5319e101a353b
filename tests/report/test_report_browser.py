"""The page in a real browser: clicked, sorted, searched and read back."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from browser import MISSING, find_chromium
from make_entries import make_entry
from report_rankings import named

from kappa_fast.errors import OptionError
from kappa_fast.report.table import _digits as digits_of
from kappa_fast.report.table import format_interval, format_number, format_relative
from kappa_fast.results.entries import Skipped
from kappa_fast.results.names import in_model_order
from kappa_fast.results.ranking import Ranking

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_chromium() is None, reason=MISSING)]


def words(entry):
    """What the table that kappa_fast prints says of an entry."""
    statuses = {"ok": "ok", "rank_deficient": "rank deficient", "bounded": "bounded", "non_finite": "non-finite"}
    settled = entry.status in ("ok", "rank_deficient")
    return {
        "key": entry.key,
        "layer": "" if entry.layer is None else str(entry.layer),
        "shape": "x".join(map(str, entry.shape)),
        "dtype": entry.dtype,
        "kappa": format_number(entry.kappa, max(4, digits_of(entry))),
        "interval": format_interval(entry),
        "proven": ("yes" if entry.certified else "no") if settled else "-",
        "sensitivity": format_relative(entry.sensitivity),
        "status": statuses[entry.status],
        "method": entry.method,
    }


@pytest.mark.parametrize("name", ["minilm", "mixtral", "top", "odd"])
def test_the_table_says_what_the_table_in_the_terminal_says(name, rankings, open_page):
    ranking = rankings[name]
    rows = open_page(ranking).rows()
    assert [position for position, _ in rows] == list(range(len(ranking)))
    for (_, cells), entry in zip(rows, ranking, strict=True):
        expected = words(entry)
        assert {column: cells[column] for column in expected} == expected


@pytest.mark.parametrize("name", ["minilm", "odd"])
def test_a_click_on_a_header_sorts_and_another_one_turns_it_round(name, rankings, open_page):
    ranking = rankings[name]
    view = open_page(ranking)
    places = {key: place for place, key in enumerate(in_model_order(entry.key for entry in ranking))}
    values = {
        "kappa": lambda entry: entry.kappa,
        "key": lambda entry: places[entry.key],
        "layer": lambda entry: math.nan if entry.layer is None else entry.layer,
        "shape": lambda entry: entry.numel,
        "sensitivity": lambda entry: entry.sensitivity,
        "interval": lambda entry: entry.lower,
        "status": lambda entry: entry.status,
    }
    for column, read in values.items():
        numbers = [read(entry) for entry in ranking]
        known = [i for i, value in enumerate(numbers) if value == value]
        unknown = [i for i, value in enumerate(numbers) if value != value]
        for direction, sign in (("ascending", 1), ("descending", -1)):
            view.sort(column)
            header = f'#rows th[data-name="{column}"]'
            assert view.page.get_attribute(header, "aria-sort") == direction
            assert view.page.locator(f'#rows th[aria-sort="{direction}"]').count() == 1
            assert view.page.locator('#rows th[aria-sort="none"]').count() == view.page.locator("#rows th").count() - 1
            shown = view.positions()
            ranked = sorted(known, key=lambda i: numbers[i], reverse=sign < 0)
            ties = [list(same) for _, same in itertools.groupby(ranked, key=lambda i: numbers[i])]
            assert shown == [i for same in ties for i in sorted(same)] + unknown


def test_searching_keeps_what_has_all_the_words(rankings, open_page):
    ranking = rankings["minilm"]
    view = open_page(ranking)
    for text, parts in [("layer.3. DENSE", ["layer.3.", "dense"]), ("query", ["query"]), ("nothing-like-this", ["%"])]:
        view.page.fill("#search", text)
        expected = [i for i, entry in enumerate(ranking) if all(part in entry.key for part in parts)]
        assert view.positions() == expected
        assert view.page.inner_text("#table-count") == f"{len(expected)} of {len(ranking)} rows"
    view.page.fill("#search", "")
    assert view.page.inner_text("#table-count") == f"{len(ranking)} rows"


def test_the_filter_keeps_one_status(rankings, open_page):
    ranking = rankings["odd"]
    view = open_page(ranking)
    view.page.select_option("#filter-status", "rank_deficient")
    assert view.positions() == [i for i, entry in enumerate(ranking) if entry.status == "rank_deficient"]


@pytest.mark.parametrize("name", ["minilm", "mixtral", "top", "odd", "score"])
def test_a_budget_in_the_page_takes_what_select_takes(name, rankings, open_page):
    ranking = rankings[name]
    view = open_page(ranking)
    resolved = sorted(entry.kappa for entry in ranking if entry.status == "ok")
    budgets = [("max_params", value) for value in (0.003, 0.05, 0.2, 0.5, 1.0)]
    budgets += [("num_tensors", value) for value in (1, 4, len(resolved), len(resolved) + 3, 10**6)]
    budgets += [("max_kappa", value) for value in (1.0, resolved[0], resolved[len(resolved) // 2] * 1.0000001, 1e200)]
    outcomes = set()
    for kind, value in budgets:
        view.set_budget(kind, value)
        said = view.page.inner_text("#cut-result")
        try:
            selection = ranking.select(**{kind: value})
        except OptionError as error:
            expected = "beyond what was resolved" if "beyond" in str(error) else "This takes nothing"
            assert expected in said, (kind, value)
            assert view.chosen() == []
            outcomes.add(expected)
            continue
        assert [ranking[i].key for i in view.chosen()] == list(selection.keys), (kind, value)
        assert ("The cut is certain" in said) == selection.boundary_certain, (kind, value, said)
        assert f"Takes {len(selection):,} of {len(ranking):,} matrices, {selection.num_params:,} parameters" in said
        code = view.page.inner_text("#cut-code")
        assert eval(code, {"ranking": ranking}) == selection, code
        outcomes.add(selection.boundary_certain)
    assert True in outcomes


@pytest.mark.parametrize("seed", range(3))
def test_the_page_is_as_sure_of_a_cut_as_select_is_where_intervals_overlap(seed, open_page):
    rng = random.Random(seed)
    entries = []
    for i in range(12):
        kappa, below, above = 10 + 0.3 * i, rng.choice([0, 0.1, 0.5]), rng.choice([0, 0.1, 0.5])
        shape = (rng.choice([16, 32, 64, 512]), 16)
        entries.append(named(f"h.{i}.w", kappa, lower=kappa - below, upper=kappa + above, shape=shape))
    ranking = Ranking(entries, (), {"num_parameters": sum(entry.numel for entry in entries)})
    budgets = [("num_tensors", count) for count in range(1, 12)]
    budgets += [("max_params", rng.random()) for _ in range(16)]
    budgets += [("max_kappa", getattr(entry, end)) for entry in entries[::2] for end in ("lower", "kappa", "upper")]
    view = open_page(ranking)
    verdicts = set()
    for kind, value in budgets:
        view.set_budget(kind, value)
        said = view.page.inner_text("#cut-result")
        try:
            selection = ranking.select(**{kind: value})
        except OptionError:
            assert said == "This takes nothing."
            continue
        assert f"Takes {len(selection)} of 12" in said
        assert ("The cut is certain" in said) == selection.boundary_certain, (kind, value)
        verdicts.add((kind, selection.boundary_certain))
    assert len(verdicts) == 6


def test_the_slider_moves_the_cut_in_the_map_and_the_table(rankings, open_page):
    ranking = rankings["minilm"]
    view = open_page(ranking)
    counts = []
    for place in (50, 200, 600, 1000):
        view.page.evaluate(
            "(place) => { const s = document.getElementById('cut-slider'); s.value = place;"
            " s.dispatchEvent(new Event('input')); }",
            str(place),
        )
        share = float(view.page.input_value("#cut-value"))
        assert share == place / 1000
        expected = set(ranking.select(max_params=share).keys)
        marked = view.page.eval_on_selector_all(".cell.chosen", "cells => cells.map((c) => Number(c.dataset.position))")
        assert {ranking[i].key for i in marked} == expected
        counts.append(len(marked))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == len(ranking)


def test_values_that_are_no_budget_are_answered_with_what_is(rankings, open_page):
    view = open_page(rankings["minilm"])
    for kind, text in [("max_params", "1.5"), ("max_params", "0"), ("num_tensors", "2.5"), ("max_kappa", "0.5")]:
        view.page.select_option("#cut-kind", kind)
        view.page.fill("#cut-value", text)
        assert view.page.inner_text("#cut-result").startswith("Give a ")
        assert view.page.get_attribute("#cut-value", "aria-invalid") == "true"


def test_a_selection_that_was_given_is_shown_first(rankings, open_page):
    ranking = rankings["mixtral"]
    selection = ranking.select(num_tensors=2, unit="expert", per_group=True)
    view = open_page(ranking, selection)
    assert view.page.input_value("#cut-kind") == "given"
    assert [ranking[i].key for i in view.chosen()] == list(selection.keys)
    assert view.page.inner_text("#cut-code") == "ranking.select(num_tensors=2, per_group=True, unit='expert')"
    view.page.select_option("#cut-kind", "num_tensors")
    view.page.fill("#cut-value", "3")
    assert view.chosen() == [0, 1, 2]


def test_a_cell_of_experts_unfolds_into_all_of_them_and_folds_again(rankings, open_page):
    ranking = rankings["mixtral"]
    view = open_page(ranking)
    groups = view.page.locator("#map .cell[aria-expanded]")
    assert groups.count() == 6  # gate, up and down in two layers
    label = groups.first.get_attribute("aria-label")
    members = [e for e in ranking if e.layer == 0 and e.group.endswith("gate_up_proj.gate")]
    mean = math.exp(sum(math.log(e.kappa) for e in members) / 4)
    low, high = (format_number(pick(e.kappa for e in members)) for pick in (min, max))
    assert f"kappa {low} to {high}, geometric mean {format_number(mean)}" in label
    groups.first.click()
    assert groups.first.get_attribute("aria-expanded") == "true"
    shown = view.page.eval_on_selector_all(".unfolded .cell", "cells => cells.map((c) => Number(c.dataset.position))")
    expected = [entry for entry in ranking if entry.layer == 0 and "experts" in entry.name]
    assert sorted(shown) == sorted(ranking.entries.index(entry) for entry in expected)
    assert [ranking[i].part for i in shown[:4]] == [f"[{i}].gate" for i in range(4)]
    view.page.hover(".unfolded .cell >> nth=1")
    tip = view.page.inner_text("#tip")
    assert ranking[shown[1]].key in tip
    assert f"interval {format_interval(ranking[shown[1]])}" in tip
    groups.first.click()
    assert view.page.locator(".unfolded").count() == 0


def test_the_keyboard_reaches_cells_experts_curve_and_headers(rankings, open_page):
    view = open_page(rankings["mixtral"])
    page = view.page
    focused = "document.activeElement"
    assert page.locator('#map .cell[tabindex="0"]').count() == 1
    page.focus('#map .cell[tabindex="0"]')
    first = page.evaluate(f"{focused}.getAttribute('aria-label')")
    assert page.is_visible("#tip")
    page.keyboard.press("Escape")
    assert not page.is_visible("#tip")
    for _ in range(4):  # from q over k, v, o to the first experts
        page.keyboard.press("ArrowRight")
    assert page.evaluate(f"{focused}.getAttribute('aria-label')") != first
    assert page.evaluate(f"{focused}.getAttribute('aria-expanded')") == "false"
    page.keyboard.press("Enter")
    assert page.evaluate(f"{focused}.getAttribute('aria-expanded')") == "true"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.closest('.strip') !== null")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    strips = "[...document.querySelectorAll('.strip')]"
    assert page.evaluate(f"{strips}.indexOf({focused}.closest('.strip'))") == 1
    assert page.evaluate(f"[...{focused}.parentElement.children].indexOf({focused})") == 1
    page.focus("#curve")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    entry = rankings["mixtral"][len(rankings["mixtral"]) - 2]
    assert entry.key in page.get_attribute("#curve", "aria-valuetext")
    assert page.get_attribute("#curve", "aria-valuenow") == str(len(rankings["mixtral"]) - 1)
    page.keyboard.press("Enter")
    assert page.input_value("#cut-kind") == "num_tensors"
    assert page.input_value("#cut-value") == str(len(rankings["mixtral"]) - 1)
    page.focus('#rows th[data-name="kappa"] button')
    page.keyboard.press("Enter")
    assert page.get_attribute('#rows th[data-name="kappa"]', "aria-sort") == "ascending"


def test_a_click_on_a_matrix_shows_its_row(rankings, open_page):
    ranking = rankings["odd"]
    view = open_page(ranking)
    view.page.fill("#search", "exact")
    position = next(i for i, entry in enumerate(ranking) if entry.key == "model.layers.5.m7.weight")
    view.page.click(f'#map .cell[data-position="{position}"]')
    assert view.page.inner_text("#rows tr.revealed td.key") == "model.layers.5.m7.weight"
    assert view.page.is_visible("#rows tr.revealed")


def test_the_histogram_counts_every_finite_kappa_of_the_chosen_type(rankings, open_page):
    ranking = rankings["minilm"]
    view = open_page(ranking)
    view.page.eval_on_selector_all("details", "all => all.forEach((d) => (d.open = true))")

    def total():
        texts = view.page.eval_on_selector_all(
            "#histogram-numbers tbody tr", "rows => rows.map((row) => Number(row.lastChild.textContent))"
        )
        return sum(texts)

    assert total() == len(ranking)
    view.page.select_option("#histogram-group", label="encoder.layer.*.attention.self.query.weight")
    assert total() == 6
    assert "6 matrices" in view.page.get_attribute("#histogram svg", "aria-label")


def test_skipped_parameters_unfold_under_their_reasons(open_page):
    left_out = [Skipped(f"model.layers.{i}.norm.weight", (4, i + 1), "too small") for i in range(450)]
    left_out.append(Skipped("codes.3.weight", (8, 8), "codes that need the scales of layers.3.x"))
    view = open_page(Ranking([make_entry("w")], left_out))
    summaries = view.page.locator("#skipped summary")
    assert summaries.all_inner_texts() == ["450: too small", "1: codes that need the scales of layers.*.x"]
    summaries.first.click()
    items = view.page.locator("#skipped details >> nth=0 >> li")
    items.first.wait_for()
    assert items.count() == 200
    assert items.first.inner_text().split() == ["model.layers.0.norm.weight", "4x1"]
    while view.page.is_visible("#skipped details >> nth=0 >> button"):
        view.page.click("#skipped details >> nth=0 >> button")
    assert items.count() == 450
    summaries.nth(1).click()
    assert "layers.3.x" in view.page.inner_text("#skipped details >> nth=1 >> li")
