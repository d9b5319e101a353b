"""The tables of docs/ that say which format is read where: every cell names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


@pytest.mark.parametrize("page", ["quantized.md", "checkpoints.md"])
def test_every_cell_names_a_test_that_exists(page):
    named = NAMED.findall((DOCS / page).read_text())
    assert len(named) > 8
    for file, test in named:
        (path,) = TESTS.rglob(file)
        assert f"def {test}(" in path.read_text(), (file, test)


def test_every_cell_of_the_formats_says_what_happens_there():
    table = (DOCS / "quantized.md").read_text().partition("## Which format is read where")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for _, *cells in rows:
        assert len(cells) == 4
        assert all(cell == "-" or re.fullmatch(r"(?:read|refused|skipped): `\S+`", cell) for cell in cells), cells
