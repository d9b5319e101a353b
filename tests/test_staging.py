"""Reading ahead: the next wave is loaded while this one is used, and never more than that."""

import threading
from types import SimpleNamespace

import pytest
import torch

from kappa_fast.staging import Staged, one_ahead, stage

CPU = torch.device("cpu")


def matrix(value, log=None, before=lambda: None):
    def load(device=None):
        before()
        if log is not None:
            log.append(value)
        return torch.full((2, 2), float(value))

    return SimpleNamespace(load=load)


def test_the_next_wave_is_loaded_while_this_one_is_used_and_the_one_after_is_not():
    loaded, second = [], threading.Event()

    def waves(item):
        return [matrix(item, loaded, second.set if item == 1 else lambda: None)]

    for item, staged in one_ahead(range(5), waves, CPU):
        assert float(staged.ready()[0][0, 0]) == item
        if item == 0:
            assert second.wait(10)
        assert max(loaded) <= item + 1
    assert loaded == list(range(5))


def test_one_item_and_none_work_too():
    assert [item for item, _ in one_ahead([7], lambda item: [matrix(item)], CPU)] == [7]
    assert list(one_ahead([], lambda item: [matrix(item)], CPU)) == []


def fail(error):
    def raising():
        raise error

    return raising


def test_an_error_comes_when_it_is_the_turn_of_its_wave():
    staged = one_ahead([0, 1], lambda i: [matrix(i, None, fail(ValueError("damaged")) if i else lambda: None)], CPU)
    assert next(staged)[0] == 0
    with pytest.raises(ValueError, match="damaged"):
        next(staged)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_wave_that_does_not_fit_yet_is_left_for_its_turn(error):
    assert stage([matrix(1), matrix(2, None, fail(error))], CPU) == Staged([])


def test_what_is_staged_on_the_cpu_is_what_load_returns():
    weight = torch.randn(3, 3)
    assert stage([SimpleNamespace(load=lambda device: weight)], CPU).weights[0] is weight


def test_what_is_on_the_accelerator_already_is_left_to_the_stream_that_uses_it():
    gpu = torch.device("cuda", 0)
    there = SimpleNamespace(device=gpu, load=fail(AssertionError("loaded on the stream of another thread")))
    assert stage([there, there], gpu) == Staged([])


def test_leaving_early_ends_the_thread():
    staged = one_ahead(range(100), lambda item: [matrix(item)], CPU)
    next(staged)
    staged.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kappa_fast_staging")]
