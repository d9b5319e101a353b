"""Record what kappa_fast answers, and compare two recordings: whether a change has changed a number.

    python tests/support/recording.py OUT.json                   # some minutes on one core
    python tests/support/recording.py --compare A.json B.json    # exit code 1, and what differs

Only the public interface is called, so the same file records an old commit and a new one: PYTHONPATH says which.
Sources are made of seeds in a temporary folder. What a clock or a path decides is left out; words meant for people are
kept apart, so that ``--numbers-only`` compares numbers, names, order, statuses and the kinds of errors alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import recording_cases_commands as commands
import recording_cases_errors as errors
import recording_cases_exports as exports
import recording_cases_families as families
import recording_cases_matrices as matrices
import recording_cases_options as options
import recording_cases_results as results
import recording_cases_runs as runs
import recording_cases_sources as sources
import recording_cases_training as training
import recording_cases_views as views
import recording_compare
import torch
from recording_plain import Place, outcome
from recording_sources import Cases, Stored

import kappa_fast

AREAS: Mapping[str, Callable[[Stored], Cases]] = {
    "matrices": matrices.cases,
    "options": options.cases,
    "sources": sources.cases,
    "families": families.cases,
    "results": results.cases,
    "views": views.cases,
    "training": training.cases,
    "exports": exports.cases,
    "errors": errors.cases,
    "commands": commands.cases,
    "runs": runs.cases,
}


def record(
    areas: Sequence[str] = tuple(AREAS), only: str = "", *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The results of all cases of some areas, or of those in whose name the expression ``only`` is found."""
    wanted, found = re.compile(only), dict[str, Any]()
    with _surroundings() as folder:
        place = Place(folder)
        for area in areas:
            started, number = time.perf_counter(), len(found)
            for name, call in AREAS[area](Stored(place)):
                name = place.scrubbed(f"{area}: {name}")
                if name in found:
                    raise ValueError(f"two cases are called {name!r}")
                if wanted.search(name):
                    found[name] = outcome(call, place)
            say(f"{area}: {len(found) - number} cases in {time.perf_counter() - started:.1f} s")
    return found


@contextlib.contextmanager
def _surroundings() -> Iterator[Path]:
    """A temporary folder, a cache of its own and one thread; afterwards all is as it was."""
    threads, before = torch.get_num_threads(), os.environ.get("KAPPA_FAST_CACHE")
    with tempfile.TemporaryDirectory(prefix="recording-") as folder:
        os.environ["KAPPA_FAST_CACHE"] = str(Path(folder, "cache of the user"))
        torch.set_num_threads(1)
        try:
            yield Path(folder).resolve()
        finally:
            torch.set_num_threads(threads)
            if before is None:
                del os.environ["KAPPA_FAST_CACHE"]
            else:
                os.environ["KAPPA_FAST_CACHE"] = before


def write(path: Path, cases: Mapping[str, Any]) -> None:
    """A case a line."""
    about = {"python": platform.python_version(), "torch": torch.__version__, "cases": len(cases)}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    path.write_text(f'{{"about": {json.dumps(about)},\n"cases": {{\n{lines}\n}}}}\n', encoding="utf-8")


def compare(one: Path, other: Path, *, numbers_only: bool = False) -> int:
    """Print what differs; 1 if something does, else 0."""
    before, after = recording_compare.read(one), recording_compare.read(other)
    found = recording_compare.differing(before, after, numbers_only=numbers_only)
    for line in recording_compare.report(found, len({*before, *after})):
        print(line)
    return 1 if found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="where to record to, or two to compare")
    parser.add_argument("--compare", action="store_true", help="compare two recordings")
    parser.add_argument("--numbers-only", action="store_true", help="leave words out of the comparison")
    parser.add_argument("--areas", default=",".join(AREAS), help="what to record, of %(default)s")
    parser.add_argument("--only", default="", metavar="REGEX", help="record cases in whose name this is found")
    given = parser.parse_args(arguments)
    if len(given.files) != (2 if given.compare else 1):
        parser.error("give two files to compare" if given.compare else "give one file to record to")
    if given.compare:
        return compare(*given.files, numbers_only=given.numbers_only)
    print(f"recording {Path(kappa_fast.__file__).parent}", file=sys.stderr)
    started = time.perf_counter()
    cases = record(given.areas.split(","), given.only, say=lambda line: print(line, file=sys.stderr, flush=True))
    write(given.files[0], cases)
    print(f"{len(cases)} cases in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
