"""Threads without a matrix do parts of the others': all of them once, in the right state, and no bit differs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter

import pytest
import torch

import kappa_fast
from kappa_fast.backends import torch_gram
from kappa_fast.execution import executor
from kappa_fast.machine import threads
from kappa_fast.machine.helping import share
from kappa_fast.machine.threads import deserves_help, each_on_one_thread, helped
from kappa_fast.machine.torch_state import undisturbed_thread
from kappa_fast.spectrum import shifted, small


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_without_helpers_everything_is_done_in_its_order():
    done = list[int]()
    share([lambda i=i: done.append(i) for i in range(9)])
    assert done == list(range(9))


def test_idle_threads_help_the_only_one_that_has_work():
    together = threading.Barrier(3)

    def task(_: int) -> set[str]:
        seen = set[str]()

        def part() -> None:
            together.wait(60)  # breaks unless three threads are here at once
            seen.add(threading.current_thread().name)

        share([part] * 3)
        return seen

    ((_, seen),) = each_on_one_thread(task, [0], helping=undisturbed_thread)
    assert len(seen) == 3


def test_every_part_is_done_once_whoever_shares_it():
    counts: Counter[tuple[int, int, int]] = Counter()
    lock = threading.Lock()

    def part(key: tuple[int, int, int]) -> None:
        with lock:
            counts[key] += 1

    def task(item: int) -> int:
        for round_ in range(20):
            share([lambda key=(item, round_, i): part(key) for i in range(7)])
            assert sum(counts[item, round_, i] for i in range(7)) == 7  # share() returns when all parts are done
        return item

    found = dict(each_on_one_thread(task, range(5), helping=undisturbed_thread))
    assert found == {i: i for i in range(5)}
    assert set(counts.values()) == {1}
    assert len(counts) == 5 * 20 * 7


def test_helpers_work_in_the_context_and_with_one_thread_of_torch():
    together, entered = threading.Barrier(3), list[str]()

    @contextlib.contextmanager
    def around():
        entered.append(threading.current_thread().name)
        with undisturbed_thread():
            yield

    def task(_: int) -> list[tuple[bool, int]]:
        seen = list[tuple[bool, int]]()

        def part() -> None:
            together.wait(60)
            seen.append((torch.is_grad_enabled(), torch.get_num_threads()))

        with undisturbed_thread():
            share([part] * 3)
        return seen

    ((_, seen),) = each_on_one_thread(task, [0], helping=around)
    assert seen == [(False, 1)] * 3
    assert len(entered) >= 2


@pytest.mark.parametrize("failing", [0, 3, 8])
def test_a_failure_of_a_part_is_raised_where_it_was_shared_and_ends_the_others(failing):
    def task(_: int) -> str:
        running = list[int]()

        def part(i: int) -> None:
            running.append(i)
            time.sleep(0.001)
            running.remove(i)
            if i == failing:
                raise MemoryError(f"part {i}")

        with pytest.raises(MemoryError, match=f"part {failing}"):
            share([lambda i=i: part(i) for i in range(9)])
        assert running == []
        share([lambda: None] * 3)  # the crew goes on
        return "done"

    assert dict(each_on_one_thread(task, [0, 1], helping=undisturbed_thread)) == {0: "done", 1: "done"}


def test_a_failed_item_and_a_closed_iterator_let_the_helpers_go():
    def fail(_: int) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(each_on_one_thread(fail, [0], helping=undisturbed_thread))
    results = each_on_one_thread(abs, range(9), helping=undisturbed_thread)
    next(results)
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("kappa_fast_")]


LARGE = (4000, 1536)  # 512 columns for each of three threads


def test_others_do_all_parts_of_what_a_leader_shares_with_one_thread_of_torch():
    seen = list[tuple[str, int]]()

    def part() -> None:
        assert not torch.is_grad_enabled()
        seen.append((threading.current_thread().name, torch.get_num_threads()))

    me = threading.current_thread().name
    mine = part_by(me)
    with helped(LARGE, undisturbed_thread):
        assert torch.get_num_threads() == 3
        for _ in range(20):
            share([part] * 7)
            share([mine] * 2, brief=True)
    assert len(seen) == 140
    assert me not in {name for name, _ in seen}
    assert {threads for _, threads in seen} == {1}
    share([mine] * 2)  # afterwards it does them itself
    assert not [t for t in threading.enumerate() if t.name.startswith("kappa_fast_")]


def part_by(name: str):
    def part() -> None:
        assert threading.current_thread().name == name

    return part


@pytest.mark.parametrize("shape", [(100_000, 1535), (1000, 100_000)])
def test_a_matrix_with_few_parts_for_each_thread_is_led_by_nobody(shape):
    with helped(shape, undisturbed_thread):
        share([part_by(threading.current_thread().name)] * 2)


def test_a_leader_raises_what_a_part_raised_and_goes_on_where_no_thread_helps():
    def fails() -> None:
        raise ArithmeticError("a part")

    with helped(LARGE, undisturbed_thread):
        with pytest.raises(ArithmeticError, match="a part"):
            share([fails, lambda: None, lambda: None])
        done = list[int]()
        share([lambda i=i: done.append(i) for i in range(9)])
        assert sorted(done) == list(range(9))

    def broken():
        raise ArithmeticError("no context")

    done.clear()
    with helped(LARGE, broken):  # the helpers end at once
        share([lambda i=i: done.append(i) for i in range(9)])
    assert sorted(done) == list(range(9))


def test_where_the_system_starts_no_thread_a_leader_does_it_all(monkeypatch):
    def refused(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with helped(LARGE, undisturbed_thread):
        share([part_by(threading.current_thread().name)] * 2)
    assert torch.get_num_threads() == 3


def test_a_large_matrix_has_its_parts_done_by_others_and_the_same_bits(monkeypatch):
    names = set[str]()
    for way in ("_add_tile", "_add_strip"):
        original = getattr(torch_gram, way)
        monkeypatch.setattr(
            torch_gram, way, lambda *given, f=original: (names.add(threading.current_thread().name), f(*given))
        )
    weight = torch.randn(LARGE, generator=torch.Generator().manual_seed(1))
    expected = torch.tril(weight.double().T @ weight.double())
    for onednn in (False, torch.backends.mkldnn.is_available()):
        monkeypatch.setattr(torch_gram, "by_onednn", lambda onednn=onednn: onednn)
        torch.set_num_threads(1)
        alone = torch_gram.gram(weight, torch.float32)
        torch.set_num_threads(3)
        names.clear()
        with helped(LARGE, undisturbed_thread):
            led = torch_gram.gram(weight, torch.float32)
            assert threading.current_thread().name not in names
            factor = led.clone()
            factor.diagonal().add_(4000)
            names.clear()
            assert torch_gram.cholesky(factor)
        assert torch.equal(torch.tril(led), torch.tril(alone))
        assert float((torch.tril(led).double() - expected).abs().max()) < 1e-3 * 4000
    monkeypatch.setattr(threads, "SINGLE_THREAD_OPERATIONS", 1e9)
    names.clear()
    entry = kappa_fast.rank({"weight": weight})[0]
    assert any(name.startswith("kappa_fast_") for name in names)
    values = torch.linalg.svdvals(weight.double())
    assert entry.lower <= float(values[0] / values[-1]) <= entry.upper


SHAPES = {"tall": (2100, 1000), "wide": (700, 2300), "square": (1000, 1000)}


@pytest.mark.parametrize("certify", [False, True])
def test_no_bit_depends_on_help_or_on_the_number_of_threads(certify, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    source = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    assert all(deserves_help(weight.shape) for weight in source.values())
    helped = {key: kappa_fast.rank({key: weight}, certify=certify)[0] for key, weight in source.items()}
    assert {entry.key: entry for entry in kappa_fast.rank(source, certify=certify)} == helped
    torch.set_num_threads(1)
    assert {entry.key: entry for entry in kappa_fast.rank(source, certify=certify)} == helped
    torch.set_num_threads(3)
    monkeypatch.setattr(executor, "deserves_help", lambda shape: False)
    assert {entry.key: entry for entry in kappa_fast.rank(source, certify=certify)} == helped


@pytest.mark.parametrize(("shape", "part"), [((1300, 1000), "_add_panel"), ((1100, 1100), "_add_in_chunks")])
def test_the_proofs_of_a_lone_matrix_are_shared(shape, part, monkeypatch):
    module = small if part == "_add_panel" else torch_gram
    seen: dict[str, set[str]] = {}
    for place, name in ((module, part), (shifted, "_below"), (shifted, "_below_batch")):
        original = getattr(place, name)

        def recorded(*given, name=name, original=original):
            seen.setdefault(name, set()).add(threading.current_thread().name)
            time.sleep(0.01)
            original(*given)

        monkeypatch.setattr(place, name, recorded)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    entry = kappa_fast.rank({"weight": weight}, certify=True)[0]
    assert entry.certified
    assert len(seen[part]) > 1
    assert any(len(names) > 1 for name, names in seen.items() if name != part)


def test_a_lone_matrix_is_shared(monkeypatch):
    import kappa_fast.backends.torch_gram as backend

    names = set[str]()
    original = backend._add_tile

    def add_tile(*arguments):
        names.add(threading.current_thread().name)
        time.sleep(0.01)
        original(*arguments)

    monkeypatch.setattr(backend, "_add_tile", add_tile)
    kappa_fast.rank({"weight": torch.randn(1200, 1000)})
    assert len(names) > 1
