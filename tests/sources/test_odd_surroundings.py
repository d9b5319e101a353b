"""Systems that start no thread, give no memory, or whose hub has a password in its address."""

import contextlib
import subprocess
import sys
import threading
import traceback

import pytest
import torch
from safetensors.torch import save_file

import kappa_fast
from kappa_fast.errors import ComputeError, SourceError
from kappa_fast.sources.hub import safe_cause


@pytest.fixture
def folder(tmp_path):
    save_file({f"l.{i}.w": torch.randn(30, 20) for i in range(4)}, tmp_path / "model.safetensors")
    return tmp_path


class NoThreads:
    """Where the system starts so many threads and no more."""

    def __init__(self, monkeypatch, count):
        self.left = count
        original = threading.Thread.start

        def start(thread):
            if self.left <= 0:
                raise RuntimeError("can't start new thread")
            self.left -= 1
            original(thread)

        monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize("count", [0, 1])
def test_a_system_that_starts_no_thread_is_told_and_not_waited_for(count, folder, monkeypatch):
    threads = torch.get_num_threads()
    NoThreads(monkeypatch, count)
    with pytest.raises(ComputeError, match=r"the system starts no thread .*ulimit -u"):
        kappa_fast.rank({f"l.{i}.w": torch.randn(30, 20) for i in range(4)}, progress=False)
    monkeypatch.undo()
    assert torch.get_num_threads() == threads
    assert len(kappa_fast.rank(folder, progress=False)) == 4


def test_nothing_is_read_ahead_and_nothing_kept_where_threads_are_scarce(folder, monkeypatch):
    expected = list(kappa_fast.rank(folder, progress=False))
    original, refused = threading.Thread.start, ("kappa_fast_read_ahead", "kappa_fast_journal")

    def start(thread):
        if thread.name.startswith(refused):
            raise RuntimeError("can't start new thread")
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.warns(UserWarning, match="results cannot be kept"):
        assert list(kappa_fast.rank(folder, progress=False, cache=folder / "cache")) == expected


PROGRAM = """
import resource, sys, torch, kappa_fast
torch.set_num_threads(1)
kappa_fast.rank({"a": torch.randn(20, 20)}, progress=False)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), used + int(sys.argv[2])))
try:
    print(len(kappa_fast.rank(sys.argv[1], progress=False)))
except kappa_fast.KappaError as error:
    print("refused", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
@pytest.mark.parametrize("left", [0, 4 << 20, 64 << 20, 1 << 30])
def test_a_limit_of_the_address_space_is_an_error_or_enough(left, tmp_path):
    save_file({"l.0.w": torch.randn(1500, 1500), "l.1.w": torch.randn(30, 20)}, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(left)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2" or done.stdout.startswith("refused")
    assert left < 1 << 30 or done.stdout.strip() == "2"


def test_a_cause_with_a_password_in_it_is_left_out():
    inner = ValueError("GET https://me:s3cret@hub.example/x failed")
    outer = RuntimeError("the hub did not answer")
    outer.__cause__ = inner
    assert safe_cause(inner) is None
    assert safe_cause(outer) is None
    assert safe_cause(ValueError("plain")) is not None
    try:
        try:
            raise outer
        except RuntimeError as error:
            raise SourceError(f"no model ({inner})") from safe_cause(error)
    except SourceError:
        assert "s3cret" not in traceback.format_exc()


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), "9" * 5000, "1e400", float("nan"), float("inf"), "\0", [], {}, object()]
)
def test_no_value_of_an_option_ends_in_another_exception(value):
    source = {"l.0.w": torch.randn(20, 20)}
    ranking = kappa_fast.rank(source, progress=False)
    options = ["top", "rtol", "certify", "score", "include", "exclude", "min_dim", "max_dim", "device", "memory_budget"]
    calls = [lambda option=option: kappa_fast.rank(source, **{"progress": False, option: value}) for option in options]
    budgets = ["num_tensors", "top_p", "max_kappa", "max_params"]
    calls += [lambda budget=budget: ranking.select(**{budget: value}) for budget in budgets]
    calls += [lambda: ranking.to_text(value), lambda: kappa_fast.rank(value, progress=False)]
    if not isinstance(value, int):
        calls.append(lambda: ranking.to_text(None, value))
    for call in calls:
        with contextlib.suppress(kappa_fast.KappaError):
            call()
