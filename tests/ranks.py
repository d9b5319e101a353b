"""Running a function on two processes that talk through gloo, for tests of data parallel and sharded training."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes

WORLD = 2


def on_two_ranks(work: Callable[..., Any], *arguments: Any) -> None:
    """``work(rank, *arguments)`` on each; what one raises is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(_enter, (port, work, arguments), nprocs=WORLD, join=True)


def _enter(rank: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch.distributed as distributed

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
    distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work(rank, *arguments)
    finally:
        distributed.destroy_process_group()
    # A thread of gloo may hold the tensors of the last collective for a moment longer, and lets go of them with the
    # interpreter's lock. When the interpreter is at its end by then, Python ends that thread, and C++ the process with
    # SIGABRT (one run in thirty; torch 2.13.0, ProcessGroupGloo::runLoop). What has passed leaves without such an end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
