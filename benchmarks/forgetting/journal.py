"""The journal of a study: a line of JSON for everything that has been done, so that it can be killed and go on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Journal:
    """Lines are added one at a time and reach the disk before the next. A torn last line, of a kill, is cut off."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock: int | None = None

    def let_go(self) -> None:
        """For a forked process: a lock is held by all that have its file open, and is the parent's alone."""
        if self._lock is not None:
            os.close(self._lock)

    def records(self) -> dict[str, dict[str, Any]]:
        """The last record of each id, in the order in which they came."""
        return {record["id"]: record for record in self._lines()}

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.file.exists():
            return
        with self.file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{self.file}, line {number}: no JSON ({error}); mend or remove it") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time.

        Raises:
            BlockingIOError: another process is at it.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock = stream.fileno()
            self._cut_torn_line()
            yield
            self._lock = None

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record, for good."""
        line = json.dumps(record, separators=(",", ":"), allow_nan=True).encode() + b"\n"
        with self.file.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())

    def _cut_torn_line(self) -> None:
        content = self.file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.file, whole)
