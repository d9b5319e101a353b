"""One of four ranks is killed, or stops, at a random moment: nobody waits beyond the timeout, and a restart is whole.

Moments are drawn by seed: half of them over the whole of an undisturbed run and a little beyond, so before the ranks
have agreed, while pieces of weights are on their way, and after a rank's last result; half of them shortly after a
number of results. Where the run was over by then, all is well without an error.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from ranks import Outcome, on_ranks
from safetensors.torch import save_file
from sharding import Net, fully_sharded, mesh, passed
from test_distributed import trust_new_files

import kappa_fast
from kappa_fast import ProcessGroupError

distributed = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed"),
]

SIZE, TIMEOUT = 4, 8.0
KINDS = ("checkpoint", "shards")


@dataclass(frozen=True)
class Run:
    """Of one rank: the seconds of rank(), and what came of it."""

    seconds: float
    entries: list[str] | None = None
    cache: dict[str, int] | None = None
    error: ProcessGroupError | None = None


def net() -> torch.nn.Module:
    """Of a second of work or two for one process."""
    return Net(128, 389)


def source(kind: str, file: Path):
    """What is ranked: a file, or the model in shards on all ranks."""
    if kind == "checkpoint":
        return file
    world = torch.distributed.get_world_size()
    return net() if world == 1 else fully_sharded(net(), mesh(world))


@dataclass(frozen=True)
class Loss:
    """Which rank gets which signal, and when: so many seconds after so many matrices are done."""

    rank: int
    how: int
    matrices: int
    seconds: float


def work(rank: int, kind: str, file: Path, cache: Path, *losses: Loss) -> Run:
    """Rank it, while some ranks may be lost."""
    trust_new_files()
    weights = source(kind, file)
    torch.distributed.barrier()
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(f"here/{rank}", "")
    due = [loss for loss in losses if loss.rank == rank]
    if due:  # gloo's barrier does not end at once for all of them
        store.wait([f"here/{other}" for other in range(SIZE)])

    def lose(done: int) -> None:
        if due and done >= due[0].matrices:
            timer = threading.Timer(due[0].seconds, os.kill, (os.getpid(), due.pop().how))
            timer.daemon = True
            timer.start()

    lose(0)
    group, started = torch.distributed.group.WORLD, time.monotonic()
    try:
        ranking = kappa_fast.rank(
            weights, process_group=group, cache=cache, progress=lambda told: lose(told.matrices_done)
        )
    except ProcessGroupError as error:
        return Run(time.monotonic() - started, error=error)
    return Run(time.monotonic() - started, list(map(repr, ranking)), dict(ranking.metadata["cache"]))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("losses") / "model.safetensors"
    state = {name: tensor.contiguous() for name, tensor in net().state_dict().items() if name != "head.weight"}
    save_file(state, made)
    return made


@pytest.fixture(scope="module")
def undisturbed(file, tmp_path_factory) -> dict[str, tuple[float, list[str]]]:
    """Seconds and entries of four ranks of which none is lost; the entries are those of one process."""
    found = {}
    for kind in KINDS:
        outcomes = on_ranks(SIZE, work, kind, file, tmp_path_factory.mktemp(kind) / "cache")
        passed(outcomes)
        alone = entries_of(file if kind == "checkpoint" else net())
        assert all(outcome.value.entries == alone for outcome in outcomes)
        found[kind] = max(outcome.value.seconds for outcome in outcomes), alone
    return found


def entries_of(weights) -> list[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(map(repr, kappa_fast.rank(weights)))
    finally:
        torch.set_num_threads(threads)


def check_losses(outcomes: list[Outcome], lost: Collection[int], longest: float) -> int:
    """That all others have an error that names a lost rank, in time, or all are done; how many have one."""
    told = [outcome for rank, outcome in enumerate(outcomes) if rank not in lost]
    passed(told)
    runs = [outcome.value for outcome in told]
    for run in runs:
        if run.error is not None:
            assert run.error.rank in lost, run.error
            assert f"rank {run.error.rank}" in str(run.error)
        assert run.seconds < longest + TIMEOUT + 2, run
    return sum(run.error is not None for run in runs)


@pytest.mark.parametrize(
    ("how", "seed"), [*((signal.SIGKILL, n) for n in range(20)), *((signal.SIGSTOP, n) for n in range(5))]
)
def test_a_rank_that_is_lost_at_a_random_moment_is_named_and_a_restart_is_whole(tmp_path, file, undisturbed, how, seed):
    chosen = random.Random(f"{how.name} {seed}")
    kind, again = KINDS[seed % 2], chosen.randint(1, SIZE)
    seconds, expected = undisturbed[kind]
    by_time = Loss(chosen.randrange(SIZE), int(how), 0, chosen.uniform(0.0, 1.1) * seconds)
    by_work = replace(by_time, matrices=chosen.randint(1, len(expected)), seconds=chosen.uniform(0.0, 0.1))
    loss, cache = by_work if seed // 2 % 2 else by_time, tmp_path / "cache"
    outcomes = on_ranks(SIZE, work, kind, file, cache, loss, timeout=TIMEOUT)
    failed = check_losses(outcomes, {loss.rank}, max(3 * seconds, loss.seconds))
    print(f"{kind}, {how.name}, {loss}, {seconds:.2f} s undisturbed: {failed} others failed, again on {again}")
    restarted = on_ranks(again, work, kind, file, cache)
    passed(restarted)
    for outcome in restarted:
        assert outcome.value.entries == expected
    counts = restarted[0].value.cache
    assert counts["hits"] + counts["computed"] == len(expected)


@pytest.mark.parametrize(("kind", "lost"), [("checkpoint", (1, 3)), ("shards", (1, 2)), ("shards", (0, 3))])
def test_two_ranks_that_are_lost_at_once_end_the_others_too(tmp_path, file, undisturbed, kind, lost):
    cache, seconds = tmp_path / "cache", undisturbed[kind][0]
    losses = [Loss(rank, int(signal.SIGKILL), 5, 0.0) for rank in lost]
    outcomes = on_ranks(SIZE, work, kind, file, cache, *losses, timeout=TIMEOUT)
    assert check_losses(outcomes, set(lost), 3 * seconds) == SIZE - len(lost)
    restarted = on_ranks(2, work, kind, file, cache)
    passed(restarted)
    assert restarted[0].value.entries == undisturbed[kind][1]
