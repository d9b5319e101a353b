"""rank() against the best of the plain ways on this machine's CPU, for shapes from 16 x 16 to those of large models.

    python benchmarks/sweep.py [--minutes 60] [--threads 1,2] [--output DIR] [--only machine,claims,cells]
    python benchmarks/sweep.py --quick [CELL | CLAIM ...]   # at most two minutes, one thread, by processor time
    python benchmarks/sweep.py --report                     # the document and the picture of what the journal has

A cell is COUNTxROWSxCOLUMNS[:DTYPE][:SPECTRUM], as in "24x64x64" or "1x256x2048:bfloat16:graded" (sweep_cells.py); a
claim is a name of sweep_claims.py. Every number of threads has a process of its own. Every figure is in
DIR/sweep.jsonl the moment it exists: a run that was ended goes on from there, if the code is the same.

Within a cell all ways are run in turn. What counts is processor time on one thread, and the wall clock, of an idle
machine, on several. A plain way whose kappa is off by more than 1%, the width that rank() promises, is measured but
is not the best one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this clone, whatever is installed

from gpu_results import read_lines, write_line  # noqa: E402

LINES, DOCUMENT = "sweep.jsonl", "sweep.json"
LIMIT = 60.0  # seconds: a way that would take longer for one call, by what smaller cells took, is left out
EACH = 4.0  # seconds for the turns of a cell
CLAIM_SECONDS = 120.0
WRONG = 0.01  # relative error of a kappa from which on a plain way does not count
QUICK_SECONDS = 110.0
QUICK = [
    *("1x16x16", "64x16x16", "1x64x64", "small", "many", "24x128x128", "24x384x384", "8x1536x384", "1x384x384"),
    *("1x256x2048", "minilm", "24x64x64:bfloat16", "24x64x64:float32:graded", "8x384x384:bfloat16:graded"),
    *("16x1024x32", "1x1024x1024", "1x2048x2048", "1x5632x2048"),
]
NEVER_BEST = ("numpy svd float32", "numpy svd float64", "scipy svdvals float64")  # left out of --quick


class Sweep:
    """The figures of one number of threads, each written to the journal at once."""

    def __init__(self, lines: Path | None, threads: int, deadline: float) -> None:
        import record
        import torch

        torch.set_num_threads(threads)
        self.lines, self.threads, self.deadline = lines, threads, deadline
        self.digest = record.source_digest()
        self.known = {} if lines is None else self._read(lines)
        self.pace: dict[str, list[tuple[float, float]]] = {}  # operations and seconds of one call, by way

    def _read(self, lines: Path) -> dict[tuple[str, str], Any]:
        mine = [x for x in read_lines(lines) if (x["source"], x["threads"]) == (self.digest, self.threads)]
        return {(x["stage"], x["key"]): x["value"] for x in mine}

    def keep(self, stage: str, key: str, value: Any) -> Any:
        """Write a figure down, before anything else can go wrong."""
        if self.lines is not None:
            origin = {"threads": self.threads, "source": self.digest}
            write_line(self.lines, {"stage": stage, "key": key, "value": value, **origin})
        return value

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def machine(self) -> None:
        import sweep_machine

        if ("machine", "rates") not in self.known:
            self.known["machine", "rates"] = self.keep("machine", "rates", sweep_machine.rates())

    def claims(self, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in names:
            if ("claims", name) not in self.known and self.left > 0:
                yield name, self.keep("claims", name, self.claim(name))

    def claim(self, name: str, seconds: float = CLAIM_SECONDS) -> dict[str, Any]:
        from sweep_claims import CLAIMS
        from sweep_timing import alternate

        claim = CLAIMS[name]
        found = alternate(claim.ours(), claim.others(), seconds)
        claim.check({way: times.result for way, times in found.items()})
        times = {way: t.as_json() for way, t in found.items()}
        clock = self.clock
        return {"figure": claim.figure({way: t[clock] for way, t in times.items()}), "clock": clock, "times": times}

    @property
    def clock(self) -> str:
        return "processor" if self.threads == 1 else "wall"

    def cells(self, chosen: Sequence[Any], seconds: float = EACH) -> Iterator[tuple[Any, dict[str, Any]]]:
        for cell in chosen:
            if ("cells", str(cell)) in self.known:
                self._learn(cell, self.known["cells", str(cell)])
            elif self.left > 0:
                yield cell, self.keep("cells", str(cell), self.cell(cell, seconds))

    def cell(self, cell: Any, seconds: float = EACH, *, quick: bool = False) -> dict[str, Any]:
        """All ways in turn; the ratio of the fastest plain way that is right to rank()."""
        from sweep_cells import mapping, plain_ways
        from sweep_claims import assert_contains
        from sweep_timing import alternate

        import kappa_fast

        matrices = cell.matrices()
        weights = mapping(matrices)
        plain = plain_ways(matrices, peft=not quick)
        plain = {way: run for way, run in plain.items() if not (quick and way in NEVER_BEST)}
        long = {way: t for way in plain if (t := self._predicted(way, cell)) > LIMIT}
        ways = {way: run for way, run in plain.items() if way not in long}
        found = alternate({"rank": lambda: kappa_fast.rank(weights, progress=False)}, ways, seconds)
        times = {way: t.as_json() for way, t in found.items()}
        exact, by = _most_exact(found)
        if exact is not None:
            slack = 1e-9 if "svd" in by else 1e-13 * max(exact) ** 2
            assert_contains(found["rank"].result, exact, slack)
            for way in ways:
                times[way]["error"] = max(abs(k / x - 1) for k, x in zip(found[way].result, exact, strict=True))
        right = [way for way in ways if times[way].get("error", 0.0) <= WRONG]
        value = {"times": times, "too long": {way: round(t, 1) for way, t in long.items()}, "truth": by}
        value |= {"methods": sorted({entry.method for entry in found["rank"].result}), "clock": self.clock}
        if right:
            best = min(right, key=lambda way: times[way][self.clock])
            value |= {"best": best, "ratio": times[best][self.clock] / times["rank"][self.clock]}
        self._learn(cell, value)
        return value

    def _learn(self, cell: Any, value: dict[str, Any]) -> None:
        for way, t in value["times"].items():
            self.pace.setdefault(way, []).append((cell.operations, t["wall"]))

    def _predicted(self, way: str, cell: Any) -> float:
        """Seconds of one call, scaled with the operations from the largest cell that is not larger; 0 if unknown."""
        smaller = [(o, s) for o, s in self.pace.get(way, []) if o <= cell.operations]
        operations, seconds = max(smaller, default=(1.0, 0.0))
        return seconds * cell.operations / operations


def _most_exact(found: dict[str, Any]) -> tuple[list[float] | None, str]:
    """The kappas of the most exact plain way that was run, and which: a float64 SVD, or a Gram matrix if it serves."""
    for way in ("torch svdvals float64", "numpy svd float64", "scipy svdvals float64"):
        if way in found:
            return found[way].result, way
    for way in ("torch eigvalsh of Gram float64", "numpy eigvalsh of Gram float64"):
        if way in found and max(found[way].result) < 1e5:  # relative error below 1e-5
            return found[way].result, way
    return None, ""


def quick(names: Sequence[str]) -> None:
    """Print ratios by processor time on one thread, as many as fit into QUICK_SECONDS."""
    from sweep_cells import Cell
    from sweep_claims import CLAIMS

    sweep = Sweep(None, 1, time.time() + QUICK_SECONDS)
    print(f"{'cell or claim':<32}{'rank()':>11}{'best plain':>12}{'ratio':>8}  best plain way; methods of rank()")
    for name in names:
        if sweep.left < 0:
            print(f"{name:<32} left out: {QUICK_SECONDS:.0f} s are over")
        elif name in CLAIMS:
            found = sweep.claim(name, seconds=1.0)
            claim = CLAIMS[name]
            goal = f"{'at most' if claim.at_most else 'at least'} {claim.reach:g}"
            print(f"{name:<32}{found['figure']:>31.3f}  {claim.text} ({goal})", flush=True)
        else:
            found = sweep.cell(Cell.parse(name), seconds=0.5, quick=True)
            ours = 1e3 * found["times"]["rank"]["processor"]
            best = 1e3 * found["times"][found["best"]]["processor"]
            what = f"{found['best']}; {', '.join(found['methods'])}"
            print(f"{name:<32}{ours:>8.2f} ms{best:>9.2f} ms{found['ratio']:>8.3f}  {what}", flush=True)


def stages(options: argparse.Namespace) -> None:
    """What was chosen, with the number of threads of this process."""
    from sweep_cells import cells
    from sweep_claims import CLAIMS

    sweep = Sweep(options.output / LINES, options.threads[0], time.time() + 60 * options.minutes)
    if "machine" in options.only:
        sweep.machine()
    if "claims" in options.only:
        for name, found in sweep.claims(list(CLAIMS)):
            print(f"{name}: {found['figure']:.3f}", flush=True)
    if "cells" in options.only:
        for cell, found in sweep.cells(list(cells()), options.seconds):
            print(f"{cell}: {found.get('ratio', float('nan')):.3f}  {found.get('best')}", flush=True)


def main(given: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="CELL|CLAIM", help="with --quick: which ones")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--minutes", type=float, default=60.0, help="for every number of threads")
    parser.add_argument("--seconds", type=float, default=EACH, help="for the turns of a cell")
    parser.add_argument("--threads", type=_numbers, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["machine", "claims", "cells"])
    options = parser.parse_args(given)
    if options.names and not options.quick:
        parser.error("names of cells and claims go with --quick")
    if options.report:
        from sweep_report import write

        write(options.output / LINES, options.output / DOCUMENT)
    elif options.quick:
        _limit_threads(1)
        quick(options.names or QUICK)
    elif len(options.threads) == 1:
        _limit_threads(options.threads[0])
        stages(options)
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        for threads in options.threads:
            again = ["--threads", str(threads), "--minutes", str(options.minutes), "--seconds", str(options.seconds)]
            where = ["--output", str(options.output), "--only", ",".join(options.only)]
            command = [sys.executable, __file__, *again, *where]
            if code := subprocess.run(command, check=False).returncode:
                return code
    return 0


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _limit_threads(threads: int) -> None:
    """Of every library, before any is loaded."""
    assert "torch" not in sys.modules
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


if __name__ == "__main__":
    sys.exit(main())
