"""A part of a store for one start of the ranks, where the store has seen earlier starts of them.

torchrun starts failed ranks again with the store that it had, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set. There
gloo finds the addresses of the ranks that are gone and connects to those: init_process_group() fails or hangs.
TORCHELASTIC_RESTART_COUNT does not tell the starts apart, since it stays the same where ranks start again because a
machine has come or gone.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING

from ..errors import ProcessGroupError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

PAUSE = 0.02  # seconds between two looks at the store


def of_this_start(store: Store, rank: int, size: int, timeout: float) -> Store:
    """The part of ``store`` that only the ``size`` ranks of this start write to. All of them call this.

    Rank 0 makes up a name for the part, and says whom it has invited by what they have made up themselves.

    Args:
        timeout: seconds that the others may take to come.

    Raises:
        ProcessGroupError: a rank has not come; its ``rank`` says which.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    deadline = time.monotonic() + timeout
    name = _invite(store, size, deadline) if rank == 0 else _invitation(store, rank, deadline)
    return PrefixStore(name, store)


def _invite(store: Store, size: int, deadline: float) -> str:
    name, invited = secrets.token_hex(8), dict[str, str]()
    waiting = list(range(1, size))
    while waiting:
        come = [other for other in waiting if store.check([f"hello/{other}"])]
        found = {str(other): store.get(f"hello/{other}").decode() for other in come}
        if found and found != invited:
            invited = found
            store.set("start", json.dumps([name, invited]))
        waiting = [other for other in waiting if not store.check([f"{name}/joined/{other}"])]
        _wait(waiting[0] if waiting else 0, deadline)
    return name


def _invitation(store: Store, rank: int, deadline: float) -> str:
    mine = secrets.token_hex(8)
    store.set(f"hello/{rank}", mine)
    while True:
        if store.check(["start"]):
            name, invited = json.loads(store.get("start"))
            if invited.get(str(rank)) == mine:
                store.set(f"{name}/joined/{rank}", "")
                return str(name)
        _wait(0, deadline)


def _wait(rank: int, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise ProcessGroupError(
            f"rank {rank} has not come within the timeout: see why it has not started, or start all ranks again", rank
        )
    time.sleep(PAUSE)
