"""Recognizes files that are not the weights they are named after: pointers of Git LFS and the like, web pages."""

from __future__ import annotations

from pathlib import Path

_LONGEST = 2048  # bytes that are read, enough for every pointer

_OF_LFS = (
    "a pointer of Git LFS, not the file itself: run `git lfs install` and `git lfs pull` in the clone, or download the "
    "model with `hf download`"
)
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec", _OF_LFS),
    (b"version https://hawser.github.com/spec", _OF_LFS),
    (b"/annex/objects/", "a pointer of git-annex, not the file itself: run `git annex get`"),
    (b"# xet version", "a pointer of Git Xet, not the file itself: run `git xet pull`, or download the model again"),
    (b"<!doctype html", "a web page, not the file itself: log in if necessary, and download the file again"),
    (b"<html", "a web page, not the file itself: log in if necessary, and download the file again"),
)


def pointer_kind(path: Path) -> str | None:
    """Return what a file is and what to do, if it is a pointer or a web page; else None.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        begins = file.read(_LONGEST)
    begins = begins.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((what for start, what in _KINDS if begins.startswith(start)), None)
