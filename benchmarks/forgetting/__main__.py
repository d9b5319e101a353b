"""``python -m benchmarks.forgetting``: --smoke, --plan FILE --folder DIR, --report, --publish, --status, --model."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from . import __doc__ as about
from .plan import PLANS, Plan


def main() -> None:
    """Reads the command line and does what it says."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: a run has one thread
    from . import own_command

    parser = argparse.ArgumentParser("python -m benchmarks.forgetting", description=about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--smoke", action="store_true", help="a study of a minute on made-up text, with its report")
    parser.add_argument("--plan", type=Path, default=PLANS / "study.json", help="what to run (default: the study)")
    parser.add_argument("--folder", type=Path, help="where bases and journal are; the same again goes on")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at once, of one thread each")
    parser.add_argument("--known", type=Path, help="results made elsewhere, not to be made again: a .jsonl file")
    parser.add_argument("--most", type=int, help="end after so many")
    parser.add_argument("--report", action="store_true", help="write tables and figures of what is there")
    parser.add_argument("--publish", action="store_true", help="put runs and figures into benchmarks/results and docs")
    parser.add_argument("--status", action="store_true", help="say how much is there")
    parser.add_argument("--out", type=Path, help="where --report writes (default: FOLDER/report)")
    own_command.add_options(parser)
    given = parser.parse_args()
    if given.smoke:
        with tempfile.TemporaryDirectory() as scratch:
            smoke(given.folder or Path(scratch), given.workers)
        return
    if given.model is not None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        own_command.run(given, _say)
        return
    if given.folder is None:
        parser.error("--folder is missing")
    plan = Plan.read(given.plan)
    if given.report:
        from . import report, sentences_report

        write = sentences_report.write if plan.training.get("of") == "sentences" else report.write
        print(write(plan, given.folder, given.out or given.folder / "report"))
        return
    if given.publish:
        from . import kept

        print("\n".join(str(file) for file in kept.keep(plan, given.folder)))
        print("python -m benchmarks figures puts the tables into the documents")
        return
    from .journal import Journal
    from .study import go_on, left_over

    if given.known and not given.known.is_file():
        parser.error(f"--known: there is no file {given.known}")
    known = Journal(given.known).records() if given.known else {}
    if given.status:
        left = left_over(plan, given.folder, known)
        bases = sum(job["what"] == "base" for job in left)
        print(f"{plan.name}: of {len(plan.jobs())} results {len(left)} are missing, {bases} of them bases")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end too
    try:
        missing = go_on(plan, given.folder, given.workers, _say, given.most, known)
    except BlockingIOError:
        raise SystemExit(f"{given.folder}: another process is at this study") from None
    _say(f"{missing} results are missing")


def smoke(folder: Path, workers: int) -> None:
    """All parts once, in little."""
    from .report import write
    from .study import go_on

    started = time.monotonic()
    plan = Plan.read(PLANS / "smoke.json")
    missing = go_on(plan, folder, workers, lambda line: None)
    write(plan, folder, folder / "report")
    failed = [line for line in (folder / "journal.jsonl").read_text().splitlines() if '"status":"failed"' in line]
    print(f"{len(plan.jobs())} results in {time.monotonic() - started:.0f} s; {missing} missing, {len(failed)} failed")
    if missing or failed:
        raise SystemExit("\n".join([*failed[:1], "the smoke study has failed"]))


def _say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
