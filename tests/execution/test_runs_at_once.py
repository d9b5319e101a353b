"""Several runs of rank() in one process: none takes for the caller's what another one has set."""

import threading

import pytest
import torch

import kappa_fast
from kappa_fast.machine.threads import each_on_one_thread, usual_threads
from kappa_fast.machine.torch_state import EXACT, undisturbed

PRODUCT = torch.backends.mkldnn.matmul


@pytest.fixture
def crossed():
    """For runs that end in this thread in another order than they began: each puts back autograd as it found it."""
    with torch.enable_grad():
        yield


@pytest.fixture(params=["bf16", "medium"])
def coarse(request):
    """The caller's wish for coarse products, by the newer and by the older switch, and how to read it."""
    newer, older = PRODUCT.fp32_precision, torch.get_float32_matmul_precision()
    if request.param == "bf16":
        PRODUCT.fp32_precision = "bf16"
    else:
        torch.set_float32_matmul_precision("medium")
    yield lambda: (PRODUCT.fp32_precision, request.param == "bf16" or torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision(older)
    PRODUCT.fp32_precision = newer


@pytest.mark.usefixtures("crossed")
@pytest.mark.parametrize("first_ends", [0, 1])
def test_the_exact_mode_lasts_from_the_first_run_to_the_last(coarse, first_ends):
    before = coarse()
    runs = [undisturbed(), undisturbed()]
    for run in runs:
        run.__enter__()
    seen = [PRODUCT.fp32_precision]
    runs[first_ends].__exit__(None, None, None)
    seen.append(PRODUCT.fp32_precision)
    runs[1 - first_ends].__exit__(None, None, None)
    assert set(seen) <= set(EXACT)
    assert coarse() == before


@pytest.mark.usefixtures("crossed")
def test_what_the_caller_sets_between_two_runs_does_not_spoil_the_second(coarse):
    first, second = undisturbed(), undisturbed()
    first.__enter__()
    PRODUCT.fp32_precision = "bf16"
    second.__enter__()
    assert PRODUCT.fp32_precision in EXACT
    first.__exit__(None, None, None)
    assert PRODUCT.fp32_precision in EXACT
    second.__exit__(None, None, None)


def test_runs_in_many_threads_give_the_results_of_one_and_leave_the_modes(coarse):
    before = coarse()
    source = {f"l.{i}.w": torch.randn(40 + i, 30, generator=torch.Generator().manual_seed(i)) for i in range(6)}
    expected = list(kappa_fast.rank(source, progress=False))
    found, threads = [], []

    def run():
        ranking = kappa_fast.rank(source, progress=False)
        found.append(list(ranking))
        threads.append(ranking.metadata["threads"])

    workers = [threading.Thread(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 4
    assert set(threads) == {torch.get_num_threads()}
    assert coarse() == before


def test_a_thread_that_begins_beside_workers_gets_the_usual_number_of_threads():
    usual, found, working, asked = torch.get_num_threads(), [], threading.Event(), threading.Event()

    def task(_):
        working.set()
        assert asked.wait(30)
        (torch.ones(1 << 18, dtype=torch.float64) * 2).sum()  # work that more threads would share
        return torch.get_num_threads()

    def ask():
        found.append((usual_threads(), torch.get_num_threads()))
        asked.set()

    def begin():
        assert working.wait(30)
        worker = threading.Thread(target=ask)
        worker.start()
        worker.join()

    beside = threading.Thread(target=begin)
    beside.start()
    assert dict(each_on_one_thread(task, range(2))) == {0: 1, 1: 1}
    beside.join()
    assert found == [(usual, usual)]
    assert torch.get_num_threads() == usual
