"""Reading ahead: the next wave is loaded while this one is used, and never more than that."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from kappa_fast.execution import prefetch as staging
from kappa_fast.execution.prefetch import Staged, one_ahead, read_ahead, stage

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
    waves = ([matrix(item, loaded, second.set if item == 1 else lambda: None)] for item in range(5))
    for item, (_, staged) in enumerate(one_ahead(waves, CPU)):
        assert float(staged.ready()[0][0, 0]) == item
        if item == 0:
            assert second.wait(10)
        assert max(loaded) <= item + 1
    assert loaded == list(range(5))


def test_one_item_and_none_work_too():
    wave = [matrix(7)]
    assert [found for found, _ in one_ahead([wave], CPU)] == [wave]
    assert list(one_ahead([], CPU)) == []


def fail(error):
    def raising():
        raise error

    return raising


def test_an_error_comes_when_it_is_the_turn_of_its_wave():
    whole, damaged = [matrix(0)], [matrix(1, None, fail(ValueError("damaged")))]
    staged = one_ahead([whole, damaged], CPU)
    assert next(staged)[0] is whole
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


class FakeStream:
    """What staging asks of a stream; ``log`` tells in which thread and what for it was waited."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, other.name))

    def record_event(self):
        return "copied"


def test_copies_wait_for_the_streams_that_are_current_where_rank_was_called(monkeypatch):
    """A stream is current for one thread: the one that stages would find the default streams."""
    log, caller = [], threading.get_ident()

    def current(device):
        return FakeStream(f"{device} of the {'caller' if threading.get_ident() == caller else 'pool'}", log)

    gpu, other = torch.device("cuda", 1), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("copies", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(staging, "_copied", lambda weight, device: weight)
    elsewhere = SimpleNamespace(device=other, load=lambda device: torch.zeros(2, 2))
    ((_, staged),) = one_ahead([[elsewhere]], gpu)
    assert log == [("copies", "cuda:0 of the caller"), ("copies", "cuda:1 of the caller")]
    assert staged.arrived == "copied"


def test_leaving_early_ends_the_thread():
    staged = one_ahead(([matrix(item)] for item in range(100)), CPU)
    next(staged)
    staged.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kappa_fast_staging")]


def on_disk(value, log, nbytes=1, before=lambda: None):
    def prefetch():
        before()
        log.append(value)

    return SimpleNamespace(prefetch=prefetch, nbytes=nbytes)


def until(log, count):
    for _ in range(1000):
        if len(log) >= count:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.02)  # time enough to go too far
    return list(log)


def test_this_wave_and_the_next_are_read_ahead_however_large_and_no_more():
    log: list[int] = []
    waves = read_ahead([[on_disk(wave, log, 10)] for wave in range(5)], ahead=1)
    for wave, _ in enumerate(waves):
        assert until(log, min(wave + 2, 5)) == list(range(min(wave + 2, 5)))


def test_small_waves_are_read_ahead_up_to_so_many_bytes():
    log: list[int] = []
    given = [[on_disk(wave, log, 10)] for wave in range(100)]
    waves = read_ahead(given, ahead=45)
    assert next(waves) is given[0]
    assert until(log, 5) == list(range(5))
    assert next(waves) is given[1]
    assert until(log, 6) == list(range(6))
    waves.close()


def test_what_lies_in_memory_is_not_read_ahead():
    waves = [[SimpleNamespace(prefetch=None, nbytes=0)] for _ in range(3)]
    assert list(read_ahead(waves)) == waves


def test_leaving_early_ends_reading_ahead_before_the_next_matrix():
    log, started, gate = [], threading.Event(), threading.Event()

    def first():
        started.set()
        gate.wait(10)

    waves = read_ahead([on_disk(wave, log, before=first), on_disk(-1, log)] for wave in range(50))
    next(waves)
    assert started.wait(10)
    threading.Timer(0.05, gate.set).start()
    waves.close()
    assert log == [0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kappa_fast_read")]


def test_the_way_into_the_next_wave_may_fail_as_the_waves_do():
    def failing():
        yield []
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(read_ahead(failing()))
