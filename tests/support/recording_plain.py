"""What a recording keeps of a result: plain JSON, without what a clock or a path decides, and words marked as words."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kappa_fast

WORDS = "$text"  # {"$text": "..."}: compared only where words count
# By the name of the field: what a clock decides, and what holds words wherever it stands.
CLOCK = {"seconds": "<seconds>", "waiting": "<seconds>"}
WORDY = {"reason", "caveats", "unfit"}
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
_TIME = re.compile(r"\d[\d,.]*(?:e[-+]\d+)? (?:s|ms|min|h)\b|\d+:\d\d:\d\d\b")
_PROCESS = re.compile(r"\bpid \d+")


@dataclass(frozen=True)
class Text:
    """Words meant for people."""

    words: str


@dataclass(frozen=True)
class Lines:
    """A text for another program, of which lines that begin with "#" are meant for people."""

    words: str


@dataclass(frozen=True)
class Place:
    """The folder that a recording works in, and the words that it leaves out for being there."""

    folder: Path

    def scrubbed(self, text: str) -> str:
        """``text`` without paths of this machine, addresses in memory and numbers of processes."""
        home = str(Path(kappa_fast.__file__).resolve().parents[1])
        for path, name in ((str(self.folder), "<folder>"), (home, "<package>"), (sys.executable, "<python>")):
            text = text.replace(path, name)
        return _PROCESS.sub("pid <pid>", _ADDRESS.sub("0x<address>", text))

    def untimed(self, text: str) -> str:
        """The same, for output that says how long something took."""
        return _TIME.sub("<seconds>", self.scrubbed(text))


def tensor_hash(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape, dtype and the SHA-256 of the values."""
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    found = hashlib.sha256(values).hexdigest()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": found}


def plain(value: Any, place: Place, name: str = "") -> Any:
    """``value`` as JSON; ``name`` is that of the field that it stands in."""
    if name in CLOCK and value is not None and not isinstance(value, str):
        return CLOCK[name]
    if isinstance(value, Text):
        return {WORDS: place.untimed(value.words)}
    if isinstance(value, Lines):
        return [{WORDS: line} if line.startswith("#") else line for line in place.scrubbed(value.words).splitlines()]
    if isinstance(value, str):
        value = place.scrubbed(str(value))
        return {WORDS: value} if name in WORDY else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (Path, torch.dtype, enum.Enum)):
        return place.scrubbed(str(value))
    if isinstance(value, torch.Tensor):
        return tensor_hash(value)
    if isinstance(value, slice):
        return ["slice", value.start, value.stop, value.step]
    if hasattr(value, "document"):
        return plain(without_volatile(value.document()), place)
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name), place, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping) and name == "evidence":  # names by words
        return [[{WORDS: place.scrubbed(str(words))}, plain(names, place)] for words, names in value.items()]
    if isinstance(value, Mapping) and name == "layouts":
        return {group: {WORDS: place.scrubbed(str(words))} for group, words in value.items()}
    if isinstance(value, Mapping):
        return {place.scrubbed(str(key)): plain(item, place, str(key)) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [plain(item, place, name) for item in sorted(value)]
    if isinstance(value, Iterable):
        return [plain(item, place, name) for item in value]
    raise TypeError(f"{name or 'a result'} is of type {type(value).__name__}, which a recording has no form for")


def without_volatile(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the files of rankings, selections, comparisons, series and plans hold, but for what was measured."""
    found = _of_plan(document) if document.get("format") == "kappa_fast plan" else dict(document)
    for holder in ("metadata", "settings"):
        if isinstance(found.get(holder), Mapping):
            found[holder] = _of_metadata(found[holder])
    return found


def _of_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(metadata)
    if isinstance(found.get("versions"), Mapping):
        found["versions"] = {**found["versions"], "kappa_fast": "<version>"}
    if found.get("partial"):  # how far threads are when the others stop is a matter of time
        found.pop("work", None)
    if "ranks" in found:  # which rank was free when is a matter of time
        found["ranks"] = len(found["ranks"])
    return found


def _of_plan(document: Mapping[str, Any]) -> dict[str, Any]:
    """A plan without what was measured."""
    found = {**document, "kappa_fast": "<version>"}
    if found["prediction"] is not None:
        found["prediction"] = "<seconds>"
    if found["reading"] is not None:
        found["reading"] = {"nbytes": found["reading"]["nbytes"]}
    if found["floor"] is not None:  # its seconds are no measurement
        found["floor"] = list(map(list, found["floor"].items()))
    return found


class _Heard(logging.Handler):
    """Warnings and errors in the log of kappa_fast."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[Text] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(Text(record.getMessage()))


def outcome(call: Callable[[], Any], place: Place) -> dict[str, Any]:
    """What a call returns or raises, and what it warns of: as plain JSON."""
    found: dict[str, Any] = {}
    heard, log = _Heard(), logging.getLogger("kappa_fast")
    log.addHandler(heard)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = call()
            except (Exception, KeyboardInterrupt) as error:
                found["error"] = _of_error(error, place)
            else:
                found["result"] = plain(result, place)
    finally:
        log.removeHandler(heard)
    if own := [warning for warning in caught if _is_ours(warning)]:
        found["warnings"] = [_of_warning(warning, place) for warning in own]
    if heard.said:
        found["log"] = plain(heard.said, place)
    return found


def _of_error(error: BaseException, place: Place) -> dict[str, Any]:
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind is not object]
    found: dict[str, Any] = {"type": kinds[0], "bases": kinds[1:], "text": {WORDS: place.untimed(str(error))}}
    if isinstance(error, kappa_fast.Interrupted):
        found |= {"resumable": error.resumable, "partial": plain(error.partial, place)}
    return found


def _is_ours(warning: warnings.WarningMessage) -> bool:
    """Whether kappa_fast has warned: of what others do, only their own kinds and files tell."""
    here = Path(__file__).parent
    package = Path(kappa_fast.__file__).parent
    where = Path(warning.filename)
    return warning.category is UserWarning and (here in where.parents or package in where.parents)


def _of_warning(warning: warnings.WarningMessage, place: Place) -> dict[str, Any]:
    """With where it points: to the line that called, or elsewhere."""
    name = os.path.basename(warning.filename)
    points = "to the caller" if name.startswith("recording") else "elsewhere"
    return {"kind": warning.category.__name__, "points": points, "text": {WORDS: place.untimed(str(warning.message))}}
