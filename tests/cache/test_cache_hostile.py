"""A cache that others can write to, or that is full of well-sealed nonsense, ends no run and is obeyed in nothing."""

import os
import stat
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import kappa_fast
from kappa_fast import cache as module
from kappa_fast.cache import _header, files, memos
from kappa_fast.machine.torch_state import is_exact

WEIGHTS = {f"l.{i}.w": torch.randn(20 + i, 18, generator=torch.Generator().manual_seed(i)) for i in range(3)}
JUNK = [None, True, 0, -1, 10**400, 1.5, "x", "nan", [], [1], {}, {"a": 1}, [[]], [[["p", 1, 2, 3, 4, 5]], "w"]]


def rank(source, cache):
    return kappa_fast.rank(source, cache=cache, progress=False)


@pytest.fixture(scope="module")
def plain():
    return list(kappa_fast.rank(WEIGHTS, progress=False))


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A file of weights, and a cache that knows it."""
    monkeypatch.setattr(memos, "RACY_NS", -(10**12))
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    rank(tmp_path / "model.safetensors", tmp_path / "cache")
    return tmp_path / "model.safetensors", tmp_path / "cache"


def places(value, path=()):
    """The place of every value in plain JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(value, path, item):
    """A copy of plain JSON with something else at that place."""
    if not path:
        return item
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], item)
    return copy


def quietly(source, cache):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(rank(source, cache))


@pytest.mark.parametrize("kind", ["results", "sources"])
def test_no_type_in_a_sealed_document_ends_a_run_or_changes_what_cannot_be(kind, known, plain):
    source, cache = known
    paths = sorted((cache / "v1" / kind).rglob("*.json"))[:1]
    before = {path: path.read_bytes() for path in (cache / "v1").rglob("*.json")}
    for path in paths:
        body = files.unseal(path.read_bytes())
        for number, place in enumerate(places(body)):
            for other in sorted((cache / "v1").rglob("*.json")):
                other.write_bytes(before[other])
            path.write_bytes(files.seal(put(body, place, JUNK[number % len(JUNK)])))
            found = quietly(WEIGHTS if kind == "results" else source, cache)
            assert [e.key for e in found] == [e.key for e in plain], place
            assert all(e.lower <= e.kappa <= e.upper for e in found), place


@settings(max_examples=60)
@given(st.recursive(st.sampled_from(JUNK), lambda inner: st.lists(inner, max_size=4), max_leaves=6))
def test_no_line_of_a_journal_ends_a_run(tmp_path_factory, line):
    cache = tmp_path_factory.mktemp("cache")
    (cache / "v1" / "journals").mkdir(parents=True, mode=0o700)
    text = "float32-20x18-" + "a" * 32
    answer = dict(rtol=0.01, status="ok", method="m", certified=False)
    answer |= dict.fromkeys(("kappa", "lower", "upper", "sigma_max", "sigma_min", "sensitivity"), 2.0)
    good = {"plain": answer}
    lines = [
        line,
        [line, good, None],
        [text, line, None],
        [text, {"plain": line}, None],
        [text, {"plain": {**answer, "kappa": line}}, None],
        [text, good, line],
        [text, good, [[line], "w"]],
        [text, good, [[[line] * 6], line]],
        [text, good, [[["/x", 1, 2, 3, 4, 5]], line]],
    ]
    sealed = [files.seal(each) for each in lines]
    (cache / "v1" / "journals" / "00.jsonl").write_bytes(files.seal(_header()) + b"".join(sealed))
    assert len(quietly({"a": WEIGHTS["l.0.w"]}, cache)) == 1


def test_a_planted_draft_is_neither_followed_nor_written_to(known, tmp_path):
    _, cache = known
    (result,) = sorted((cache / "v1" / "results").rglob("*.json"))[:1]
    body = files.unseal(result.read_bytes())
    victim = tmp_path / "victim"
    victim.write_text("precious")
    result.unlink()
    for link in (os.symlink, os.link):
        draft = files.temporary(result, "00")
        draft.unlink(missing_ok=True)
        link(victim, draft)
        files.write(result, body, "00")
        assert victim.read_text() == "precious"
        assert files.unseal(result.read_bytes()) == body
        assert not draft.exists()


def test_a_folder_of_the_cache_that_is_a_link_is_not_written_through(tmp_path, plain):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache" / "v1").mkdir(parents=True)
    for name in ("results", "journals", "sources"):
        (tmp_path / "cache" / "v1" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="results cannot be kept"):
        assert list(rank(WEIGHTS, tmp_path / "cache")) == plain
    assert not list((tmp_path / "elsewhere").iterdir())


posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights of POSIX")


@posix
def test_the_folder_is_the_users_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        rank(WEIGHTS, tmp_path / "cache")
    finally:
        os.umask(before)
    folders = [p for p in (tmp_path / "cache").rglob("*") if p.is_dir()]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in [tmp_path / "cache", *folders]}
    assert modes == {0o700}


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_cache_that_others_can_write_to_is_not_used_and_the_warning_says_what_to_do(mode, known, plain):
    _, cache = known
    (cache / "v1").chmod(mode)
    with pytest.warns(UserWarning, match=r"others can write to .*v1: run chmod go-w"):
        ranking = rank(WEIGHTS, cache)
    assert list(ranking) == plain
    assert ranking.metadata["cache"] == {"hits": 0, "computed": 3}
    (cache / "v1").chmod(0o755)
    assert rank(WEIGHTS, cache).metadata["cache"]["hits"] == 3


@posix
def test_a_cache_of_another_user_is_not_used(known, plain, monkeypatch):
    _, cache = known
    monkeypatch.setattr(os, "geteuid", lambda: (cache / "v1").stat().st_uid + 1)
    if (cache / "v1").stat().st_uid != 0:  # what root has put there for all is used
        with pytest.warns(UserWarning, match="belongs to another user"):
            assert list(rank(WEIGHTS, cache)) == plain
    else:
        assert files.refused(cache / "v1") is None


@pytest.mark.parametrize("failure", [PermissionError(13, "Permission denied"), OSError(36, "File name too long")])
def test_a_cache_that_cannot_even_be_looked_at_is_one_warning(failure, tmp_path, plain, monkeypatch):
    def refuse(*_):
        raise failure

    monkeypatch.setattr(files.os, "lstat", refuse)
    with pytest.warns(UserWarning, match=failure.strerror) as said:
        ranking = kappa_fast.rank(WEIGHTS, cache=tmp_path / "cache", progress=False)
    monkeypatch.undo()
    assert len(said) == 1
    assert list(ranking) == plain


def test_a_path_that_is_too_long_is_a_warning_and_one_that_none_can_be_an_option_error(tmp_path, plain):
    with pytest.warns(UserWarning, match="results cannot be kept"):
        assert list(rank(WEIGHTS, tmp_path / ("y" * 300))) == plain
    with pytest.raises(kappa_fast.OptionError, match="no path has such a character"):
        rank(WEIGHTS, str(tmp_path) + "\0x")


def test_what_was_computed_under_a_mode_that_came_in_between_is_not_kept(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(module, "is_exact", lambda: False)
    assert list(rank(WEIGHTS, tmp_path / "cache")) == plain
    monkeypatch.undo()
    assert rank(WEIGHTS, tmp_path / "cache").metadata["cache"] == {"hits": 0, "computed": 3}


def test_modes_that_make_arithmetic_coarse_are_seen():
    product = torch.backends.mkldnn.matmul
    before = product.fp32_precision
    assert is_exact()
    try:
        product.fp32_precision = "bf16"
        assert not is_exact()
    finally:
        product.fp32_precision = before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_exact()
    found = []

    def flushing():
        torch.set_flush_denormal(True)
        found.append(is_exact())

    thread = threading.Thread(target=flushing)
    thread.start()
    thread.join()
    assert found == [False]
    assert is_exact()
