"""Matrices side by side, one thread each: results, threads, failures and interruptions."""

from __future__ import annotations

import _thread
import threading
import time

import pytest
import torch

from kappa_fast import ComputeError
from kappa_fast.machine.threads import each_on_one_thread, fits_one_thread


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("shape", [(384, 384), (2048, 5632), (5632, 2048)])
def test_matrices_of_small_models_get_one_thread_each_whichever_side_is_longer(shape):
    assert fits_one_thread(shape)


def test_a_matrix_of_a_large_model_keeps_all_cores_busy():
    assert not fits_one_thread((14336, 4096))


def test_every_item_comes_back_with_its_own_result(threads):
    assert dict(each_on_one_thread(lambda i: i * i, range(20))) == {i: i * i for i in range(20)}


def test_nothing_to_do_is_no_error(threads):
    assert list(each_on_one_thread(abs, [])) == []


def test_each_task_runs_on_one_thread_of_torch_and_off_the_main_thread(threads):
    seen = dict(each_on_one_thread(lambda _: (torch.get_num_threads(), threading.current_thread().name), range(4)))
    assert {count for count, _ in seen.values()} == {1}
    assert all(name.startswith("kappa_fast") for _, name in seen.values())


def test_new_threads_start_with_the_callers_number_of_threads_afterwards(threads):
    list(each_on_one_thread(abs, range(4)))
    found: list[int] = []
    worker = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    worker.start()
    worker.join()
    assert found == [threads]


def test_a_failure_reaches_the_caller_and_drops_what_has_not_begun(threads):
    begun: list[int] = []

    def task(i: int) -> int:
        begun.append(i)
        if i == 0:
            raise ValueError("the first one fails")
        time.sleep(0.01)  # a thousand of these take seconds: time enough to hear of the failure
        return i

    with pytest.raises(ValueError, match="the first one fails"):
        for _ in each_on_one_thread(task, range(1000)):
            pass
    assert len(begun) < 1000


def test_what_waits_is_told_when_nobody_wants_the_results_any_more(threads):
    stop = threading.Event()
    assert len(list(each_on_one_thread(lambda i: i, range(4), stop))) == 4
    assert not stop.is_set()

    def task(i: int) -> bool:
        return i == 0 or stop.wait(60)

    results = each_on_one_thread(task, range(4), stop)
    assert next(results) == (0, True)
    results.close()  # it would wait for a minute
    assert stop.is_set()


def test_a_task_without_memory_runs_again_alone_and_once(threads):
    begun, ended = list[int](), list[int]()

    def task(i: int) -> int:
        begun.append(i)
        if i == 0 or (i == 1 and begun.count(i) == 1):
            raise ComputeError("no room", out_of_memory=True)
        assert begun.count(1) == 1 or len(ended) == 4
        time.sleep(0.01)
        ended.append(i)
        return i

    results = each_on_one_thread(task, [1, 2, 3, 4, 5, 0])
    assert sorted(next(results)[0] for _ in range(5)) == [1, 2, 3, 4, 5]
    assert ended[-1] == 1
    with pytest.raises(ComputeError, match="no room"):
        next(results)
    assert (begun.count(0), begun.count(1)) == (2, 2)


def test_an_iterator_that_is_closed_early_waits_for_its_tasks_and_drops_the_rest(threads):
    begun: list[int] = []
    ended: list[int] = []

    def task(i: int) -> int:
        begun.append(i)
        time.sleep(0.01)
        ended.append(i)
        return i

    results = each_on_one_thread(task, range(1000))
    next(results)
    results.close()
    assert sorted(begun) == sorted(ended)
    assert len(begun) < 1000


def test_an_interrupt_that_wakes_no_thread_is_seen_all_the_same(threads):
    """As one that comes right before the main thread begins to wait."""
    stop, stopped = threading.Event(), []

    def task(_):
        time.sleep(0.2)  # the main thread waits now
        _thread.interrupt_main()  # which sends no signal that would wake it
        stopped.append(stop.wait(20))

    with pytest.raises(KeyboardInterrupt):
        list(each_on_one_thread(task, [0], stop))
    assert stopped == [True]
