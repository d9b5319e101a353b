"""JSON from untrusted files: the size is limited, and only regular files are read (reading a pipe might never end)."""

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
    """Parse the JSON in a file.

    limit: the largest size of the file in bytes.  most_values: the largest number of values (numbers, strings, lists
    and objects); they are counted by commas and opening brackets.

    Raises:
        SourceError: the file exceeds a limit.  OSError: it cannot be read.  ValueError: it is not valid JSON.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is not a regular file")
        check_limit(path, "the number of bytes", found.st_size, limit)
        content = file.read(limit + 1)
    check_limit(path, "the number of bytes", len(content), limit)  # the file may have grown since fstat()
    return parse_json(content, path, most_values)


def parse_json(content: bytes, path: str | Path, most_values: int = MOST_VALUES) -> Any:
    """Parse JSON; ``path`` says in messages where the bytes come from.

    Raises:
        SourceError: there are more than ``most_values`` values.
        ValueError: ``content`` is not valid JSON, or is nested too deeply.
    """
    if len(content) > most_values:
        check_limit(path, "the number of values", sum(1 for _ in _SEPARATORS.finditer(content)), most_values)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
