"""The cache of results by the content of weights: a run looks up here what is known, and stores what it computed.

docs/caching.md has the layout, the keys and what survives a failure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from .._version import __version__
from ..errors import OptionError
from ..machine.torch_state import is_exact
from ..sources.base import FileState, Matrix
from ..spectrum.resolution import NUMERICS
from ..texts import warn
from . import files
from .fingerprints import fingerprint, is_fingerprint
from .journal import Journal, leftovers
from .memos import Memo, decode_stamp, encode_stamp, is_settled, name_of
from .records import LowerBoundQuery, Query, Record, ResolutionQuery, decode, encode

__all__ = [
    "CacheOption",
    "LowerBoundQuery",
    "Query",
    "ResolutionQuery",
    "ResultCache",
    "cache_directory",
    "opened_cache",
]

log = logging.getLogger("kappa_fast")

CacheOption = bool | str | os.PathLike[str] | None
R = TypeVar("R")

ENVIRONMENT = "KAPPA_FAST_CACHE"
LAYOUT = "v1"
RESULT_FORMAT, JOURNAL_FORMAT = "kappa_fast result", "kappa_fast journal"
RESULT_LIMIT = 1 << 16  # bytes


def cache_directory(cache: CacheOption) -> Path | None:
    """Where the option ``cache`` of rank() says that results are; None for nowhere.

    Raises:
        OptionError: it is neither a bool, None nor a path, or no directory can be there.
    """
    if cache is None or cache is False:
        return None
    where = os.environ.get(ENVIRONMENT) if cache is True else cache
    if cache is True and not where:
        from platformdirs import user_cache_path

        where = user_cache_path("kappa_fast", appauthor=False)
        if not where.is_absolute():
            raise OptionError(f"cache=True: this user has no home for caches; set {ENVIRONMENT}, or give a path")
    if not isinstance(where, (str, os.PathLike)) or not os.fspath(where):
        raise OptionError(f"cache={cache!r}: give True, False, None or the path of a directory")
    path = Path(os.path.abspath(os.fsdecode(where)))
    if "\0" in str(path):
        raise OptionError(f"cache={cache!r}: no path has such a character; give the path of a directory")
    # What cannot even be looked at is told with a warning when it is used.
    if os.path.exists(path) and not os.path.isdir(path):
        raise OptionError(f"cache={cache!r}: {path} is no directory; give the path of one, it is made if need be")
    return path


class ResultCache:
    """The cache as one run of rank() sees it. Many threads may use ``lookup_weights`` and ``store``, one the rest."""

    def __init__(self, directory: Path, matrices: Sequence[Matrix]) -> None:
        self.directory = directory
        self._home = directory / LAYOUT
        self._lock = threading.RLock()
        self._journal: Journal | None = None
        self._records: dict[str, Record] = {}  # by fingerprint: what this run has read or found
        self._looked_up: set[str] = set()  # fingerprints of which the result, or that there is none, has been read
        self._fingerprints: dict[Matrix, str] = {}
        self._memos: dict[FileState, Memo] = {}
        self._hits: set[Matrix] = set()
        self._damaged: dict[Path, str] = {}
        self._failure: Exception | None = None
        self._usable = True  # whether what is there is taken for the user's own
        self._warned = False
        try:
            if (reason := files.refused(self._home)) is not None:
                self._failure, self._usable = OSError(reason), False
        except OSError as error:
            self._failure, self._usable = error, False
        now = time.time_ns()
        self._stamps = {m: m.stamp for m in matrices if m.stamp is not None and is_settled(m.stamp, now)}

    @property
    def keeps(self) -> bool:
        """Whether what is done so far will be found by the next run."""
        return self._failed() is None

    def metadata(self, matrices: Collection[Matrix]) -> dict[str, int]:
        """How many results of these matrices came from the cache, and how many were computed."""
        hits = sum(matrix in self._hits for matrix in matrices)
        return {"hits": hits, "computed": len(matrices) - hits}

    def lookup(self, query: Query[R], matrix: Matrix) -> R | None:
        """The result for a matrix if it is known without reading the weights, else None."""
        text = self._fingerprints.get(matrix)
        if text is None:
            known = self._by_stamp(matrix)
            if known is None:
                return None
            text, record = known
            with self._lock:
                self._fingerprints[matrix] = text
                self._records.setdefault(text, record)
        result = query.answer(self._records[text]) if text in self._records else None
        if result is None:  # another run may have found out more than the memo knows
            result = self._by_content(query, text)
        if result is not None:
            self._hits.add(matrix)
        return result

    def lookup_weights(
        self, query: Query[R], matrices: Sequence[Matrix], weights: Sequence[torch.Tensor]
    ) -> list[R | None]:
        """The results that are known of loaded weights, by their content; None for the others."""
        texts = [fingerprint(weight) for weight in weights]
        results = [self._by_content(query, text) for text in texts]
        with self._lock:
            self._fingerprints.update(zip(matrices, texts, strict=True))
            self._hits.update(m for m, result in zip(matrices, results, strict=True) if result is not None)
        return results

    def store(self, query: Query[R], matrix: Matrix, result: R) -> R:
        """Keep a result of weights that were looked up. What is returned is what the next run will get.

        That takes earlier results of the same weights into account.
        """
        with self._lock:
            self._hits.discard(matrix)
            if not is_exact():  # another thread has changed a mode meanwhile: what came of it is not for other runs
                return result
            text, new = self._fingerprints[matrix], query.record_of(result)
            old = self._records.get(text)
            record = self._records[text] = new if old is None else old.merged(new)
            journal = self._begun_journal()
            if journal is not None:
                stamp = self._stamps.get(matrix)
                journal.append([text, encode(record), None if stamp is None else encode_stamp(stamp)])
            merged = query.answer(record)
            return result if merged is None else merged

    def exported(self, matrix: Matrix) -> list[Any] | None:
        """What this run knows of a matrix, as plain JSON for another rank; None if nothing."""
        with self._lock:
            text = self._fingerprints.get(matrix)
            if text is None or text not in self._records:
                return None
            return [text, encode(self._records[text]), matrix in self._hits]

    def take_over(self, matrix: Matrix, exported: Sequence[Any], *, keep: bool) -> None:
        """What another rank has ``exported``, so that this one decides as if it had computed that itself.

        keep: whether this cache is to remember it of the file; what was computed lies in that rank's cache already.
        """
        text, raw, hit = exported
        with self._lock:
            known, new = self._records.get(text), decode(raw)
            self._fingerprints[matrix] = text
            self._records[text] = new if known is None else known.merged(new)
            (self._hits.add if hit else self._hits.discard)(matrix)
            if not keep:
                self._stamps.pop(matrix, None)

    def leave_memos(self) -> None:
        """Another rank remembers all of it: of two that write a memo at once, the later one might win with less."""
        self._stamps.clear()

    def _by_stamp(self, matrix: Matrix) -> tuple[str, Record] | None:
        stamp = self._stamps.get(matrix)
        if stamp is None:
            return None
        memo, known = self._memo(stamp.files[0]), None
        with self._noting_damage(memo.path):
            known = memo.get(stamp)
        return known

    def _by_content(self, query: Query[R], text: str) -> R | None:
        """The answer from what this run, the memo and the result itself know, the latter read once."""
        with self._lock:
            new = text not in self._looked_up
        if new:
            path = self._result_path(text)
            with self._noting_damage(path):
                stored = _read_result(path, text) if self._usable else None
                with self._lock:
                    if stored is not None and text not in self._looked_up:
                        known = self._records.get(text)
                        self._records[text] = stored if known is None else stored.merged(known)
        with self._lock:
            self._looked_up.add(text)
            record = self._records.get(text)
        return None if record is None else query.answer(record)

    def _memo(self, state: FileState) -> Memo:
        memo = self._memos.get(state)
        if memo is None:
            path = self._home / "sources" / name_of(state)
            memo = Memo(path, state)
            if self._usable:
                with self._noting_damage(path):
                    memo = Memo.read(path, state)
            self._memos[state] = memo
        return memo

    @contextlib.contextmanager
    def _noting_damage(self, path: Path) -> Iterator[None]:
        try:
            yield
        except files.DamagedError as error:
            with self._lock:
                self._damaged[path] = str(error)

    def replay(self) -> None:
        """Settle what runs have left that were killed."""
        for tag, lines, remove in leftovers(self._home / "journals") if self._usable else ():
            whole = [line for line in lines[1:] if _is_result(line)] if lines and lines[0] == _header() else []
            log.info("%d results of an interrupted run are taken over", len(whole))
            try:
                # With the tag of that run, so that it takes over what was half written; and on the disk before the
                # journal goes, which a loss of power would spare.
                self._settle(whole, tag)
                self._settle_stamps(whole, tag)
                remove()
            except OSError as error:
                self._failure = error
                for text, raw, _ in whole:
                    self._records[text] = decode(raw)

    def _begun_journal(self) -> Journal | None:
        """The journal, from the first result on; None where none can be kept."""
        if self._journal is None and self._failure is None:
            try:
                self._journal = Journal(self._home / "journals", _header(), self._settle)
            except (OSError, RuntimeError) as error:  # the latter where the system starts no thread
                self._failure = error
        return self._journal

    def _settle(self, lines: Sequence[Any], tag: str | None = None) -> None:
        """Lines of a journal become results; a later line of the same content says more than an earlier one.

        tag: of the run that wrote the lines, if it is not this one: then what no memo will hold goes to the disk.
        """
        this_run = self._journal.tag if self._journal else ""
        for text, raw, stamp in {line[0]: line for line in lines}.values():
            path = self._result_path(text)
            record = decode(raw)
            with contextlib.suppress(files.DamagedError):
                others = _read_result(path, text)
                record = record if others is None else others.merged(record)
            body = {"format": RESULT_FORMAT, "numerics": NUMERICS, "kappa_fast": __version__, "fingerprint": text}
            files.write(path, {**body, **encode(record)}, tag or this_run, durable=tag is not None and stamp is None)

    def _settle_stamps(self, lines: Sequence[Any], tag: str) -> None:
        for text, raw, stamp in lines:
            if stamp is not None:
                known = decode_stamp(stamp)
                self._memo(known.files[0]).put(known, text, decode(raw))
        self._write_memos(tag, durable=True)

    def _write_memos(self, tag: str, *, durable: bool) -> None:
        for memo in self._memos.values():
            if memo.changed:
                memo.write(tag, durable=durable)

    def close(self) -> None:
        """Bring everything to where it belongs. Never raises because of the cache."""
        for matrix, stamp in self._stamps.items():
            text = self._fingerprints.get(matrix)
            if text in self._records:
                self._memo(stamp.files[0]).put(stamp, text, self._records[text])
        if self._journal is not None:
            self._journal.close(partial(self._write_memos, self._journal.tag, durable=True))
        elif self._failure is None:
            try:
                self._write_memos(str(os.getpid()), durable=False)  # all of it can be found out again
            except (OSError, ValueError) as error:
                self._failure = error

    def warn(self) -> None:
        """One warning for what is damaged, and one if nothing can be kept."""
        if self._damaged:
            path, reason = min(self._damaged.items())
            warn(
                f"damaged or foreign files in the cache: {len(self._damaged)}, {path} among them ({reason}); what they "
                "should hold was computed and written anew",
            )
        if (failure := self.new_failure()) is not None:
            warn(failure)

    def new_failure(self) -> str | None:
        """Why nothing can be kept, in words for a warning; None where it can, or where this was asked before."""
        failure = self._failed()
        if failure is None or self._warned:
            return None
        self._warned = True
        reason = getattr(failure, "strerror", None) or failure
        return (
            f"results cannot be kept in the cache {self.directory} ({reason}): the ranking "
            "goes on without; make room, make it writable, or give another directory"
        )

    def _failed(self) -> Exception | None:
        return self._failure or (self._journal.failure if self._journal is not None else None)

    def _result_path(self, text: str) -> Path:
        return self._home / "results" / text[-32:-30] / f"{text}.json"


@contextlib.contextmanager
def opened_cache(directory: Path | None, matrices: Sequence[Matrix]) -> Iterator[ResultCache | None]:
    """The cache for the body of a run, or None; closed afterwards, and then it warns of what was wrong with it."""
    if directory is None:
        yield None
        return
    opened = ResultCache(directory, matrices)
    opened.replay()
    try:
        yield opened
    finally:
        opened.close()
    opened.warn()


def _header() -> dict[str, Any]:
    return {"format": JOURNAL_FORMAT, "numerics": NUMERICS, "kappa_fast": __version__}


def _read_result(path: Path, text: str) -> Record | None:
    body = files.read(path, RESULT_LIMIT)
    if body is None:
        return None
    if not isinstance(body, dict) or (body.get("format"), body.get("fingerprint")) != (RESULT_FORMAT, text):
        raise files.DamagedError("another format, or the result of other weights")
    if body.get("numerics") != NUMERICS:
        return None
    try:
        return decode(body)
    except Exception as error:  # whatever stands there, with a good checksum
        raise files.DamagedError(str(error)) from error


def _is_result(line: Any) -> bool:
    try:
        text, raw, stamp = line
        decode(raw)
        if stamp is not None:
            decode_stamp(stamp)
        return is_fingerprint(text)
    except Exception:  # whatever stands there, with a good checksum
        return False
