"""Sharded models: what a rank takes of memory and network, and what the others say when one is gone."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import on_ranks, stop_here
from sharding import Net, fully_sharded, mesh, passed, together
from torch import nn

import kappa_fast
from kappa_fast import ProcessGroupError
from kappa_fast.sources.spread import Spread

distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

TIMEOUT = 6.0


def world():
    return torch.distributed.get_world_size()


def lose(rank, lost, how):
    """What the error says, and the seconds from the last thing that went well until it came."""
    model = fully_sharded(Net(), mesh(world()))
    part, asked = Spread.part, [time.monotonic()]

    def gone_meanwhile(self, box):
        """The rank ends when it is asked for a piece."""
        asked.append(time.monotonic())
        if rank == lost and len(asked) == 9:
            stop_here(how)
        return part(self, box)

    Spread.part = gone_meanwhile
    with pytest.raises(ProcessGroupError) as error:
        together(model)
    return error.value.rank, str(error.value), time.monotonic() - asked[-1]


@pytest.mark.parametrize(
    ("lost", "how"),
    [
        (1, signal.SIGKILL),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_gone_while_others_want_its_pieces_is_named_within_the_timeout(lost, how):
    outcomes = on_ranks(3, lose, lost, how, timeout=TIMEOUT)
    for rank, outcome in enumerate(outcomes):
        if rank != lost:
            assert outcome.error is None, outcome.trace
            at_fault, message, seconds = outcome.value
            assert at_fault == lost, message
            assert f"rank {lost}" in message
            assert seconds < TIMEOUT + 2


def fail(rank):
    """What one rank cannot read, the others learn."""
    model = fully_sharded(Net(), mesh(world()))
    group = torch.distributed.group.WORLD
    if rank == 1:
        model.layers[0].up.weight.to_local().untyped_storage().resize_(0)
    with pytest.raises(kappa_fast.KappaError, match=r"memory of layers\.0\.\S+ has been freed"):
        kappa_fast.rank(model, process_group=group)


def test_what_one_rank_cannot_give_all_learn():
    passed(on_ranks(2, fail))


def strangers(rank):
    """Whoever does not know the secret of the call gets nothing, and keeps nobody from it."""
    import socket

    from kappa_fast.distributed import transfer

    told = []
    real = transfer.Transfer.__init__

    def opened(self, *arguments):
        real(self, *arguments)
        told.append(self._listener.getsockname())

    transfer.Transfer.__init__ = opened

    def knock(progress):
        if progress.matrices_done == 1 and len(told) == 1:
            told.append(None)
            silent = socket.create_connection(told[0])
            told.append(silent)
            with socket.create_connection(told[0]) as other:
                other.settimeout(5)
                assert len(other.recv(64)) == transfer.NONCE
                other.sendall(bytes(2 * transfer.NONCE))
                assert other.recv(64) == b""

    together(fully_sharded(Net(), mesh(world())), progress=knock)
    assert len(told) == 3 or rank


@pytest.mark.slow
def test_strangers_get_nothing():
    passed(on_ranks(2, strangers))


SIZE, LAYERS, BUDGET = 1024, 24, 8 << 20


class Tall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def memory(rank):
    """Peaks of ranking one matrix alone, and the model together, and the bytes that came from others."""
    with torch.device("meta"):
        model = Tall()
    fully_sharded(model, mesh(world()))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.to_local())
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    torch.distributed.barrier()
    kappa_fast.rank({"warm": torch.randn(SIZE, SIZE)}, memory_budget=BUDGET)
    together(fully_sharded(Net(), mesh(world())))
    alone, _ = peak_of(kappa_fast.rank, {"one": torch.randn(SIZE, SIZE)}, memory_budget=BUDGET)
    shared, found = peak_of(together, model, memory_budget=BUDGET)
    return alone, shared, found.metadata["ranks"][rank]["gathered"]


def peak_of(work, *arguments, **options):
    """How many bytes more than before this process had at most, looked at every two milliseconds."""
    before, peak, ended = resident(), [0], threading.Event()

    def watch():
        while not ended.wait(0.002):
            peak[0] = max(peak[0], resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return_value = work(*arguments, **options)
    finally:
        ended.set()
        watcher.join()
    return peak[0], return_value


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_no_rank_holds_the_model():
    matrix = 4 * SIZE * SIZE
    outcomes = on_ranks(2, memory)
    passed(outcomes)
    assert sum(outcome.value[2] for outcome in outcomes) == LAYERS * matrix // 2  # of each matrix one half moves once
    for alone, shared, _ in (outcome.value for outcome in outcomes):
        assert shared < alone + BUDGET + 3 * matrix  # the whole, a piece on its way to it, and one to another rank
        assert shared < LAYERS * matrix  # which ranking the gathered model would take
