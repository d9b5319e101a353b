"""Where Triton does not work, "auto" goes on with torch and says so once; backend="triton" says what to do instead."""

import logging
import sys

import pytest
import torch
from models import weights

import kappa_fast
import kappa_fast.execution.run
from kappa_fast import backends
from kappa_fast.backends import get_backend
from kappa_fast.backends.triton_backend import TritonBackend
from kappa_fast.execution import executor as execution
from kappa_fast.pipeline import rank

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux")
CPU = torch.device("cpu")
GIVEN = weights(a=(60, 40), b=(20, 30), c=(33, 33))


@pytest.fixture
def wanted(monkeypatch):
    """Triton is what "auto" tries first, as on a GPU."""
    monkeypatch.setattr(backends, "preferred", lambda device: "triton")


def assert_same_as_torch(found):
    """But for the last bits: what is left of a wave is not given one thread for each matrix."""
    alone = rank(GIVEN, backend="torch")
    assert [(e.key, e.method, e.status) for e in found] == [(e.key, e.method, e.status) for e in alone]
    for entry, twin in zip(found, alone, strict=True):
        assert entry.kappa == pytest.approx(twin.kappa, rel=1e-12)
        assert entry.lower == pytest.approx(twin.lower, rel=1e-12)
        assert entry.upper == pytest.approx(twin.upper, rel=1e-12)


def broken(*_, **__):
    raise SyntaxError("at 12:8: no such instruction\n  and much more")


def test_a_gpu_gets_triton_first_and_a_cpu_does_not():
    assert backends.preferred(torch.device("cuda", 0)) == "triton"
    assert backends.preferred(CPU) == "torch"


@linux_only
@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize("place", ["quantize.column_peaks", "apply.times", "cholesky.cholesky"])
def test_a_kernel_that_fails_leaves_the_work_to_torch_with_one_line(place, monkeypatch, caplog):
    if place != "quantize.column_peaks":
        monkeypatch.setattr("kappa_fast.spectrum.ladder.EXACT_BELOW", 32)
    monkeypatch.setattr(f"kappa_fast.kernels.{place}", broken)
    with caplog.at_level(logging.INFO, "kappa_fast"):
        found = rank(GIVEN, memory_budget=1)  # a wave for each matrix
    assert_same_as_torch(found)
    assert found.metadata["backend"] == "torch"
    line = "backend='triton' failed on cpu (at 12:8: no such instruction): going on with backend='torch'"
    assert caplog.messages == [line]
    assert caplog.records[0].levelno == logging.WARNING


@linux_only
@pytest.mark.usefixtures("wanted")
def test_a_device_that_is_lost_ends_the_run_and_names_what_was_launched(monkeypatch, caplog):
    """A fallback in this process would fail too, and hide the cause."""
    from kappa_fast.kernels.launch import tally

    def lost(*_):
        tally.recent.append("quantize.peaks")
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr("kappa_fast.kernels.quantize.column_peaks", lost)
    monkeypatch.setattr(execution, "is_lost", lambda device: True)
    message = r"cpu cannot be used by this process any more \(CUDA error: an illegal memory access was encountered\)"
    with pytest.raises(kappa_fast.BackendError, match=message + ".*quantize.peaks.*backend='torch'"):
        rank(GIVEN)
    assert caplog.messages == []


@linux_only
def test_by_name_a_kernel_that_fails_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("kappa_fast.kernels.quantize.column_peaks", broken)
    message = (
        r"^backend='triton' failed on cpu \(at 12:8: no such instruction\): use backend='auto' or backend='torch'$"
    )
    with pytest.raises(kappa_fast.BackendError, match=message) as failure:
        rank(GIVEN, backend="triton")
    assert isinstance(failure.value.__cause__, SyntaxError)


@linux_only
@pytest.mark.usefixtures("wanted")
def test_a_launch_without_memory_is_tried_in_halves_and_not_given_up(monkeypatch, caplog):
    original, sizes = execution.get_backend("triton", CPU).prepare, []

    def crowded(self, given):
        sizes.append(len(given))
        if len(given) > 1:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return original(given)

    monkeypatch.setattr(TritonBackend, "prepare", crowded)
    found = rank(weights(a=(20, 30), b=(25, 20)))
    assert sizes == [2, 1, 1]
    assert found.metadata["backend"] == "triton"


@pytest.mark.usefixtures("wanted")
def test_without_triton_auto_says_so_and_works(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "kappa_fast.kernels.problems", None)
    with caplog.at_level(logging.INFO, "kappa_fast"):
        found = rank(GIVEN)
    assert_same_as_torch(found)
    assert [message.split(":")[0] for message in caplog.messages] == [
        "backend='triton' needs Triton, which is for Linux"
    ]
    assert caplog.messages[0].endswith(": going on with backend='torch'")
    with pytest.raises(kappa_fast.BackendError, match="needs Triton, which is for Linux"):
        get_backend("triton", CPU)


@linux_only
@pytest.mark.usefixtures("wanted")
def test_a_device_that_is_too_old_is_left_to_torch(monkeypatch, caplog):
    def too_old(device):
        raise RuntimeError("compute capability 7.5 is below 8.0, the first that Triton supports")

    monkeypatch.setattr("kappa_fast.kernels.problems.target_of", too_old)
    assert rank(GIVEN).metadata["backend"] == "torch"
    assert "cannot work on cpu: compute capability 7.5 is below 8.0" in caplog.text


@linux_only
@pytest.mark.usefixtures("wanted")
def test_a_device_that_computes_something_else_is_left_to_torch(monkeypatch, caplog):
    from kappa_fast.kernels.canary import CanaryError

    def wrong(self, problems):
        raise CanaryError("times is off by 3.0e-05 on cuda:0, where 1e-11 is allowed")

    monkeypatch.setattr(TritonBackend, "_trust", wrong)
    assert_same_as_torch(rank(GIVEN))
    assert "(times is off by 3.0e-05 on cuda:0, where 1e-11 is allowed): going on with backend='torch'" in caplog.text


@linux_only
def test_kernels_are_checked_on_the_device_for_every_class_before_they_see_a_weight(monkeypatch):
    from kappa_fast.kernels import canary
    from kappa_fast.kernels.problems import Problems, Storage

    checked = []
    monkeypatch.setattr(canary, "check_device", lambda device: checked.append(device))
    monkeypatch.setattr(canary, "check_storage", lambda device, storage: checked.append((device, storage)))
    backend = TritonBackend(CPU)
    matrices = [torch.randn(40, 30), torch.randn(50, 20).half()]
    backend.prepare(matrices)
    assert checked == []  # what the interpreter computes is what numpy computes
    backend.device = torch.device("cuda", 0)
    backend._trust(Problems.of(matrices))
    assert checked == [backend.device, *((backend.device, Storage.of(m)) for m in matrices)]


@linux_only
@pytest.mark.usefixtures("wanted")
def test_an_error_in_the_source_is_not_taken_for_one_of_the_backend(monkeypatch):
    def refuse(backend, given, **options):
        raise kappa_fast.SourceError("the shard is damaged")

    monkeypatch.setattr("kappa_fast.execution.run.resolve", refuse)
    with pytest.raises(kappa_fast.SourceError, match="the shard is damaged"):
        rank(GIVEN)


@linux_only
def test_what_a_run_will_launch_is_compiled_once_before_its_first_wave(monkeypatch):
    """On all cores, and told of: one kernel after the other would take a quarter of a minute without a word."""
    from kappa_fast.kernels import jit_cache
    from kappa_fast.sources import Filters, open_source

    asked, told = [], []

    def warmup(weights, device, progress):
        asked.append((device, sorted((tuple(w.shape), w.dtype, w.is_meta) for w in weights)))
        progress(3, 33)
        return jit_cache.Compiled()

    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(jit_cache, "warmup", warmup)
    monkeypatch.setattr(execution, "_warm", {})
    source = open_source(GIVEN, Filters())
    executor = execution.Executor(source, "torch", CPU, None)
    monkeypatch.setattr(executor, "_backend_for", lambda device: TritonBackend(CPU))
    executor.notify = told.append
    for positions in ([0, 1], [0], [0, 1, 2]):
        executor._warm_up(gpu, [source.matrices[i] for i in positions])
    executor._warm_up(CPU, source.matrices[:1])
    f = torch.float32
    assert asked == [(gpu, [((20, 30), f, True), ((60, 40), f, True)]), (gpu, [((33, 33), f, True)])]
    assert told == ["compiling kernels 3/33", "ranking"] * 2

    def interrupted(*_):
        raise KeyboardInterrupt

    third = source.matrices[2]
    monkeypatch.setattr(execution, "_warm", {})
    monkeypatch.setattr(jit_cache, "warmup", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executor._warm_up(gpu, [third])
    monkeypatch.setattr(jit_cache, "warmup", warmup)
    executor._warm_up(gpu, [third])  # again, since nothing was compiled
    assert asked[2:] == [(gpu, [((33, 33), f, True)])]
