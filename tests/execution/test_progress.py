"""Progress: what a callable is told, and a bar on a terminal that stays away from pipes."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import weights

import kappa_fast
import kappa_fast.execution.run
from kappa_fast import Interrupted, OptionError
from kappa_fast.execution.progress import Progress, Tracker
from kappa_fast.pipeline import rank

GIVEN = weights(a=(200, 170), b=(180, 180), c=(64, 32), d=(40, 90), e=(300, 165), f=(30, 30))


ERASED = "\x1b[1A\x1b[2K"  # one line up, and clear it


class Terminal(io.StringIO):
    """A stream that passes for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """To be redirected to within a test, since pytest takes stderr back when the test begins."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({}, 6),
        ({"memory_budget": 1}, 6),
        ({"certify": True}, 6),
        ({"top": 1}, 6),
        ({"top": 2, "top_per_group": True}, 6),
        ({"top": 2, "certify": "selection"}, 6 + 2),
        ({"top": 9, "certify": "selection"}, 6 + 6),
        ({"top": 3, "score": lambda entry: -entry.kappa}, 6),
    ],
    ids=lambda options: ",".join(options) if isinstance(options, dict) else "",
)
def test_a_callable_hears_of_every_matrix_until_all_are_done(options, total):
    heard: list[Progress] = []
    rank(GIVEN, progress=heard.append, **options)
    assert [p.matrices_done for p in heard] == list(range(1, total + 1))
    assert [p.matrices_total for p in heard] == sorted(p.matrices_total for p in heard)
    assert all(p.matrices_done <= p.matrices_total for p in heard)
    for earlier, later in itertools.pairwise(heard):
        assert earlier.operations_done < later.operations_done
        assert earlier.operations_total <= later.operations_total
        assert 0 <= earlier.seconds <= later.seconds
    last = heard[-1]
    assert (last.matrices_done, last.matrices_total) == (total, total)
    assert last.operations_done == pytest.approx(last.operations_total)


def test_operations_are_those_of_the_gram_matrix_and_its_factorization():
    heard: list[Progress] = []
    rank(weights(wide=(20, 50)), progress=heard.append)
    assert heard[0].operations_total == pytest.approx(50 * 20**2 + 20**3 / 3)


@given(steps=st.lists(st.tuples(st.integers(1, 5), st.floats(0, 1e15))))
def test_a_tracker_adds_up_what_it_is_told(steps):
    heard: list[Progress] = []
    tracker = Tracker(3, 10.0, heard.append)
    for matrices, operations in steps:
        tracker.extend(matrices, operations)
        tracker.advance(matrices, operations)
    assert tracker.done == sum(matrices for matrices, _ in steps)
    assert len(heard) == len(steps)
    if steps:
        assert (heard[-1].matrices_done, heard[-1].matrices_total) == (tracker.done, tracker.done + 3)
        assert heard[-1].operations_done == pytest.approx(sum(operations for _, operations in steps))
        assert heard[-1].operations_total == pytest.approx(heard[-1].operations_done + 10)


def test_an_exception_of_the_callable_ends_the_ranking():
    def unwilling(progress: Progress) -> None:
        raise LookupError(f"after {progress.matrices_done}")

    with pytest.raises(LookupError, match="after 1"):
        rank(GIVEN, progress=unwilling)


def test_an_interruption_by_the_callable_keeps_what_is_done():
    def impatient(progress: Progress) -> None:
        if progress.matrices_done == 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"interrupted: 4 of 6 matrices are done \(see \.partial\)") as stop:
        rank(GIVEN, progress=impatient)
    full = rank(GIVEN)
    assert len(stop.value.partial) == 4
    assert all(entry == full[entry.key] for entry in stop.value.partial)
    assert isinstance(stop.value, KeyboardInterrupt)


@pytest.mark.parametrize("option", [0, 1, "yes", [], 3.0])
def test_what_is_no_progress_option_is_refused_before_any_work(option, monkeypatch):
    monkeypatch.setattr("kappa_fast.execution.run.resolve", lambda *_, **__: pytest.fail("it worked"))
    with pytest.raises(OptionError) as refusal:
        rank(GIVEN, progress=option)
    assert str(refusal.value) == f"progress={option!r}: give True, False, None or a callable that takes a Progress"


@pytest.mark.parametrize("option", [None, False])
def test_nothing_is_written_to_a_pipe(option, capfd):
    rank(GIVEN, progress=option)
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_with_matrices_work_and_time_and_then_a_clean_line(terminal, capsys):
    with contextlib.redirect_stderr(terminal):
        rank(GIVEN)
    drawn = terminal.getvalue()
    assert "6/6 matrices" in drawn
    assert "Gflop" in drawn
    assert "ETA" in drawn
    assert drawn.endswith(ERASED)
    assert capsys.readouterr() == ("", "")


def test_false_means_false_on_a_terminal_too(terminal):
    with contextlib.redirect_stderr(terminal):
        rank(GIVEN, progress=False)
    assert terminal.getvalue() == ""


def test_a_bar_that_is_asked_for_leaves_its_last_state_in_a_pipe(capsys):
    rank(GIVEN, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("6/6 matrices") == 1
    assert "\x1b" not in err


def test_the_bar_grows_with_the_proofs(terminal):
    with contextlib.redirect_stderr(terminal):
        rank(GIVEN, top=2, certify="selection")
    assert "8/8 matrices" in terminal.getvalue()


def test_the_bar_goes_away_when_interrupted(terminal, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kappa_fast.execution.run.resolve", interrupted)
    with contextlib.redirect_stderr(terminal), pytest.raises(Interrupted):
        rank(GIVEN)
    assert "matrices" in terminal.getvalue()
    assert terminal.getvalue().endswith(ERASED)


def test_a_session_without_a_terminal_at_all_gets_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert len(rank(GIVEN)) == 6
    assert capsys.readouterr().out == ""


class ZMQInteractiveShell:
    """What IPython calls the shell of a notebook's kernel."""


def test_a_notebook_has_a_bar_that_needs_no_widgets(monkeypatch):
    shown = []

    class Handle:
        def update(self, page):
            shown.append(page)

    def display(page, display_id):
        assert display_id
        shown.append(page)
        return Handle()

    ipython, pages = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = ZMQInteractiveShell
    pages.HTML, pages.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", pages)
    kappa_fast.rank({f"{i}.weight": torch.randn(32, 32) for i in range(4)})
    assert shown[0] == "<progress value='0.0000' max='1'></progress> ranking 4 matrices"
    assert any(" of 4 matrices" in page for page in shown)
    assert shown[-1] == ""
    before = len(shown)
    kappa_fast.rank({"0.weight": torch.randn(32, 32)}, progress=False)
    ipython.get_ipython = lambda: None  # the shell of a terminal, or none
    kappa_fast.rank({"0.weight": torch.randn(32, 32)})
    assert len(shown) == before
