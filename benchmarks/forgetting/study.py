"""Runs what is left of a plan: one process for each run, several at once, each result in the journal as it comes."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import record as provenance

from .journal import Journal
from .plan import Plan
from .weights import base_name, digest_of, file_of

Say = Callable[[str], None]
Records = Mapping[str, Mapping[str, Any]]
JOURNAL = "journal.jsonl"
PATIENCE = 4 * 3600  # seconds of CPU after which a run is given up


def go_on(
    plan: Plan,
    folder: Path,
    workers: int = 2,
    say: Say = print,
    most: int | None = None,
    known: Records = MappingProxyType({}),
) -> int:
    """Does what neither the journal in ``folder`` nor ``known`` has, and returns how many results are still missing.

    What fails or diverges is a result: it is written down, and not tried again. Bases that fail are tried again, and
    nothing is run on them. A base whose weights are not in ``folder`` is pre-trained again, and fails unless it comes
    to the weights that its record has: runs of two models are not runs of one.

    Args:
        known: results by id that were made in another folder, whole or compact.

    Raises:
        BlockingIOError: another process runs a study in this folder.
    """
    journal = Journal(folder / JOURNAL)
    with journal.locked():
        records = {**known, **journal.records()}
        left = left_over(plan, folder, known)
        done = {key for key, record in records.items() if _counts(record, plan, folder)}
        say(f"{plan.name}: {len(plan.jobs()) - len(left)} results are there, {len(left)} are missing")
        origin = {"plan": plan.digest(), **provenance.commit(), "versions": provenance.versions()}
        weights = {key: record["weights"] for key, record in records.items() if "weights" in record}
        _Crew(plan, folder, journal, workers, say, origin, done, weights).work(left[:most])
    return len(left_over(plan, folder, known))


def left_over(plan: Plan, folder: Path, known: Records = MappingProxyType({})) -> list[dict[str, Any]]:
    """Jobs without a result, and bases that such a job needs and whose weights are not in the folder."""
    records = {**known, **Journal(folder / JOURNAL).records()}
    left = [job for job in plan.jobs() if job["id"] not in records or not _counts(records[job["id"]], plan, folder)]
    needed = {job["needs"] for job in left if job["what"] == "run"}
    return [job for job in left if job["what"] == "run" or job["id"] in needed or job["id"] not in records]


def _counts(record: Mapping[str, Any], plan: Plan, folder: Path) -> bool:
    if record["what"] != "base":
        return True
    if record["status"] != "ok" or "model" in plan.pretraining or plan.training.get("of") == "sentences":
        return bool(record["status"] == "ok")
    return digest_of(file_of(record["kind"], record["base"], folder)) == record["weights"]


@dataclass
class _Crew:
    plan: Plan
    folder: Path
    journal: Journal
    workers: int
    say: Say
    origin: dict[str, Any]
    done: set[str]
    weights: dict[str, str]
    running: dict[int, tuple[dict[str, Any], int, bytearray]] = field(default_factory=dict)

    def work(self, left: list[dict[str, Any]]) -> None:
        _warm_up()
        started, count = time.monotonic(), len(left)
        selector = selectors.DefaultSelector()
        try:
            while left or self.running:
                while len(self.running) < self.workers and (job := self._next(left)) is not None:
                    left.remove(job)
                    selector.register(self._start(job), selectors.EVENT_READ)
                if not self.running:
                    self.say(f"{len(left)} runs have no base, because its pre-training failed")
                    return
                for key, _ in selector.select(timeout=60):
                    if self._read(key.fd):
                        selector.unregister(key.fd)
                        self._end(key.fd)
                        finished = count - len(left) - len(self.running)
                        rate = (time.monotonic() - started) / finished
                        hours = rate * (count - finished) / 3600
                        self.say(f"  {finished} of {count}, {rate:.1f} s each, {hours:.1f} h left")
        finally:
            for _, child, _ in self.running.values():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def _next(self, left: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
        return next((job for job in left if job.get("needs") is None or job["needs"] in self.done), None)

    def _start(self, job: dict[str, Any]) -> int:
        """A process of its own, forked from this one, in which the libraries are loaded already."""
        reading, writing = os.pipe()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                self.journal.let_go()
                _end_with(parent)
                with os.fdopen(writing, "wb") as stream:
                    stream.write(json.dumps(perform(job, self.plan, self.folder)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        self.running[reading] = (job, child, bytearray())
        return reading

    def _read(self, fd: int) -> bool:
        """Whether the process has said all that it will say."""
        data = os.read(fd, 1 << 20)
        self.running[fd][2].extend(data)
        return not data

    def _end(self, fd: int) -> None:
        job, child, said = self.running.pop(fd)
        os.close(fd)
        _, status = os.waitpid(child, 0)
        try:
            found = json.loads(bytes(said))
        except ValueError:
            found = {"status": "failed", "error": f"the process ended with status {status} and said nothing"}
        if self.weights.get(job["id"], found.get("weights")) != found.get("weights"):
            found = self._of_another_base(job, found)
        self.journal.add({**job, **found, **self.origin})
        if found["status"] == "ok" and job["what"] == "base":
            self.done.add(job["id"])
        name = " ".join(str(job[key]) for key in ("kind", "base", "task", "method", "draw", "lr") if key in job)
        self.say(f"{name}: {found['status']}{' ' + found['error'].splitlines()[-1] if 'error' in found else ''}")

    def _of_another_base(self, job: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """In place of a base that was made again and is another one."""
        before = self.weights[job["id"]]
        told = found.get("error") or (
            f"{base_name(job['kind'], job['base'])}: its weights have the hash {found['weights']}, and those of the "
            f"runs that are there have {before}. Another processor or version of torch rounds otherwise: bring the "
            "file of its weights, or begin in another folder without --known"
        )
        return {"status": "failed", "weights": before, "error": told}


def _end_with(parent: int) -> None:
    """On Linux a run does not outlive a study that is killed; elsewhere it ends by itself, and nobody hears of it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _warm_up() -> None:
    """Loads what every run needs, without a thread, so that forked processes have it."""
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    from . import bases, runs  # noqa: F401

    torch.set_num_threads(1)


def perform(job: dict[str, Any], plan: Plan, folder: Path) -> dict[str, Any]:
    """Does a job in this process. Whatever goes wrong becomes a result."""
    import torch

    from . import bases, own, runs, sentences

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
    try:
        if job["what"] == "base":
            if plan.training.get("of") == "sentences":
                return {"status": "ok", **sentences.base(job, plan.training, folder)}
            if "model" in plan.pretraining:
                return {"status": "ok", **own.base(job, plan.pretraining, plan.training, folder)}
            return {"status": "ok", **bases.pretrain(job["kind"], job["base"], plan.pretraining, folder)}
        fine_tune = sentences.fine_tune if plan.training.get("of") == "sentences" else runs.fine_tune
        return fine_tune(job, plan.training, folder)
    except Exception as error:
        return {"status": "failed", "error": "".join(traceback.format_exception(error))[-2000:]}
