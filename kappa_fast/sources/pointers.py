"""Files that stand for others: pointers of Git LFS, git-annex and Xet, and pages that were saved in place of a file."""

from __future__ import annotations

from pathlib import Path

_LONGEST = 2048  # bytes of a pointer; a file of weights may begin with anything

_OF_LFS = (
    "a pointer of Git LFS, not the file itself: run `git lfs install` and `git lfs pull` in the clone, or download the "
    "model with `hf download`"
)
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec", _OF_LFS),
    (b"version https://hawser.github.com/spec", _OF_LFS),
    (b"/annex/objects/", "a pointer of git-annex, not the file itself: run `git annex get`"),
    (b"# xet version", "a pointer of Git Xet, not the file itself: run `git xet pull`, or download the model anew"),
    (b"<!doctype html", "a page of a web site, not the file itself: log in if need be, and download it anew"),
    (b"<html", "a page of a web site, not the file itself: log in if need be, and download it anew"),
)


def what_stands_there(path: Path) -> str | None:
    """What a file is in place of the one that its name promises, and what to do; None if it is not one of these.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        begins = file.read(_LONGEST)
    begins = begins.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((what for start, what in _KINDS if begins.startswith(start)), None)
