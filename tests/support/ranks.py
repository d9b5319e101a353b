"""Running a function on several processes that talk through gloo, for tests of what ranks do together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes

WORLD = 2
LONGEST = 120.0  # seconds after which a test has failed
CLONE_NEWNET = 0x40000000  # of linux/sched.h


@dataclass(frozen=True)
class Outcome:
    """What became of one rank: what it returned, or the error it ended with; neither if it was killed."""

    value: Any = None
    error: Exception | None = None
    trace: str = ""
    seconds: float = 0.0  # of the work


def on_two_ranks(work: Callable[..., Any], *arguments: Any) -> None:
    """``work(rank, *arguments)`` on each; what one raises is raised here."""
    for outcome in on_ranks(WORLD, work, *arguments):
        if outcome.error is not None:
            raise AssertionError(outcome.trace) from outcome.error


@dataclass(frozen=True)
class Host:
    """A network namespace that stands for a machine: its name, its network interface, and the address of that."""

    namespace: str
    interface: str
    address: str


def on_ranks(
    size: int, work: Callable[..., Any], *arguments: Any, timeout: float = LONGEST, hosts: Sequence[Host] = ()
) -> list[Outcome]:
    """``work(rank, *arguments)`` on each; ``timeout`` is that of the process group. Ranks that stand still are killed.

    Processes are forked from one that has imported everything already. With ``hosts`` they run there in turn, rank 0 on
    the first one.
    """
    context = processes.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "xxhash", "kappa_fast.planning"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        context.Process(target=_enter, args=(rank, size, port, timeout, hosts, pipe, work, arguments), daemon=True)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    for _, pipe in pipes:
        pipe.close()
    deadline = time.monotonic() + LONGEST
    told: dict[int, Outcome] = {}
    try:
        going = True
        while going:
            assert time.monotonic() < deadline, "a rank has not come to an end"
            going = any(process.is_alive() and not _stands(process.pid) for process in ranks)
            for rank, (pipe, _) in enumerate(pipes):
                with contextlib.suppress(EOFError):
                    if rank not in told and pipe.poll(0.005):
                        told[rank] = pipe.recv()
        return [told.get(rank, Outcome()) for rank in range(size)]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _stands(pid: int | None) -> bool:
    """Whether SIGSTOP has stopped it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def stop_here(how: signal.Signals) -> None:
    """End this process, or let it stand still, at once."""
    os.kill(os.getpid(), how)


def _move_to(host: Host) -> None:
    """This process belongs to the host from now on; gloo is told of its interface, since its name has no address."""
    with Path("/run/netns", host.namespace).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {host.namespace}")
    os.environ["GLOO_SOCKET_IFNAME"] = host.interface


def _enter(
    rank: int,
    size: int,
    port: int,
    timeout: float,
    hosts: Sequence[Host],
    pipe: Connection,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch.distributed as distributed

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    if hosts:
        _move_to(hosts[rank % len(hosts)])
    address = hosts[0].address if hosts else "127.0.0.1"
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = work(rank, *arguments)
        pipe.send(Outcome(value, seconds=time.monotonic() - started))
        distributed.destroy_process_group()
    except Exception as error:
        pipe.send(Outcome(None, error, traceback.format_exc(), time.monotonic() - started))
    # A thread of gloo may hold the tensors of the last collective for a moment longer, and lets go of them with the
    # interpreter's lock. When the interpreter is at its end by then, Python ends that thread, and C++ the process with
    # SIGABRT (one run in thirty; torch 2.13.0, ProcessGroupGloo::runLoop). What has passed leaves without such an end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
