"""benchmarks/sweep.py compares what it says, and goes on where it stopped."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_worst_and_the_best_cell_are_quoted(load):
    report = load("sweep_report")
    rows = [
        {"cell": name, "count": 1, "rows": 8, "columns": 4, "dtype": "float32", "spectrum": "trained", "threads": 1}
        | {"ratio": ratio}
        for name, ratio in (("a", 0.25), ("b", 3.0), ("c", None), ("d", 1.5))
    ]
    text = report.quotes({"cells": rows})
    assert "3 cells" in text
    assert "between 0.25 and 3 times" in text


@pytest.mark.parametrize("text", ["24x64x64", "1x256x2048:bfloat16", "2x30x20:graded", "2x30x20:bfloat16:gaussian"])
def test_a_cell_is_written_as_it_is_read(text, load):
    cells = load("sweep_cells")
    cell = cells.Cell.parse(text)
    assert cells.Cell.parse(str(cell)) == cell
    assert str(cell).startswith(text.partition(":")[0])


@pytest.mark.parametrize("text", ["64x64", "1x2x3:float16", "1x2x3:odd", "small"])
def test_what_is_no_cell_is_refused(text, load):
    with pytest.raises(ValueError, match="COUNTxROWSxCOLUMNS"):
        load("sweep_cells").Cell.parse(text)


def test_the_sweep_covers_its_sizes_aspects_numbers_and_kinds_once_each(load):
    cells = load("sweep_cells")
    found = list(cells.cells())
    assert len({str(cell) for cell in found}) == len(found)
    assert {(cell.dtype, cell.spectrum) for cell in found} == set(cells.KINDS)
    assert {cell.columns for cell in found} == set(cells.SIZES)
    assert {cell.rows // cell.columns for cell in found} == set(cells.ASPECTS)
    assert {cell.count for cell in found} == {1, 64}
    assert max(cell.count * cell.rows * cell.columns for cell in found) <= cells.MOST_ENTRIES


def test_matrices_are_the_same_every_time_and_graded_ones_are_graded(load):
    cell = load("sweep_cells").Cell.parse("2x80x40:graded")
    first, second = cell.matrices(), cell.matrices()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)
    for matrix in first:
        sigma = torch.linalg.svdvals(matrix.double())
        assert 1e3 < sigma[0] / sigma[-1] < 1e6
        assert matrix.abs().amax(dim=0).min() > 1e-3 * matrix.abs().max()  # mixed: no column is small by itself


@pytest.mark.parametrize("text", ["3x40x24", "3x24x40", "1x50x20:bfloat16"])
def test_all_plain_ways_find_the_kappas(text, load):
    cells = load("sweep_cells")
    matrices = cells.Cell.parse(text).matrices()
    exact = [float(torch.linalg.cond(matrix.double(), 2)) for matrix in matrices]
    ways = cells.plain_ways(matrices)
    assert len(ways) == 10
    for name, way in ways.items():
        assert way() == pytest.approx(exact, rel=1e-3), name


def sweep_of(load, lines, seconds=60.0):
    return load("sweep").Sweep(lines, 1, time.time() + seconds)


def test_a_run_goes_on_where_the_last_one_stopped_if_the_code_is_the_same(load, tmp_path, one_thread, monkeypatch):
    cells = [load("sweep_cells").Cell.parse(text) for text in ("1x20x16", "2x24x16")]

    def done(sweep):
        return [str(cell) for cell, _ in sweep.cells(cells, seconds=0.01)]

    assert done(sweep_of(load, tmp_path / "lines")) == [str(cell) for cell in cells]
    assert done(sweep_of(load, tmp_path / "lines")) == []
    assert done(sweep_of(load, tmp_path / "others", seconds=-1.0)) == []  # no time is left
    monkeypatch.setattr(load("record"), "source_digest", lambda: "changed")
    assert done(sweep_of(load, tmp_path / "lines")) == [str(cell) for cell in cells]


def test_a_fast_way_that_is_wrong_is_not_the_best(load, one_thread, monkeypatch):
    cells = load("sweep_cells")
    original = cells.plain_ways
    wrong = {"guess": lambda: [1.0]}
    monkeypatch.setattr(cells, "plain_ways", lambda matrices, **kw: original(matrices, peft=False) | wrong)
    found = sweep_of(load, None).cell(cells.Cell.parse("1x40x20"), seconds=0.01)
    assert found["times"]["guess"]["error"] > 0.5
    assert found["best"] != "guess"
    assert found["ratio"] == pytest.approx(
        found["times"][found["best"]]["processor"] / found["times"]["rank"]["processor"]
    )


def test_what_smaller_cells_tell_to_take_too_long_is_left_out(load, one_thread):
    sweep, cell = sweep_of(load, None), load("sweep_cells").Cell.parse("1x40x20")
    sweep.pace["torch svdvals float32"] = [(cell.operations / 4, load("sweep").LIMIT / 3)]
    found = sweep.cell(cell, seconds=0.01, quick=True)
    assert "torch svdvals float32" not in found["times"]
    assert found["too long"]["torch svdvals float32"] == pytest.approx(4 / 3 * load("sweep").LIMIT, rel=0.01)


def test_an_interval_that_misses_the_kappa_ends_the_run(load):
    import kappa_fast

    ranking = kappa_fast.rank({"layers.0.weight": torch.diag(torch.linspace(1, 5, 20))})
    check = load("sweep_claims").assert_contains
    check(ranking, [5.0])
    for kappa in (4.0, 6.0):
        with pytest.raises(AssertionError):
            check(ranking, [kappa])


def test_ways_are_run_in_turn_and_those_without_a_chance_once(load):
    order = list[str]()

    def way(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)
            return name

        return run

    timing = load("sweep_timing")
    found = timing.alternate({"ours": way("ours", 0.03)}, {"a": way("a", 0.03), "slow": way("slow", 0.4)}, 10.0, most=4)
    assert order == ["ours", "ours", "a", "a", "slow", *["ours", "a"] * 3]  # the first run of short ones warms up
    assert [found[name].result for name in found] == ["ours", "a", "slow"]
    assert [len(found[name].wall) for name in found] == [4, 4, 1]
    assert 0.4 <= found["slow"].as_json()["wall"] < 4
    assert found["slow"].as_json()["processor"] < 0.2  # it sleeps


def test_every_claim_has_a_goal_and_the_short_ones_are_met_by_what_they_check(load, one_thread):
    claims = load("sweep_claims").CLAIMS
    assert list(claims) == ["small", "many", "minilm", "peft", "top", "inside", "certify"]
    found = sweep_of(load, None).claim("small", seconds=0.01)
    seconds = {way: times["processor"] for way, times in found["times"].items()}
    ours = seconds.pop("rank")
    assert found["figure"] == pytest.approx(min(seconds.values()) / ours)
