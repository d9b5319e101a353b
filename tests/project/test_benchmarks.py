"""One front door to all benchmarks, and documents whose figures are those of benchmarks/results/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def door(load):
    yield load("benchmarks.__main__")
    sys.modules.pop("benchmarks.__main__", None)


def test_the_documents_have_the_figures_of_the_results(load):
    assert load("figures").stale() == [], "python -m benchmarks figures writes them anew"


def test_a_page_with_another_figure_is_found_and_mended(load, tmp_path, monkeypatch):
    figures = load("figures")
    for page in {page for page, _ in figures.BLOCKS.values()}:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((figures.ROOT / page).read_text())
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    before = (tmp_path / "docs" / "caching.md").read_text()
    (tmp_path / "docs" / "caching.md").write_text(before.replace("| 6.7 ms |", "| 5.7 ms |"))
    assert figures.stale() == ["docs/caching.md"]
    figures.write()
    assert figures.stale() == []
    assert (tmp_path / "docs" / "caching.md").read_text() == before


def test_a_page_without_its_marks_is_refused(load):
    figures = load("figures")
    marked = f"a\n{figures.BEGIN.format('x')}\nold\n{figures.END}\nb"
    assert figures.replaced(marked, "x", "new") == f"a\n{figures.BEGIN.format('x')}\n\nnew\n{figures.END}\nb"
    for text in ("a", marked + marked, marked.replace(figures.END, "")):
        with pytest.raises(ValueError, match=r"README\.md needs the line '<!-- made by .* figures: x -->' once"):
            figures.replaced(text, "x", "new", "README.md")


def test_every_mark_of_every_document_belongs_to_a_block_and_every_file_to_a_suite(load, root):
    figures, suites = load("figures"), load("suites")
    opened = figures.BEGIN.partition("{}")[0]
    documents = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    marks = sum(file.read_text().count(opened) for file in documents)
    assert marks == len(figures.BLOCKS)
    made = {file.name for suite in suites.SUITES.values() for file in suite.files}
    there = {file.name for file in suites.RESULTS.glob("*.json")}
    assert there <= made, "results that no suite makes"
    assert all(json.loads(file.read_text())["hardware"]["processor"] for file in suites.RESULTS.glob("*.json"))


def test_every_program_of_a_suite_exists(load, root):
    for suite in load("suites").SUITES.values():
        for part in suite.parts:
            named = [word for word in part.command if word.endswith(".py")]
            assert named or part.command[:2] == ("-m", "benchmarks.forgetting"), suite.name
            assert all((root / name).is_file() for name in named), suite.name


def test_without_a_name_it_lists_the_suites_and_of_when_their_results_are(root):
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("cpu", "sweep", "gpu", "io", "scale", "plan", "scores", "report", "forgetting"):
        assert f"\n{name}" in f"\n{done.stdout}"
    assert "cpu.json: AMD EPYC, avx2, avx512f, 2 cores, 2 threads, torch 2" in done.stdout


def test_tables_have_ratios_and_hardware(door, capsys):
    assert door.main(["tables", "cpu", "io", "scale"]) == 0
    said = capsys.readouterr().out
    assert "cpu, cpu.json: AMD EPYC" in said
    rows = json.loads((BENCHMARKS / "results" / "cpu.json").read_text())["rows"]
    ratio = next(row["ratio"] for row in rows if row["name"] == "peft_selector")
    assert f"{ratio:.2f} x kappa_fast" in said
    assert "second_run" in said
    assert "| 7168 x 2048 | 44,718 |" in said
    with pytest.raises(SystemExit):
        door.main(["tables", "cpus"])
    assert "there is no suite 'cpus'" in capsys.readouterr().err


def test_a_suite_runs_its_programs_and_says_where_results_go(door, load, tmp_path, capfd):
    """A suite of two small programs: what is not known goes to them, and the first that fails ends it."""
    suites = sys.modules["suites"]
    program = tmp_path / "program.py"
    rows = "[{'group': 'g', 'name': 'kappa_fast', 'seconds': {'median': 0.5}, 'ratio': 1.0}]"
    program.write_text(
        f"import sys, os, json\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport record\nprint('given', sys.argv[1:3])\n"
        "where = os.environ.get('KAPPA_FAST_RESULTS') or sys.argv[-1]\n"
        f"record.write(record.RESULTS / where, {rows})\nsys.exit(int(sys.argv[1]))\n"
    )
    kept = tmp_path / "kept"
    by_option = suites.Part((str(program),), "a.json", "--output")
    by_environment = suites.Part((str(program),), "b.json", "environment")
    suite = suites.Suite("toy", "a toy", "no time", (by_option, by_environment))
    suites.SUITES["toy"] = suite
    assert door.run(suite, ["0", "--fast"], kept) == 0
    said = capfd.readouterr().out
    assert said.count("given ['0', '--fast']") == 2
    assert said.count("kappa_fast") >= 2
    assert {file.name for file in kept.iterdir()} == {"a.json", "b.json"}
    assert door.run(suite, ["3"], kept) == 3
    assert capfd.readouterr().out.count("given") == 1
