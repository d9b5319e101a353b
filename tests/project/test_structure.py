"""The import graph: no circle among files, and every import goes down in the picture of docs/design.md."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kappa_fast"
# The one place that may reach up: methods such as Ranking.to_html() find there what they hand a result to.
CONSUMERS = "kappa_fast.results.consumers"


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """What a file imports of the package, late and type-only imports included."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield from (target for target in (inner if inner in known else base,) if target in known)


def graph() -> dict[str, set[str]]:
    known = modules()
    found = {name: set(imported(name, path, known)) - {name} for name, path in known.items()}
    found[CONSUMERS] = set()
    return found


def room_of(name: str) -> str:
    """The folder of a file, or the file itself where it lies in none."""
    parts = name.split(".")
    if len(parts) == 1:
        return "__init__.py"
    return parts[1] + ("/" if (PACKAGE / parts[1]).is_dir() else ".py")


def picture() -> dict[str, int]:
    """The level of every room in the picture, the highest first."""
    text = (ROOT / "docs/design.md").read_text()
    drawn = re.search(r"<!-- rooms -->\n+```text\n(.*?)```", text, re.DOTALL)
    assert drawn is not None
    rows = [row for row in drawn[1].splitlines() if "|" in row]
    return {room: level for level, row in enumerate(rows) for room in row.partition("|")[0].split()}


def test_no_file_imports_what_imports_it():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_picture_has_every_room_once():
    rooms = {room_of(name) for name in modules()}
    assert set(picture()) == rooms


def test_imports_go_down_in_the_picture():
    level = picture()
    up = {
        (name, target)
        for name, targets in graph().items()
        for target in targets
        if room_of(name) != room_of(target) and level[room_of(target)] <= level[room_of(name)]
    }
    assert up == set()


def test_a_circle_would_be_found():
    circular = graph()
    circular["kappa_fast.errors"].add("kappa_fast.pipeline")
    with pytest.raises(CycleError):
        TopologicalSorter(circular).prepare()
