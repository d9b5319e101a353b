"""Waves: sizes as text, what fits together, and what happens when memory runs out or a library routine fails."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import one_thread, weights

import kappa_fast.execution.run
from kappa_fast import ComputeError, Interrupted, OptionError
from kappa_fast.backends import get_backend
from kappa_fast.backends.torch_backend import TorchBackend
from kappa_fast.cache import LowerBoundQuery
from kappa_fast.execution import executor as execution
from kappa_fast.execution import waves
from kappa_fast.execution.step import Step
from kappa_fast.execution.waves import default_budget, into_waves, parse_bytes
from kappa_fast.machine.memory import is_out_of_memory
from kappa_fast.pipeline import rank
from kappa_fast.sources import Matrix, Source
from kappa_fast.spectrum import exact
from kappa_fast.spectrum import small as batches

CPU = torch.device("cpu")
GIVEN = weights(a=(200, 170), b=(180, 180), c=(64, 32), d=(40, 90), e=(300, 165))


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (None, None),
        (1, 1),
        (10**15, 10**15),
        ("1", 1),
        ("512B", 512),
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("2 G", 2 * 10**9),
        (" 2GiB ", 2 * 2**30),
        ("1.5G", 1_500_000_000),
        ("1.k", 1000),
        ("512 MiB", 512 * 2**20),
        ("3KB", 3000),
        ("3Ki", 3072),
        ("1TB", 10**12),
        ("0.5TiB", 2**39),
    ],
)
def test_a_size_is_a_number_or_a_text_with_a_unit(value, size):
    assert parse_bytes(value) == size


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 1.5, 1e9, float("inf"), True, False, "", " ", "GB", "much", "-2GB", "0", "0.4", "0GB", "2 XB", "1e9"),
        *("2GBB", "2G B", "1,5G", "1.2.3", "٣GB", "2\nGB x", b"2GB", [2], {}),
    ],
)
def test_what_is_no_size_is_refused_and_named(value):
    with pytest.raises(OptionError) as refusal:
        parse_bytes(value)
    assert str(refusal.value).startswith(f"memory_budget={value!r} is no size in bytes; give a positive int or a text")


@given(sizes=st.lists(st.integers(0, 100)), budget=st.integers(1, 150))
def test_waves_hold_everything_in_order_within_the_budget_and_no_two_could_be_one(sizes, budget):
    found = list(into_waves(range(len(sizes)), sizes.__getitem__, budget))
    assert [i for wave in found for i in wave] == list(range(len(sizes)))
    assert all(wave for wave in found)
    totals = [sum(sizes[i] for i in wave) for wave in found]
    assert all(total <= budget or len(wave) == 1 for total, wave in zip(totals, found, strict=True))
    firsts = [sizes[wave[0]] for wave in found[1:]]
    assert all(total + first > budget for total, first in zip(totals, firsts, strict=False))


def test_waves_are_cut_as_they_are_asked_for():
    asked: list[int] = []

    def size(i: int) -> int:
        asked.append(i)
        return 1

    next(into_waves(range(100), size, 2))
    assert len(asked) == 3


def test_the_default_on_a_cpu_is_bounded_by_what_is_free(monkeypatch):
    budget = default_budget(torch.device("cpu"))
    assert 0 < budget <= max(waves.LARGEST_DEFAULT, waves.SHARE * torch.get_num_threads())
    monkeypatch.setattr(waves.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 1000}[name])
    assert default_budget(torch.device("cpu")) == 4096 * 1000 // 4


def test_where_nobody_tells_what_is_free_a_modest_amount_is_taken(monkeypatch):
    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(waves.os, "sysconf", unknown)
    assert default_budget(torch.device("cpu")) == waves.LARGEST_DEFAULT // 4


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch):
    monkeypatch.setattr(waves, "_given", {})


def test_the_default_on_a_gpu_is_most_of_what_is_free_there(monkeypatch):
    held = {"mem_get_info": (1000, 5000), "memory_reserved": 700, "memory_allocated": 500}
    for name, value in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert default_budget(torch.device("cuda", 0)) == 960  # 80% of 1200


def test_a_second_run_on_a_gpu_cuts_the_same_waves_as_the_first(monkeypatch):
    """After it torch's allocator holds what the first one used, and libraries have taken a little for themselves."""
    gpu, total = torch.device("cuda", 0), 140 << 30
    states = [(46 << 30, 94 << 30, 93 << 30), (1 << 30, 138 << 30, 93 << 30)]
    budgets = []
    for free, reserved, allocated in states:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, reserved=reserved: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device, allocated=allocated: allocated)
        budgets.append(default_budget(gpu))
    assert budgets[0] == budgets[1] > 30 << 30


def test_a_gpu_that_is_almost_full_by_now_gives_what_there_is(monkeypatch):
    for free, budget in ((10000, 8000), (100, 80)):
        held = {"mem_get_info": (free, 64000), "memory_reserved": 0, "memory_allocated": 0}
        for name, value in held.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        assert default_budget(torch.device("cuda", 0)) == budget


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("not enough memory"), False),
        (torch.linalg.LinAlgError("did not converge"), False),
        (None, False),
    ],
)
def test_lack_of_memory_is_told_from_other_failures(error, expected):
    assert is_out_of_memory(error) is expected


def test_torch_itself_runs_out_of_memory_in_one_of_these_ways():
    with pytest.raises((RuntimeError, MemoryError)) as failure:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(failure.value)


OUT_OF_MEMORY: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes"),
    lambda: MemoryError("no more"),
]
NO_CONVERGENCE = lambda: torch.linalg.LinAlgError("linalg.svd: did not converge")  # noqa: E731


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whole waves go to the backend at once, as on an accelerator."""
    monkeypatch.setattr(TorchBackend, "side_by_side", False)
    with one_thread():
        yield


def refusing(
    monkeypatch: pytest.MonkeyPatch, name: str, refuse: Callable[[Sequence[Any]], bool], make: Any
) -> list[int]:
    """``run.<name>`` raises for some waves; the sizes of all are noted."""
    original, sizes = getattr(kappa_fast.execution.run, name), list[int]()

    def work(backend: Any, given: Sequence[torch.Tensor], **options: Any) -> Any:
        sizes.append(len(given))
        if refuse(given):
            raise make()
        return original(backend, given, **options)

    monkeypatch.setattr(kappa_fast.execution.run, name, work)
    return sizes


@pytest.mark.parametrize("make", [*OUT_OF_MEMORY, NO_CONVERGENCE])
def test_a_wave_that_fails_is_halved_until_it_works_with_the_same_result(make, whole, monkeypatch, caplog):
    expected = list(rank(GIVEN))
    sizes = refusing(monkeypatch, "resolve", lambda given: len(given) > 1, make)
    with caplog.at_level(logging.INFO, "kappa_fast"):
        assert list(rank(GIVEN)) == expected
    assert sizes == [5, 2, 1, 1, 3, 1, 2, 1, 1]
    assert caplog.messages[0].startswith("a wave of 5 matrices failed (")
    assert caplog.messages[0].endswith("; trying halves")


def counted(count: int) -> tuple[Source, list[int]]:
    """A source, and how many weights that it has given out were still there at each load."""
    given, there = list["weakref.ref[torch.Tensor]"](), list[int]()

    def load(device: torch.device | None = None) -> torch.Tensor:
        there.append(sum(weight() is not None for weight in given))
        weight = torch.zeros(20, 20)
        given.append(weakref.ref(weight))
        return weight

    matrices = [Matrix(f"w{i}", (), "", (), None, "w", (20, 20), torch.float32, CPU, load) for i in range(count)]
    return Source(tuple(matrices), (), 1, {}), there


def test_the_weights_of_two_waves_are_there_at_a_time_and_no_more(whole):
    source, there = counted(12)
    step = Step(LowerBoundQuery(1.0), lambda backend, given: [0.0])
    assert len(list(execution.Executor(source, "torch", CPU, 1).results(step, source.matrices))) == 12
    assert max(there) == 1  # beside the one that is loaded


def test_a_wave_that_fails_leaves_its_room_to_the_halves(whole):
    source, there = counted(4)

    def compute(backend: Any, given: list[torch.Tensor]) -> list[float]:
        if len(given) == 4:
            raise MemoryError
        return [0.0] * len(given)

    step = Step(LowerBoundQuery(1.0), compute)
    assert len(list(execution.Executor(source, "torch", CPU, None).results(step, source.matrices))) == 4
    assert there == [0, 1, 2, 3, 0, 1, 0, 1]


@pytest.mark.parametrize("make", OUT_OF_MEMORY)
def test_a_probe_that_fails_is_halved_too(make, whole, monkeypatch):
    source = GIVEN | weights(f=(220, 180), g=(64, 30))
    expected = list(rank(source, top=2))
    sizes = refusing(monkeypatch, "lower_bounds", lambda given: len(given) > 1, make)
    assert list(rank(source, top=2)) == expected
    assert max(sizes) > 1
    assert sizes.count(1) > 1


@pytest.mark.parametrize("work", ["resolve", "lower_bounds"])
@pytest.mark.parametrize("make", OUT_OF_MEMORY)
def test_what_its_neighbours_leave_no_memory_for_is_tried_again_alone(make, work, monkeypatch):
    expected = list(rank(GIVEN, top=2))
    seen: set[int] = set()
    lock = threading.Lock()

    def first_time(given: Sequence[torch.Tensor]) -> bool:
        assert torch.get_num_threads() == 1
        with lock:
            new = given[0].data_ptr() not in seen
            seen.add(given[0].data_ptr())
            return new

    refusing(monkeypatch, work, first_time, make)
    assert list(rank(GIVEN, top=2)) == expected
    assert seen


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("make", OUT_OF_MEMORY)
def test_a_single_matrix_without_memory_is_named_with_what_to_do(make, device, request, monkeypatch):
    if device == "accelerator":
        request.getfixturevalue("whole")
    refusing(monkeypatch, "resolve", lambda given: any(w.shape == (40, 90) for w in given), make)
    with pytest.raises(ComputeError) as failure:
        rank(GIVEN)
    assert str(failure.value) == (
        "there is not enough memory for 'd' of shape (40, 90), torch.float32: free memory, use another device, or "
        "leave it out with exclude='d'"
    )
    assert is_out_of_memory(failure.value.__cause__)
    assert len(rank(GIVEN, exclude="d")) == 4


def test_a_matrix_that_a_library_routine_fails_on_is_named_and_tried_once(monkeypatch):
    sizes = refusing(monkeypatch, "resolve", lambda given: given[0].shape == (64, 32), NO_CONVERGENCE)
    with pytest.raises(
        ComputeError, match=r"a library routine failed \(linalg.svd: did not converge\) on 'c' of shape"
    ):
        rank({"c": GIVEN["c"]})
    assert sizes == [1]


@pytest.mark.parametrize("work", ["resolve", "lower_bounds"])
def test_any_other_failure_comes_through_as_it_is(work, monkeypatch):
    refusing(monkeypatch, work, lambda _: True, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2") as failure:
        rank(GIVEN, top=2)
    assert not isinstance(failure.value, ComputeError)


def waves_of(source: dict[str, torch.Tensor], budget: int | str, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    original, found = execution.into_waves, list[list[Any]]()

    def into_waves(*arguments: Any) -> Iterator[Any]:
        for wave in original(*arguments):
            found.append(wave)
            yield wave

    monkeypatch.setattr(execution, "into_waves", into_waves)
    rank(source, memory_budget=budget)
    return found


def test_a_wave_takes_no_more_than_the_budget(monkeypatch):
    backend = get_backend("torch", torch.device("cpu"))
    assert isinstance(backend, TorchBackend)
    need = backend.workspace((100, 80), torch.float32)
    source = {f"w{i}": torch.randn(80, 100) for i in range(5)}
    assert [len(wave) for wave in waves_of(source, 2 * need, monkeypatch)] == [2, 2, 1]


def test_the_weights_of_a_checkpoint_count_since_they_are_brought_into_memory(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    need = get_backend("torch", torch.device("cpu")).workspace((100, 80), torch.float32)
    source = {f"w{i}": torch.randn(80, 100) for i in range(4)}
    save_file(source, tmp_path / "model.safetensors")
    assert [len(wave) for wave in waves_of(tmp_path, 2 * need + 1, monkeypatch)] == [1, 1, 1, 1]
    assert [len(wave) for wave in waves_of(tmp_path, 2 * (need + 32000), monkeypatch)] == [2, 2]


@pytest.mark.parametrize("budget", [1, "1B", "200KB", "1 TiB"])
def test_the_budget_changes_no_bit(budget):
    assert list(rank(GIVEN, memory_budget=budget)) == list(rank(GIVEN))


@pytest.mark.parametrize(("rooms", "at_once"), [(0.5, 1), (1, 1), (1.9, 1), (2, 2), (50, 2)])
def test_exact_decompositions_share_the_budget_and_one_that_exceeds_it_runs_alone(rooms, at_once, monkeypatch):
    running, most, lock, together = [0], [0], threading.Lock(), threading.Barrier(at_once)
    decompose = exact.decompose

    def watched(a: Any, rtol: float, **options: Any) -> Any:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait(60)  # for those that may run at once
        found = decompose(a, rtol, **options)
        with lock:
            running[0] -= 1
        return found

    small = {f"w{i}": torch.randn(40, 30) for i in range(4)}  # by a singular value decomposition from the start
    monkeypatch.setattr(batches, "eligible", lambda shape, goal: False)
    expected = list(rank(small))
    monkeypatch.setattr(exact, "decompose", watched)
    # Waves are cut by what the backend takes, which must not be what keeps them apart.
    monkeypatch.setattr(TorchBackend, "workspace", lambda *_, **__: 1)
    assert list(rank(small, memory_budget=int(rooms * exact.peak_bytes((40, 30))))) == expected
    assert most == [at_once]


def test_decompositions_that_wait_for_room_are_dropped_when_the_run_is_interrupted(monkeypatch):
    """Otherwise Ctrl-C would wait for one after the other."""
    decompose, begun, waiting = exact.decompose, [], threading.Event()
    taken, stops = exact.MemoryGate.taken, list[threading.Event]()

    def slow(a: Any, rtol: float, **options: Any) -> Any:
        begun.append(a.shape)
        assert waiting.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        while not stops[0].is_set():
            time.sleep(0.01)
        return decompose(a, rtol, **options)

    def watched(room: Any, a: Any) -> Any:
        stops.append(room.stop)
        if room._used:
            waiting.set()
        return taken(room, a)

    monkeypatch.setattr(batches, "eligible", lambda shape, goal: False)
    monkeypatch.setattr(exact, "decompose", slow)
    monkeypatch.setattr(exact.MemoryGate, "taken", watched)
    monkeypatch.setattr(TorchBackend, "workspace", lambda *_, **__: 1)
    with pytest.raises(Interrupted) as stop:
        rank({f"w{i}": torch.randn(40, 30) for i in range(2)}, memory_budget=exact.peak_bytes((40, 30)))
    assert len(begun) == 1
    assert len(stop.value.partial) <= 1


def test_room_is_given_back_when_a_decomposition_fails():
    room = exact.MemoryGate(1)
    a = get_backend("torch", torch.device("cpu")).prepare([torch.randn(40, 30)])[0]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no convergence"), room.taken(a):
            raise RuntimeError("no convergence")
        assert room._used == 0  # or the next one would wait for ever
