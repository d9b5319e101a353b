"""What a rank hears of the others and of a store that is gone; the ranks are threads here."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kappa_fast import ProcessGroupError

distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

from kappa_fast.distributed.line import Line  # noqa: E402

TIMEOUT = 1.0


@pytest.fixture
def lines():
    """Of two ranks."""
    store = torch.distributed.HashStore()
    made = [Line(store, rank, 2, TIMEOUT) for rank in range(2)]
    yield made
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Line.close, made))


def raised(line: Line) -> ProcessGroupError:
    """The error that comes while this rank goes on with its work."""
    deadline = time.monotonic() + 2 * TIMEOUT
    while time.monotonic() < deadline:
        try:
            line.moved()
        except ProcessGroupError as error:
            return error
        time.sleep(0.01)
    raise AssertionError("no error came")


def test_what_is_posted_is_found_and_counters_are_shared(lines):
    first, second = lines
    assert second.find("known") is None
    first.post("known", {"kappa": [1.5, float("inf")]})
    assert second.expect("known") == {"kappa": [1.5, float("inf")]}
    assert [first.count("asked"), second.count("asked"), first.count("asked", 0)] == [1, 2, 2]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda line: line.meet("here"), lines))


def test_a_rank_that_waits_is_not_lost(lines):
    deadline = time.monotonic() + 2 * TIMEOUT
    while time.monotonic() < deadline:
        for line in lines:
            line.moved()
        time.sleep(0.02)


def test_a_failure_is_told_once_and_names_its_rank(lines):
    first, second = lines
    second.fail("error", "rank 1 failed: a disk")
    second.fail("error", "and then this")
    error = raised(first)
    assert str(error) == "rank 1 failed: a disk"
    assert error.rank == 1


def test_a_rank_that_does_not_go_on_is_lost_for_itself_too(lines):
    first, second = lines
    error = raised(first)  # nobody tells the second line that its work moves on: rank 1 is to blame
    assert "rank 1 is there, but has finished no matrix for 1 s" in str(error)
    assert error.rank == raised(second).rank == 1


def test_a_rank_without_signs_of_life_is_lost_and_one_that_never_came_too():
    store = torch.distributed.HashStore()
    first, second = Line(store, 0, 3, TIMEOUT), Line(store, 1, 3, TIMEOUT)
    with ThreadPoolExecutor(2) as pool:  # both go on with their work: it is rank 2 that is missing
        errors = list(pool.map(raised, [first, second]))
    for error in errors:
        assert "rank 2 has not called rank() with this process group for 1 s" in str(error)
        assert error.rank == 2
    second.close()
    first.close()
    store = torch.distributed.HashStore()
    first, second = Line(store, 0, 2, TIMEOUT), Line(store, 1, 2, TIMEOUT)
    time.sleep(0.1)
    second.close()
    error = raised(first)
    assert "rank 1 has given no sign of life for 1 s" in str(error)
    first.close()


def test_the_first_rank_is_missed_too():
    line = Line(torch.distributed.HashStore(), 1, 2, TIMEOUT)
    with pytest.raises(ProcessGroupError, match=r"rank 0 has not called rank\(\) with this process group for 1 s"):
        line.expect("anything")
    line.close()


def test_what_killed_processes_have_left_in_a_store_is_not_taken_for_ones_own():
    store = torch.distributed.HashStore()
    for number in range(3):
        pair = [Line(store, rank, 2, TIMEOUT) for rank in range(2)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda line: line.meet("here"), pair))
        assert pair[1].find("known") is None
        pair[0].post("known", number)
        assert pair[1].expect("known") == number
        assert pair[0].count("asked") == 1
        pair[1].fail("error", "rank 1 failed")
        for line in pair:  # nothing is put in order
            line._ended = True
            line._thread.join()


class Silent:
    """A store whose process stands still."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()

    def __getattr__(self, name):
        return lambda *_: self.goes_on.wait()


class Gone:
    """A store whose process has ended."""

    def __getattr__(self, name):
        def refused(*_):
            raise RuntimeError("Connection reset by peer")

        return refused


def test_a_store_that_does_not_answer_stops_nobody():
    store = Silent()
    line = Line(store, 1, 2, TIMEOUT)
    started = time.monotonic()
    with pytest.raises(ProcessGroupError, match=r"rank 0, or who else holds the store .*not answered") as error:
        line.count("anything")
    assert time.monotonic() - started < TIMEOUT + 0.3
    assert error.value.rank == 0
    line.close()
    store.goes_on.set()


def test_a_store_that_is_gone_says_why():
    line = Line(Gone(), 1, 2, TIMEOUT)
    with pytest.raises(ProcessGroupError, match=r"rank 0, or who else holds the store .*Connection reset by peer"):
        line.expect("anything")
    line.close()
