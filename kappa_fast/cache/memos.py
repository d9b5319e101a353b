"""Memos: what is known of the matrices in one file of weights, so that the file itself need not be read again.

As long as a file is what it was (device, inode, size, times of change), so are its values. A file that had changed
within the two seconds before a run began is not trusted: a later change might get the same time, as in git's index
(Documentation/technical/racy-git). Programs that write through a shared mapping may change a file without its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._version import __version__
from ..sources.base import FileState, Stamp
from ..spectrum.resolution import NUMERICS
from . import files
from .fingerprints import checksum, is_fingerprint
from .records import Record, decode, encode

FORMAT = "kappa_fast source"
LIMIT = 1 << 30  # bytes
RACY_NS = 2_000_000_000

Known = tuple[str, Any]  # a fingerprint, and the encoded record


class Memo:
    """Everything that is remembered of one file of weights in one state; ``path`` is where that is written."""

    def __init__(self, path: Path, state: FileState, matrices: dict[str, Known] | None = None) -> None:
        self.path, self.state = path, state
        self._matrices = matrices if matrices is not None else {}
        self._decoded: dict[str, Record] = {}
        self.changed = False

    @classmethod
    def read(cls, path: Path, state: FileState) -> Memo:
        """What was written for this state of the file, or an empty memo.

        Raises:
            DamagedError: the document is damaged, or was not written by this class.
        """
        body = files.read(path, LIMIT)
        if body is None:
            return cls(path, state)
        if not isinstance(body, dict) or body.get("format") != FORMAT or not isinstance(body.get("matrices"), dict):
            raise files.DamagedError("another format")
        # Not only the numerics but also what reads weights may have been corrected between two versions.
        current = (body.get("numerics"), body.get("kappa_fast"), body.get("file"))
        valid = current == (NUMERICS, __version__, asdict(state))
        return cls(path, state, dict(body["matrices"]) if valid else None)

    def get(self, stamp: Stamp) -> tuple[str, Record] | None:
        """Fingerprint and record of a matrix.

        Raises:
            DamagedError: that is not what was written.
        """
        what = _key(stamp)
        known = self._matrices.get(what)
        if known is None:
            return None
        try:
            if what not in self._decoded:
                self._decoded[what] = decode(known[1])
            if not is_fingerprint(known[0]):
                raise ValueError("no fingerprint")
        except Exception as error:  # whatever stands there, with a good checksum
            del self._matrices[what]
            self.changed = True
            raise files.DamagedError(str(error)) from error
        return known[0], self._decoded[what]

    def put(self, stamp: Stamp, fingerprint: str, record: Record) -> None:
        """Remember a matrix."""
        what = _key(stamp)
        if what in self._matrices and self._decoded.get(what) is record and self._matrices[what][0] == fingerprint:
            return
        known = (fingerprint, encode(record))
        before = self._matrices.get(what)
        if not isinstance(before, (list, tuple)) or tuple(before) != known:
            self._matrices[what], self._decoded[what], self.changed = known, record, True

    def write(self, tag: str, *, durable: bool) -> None:
        """Write it, together with what another process has added meanwhile; OSError where that cannot be done."""
        try:
            others: Mapping[str, Any] = Memo.read(self.path, self.state)._matrices
        except files.DamagedError:
            others = {}
        body = {
            "format": FORMAT,
            "numerics": NUMERICS,
            "kappa_fast": __version__,
            "file": asdict(self.state),
            "matrices": {**others, **self._matrices},
        }
        files.write(self.path, body, tag, durable=durable)
        self.changed = False


def name_of(state: FileState) -> str:
    """The name of the document for this file."""
    return checksum(state.path.encode("utf-8", "surrogateescape")) + ".json"


def is_settled(stamp: Stamp, now_ns: int) -> bool:
    """Whether the files had not changed for long enough when the run began."""
    return all(max(state.mtime_ns, state.ctime_ns) < now_ns - RACY_NS for state in stamp.files)


def encode_stamp(stamp: Stamp) -> list[Any]:
    """Plain JSON."""
    return [[list(vars(state).values()) for state in stamp.files], stamp.what]


def decode_stamp(raw: Any) -> Stamp:
    """What ``encode_stamp`` wrote; ValueError, TypeError or IndexError where it is no such thing."""
    states = tuple(FileState(*state) for state in raw[0])
    numbers = [number for state in states for number in list(vars(state).values())[1:]]
    if not states or not all(isinstance(state.path, str) for state in states) or not isinstance(raw[1], str):
        raise ValueError("no stamp")
    if not all(isinstance(number, int) and abs(number) < 1 << 64 for number in numbers):
        raise ValueError("no state of a file")
    return Stamp(states, raw[1])


def _key(stamp: Stamp) -> str:
    others = [list(asdict(state).values()) for state in stamp.files[1:]]
    return f"{stamp.what} {others}" if others else stamp.what
