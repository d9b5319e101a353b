"""A run that is killed loses what it has in hand, and the next one goes on to the identical result."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import kappa_fast
import kappa_fast.execution.run
from kappa_fast.cache import JOURNAL_FORMAT, ResultCache, _header, journal, memos
from kappa_fast.cache.files import seal, unseal
from kappa_fast.cache.journal import Journal, leftovers
from kappa_fast.pipeline import rank
from kappa_fast.sources.files import Region

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no locks that tell who lives")

# Every wave holds one matrix; in the third one the process waits to be killed.
WAITING = """
import sys, time
import torch
torch.set_num_threads(2)
import kappa_fast.execution.run
from kappa_fast.cache import memos
from kappa_fast.cli import main
memos.RACY_NS = -10**12
resolve, waves = kappa_fast.execution.run.resolve, []

def waiting(*arguments, **options):
    waves.append(1)
    if len(waves) == 3:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    return resolve(*arguments, **options)

kappa_fast.execution.run.resolve = waiting
main()
"""


def weights(count: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": torch.randn(40 + i, 30, generator=generator) for i in range(count)}


WEIGHTS = weights()
PLAIN = list(rank(WEIGHTS))


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint, and the cache that a run has left which was killed in its third wave of five."""
    directory = tmp_path_factory.mktemp("killed")
    path, cache = directory / "model.safetensors", directory / "cache"
    save_file(WEIGHTS, path)
    command = [sys.executable, "-c", WAITING, "rank", str(path), "--memory-budget", "1", "--cache-dir", str(cache)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    ready = child.stderr.readline()
    assert ready == "ready\n", ready + child.stderr.read()
    child.kill()
    child.communicate(timeout=60)
    return path, cache


def journals(cache: Path) -> list[Path]:
    return sorted((cache / "v1" / "journals").glob("*"))


def lines_left(killed: tuple[Path, Path]) -> list[bytes]:
    (left,) = journals(killed[1])
    return left.read_bytes().splitlines(keepends=True)


def left_behind(cache: Path, data: bytes, name: str = "0123456789abcdef.jsonl") -> Path:
    folder = cache / "v1" / "journals"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(data)
    return folder / name


def test_the_next_run_goes_on_and_gets_the_identical_result(killed, tmp_path, monkeypatch):
    path, _ = killed
    lines = lines_left(killed)
    assert len(lines) == 3  # what it is, and two results
    left = left_behind(tmp_path, b"".join(lines))
    monkeypatch.setattr(memos, "RACY_NS", -(10**12))
    read, original = [], Region.take
    monkeypatch.setattr(Region, "take", lambda *a: read.append(a[1]) or original(*a))
    ranking = rank(path, cache=tmp_path)
    assert list(ranking) == PLAIN
    assert ranking.metadata["cache"] == {"hits": 2, "computed": 3}
    assert len(read) == 3  # what was done before is not even read again
    assert not left.exists()
    assert journals(tmp_path) == []
    assert rank(WEIGHTS, cache=tmp_path).metadata["cache"] == {"hits": 5, "computed": 0}


@pytest.mark.parametrize("with_memo", [True, False])
def test_a_journal_goes_only_when_its_results_are_on_the_disk(with_memo, killed, tmp_path, monkeypatch):
    header, *lines = lines_left(killed)
    if not with_memo:  # results of weights that came from no file
        lines = [seal([*unseal(line)[:2], None]) for line in lines]
    left = left_behind(tmp_path, b"".join([header, *lines]))
    seen, fsync = [], os.fsync

    def noted(handle: int) -> None:
        seen.append(left.exists())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    ResultCache(tmp_path, []).replay()
    assert not left.exists()
    assert all(seen)
    assert len(seen) >= (2 if with_memo else 4)  # file and folder: of the memo, or of each result; and of new folders


def test_a_journal_that_breaks_off_anywhere_gives_all_its_whole_lines(killed, tmp_path):
    lines = lines_left(killed)
    data = b"".join(lines)
    ends = [len(b"".join(lines[: i + 1])) for i in range(3)]
    places = {0, 1, 40, *ends, *(end - 1 for end in ends), *random.Random(0).sample(range(len(data)), 12)}
    for place in sorted(places):
        cache = tmp_path / str(place)
        left_behind(cache, data[:place])
        ranking = rank(WEIGHTS, cache=cache)
        assert list(ranking) == PLAIN
        assert ranking.metadata["cache"]["hits"] == max(0, sum(end <= place for end in ends) - 1)
        assert journals(cache) == []


def test_a_flipped_bit_in_a_journal_costs_its_line(killed, tmp_path):
    lines = lines_left(killed)
    for number, expected in ((0, 0), (1, 1), (2, 1)):
        damaged = [bytearray(line) for line in lines]
        damaged[number][200 if number else 60] ^= 4
        cache = tmp_path / str(number)
        left_behind(cache, b"".join(damaged))
        ranking = rank(WEIGHTS, cache=cache)
        assert list(ranking) == PLAIN
        assert ranking.metadata["cache"]["hits"] == expected


@pytest.mark.parametrize(
    "line",
    [
        ["../../../evil", {}, None],
        ["float32-40x30-" + "0" * 32, {"plain": 3}, None],
        ["float32-40x30-" + "0" * 32, {}, [[[1, 2]], "x"]],
        ["float32-40x30-" + "0" * 32, {}],
        7,
        None,
    ],
)
def test_what_no_run_has_written_is_passed_over(line, tmp_path):
    left_behind(tmp_path, seal(_header()) + seal(line))
    assert list(rank(WEIGHTS, cache=tmp_path)) == PLAIN
    assert len(list((tmp_path / "v1" / "results").rglob("*.json"))) == 5
    assert journals(tmp_path) == []


def test_a_journal_of_other_numerics_is_not_used(killed, tmp_path):
    header, *rest = lines_left(killed)
    body = unseal(header)
    assert body["format"] == JOURNAL_FORMAT
    left_behind(tmp_path, seal(body | {"numerics": 999}) + b"".join(rest))
    assert rank(WEIGHTS, cache=tmp_path).metadata["cache"] == {"hits": 0, "computed": 5}
    assert journals(tmp_path) == []


def test_the_journal_of_a_run_that_lives_is_left_to_it(tmp_path):
    folder = tmp_path / "v1" / "journals"
    living = Journal(folder, _header(), lambda lines: None)
    rank(WEIGHTS, cache=tmp_path)
    assert [path.name for path in journals(tmp_path)] == [living.tag + ".jsonl"]
    living.close(lambda: None)
    assert journals(tmp_path) == []


def test_what_a_killed_run_was_just_writing_is_removed(killed, tmp_path):
    lines = lines_left(killed)
    text = unseal(lines[1])[0]
    left = left_behind(tmp_path, b"".join(lines))
    draft = tmp_path / "v1" / "results" / text[-32:-30] / f".{text}.json.{left.stem}.tmp"
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"half")
    rank(WEIGHTS, cache=tmp_path)
    assert not draft.exists()


def test_a_journal_that_was_killed_before_it_had_a_name_goes_after_a_minute(tmp_path):
    draft = left_behind(tmp_path, b"", "0123.new")
    assert list(leftovers(draft.parent)) == []
    assert draft.exists()
    os.utime(draft, (time.time() - 100, time.time() - 100))
    assert list(leftovers(draft.parent)) == []
    assert not draft.exists()


def test_links_and_pipes_among_the_journals_are_passed_over(tmp_path):
    left = left_behind(tmp_path, b"")
    left.unlink()
    left.symlink_to(tmp_path / "nowhere")
    os.mkfifo(left.with_name("pipe.jsonl"))
    (left.parent / "folder.jsonl").mkdir()
    assert list(rank(WEIGHTS, cache=tmp_path)) == PLAIN


def test_where_the_journal_cannot_be_settled_its_results_are_used_all_the_same(killed, tmp_path, monkeypatch):
    left = left_behind(tmp_path, b"".join(lines_left(killed)))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        ranking = rank(WEIGHTS, cache=tmp_path)
    assert list(ranking) == PLAIN
    assert ranking.metadata["cache"] == {"hits": 2, "computed": 3}
    assert left.exists()


def test_a_line_is_in_the_file_at_once_and_on_the_disk_before_it_is_settled(tmp_path, monkeypatch):
    events: list[Any] = []
    settled = threading.Event()
    fsync = os.fsync

    def noted(handle: int) -> None:
        events.append("fsync")
        fsync(handle)

    def settle(lines: Any) -> None:
        events.append(list(lines))
        settled.set()

    monkeypatch.setattr(journal, "INTERVAL", 0.2)
    monkeypatch.setattr(journal.os, "fsync", noted)
    running = Journal(tmp_path, {"header": 1}, settle)
    time.sleep(0.05)
    events.clear()  # that of the folder
    for line in (["a"], ["b"]):
        running.append(line)
    assert (tmp_path / f"{running.tag}.jsonl").read_bytes() == seal({"header": 1}) + seal(["a"]) + seal(["b"])
    assert settled.wait(10)
    assert events == ["fsync", [["a"], ["b"]]]  # one for both
    running.append(["c"])
    running.close(lambda: events.append("last"))
    assert events[2:] in ([[["c"]], "last"], ["fsync", [["c"]], "last"])
    assert list(tmp_path.iterdir()) == []


def test_a_journal_stays_where_the_results_could_not_be_written(tmp_path):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    running = Journal(tmp_path, 1, full)
    running.append(["a"])
    running.close(lambda: pytest.fail("the last step, though an earlier one failed"))
    assert running.failure is not None
    assert len(list(leftovers(tmp_path))) == 1


def test_an_interruption_keeps_what_was_in_hand_and_the_same_call_goes_on(tmp_path, monkeypatch):
    original, calls = kappa_fast.execution.run.resolve, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr("kappa_fast.execution.run.resolve", interrupted)
    with pytest.raises(kappa_fast.Interrupted) as stop:
        rank(WEIGHTS, cache=tmp_path, memory_budget=1)
    assert stop.value.resumable
    assert len(stop.value.partial) == 2
    monkeypatch.undo()
    ranking = rank(WEIGHTS, cache=tmp_path)
    assert list(ranking) == PLAIN
    assert ranking.metadata["cache"] == {"hits": 2, "computed": 3}


def test_a_failure_keeps_what_was_done_before_it(tmp_path, monkeypatch):
    original, calls = kappa_fast.execution.run.resolve, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return original(*arguments, **options)

    monkeypatch.setattr("kappa_fast.execution.run.resolve", failing)
    with pytest.raises(RuntimeError, match="broken"):
        rank(WEIGHTS, cache=tmp_path, memory_budget=1)
    monkeypatch.undo()
    assert rank(WEIGHTS, cache=tmp_path).metadata["cache"] == {"hits": 2, "computed": 3}


def heavy(path: Path) -> None:
    """Enough work for thirty kills, of several shapes and with a singular matrix."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(448, 448), (768, 384), (512, 512), (640, 320)]
    tensors = {f"layers.{i}.w": torch.randn(shapes[i % 4], generator=generator) for i in range(160)}
    tensors["layers.160.w"] = torch.ones(400, 300)
    save_file(tensors, path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--top", "0.3", "--certify", "selection"]], ids=["all", "top"])
def test_thirty_kills_change_nothing(options, tmp_path):
    path = tmp_path / "model.safetensors"
    heavy(path)
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONDONTWRITEBYTECODE": "1"}

    def start(cache: list[str], out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "kappa_fast", "rank", str(path), *options, *cache, "--json", str(out)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    undisturbed = start(["--no-cache"], tmp_path / "undisturbed.json")
    assert undisturbed.communicate(timeout=600)[1] == ""
    assert undisturbed.returncode == 0
    cache, rng = tmp_path / "cache", random.Random(1)
    kills, growth = 0, [0]
    while kills < 30:
        child = start(["--cache-dir", str(cache)], tmp_path / "out.json")
        known = set(journals(cache)) if cache.exists() else set()
        while child.poll() is None and not set(journals(cache)) - known:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.12))
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
        kills += 1
        growth.append(sum(path.read_bytes().count(b"\n") - 1 for path in journals(cache)))
    assert kills == 30, f"the work was done after {kills} kills"
    assert not (tmp_path / "out.json").exists()
    assert sum(growth) > 0
    last = start(["--cache-dir", str(cache)], tmp_path / "out.json")
    _, err = last.communicate(timeout=600)
    assert (last.returncode, err) == (0, "")
    expected = kappa_fast.Ranking.from_json(tmp_path / "undisturbed.json")
    found = kappa_fast.Ranking.from_json(tmp_path / "out.json")
    assert repr(list(found)) == repr(list(expected))
    assert found.skipped == expected.skipped
    assert 0 < found.metadata["cache"]["hits"] < len(expected)
    left = [path.name for path in journals(cache)]
    assert all(name.endswith(".new") for name in left)  # killed before the first line; these go after a minute
    assert not list(cache.rglob("*.tmp"))
