"""Whatever happens to the cache, a ranking comes out, it is right, and one warning says what was wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kappa_fast
import kappa_fast.execution.run
from kappa_fast.cache import files, journal, memos
from kappa_fast.cache.files import DamagedError, read, seal, unseal
from kappa_fast.pipeline import rank

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX has it")


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": torch.randn(40 + i, 30, generator=generator) for i in range(3)}


WEIGHTS = weights()
PLAIN = list(rank(WEIGHTS))


def results(cache: Path) -> list[Path]:
    return sorted((cache / "v1" / "results").rglob("*.json"))


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache that knows the weights."""
    rank(WEIGHTS, cache=tmp_path / "cache")
    assert len(results(tmp_path / "cache")) == 3
    return tmp_path / "cache"


@pytest.fixture
def known(cache, tmp_path, monkeypatch) -> tuple[Path, Path, Path]:
    """A checkpoint whose file is known: checkpoint, cache, memo."""
    monkeypatch.setattr(memos, "RACY_NS", -(10**12))
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    rank(tmp_path / "model.safetensors", cache=cache)
    (memo,) = (cache / "v1" / "sources").iterdir()
    return tmp_path / "model.safetensors", cache, memo


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit_of_a_value(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(b'"kappa": ') + 10] ^= 1
    file.write_bytes(data)


def flip_a_bit_of_the_checksum(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)


def put_other_json(file: Path) -> None:
    file.write_text(json.dumps({"kappa": 3.0}))


def put_a_sealed_stranger(file: Path) -> None:
    file.write_bytes(seal({"format": "something else"}))


def put_a_record_that_cannot_be(file: Path) -> None:
    body = unseal(file.read_bytes())
    body["plain"]["lower"] = 1e9
    file.write_bytes(seal(body))


def put_nested_json(file: Path) -> None:
    text = b"[" * 30_000
    file.write_bytes(b'{"checksum": "' + files.checksum(text).encode() + b'", "body": ' + text + b"}\n")


def put_a_huge_file(file: Path) -> None:
    with open(file, "r+b") as handle:
        handle.truncate(1 << 32)


def put_a_folder(file: Path) -> None:
    file.unlink()
    (file / "inside").mkdir(parents=True)


def put_a_link(file: Path) -> None:
    kept = file.with_name("elsewhere")
    file.rename(kept)
    file.symlink_to(kept)


def put_a_link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def put_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


PORTABLE = [truncate, empty, flip_a_bit_of_a_value, flip_a_bit_of_the_checksum, put_other_json, put_a_sealed_stranger]
PORTABLE += [put_a_record_that_cannot_be, put_nested_json, put_a_huge_file, put_a_folder]
DAMAGES = PORTABLE if sys.platform == "win32" else [*PORTABLE, put_a_link, put_a_link_to_itself, put_a_pipe]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_result_is_ignored_with_one_warning_and_written_anew(damage, cache):
    victims = results(cache)[:2]
    for file in victims:
        damage(file)
    message = f"damaged or foreign files in the cache: 2, {re.escape(str(victims[0]))} among them"
    with pytest.warns(UserWarning, match=message) as said:
        ranking = rank(WEIGHTS, cache=cache)
    assert len(said) == 1
    assert list(ranking) == PLAIN
    assert ranking.metadata["cache"] == {"hits": 1, "computed": 2}
    assert rank(WEIGHTS, cache=cache).metadata["cache"] == {"hits": 3, "computed": 0}  # and no warning
    assert all(file.is_file() and not file.is_symlink() for file in victims)


def test_the_result_of_other_weights_is_not_taken_for_that_of_these(cache):
    first, second, _ = results(cache)
    shutil.copy(second, first)
    with pytest.warns(UserWarning, match=r"cache: 1, .* \(another format, or the result of other weights\)") as said:
        assert list(rank(WEIGHTS, cache=cache)) == PLAIN
    assert len(said) == 1


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d is not put_a_record_that_cannot_be])
def test_a_damaged_memo_costs_reading_the_weights_once(damage, known):
    checkpoint, cache, memo = known
    damage(memo)
    with pytest.warns(UserWarning, match=f"files in the cache: 1, {re.escape(str(memo))} among them"):
        ranking = rank(checkpoint, cache=cache)
    assert list(ranking) == PLAIN
    assert ranking.metadata["cache"] == {"hits": 3, "computed": 0}
    assert rank(checkpoint, cache=cache).metadata["cache"] == {"hits": 3, "computed": 0}
    assert memo.is_file()


@pytest.mark.parametrize("value", [["../../x", {}], ["float32-1x1-" + "0" * 32, {"plain": 3}], 7, [], [None, None]])
def test_what_cannot_be_in_a_memo_is_ignored(value, known):
    checkpoint, cache, memo = known
    body = unseal(memo.read_bytes())
    name = next(iter(body["matrices"]))
    body["matrices"][name] = value
    memo.write_bytes(seal(body))
    with pytest.warns(UserWarning, match=re.escape(str(memo))):
        assert list(rank(checkpoint, cache=cache)) == PLAIN
    assert list(rank(checkpoint, cache=cache)) == PLAIN


def test_a_link_is_replaced_and_what_it_points_at_is_not_touched(cache, tmp_path):
    file = results(cache)[0]
    target = tmp_path / "precious"
    target.write_text("precious")
    file.unlink()
    file.symlink_to(target)
    with pytest.warns(UserWarning, match="files in the cache: 1, "):
        rank(WEIGHTS, cache=cache)
    assert target.read_text() == "precious"
    assert not file.is_symlink()


def test_a_folder_in_the_place_of_a_result_is_moved_aside_with_what_is_in_it(cache):
    file = results(cache)[0]
    put_a_folder(file)
    (file / "inside" / "precious").write_text("precious")
    with pytest.warns(UserWarning, match="files in the cache: 1, "):
        rank(WEIGHTS, cache=cache)
    (moved,) = file.parent.glob("*.moved")
    assert (moved / "inside" / "precious").read_text() == "precious"


FAILURES = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EROFS, "Read-only file system"),
    PermissionError(errno.EACCES, "Permission denied"),
]
PLACES: list[tuple[object, str]] = [(os, "replace"), (os, "write"), (os, "rename"), (os, "mkdir"), (os, "fsync")]


def failing(failure: OSError, *, after: int = 0) -> Callable[..., object]:
    calls = []

    def fail(*_: object, **__: object) -> object:
        calls.append(1)
        if len(calls) > after:
            raise failure
        return None

    return fail


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f.strerror)
@pytest.mark.parametrize(("module", "name"), PLACES, ids=lambda p: p if isinstance(p, str) else "")
def test_where_nothing_can_be_written_the_ranking_goes_on_with_a_warning(failure, module, name, tmp_path, monkeypatch):
    monkeypatch.setattr(memos, "RACY_NS", -(10**12))  # so that a memo is written, with fsync
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    monkeypatch.setattr(module, name, failing(failure))
    message = rf"results cannot be kept in the cache {re.escape(str(tmp_path / 'cache'))} \({failure.strerror}\)"
    with pytest.warns(UserWarning, match=message) as said:
        ranking = rank(tmp_path / "model.safetensors", cache=tmp_path / "cache")
    monkeypatch.undo()
    assert len(said) == 1
    assert list(ranking) == PLAIN
    assert list(rank(tmp_path / "model.safetensors", cache=tmp_path / "cache")) == PLAIN


def test_a_disk_that_fills_up_in_the_middle_loses_the_rest_and_nothing_else(tmp_path, monkeypatch):
    write, calls = os.write, []

    def full_after_two(handle, data):
        calls.append(1)
        return write(handle, data if len(calls) < 3 else data[:10])  # as a full disk does it

    monkeypatch.setattr(journal.os, "write", full_after_two)
    with pytest.warns(UserWarning, match="No space left on device") as said:
        assert list(rank(WEIGHTS, cache=tmp_path)) == PLAIN
    assert len(said) == 1
    monkeypatch.undo()
    again = rank(WEIGHTS, cache=tmp_path)
    assert list(again) == PLAIN
    assert again.metadata["cache"] == {"hits": 1, "computed": 2}


def test_a_cache_that_can_be_read_but_not_written_still_serves(cache, monkeypatch):
    for module, name in PLACES:
        monkeypatch.setattr(module, name, failing(OSError(errno.EROFS, "Read-only file system")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranking = rank(WEIGHTS, cache=cache)  # everything is known: nothing to write, nothing to warn of
    assert ranking.metadata["cache"] == {"hits": 3, "computed": 0}


def test_no_drafts_are_left_behind_by_a_failed_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path / "a" / "b.json", {"x": 1}, "tag")
    assert list((tmp_path / "a").iterdir()) == []


def limited(*arguments: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The command line in a process that cannot write more than a few hundred bytes into any file."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); "
    code += "from kappa_fast.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment, "PYTHONDONTWRITEBYTECODE": "1"},
    )


@posix
def test_a_disk_without_room_is_one_line_for_the_cache_and_keeps_the_earlier_json(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    earlier = json.dumps({"kept": 1})
    (out / "ranking.json").write_text(earlier)
    place = {"KAPPA_FAST_CACHE": str(tmp_path / "cache")}
    done = limited("rank", tmp_path / "model.safetensors", "--json", out / "ranking.json", environment=place)
    assert done.returncode == 1, done
    first, second = done.stderr.splitlines()
    assert re.fullmatch(r"warning: results cannot be kept in the cache .*cache \(.+\): the ranking goes on .*", first)
    assert re.fullmatch(r"error: cannot write .*ranking\.json: File too large; choose a file .*", second)
    assert [path.name for path in out.iterdir()] == ["ranking.json"]
    assert (out / "ranking.json").read_text() == earlier
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@posix
def test_a_full_cache_does_not_keep_the_table_from_being_printed(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    done = limited("rank", tmp_path / "model.safetensors", environment={"KAPPA_FAST_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0
    assert "3 of 3 intervals within rtol" in done.stdout


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_the_right_to_write_is_one_warning(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="Permission denied"):
        assert list(rank(WEIGHTS, cache=tmp_path / "cache")) == PLAIN


@pytest.mark.parametrize("options", [{}, {"top": 1}, {"top": 1, "certify": "selection"}])
def test_warnings_of_the_cache_point_at_who_called_rank(options, cache, tmp_path):
    for path in results(cache):
        path.write_text("damaged")
    (tmp_path / "v1").write_text("a file")
    for directory, message in ((cache, "damaged or foreign files"), (tmp_path, "results cannot be kept")):
        with pytest.warns(UserWarning, match=message) as caught:
            rank(WEIGHTS, cache=directory, **options)
        assert [warning.filename for warning in caught] == [__file__]


def test_a_file_where_a_folder_of_the_cache_belongs_is_one_warning(tmp_path):
    (tmp_path / "v1").write_text("a file")
    with pytest.warns(UserWarning, match="results cannot be kept"):
        assert list(rank(WEIGHTS, cache=tmp_path)) == PLAIN


@pytest.mark.parametrize("data", [b"", b"{}", b"null", seal(1)[:-1], seal(1) + b" ", seal([1]).replace(b"[", b"{")])
def test_what_is_no_sealed_document_is_damaged(data, tmp_path):
    with pytest.raises(DamagedError):
        unseal(data)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DamagedError):
        read(tmp_path / "x", 100)


def test_every_flipped_bit_of_a_document_shows():
    data = seal({"kappa": 3.5, "status": "ok"})
    for place in range(len(data)):
        for bit in range(8):
            other = bytearray(data)
            other[place] ^= 1 << bit
            with pytest.raises(DamagedError):
                unseal(bytes(other))


def test_a_document_is_one_line_of_json_that_others_can_read():
    document = json.loads(seal({"a": [1, "x\ny"]}))
    assert document["body"] == {"a": [1, "x\ny"]}
    assert seal({"a": "x\ny"}).count(b"\n") == 1


def test_a_run_that_is_interrupted_where_nothing_can_be_kept_does_not_promise_to_go_on(tmp_path, monkeypatch):
    resolve, calls = kappa_fast.execution.run.resolve, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return resolve(*arguments, **options)

    monkeypatch.setattr(kappa_fast.execution.run, "resolve", interrupted)
    monkeypatch.setattr(os, "write", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.warns(UserWarning, match="cannot be kept"), pytest.raises(kappa_fast.Interrupted) as stop:
        rank(WEIGHTS, cache=tmp_path, memory_budget=1)
    assert not stop.value.resumable


def test_a_cache_that_is_deleted_during_a_run_does_not_disturb_it(cache, monkeypatch):
    resolve = kappa_fast.execution.run.resolve

    def deleting(*arguments, **options):
        shutil.rmtree(cache, ignore_errors=True)
        return resolve(*arguments, **options)

    monkeypatch.setattr(kappa_fast.execution.run, "resolve", deleting)
    other = {name: weight + 1 for name, weight in WEIGHTS.items()}
    found = list(rank(other, cache=cache))
    monkeypatch.undo()
    assert found == list(rank(other))
    assert list(rank(other, cache=cache)) == found
