"""The front door of all benchmarks.

python -m benchmarks                    lists the suites, and of when their results are
python -m benchmarks NAME [OPTIONS]     runs one; what it does not know goes to its programs
python -m benchmarks tables [NAME ...]  prints what results/ holds: times, ratios, hardware, commit
python -m benchmarks figures [--check]  puts the figures of results/ into README.md and docs/
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this clone, whatever is installed

from suites import RESULTS, SUITES, Suite, environment  # noqa: E402


def main(given: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", nargs="?", choices=[*SUITES, "tables", "figures"], metavar="NAME")
    parser.add_argument("--to", type=Path, default=RESULTS, help="the folder for results (default: benchmarks/results)")
    parser.add_argument("--check", action="store_true", help="with figures: only say which pages are out of date")
    options, rest = parser.parse_known_args(given)
    if options.what is None:
        print("\n".join(listed()))
        return 0
    if options.what == "tables":
        unknown = [name for name in rest if name not in SUITES]
        if unknown:
            parser.error(f"there is no suite {unknown[0]!r}: there are {', '.join(SUITES)}")
        print("\n\n".join(tables(rest or list(SUITES), options.to)))
        return 0
    if options.what == "figures":
        return figures(options.check)
    return run(SUITES[options.what], rest, options.to)


def listed() -> Iterator[str]:
    """A few lines for each suite."""
    for suite in SUITES.values():
        yield f"{suite.name:<11}{suite.about}"
        yield f"{'':<11}takes {suite.takes}" + (f"; needs {', '.join(suite.needs)}" if suite.needs else "")
        for file in suite.files:
            yield f"{'':<11}{file.name}: {origin(file)}"


def origin(file: Path) -> str:
    """Where its figures come from, in a line."""
    if not file.exists():
        return "not measured yet"
    document = json.loads(file.read_text())
    hardware, versions = document["hardware"], document["versions"]
    threads = f", {hardware['threads']} threads" if "threads" in hardware else ""
    state = "" if document.get("clean") else ", with changes"
    return (
        f"{hardware['processor']}, {hardware['cores']} cores{threads}, torch {versions['torch']}, "
        f"commit {document.get('commit', 'unknown')[:10]}{state}"
    )


def tables(names: Sequence[str], folder: Path = RESULTS) -> Iterator[str]:
    """What the files of these suites hold."""
    import figures as made

    for name in names:
        for file in SUITES[name].files:
            here = folder / file.name
            head = f"{name}, {file.name}: {origin(here)}"
            yield head if not here.exists() else f"{head}\n{'-' * len(head)}\n" + made.table_of(here)


def figures(check: bool) -> int:
    """Writes the pages, or only names those that are not as they would be written."""
    import figures as made

    stale = made.stale()
    if not check:
        made.write()
    for page in stale:
        print(f"{page}: {'differs from the results' if check else 'written'}")
    return int(check and bool(stale))


def run(suite: Suite, more: Sequence[str], folder: Path = RESULTS) -> int:
    """All programs of a suite, up to the first that fails; then the tables of its files. Returns the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in suite.parts:
        command, added = part.arguments(more, folder)
        print("+", " ".join(command[1:]), flush=True)
        code = subprocess.run(command, cwd=HERE.parent, env=environment(added), check=False).returncode
        if code:
            return code
    kept: list[Any] = [file for file in suite.files if (folder / file.name).exists()]
    if kept:
        print("\n\n".join(tables([suite.name], folder)))
        print("\npython -m benchmarks figures puts them into the documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
