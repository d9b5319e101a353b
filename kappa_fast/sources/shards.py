"""Finds the files of a sharded checkpoint by their names, and refuses directories in which files are missing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ..errors import SourceError, SourceNotFoundError

INDEX_ENDING = ".safetensors.index.json"
# model.safetensors.index.json, or with a variant before the last ending, as diffusers writes it.
_INDEX = re.compile(r".*\.safetensors\.index(?:\.[\w-]+)?\.json")
# model-00001-of-00002.safetensors; a variant may come before or after the numbers; separators and zeros vary.
_NUMBERED = re.compile(
    r"(?P<stem>.*?)(?<![0-9])(?P<number>[0-9]{1,9})[-_.]?of[-_.]?(?P<count>[0-9]{1,9})(?![0-9])(?P<rest>.*)\.safetensors",
    re.IGNORECASE,
)
# model-00001.safetensors: the number of files is unknown, but a gap in the numbers shows that one is missing.
_COUNTED = re.compile(
    r"(?P<stem>.*?)(?P<number>0[0-9]{1,8}|[0-9]{2,9}|(?:(?<=[-_.])|(?<=part)|(?<=rank)|(?<=shard))[0-9])\.safetensors"
)
# Endings of files that a program has not finished downloading.
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp", ".!qB")


def is_index(name: str) -> bool:
    """Return True for names of indices of sharded checkpoints."""
    return _INDEX.fullmatch(name) is not None


def is_numbered(name: str) -> bool:
    """Return True for names of shards that contain the number of shards."""
    return _NUMBERED.fullmatch(name) is not None


def shard_position(path: Path) -> str | None:
    """Return, for example, "1 of 2" if the name is that of one of several shards, else None."""
    found = _NUMBERED.fullmatch(path.name)
    if found is None or int(found["count"]) < 2:
        return None
    return f"{int(found['number'])} of {int(found['count'])}"


def check_complete(files: Sequence[Path], beside: Iterable[str] = ()) -> None:
    """Refuse a set of files without an index if their names show that a file is missing.

    Args:
        files: the files that would be read.
        beside: the names of all files in the directory.

    Raises:
        SourceNotFoundError: a number is missing, or the download of a file is not finished.
    """
    directory = files[0].parent
    numbers: dict[tuple[str, str, int], set[int]] = {}
    counted: dict[str, set[int]] = {}
    for file in files:
        if found := _NUMBERED.fullmatch(file.name):
            group = (found["stem"].rstrip("-_."), found["rest"], int(found["count"]))
            numbers.setdefault(group, set()).add(int(found["number"]))
        elif found := _COUNTED.fullmatch(file.name):
            counted.setdefault(found["stem"], set()).add(int(found["number"]))
    for (stem, rest, count), present in numbers.items():
        first = 0 if 0 in present else 1
        missing = sorted(set(range(first, count + first)) - present)[:1] if count < 100_000 else [count]
        if missing:
            raise SourceNotFoundError(
                f"{directory} has {len(present)} of {count} shards {stem}-*{rest}.safetensors, number {missing[0]} is "
                "missing: finish the download"
            )
    for stem, present in counted.items():
        gaps = sorted(set(range(min(1, min(present)), min(max(present), 100_000))) - present)
        if len(present) > 1 and gaps:
            raise SourceNotFoundError(
                f"{directory} has {len(present)} files {stem}*.safetensors, of which number {gaps[0]} is missing: "
                "finish the download, or give the path of the file you want"
            )
    check_finished(directory, [file.name for file in files], beside)


def check_finished(directory: Path, files: Collection[str], beside: Iterable[str]) -> None:
    """Refuse a directory with an unfinished download of a file of weights.

    Raises:
        SourceNotFoundError: there is such a file.
    """
    for name in sorted(beside):
        ending = next((e for e in _UNFINISHED if name.endswith(e)), None)
        stem = name.removesuffix(ending) if ending else ""
        if stem.endswith((".safetensors", ".gguf")) and (stem not in files or ending == ".aria2"):
            raise SourceNotFoundError(
                f"{directory} has {name}, so {stem} is not complete: finish the download, or remove {name}"
            )


def chosen_index(directory: Path, indices: Sequence[Path]) -> Path:
    """Return the only index of a directory.

    Raises:
        SourceError: there are several.
    """
    if len(indices) > 1:
        listed = ", ".join(index.name for index in indices)
        raise SourceError(f"{directory} has several indices ({listed}): give the path of one of them")
    return indices[0]
