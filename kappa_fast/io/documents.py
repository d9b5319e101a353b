"""JSON from files of strangers: of a limited size, and from regular files only, since a pipe would never end."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from .limits import MOST_VALUES, check_limit

_SEPARATORS = re.compile(rb"[\[{,]")


def read_document(path: Path, limit: int, most_values: int = MOST_VALUES) -> Any:
    """What the JSON in a file says.

    limit: bytes.  most_values: numbers, texts, lists and objects, at most one more than there are commas and brackets.

    Raises:
        SourceError: it is larger than that.  OSError: it cannot be read.  ValueError: it is no JSON.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no regular file")
        check_limit(path, "the number of bytes", found.st_size, limit)
        content = file.read(limit + 1)
    check_limit(path, "the number of bytes", len(content), limit)  # it may have grown
    return parsed(content, path, most_values)


def parsed(content: bytes, path: str | Path, most_values: int = MOST_VALUES) -> Any:
    """What JSON says that came from there.

    Raises:
        SourceError: it has more values than any real file.  ValueError: it is no JSON, or nested too deeply.
    """
    if len(content) > most_values:
        check_limit(path, "the number of values", sum(1 for _ in _SEPARATORS.finditer(content)), most_values)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
