"""A signal that somebody swallows is not lost: it counts at the next look, and in the exit code at the latest."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from kappa_fast.machine import signals as stops

NUMBERS = [signal.SIGTERM, signal.SIGINT]


def swallowed(number):
    """What a library does in whose import the signal arrives."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        return True
    return False


@pytest.fixture(autouse=True)
def handlers():
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_what_was_swallowed_counts_at_the_next_look(number):
    with stops.listening():
        with contextlib.suppress(KeyboardInterrupt), stops.working():
            assert swallowed(number)
            with pytest.raises(KeyboardInterrupt):
                stops.check()
        assert stops.received(number)


@pytest.mark.parametrize("number", NUMBERS)
def test_and_at_the_end_if_nobody_looks(number):
    with stops.listening(), pytest.raises(KeyboardInterrupt), stops.working():
        swallowed(number)


def test_a_signal_before_the_work_begins_is_remembered_and_ends_it_at_once():
    with stops.listening():
        assert not swallowed(signal.SIGTERM)
        with stops.listening():  # the command, within the program
            assert stops.received(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt), stops.working():
                raise AssertionError("nothing is begun")


def test_a_signal_after_the_work_is_remembered_only():
    with stops.listening():
        with stops.working():
            pass
        assert not swallowed(signal.SIGTERM)
        stops.check()
        assert stops.received()


def test_ctrl_c_that_was_switched_off_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stops.listening(), stops.working():
            signal.raise_signal(signal.SIGINT)
            assert not stops.received()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_and_those_who_do_not_listen_are_left_alone():
    found = []

    def elsewhere():
        with stops.listening(), stops.working():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
    stops.check()


PROGRAM = """
import os, signal, sys
import kappa_fast.{module} as module
from kappa_fast.cli import main
original = module.{where}
def swallowing(*arguments, **options):
    found = original(*arguments, **options)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000): pass
    except KeyboardInterrupt:
        pass
    return found
module.{where} = swallowing
sys.argv = ["kappa-fast", "rank", sys.argv[1], "--no-cache", "--no-progress"]
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("module", "where"), [("pipeline", "open_source"), ("execution.run", "Ranking")])
def test_the_exit_code_tells_of_a_signal_that_a_library_swallowed(module, where, tmp_path):
    save_file({f"l.{i}.w": torch.randn(40, 30) for i in range(3)}, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module, where=where), str(tmp_path)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=300,
    )
    assert (done.returncode, done.stderr.startswith("terminated")) == (143, True), done.stderr
