"""Ctrl-C, SIGTERM, readers that go away and full disks: what is done is kept, and one line says so."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import COMMAND, run

import kappa_fast
from kappa_fast import pipeline

# Every wave holds one matrix, and the third waits to be interrupted by a signal from outside.
WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have switched it off for its background jobs
import kappa_fast.execution.run
from kappa_fast.cli import main
resolve, waves = kappa_fast.execution.run.resolve, []

def waiting(*arguments, **options):
    waves.append(1)
    if len(waves) == 3:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(3)  # longer than the signal takes; a matrix in hand is finished before the command ends
    return resolve(*arguments, **options)

kappa_fast.execution.run.resolve = waiting
main()
"""


def interrupt(*arguments: object, number: int = signal.SIGINT) -> tuple[int, str, str]:
    """Run in a process of its own, interrupted from outside in its third wave."""
    command = [sys.executable, "-c", WAITING, *map(str, arguments), "--memory-budget", "1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ready = child.stderr.readline()
    assert ready == "ready\n", ready + child.communicate()[1]
    time.sleep(0.05)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    return child.returncode, out, err


def test_ctrl_c_keeps_what_is_done_and_says_so(checkpoint, tmp_path):
    file = tmp_path / "partial.json"
    code, out, err = interrupt("rank", checkpoint, "--json", file)
    assert (code, out) == (130, "")
    assert err == f"interrupted: 2 of 5 matrices are done and written to {file}, marked as partial; " + (
        "the same command goes on from there\n"
    )
    partial = kappa_fast.Ranking.from_json(file)
    assert partial.metadata["partial"] is True
    whole = kappa_fast.rank(checkpoint)
    assert [entry for entry in whole if entry.key in partial] == list(partial)
    assert len(partial) == 2


@pytest.mark.slow
def test_ctrl_c_without_a_file_and_a_cache_says_how_to_keep_it(checkpoint):
    code, out, err = interrupt("rank", checkpoint, "--no-cache")
    assert (code, out) == (130, "")
    assert err == "interrupted: 2 of 5 matrices are done; --json FILE would have kept them\n"


@pytest.mark.long
@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_after_ctrl_c_or_sigterm_the_same_command_goes_on(number, code, word, checkpoint):
    stopped, out, err = interrupt("rank", checkpoint, number=getattr(signal, number))
    assert (stopped, out) == (code, "")
    assert err == f"{word}: 2 of 5 matrices are done; the same command goes on from there\n"
    again = run("rank", checkpoint)
    assert (again.returncode, again.stderr) == (0, "")
    assert "from the cache: 3 of 5" in again.stdout  # the one in hand was finished and kept too


def test_sigterm_is_handled_as_before_afterwards(cli, checkpoint):
    before = signal.getsignal(signal.SIGTERM)
    assert cli("rank", checkpoint)[0] == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_before_the_first_matrix_leaves_the_file_of_an_earlier_run(cli, checkpoint, tmp_path, monkeypatch):
    def resolve(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("kappa_fast.execution.run.resolve", resolve)
    file = tmp_path / "ranking.json"
    file.write_text(json.dumps({"kept": 1}))
    code, out, err = cli("rank", checkpoint, "--json", file)
    assert (code, out) == (130, "")
    assert err == f"interrupted: 0 of 5 matrices are done; {file} was not written\n"
    assert json.loads(file.read_text()) == {"kept": 1}


def test_ctrl_c_while_the_source_is_opened_is_clean_too(cli, checkpoint, monkeypatch):
    def open_source(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "open_source", open_source)
    assert cli("rank", checkpoint) == (130, "", "interrupted\n")


def test_a_reader_that_goes_away_is_no_error(checkpoint):
    child = subprocess.Popen([*COMMAND, "rank", checkpoint], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait(60) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_under_stdout_is_a_failure_in_one_line(checkpoint):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "rank", checkpoint], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*No space left on device\n", done.stderr)
