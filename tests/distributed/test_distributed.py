"""rank() on several processes: the same ranking as on one, and an error that names the rank that is lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from models import Experts
from ranks import Outcome, on_ranks, stop_here
from safetensors.torch import save_file

import kappa_fast
from kappa_fast import ProcessGroupError
from kappa_fast.cache import memos

distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


class Block(torch.nn.Module):
    """Dense layers of several shapes, fused experts, and a tied weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = torch.nn.Linear(48, 176), torch.nn.Linear(176, 48)
        self.query = torch.nn.Linear(64, 64)
        self.key = torch.nn.Linear(64, 64)
        self.key.weight = self.query.weight
        self.experts = Experts(3, 40, 24)


def model() -> torch.nn.Module:
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Block(0), Block(1)])})


def checkpoint(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in model().state_dict().items() if "key" not in name}, file)
    return file


def identical(entries, others) -> bool:
    return list(map(repr, entries)) == list(map(repr, others))


def trust_new_files() -> None:
    """So that the cache goes by the times of a file at once, not two seconds after it was written."""
    memos.RACY_NS = -(10**10)


def together(source, **options):
    """The ranking of all ranks, which is that of one process, and the same on every rank."""
    group = torch.distributed.group.WORLD
    cache, copy = options.pop("cache", None), None
    if cache is not None:
        copy = f"{cache}-{time.monotonic_ns()}"
        shutil.copytree(cache, copy) if cache.exists() else None
        torch.distributed.barrier()
    shared = kappa_fast.rank(source, process_group=group, cache=cache, **options)
    alone = kappa_fast.rank(source, cache=copy, **options)
    assert identical(shared, alone)
    assert shared.skipped == alone.skipped
    every = [None] * group.size()
    torch.distributed.all_gather_object(every, repr((shared.entries, shared.metadata)))
    assert len(set(every)) == 1
    return shared


def rank_modules(rank):
    source = model()
    found = together(source)
    if torch.distributed.get_world_size() > 1:
        shares = [each["matrices"] for each in found.metadata["ranks"]]
        assert sum(shares) == len(found)
        assert all(shares)
    together(source, top=5)
    together(source, top=0.3, top_per_group=True, certify="selection")
    together(source, score=lambda entry: -entry.kappa, include="experts")
    together({"only": torch.randn(40, 30, generator=torch.Generator().manual_seed(0))})  # one rank has nothing to do


def rank_checkpoint(rank, file, cache):
    trust_new_files()
    cold = together(file, cache=cache)
    assert dict(cold.metadata["cache"]) == {"hits": 0, "computed": len(cold)}
    warm = together(file, cache=cache)
    assert dict(warm.metadata["cache"]) == {"hits": len(warm), "computed": 0}
    assert warm.metadata["work"]["waves"] == 0  # nothing was read
    together(file, cache=cache, top=4, certify="selection")
    together(file, cache=cache.with_name("another"), top=4, certify="selection")


def rank_on_one_alone(rank):
    """As a training script does that asks on its first rank only."""
    if rank == 0:
        assert len(kappa_fast.rank(model())) > 0
    torch.distributed.barrier()


def refused(match, source, rank_at_fault, **options):
    with pytest.raises(ProcessGroupError, match=match) as error:
        kappa_fast.rank(source, process_group=torch.distributed.group.WORLD, **options)
    assert error.value.rank == rank_at_fault


def differ(rank, folder):
    from kappa_fast.distributed import agreement

    refused(r"rank 1 has other settings than rank 0 \(rtol: 0\.02 against 0\.01\)", model(), 1, rtol=0.01 + 0.01 * rank)
    torch.set_num_threads(1 + rank)
    refused(r"rank 1 has other settings than rank 0 \(threads: 2 against 1\)", model(), 1)
    torch.set_num_threads(1)
    other = model()
    with torch.no_grad():
        other["layers"][1].down.weight[7, 7] += 1e-6 * rank
    refused(r"rank 1 has other weights than rank 0 \(layers\.1\.down\.weight: .*load the same weights", other, 1)
    if rank:
        del other["layers"][1].down
    refused(r"rank 1 has other matrices than rank 0 \(layers\.1\.down\.weight: none against", other, 1)
    refused("rank 1 has other weights than rank 0 .*changed 1.* against .*changed 2", folder / f"{rank}.safetensors", 1)
    known, agreement.NUMERICS = agreement.NUMERICS, agreement.NUMERICS + rank
    refused(r"rank 1 has other versions than rank 0 \(its numerics: .*install the same", model(), 1)
    agreement.NUMERICS = known
    together(model())  # and now they do agree


def fail(rank, folder):
    group = torch.distributed.group.WORLD
    if rank == 1:
        with pytest.raises(kappa_fast.SourceNotFoundError):
            kappa_fast.rank(folder / "nowhere.safetensors", process_group=group)
    else:
        refused(r"rank 1 failed \(SourceNotFoundError: .*nowhere\.safetensors.*start all ranks again", model(), 1)

    def score(entry):
        if rank == 0:
            raise ArithmeticError("no score for this")
        return entry.kappa

    with pytest.raises(ProcessGroupError if rank else kappa_fast.OptionError, match="no score for this"):
        kappa_fast.rank(model(), process_group=group, score=score)
    if rank == 1:
        with pytest.raises(kappa_fast.OptionError, match="rtol=-1"):
            kappa_fast.rank(model(), process_group=group, rtol=-1)
    else:
        refused(r"rank 1 failed \(OptionError: rtol=-1", model(), 1)
    together(model())


def interrupt(rank):
    def ctrl_c(progress):
        if progress.matrices_done == 2:
            raise KeyboardInterrupt

    group = torch.distributed.group.WORLD
    if rank == 1:
        with pytest.raises(kappa_fast.Interrupted) as stop:
            kappa_fast.rank(model(), process_group=group, progress=ctrl_c)
        assert stop.value.partial.metadata["partial"]
    else:
        refused("rank 1 was interrupted", model(), 1)


def in_a_part_of_the_group(rank):
    two = torch.distributed.new_group([0, 2])
    if rank == 1:
        with pytest.raises(kappa_fast.OptionError, match=r"no process group of torch\.distributed that this process"):
            kappa_fast.rank(model(), process_group=two)
    else:
        assert len(kappa_fast.rank(model(), process_group=two).metadata["ranks"]) == 2
    torch.distributed.barrier()


def passed(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.error is None, outcome.trace


@pytest.mark.parametrize("size", [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 4))])
def test_a_module_is_ranked_as_on_one_process(size):
    passed(on_ranks(size, rank_modules))


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3, 4))])
def test_a_checkpoint_is_ranked_as_on_one_process_and_from_the_cache_without_being_read(tmp_path, size):
    passed(on_ranks(size, rank_checkpoint, checkpoint(tmp_path), tmp_path / "cache"))


def test_without_a_process_group_nobody_is_waited_for():
    passed(on_ranks(2, rank_on_one_alone))


def test_ranks_that_are_about_to_do_different_things_are_named(tmp_path):
    for rank in (0, 1):
        save_file({"w": torch.ones(40, 30)}, tmp_path / f"{rank}.safetensors")
        os.utime(tmp_path / f"{rank}.safetensors", ns=((2 - rank) * 10**18,) * 2)
    passed(on_ranks(2, differ, tmp_path, timeout=6.0))


def test_an_error_on_one_rank_is_told_by_all(tmp_path):
    passed(on_ranks(2, fail, tmp_path))


def test_ctrl_c_on_one_rank_ends_all():
    passed(on_ranks(2, interrupt))


def test_only_members_of_a_group_work():
    passed(on_ranks(3, in_a_part_of_the_group))


TIMEOUT = 3.0


def lose(rank, file, cache, lost, how, after):
    trust_new_files()

    def at(progress):
        if rank == lost and progress.matrices_done == after:
            stop_here(how)

    kappa_fast.rank(file, process_group=torch.distributed.group.WORLD, cache=cache, progress=at)


def all_of(rank, file, cache):
    trust_new_files()
    return together(file, cache=cache)


def slow(lost, how, after, size=3):
    return pytest.param(lost, how, after, size, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("lost", "how", "after", "size"),
    [
        (1, signal.SIGKILL, 4, 3),
        slow(1, signal.SIGSTOP, 4),
        slow(0, signal.SIGKILL, 4),
        slow(0, signal.SIGSTOP, 4),
        slow(2, signal.SIGKILL, 1),
        slow(2, signal.SIGSTOP, 9),
        slow(1, signal.SIGKILL, 12, 2),
    ],
)
def test_a_rank_that_is_gone_is_named_within_the_timeout_and_the_rest_is_done_later(tmp_path, lost, how, after, size):
    file = checkpoint(tmp_path)
    outcomes = on_ranks(size, lose, file, tmp_path / "cache", lost, how, after, timeout=TIMEOUT)
    assert outcomes[lost] == Outcome()
    for rank, outcome in enumerate(outcomes):
        if rank != lost:
            assert type(outcome.error) is ProcessGroupError, outcome.trace
            assert f"rank {lost}" in str(outcome.error)
            assert outcome.error.rank == lost
            assert outcome.seconds < TIMEOUT + 2
    again = on_ranks(5 - size, all_of, file, tmp_path / "cache")
    passed(again)
    cached = again[0].value.metadata["cache"]
    assert cached["hits"] >= after - 1
    assert cached["hits"] + cached["computed"] == len(again[0].value)


def never_come(rank):
    if rank == 0:
        refused("rank 1 has not called rank.. with this process group for 2 s", model(), 1)


def hang(rank):
    def wait(progress):
        if rank == 1:
            time.sleep(5)

    refused("rank 1 is there, but has finished no matrix for 2 s", model(), 1, progress=wait)


@pytest.mark.parametrize("work", [never_come, pytest.param(hang, marks=pytest.mark.slow)])
def test_a_rank_that_does_not_come_or_does_not_go_on_is_named(work):
    passed(on_ranks(2, work, timeout=2.0))
