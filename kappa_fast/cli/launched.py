"""``kappa-fast rank`` under torchrun: the process group of the ranks, of which only the first prints and writes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from ..errors import OptionError, ProcessGroupError
from .outcome import FAILURE, INTERRUPTED, WRONG_USE

if TYPE_CHECKING:
    from datetime import timedelta

    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Launch:
    """How this process was started: on its own (``group`` is None), or as one rank of several."""

    group: ProcessGroup | None = None
    prints: bool = True


def by_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether torchrun has started this process beside others.

    RANK and WORLD_SIZE are not enough, since a cluster may set them for any program: a variable of torchrun counts too.
    """
    return "TORCHELASTIC_RUN_ID" in environment and environment.get("WORLD_SIZE", "1") != "1"


@contextmanager
def launched(device: str | None, timeout: float | None, debug: bool) -> Iterator[Launch]:
    """A context for the body of a command, with a process group (gloo, or nccl for GPUs) if torchrun started it.

    Args:
        device: as for rank(). Without a number, or without a device, each rank takes the GPU of its local rank.
        timeout: the timeout of the group in seconds; None for torch's default.
        debug: every rank shows its own error; otherwise the first rank shows the errors of all.

    Raises:
        OptionError: a timeout is given without torchrun, or is not valid.
        typer.Exit: on other ranks than the first, instead of an error that the first rank prints.
    """
    if timeout is not None and not 1 <= timeout < 1e9:
        raise OptionError(f"--timeout {timeout:g}: give the seconds that a rank may be silent, 1 or more")
    if not by_torchrun(os.environ):
        if timeout is not None:
            raise OptionError("--timeout needs the ranks that torchrun starts: leave it out, or use torchrun")
        yield Launch()
        return
    from datetime import timedelta

    import torch
    from torch import distributed

    on_gpus = torch.cuda.is_available() and (device is None or device.startswith("cuda"))
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    limit = None if timeout is None else timedelta(seconds=timeout)
    _make_group("nccl" if on_gpus and distributed.is_nccl_available() else "gloo", limit)
    try:
        first = distributed.get_rank() == 0
        if not first:
            warnings.showwarning = _nowhere
        try:
            yield Launch(distributed.group.WORLD, first)
        except KeyboardInterrupt:
            if first:
                raise
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            gone = isinstance(error, ProcessGroupError) and error.rank == 0  # rank 0 may not be able to print the error
            if first or gone or debug or isinstance(error, typer.Exit):
                raise
            raise typer.Exit(WRONG_USE if isinstance(error, OptionError) else FAILURE) from None
    finally:
        distributed.destroy_process_group()


def _make_group(backend: str, timeout: timedelta | None) -> None:
    """init_process_group(), which works after a restart by torchrun too.

    Raises:
        ProcessGroupError: a rank has not come within the timeout.
    """
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    from ..distributed.starts import of_this_start

    patience = timeout or distributed.default_pg_timeout
    store, rank, size = next(rendezvous("env://", timeout=patience))
    of_its_own = of_this_start(store, rank, size, patience.total_seconds())
    distributed.init_process_group(backend, store=of_its_own, rank=rank, world_size=size, timeout=timeout)


def _nowhere(*_: object, **__: object) -> None:
    """Drop a warning, which rank 0 prints as well."""
