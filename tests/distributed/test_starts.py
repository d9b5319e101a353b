"""Ranks that start again with a store that earlier starts have written to; the ranks are threads here."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kappa_fast import ProcessGroupError

distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

from kappa_fast.distributed.starts import of_this_start  # noqa: E402


def started(store, size: int, late: int | None = None):
    """The part of the store that each rank gets; the rank ``late`` comes after the others."""

    def come(rank: int):
        time.sleep(0.2 if rank == late else 0.0)
        return of_this_start(store, rank, size, 5.0)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(come, range(size)))


@pytest.mark.parametrize("late", [None, 0, 2])
def test_every_start_has_a_part_of_the_store_for_itself(late):
    store = torch.distributed.HashStore()
    for number, size in enumerate((3, 3, 5, 3)):  # also with more ranks, and with fewer
        parts = started(store, size, late)
        assert not any(part.check(["address"]) for part in parts)
        parts[0].set("address", str(number))
        assert {part.get("address").decode() for part in parts} == {str(number)}


def test_a_rank_that_does_not_come_is_named():
    store = torch.distributed.HashStore()
    started(store, 3)  # what a start has left does not stand for a rank of the next one

    def come(rank: int) -> ProcessGroupError:
        with pytest.raises(ProcessGroupError, match="has not come within the timeout") as error:
            of_this_start(store, rank, 3, 0.5)
        return error.value

    assert come(1).rank == 0
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(of_this_start, store, 1, 3, 2.0)
        assert come(0).rank == 2
        second.result()
