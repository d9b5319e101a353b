"""Which files make up a checkpoint: indices, numbered shards in all spellings, and what shows that one is missing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ..errors import SourceError, SourceNotFoundError

INDEX_ENDING = ".safetensors.index.json"
# model.safetensors.index.json, and with the variant before the last ending, as diffusers writes it.
_INDEX = re.compile(r".*\.safetensors\.index(?:\.[\w-]+)?\.json")
# model-00001-of-00002.safetensors; the variant may come before or behind, the separators and zeros vary.
_NUMBERED = re.compile(
    r"(?P<stem>.*?)(?<![0-9])(?P<number>[0-9]{1,9})[-_.]?of[-_.]?(?P<count>[0-9]{1,9})(?![0-9])(?P<rest>.*)\.safetensors",
    re.IGNORECASE,
)
# model-00001.safetensors: how many there are is not said, but a gap shows.
_COUNTED = re.compile(
    r"(?P<stem>.*?)(?P<number>0[0-9]{1,8}|[0-9]{2,9}|(?:(?<=[-_.])|(?<=part)|(?<=rank)|(?<=shard))[0-9])\.safetensors"
)
# What programs call a file that they have not finished.
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp", ".!qB")


def is_index(name: str) -> bool:
    """True for what indices of sharded checkpoints are called."""
    return _INDEX.fullmatch(name) is not None


def is_numbered(name: str) -> bool:
    """True for a shard whose name says how many there are."""
    return _NUMBERED.fullmatch(name) is not None


def companions_of(path: Path) -> str | None:
    """For one of several numbered shards "1 of 2"; None for a file that is whole by its name."""
    found = _NUMBERED.fullmatch(path.name)
    if found is None or int(found["count"]) < 2:
        return None
    return f"{int(found['number'])} of {int(found['count'])}"


def check_complete(files: Sequence[Path], beside: Iterable[str] = ()) -> None:
    """Refuse a set of files without an index whose names show that one of them is missing.

    Args:
        files: what would be read.
        beside: names of everything else in the directory.

    Raises:
        SourceNotFoundError: numbers are missing, or a file is not finished.
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
                "not there: finish the download"
            )
    for stem, present in counted.items():
        gaps = sorted(set(range(min(1, min(present)), min(max(present), 100_000))) - present)
        if len(present) > 1 and gaps:
            raise SourceNotFoundError(
                f"{directory} has {len(present)} files {stem}*.safetensors, and number {gaps[0]} among them is not "
                "there: finish the download, or give the path of the file you want"
            )
    check_finished(directory, [file.name for file in files], beside)


def check_finished(directory: Path, files: Collection[str], beside: Iterable[str]) -> None:
    """Refuse a directory in which a program has not finished a file of weights.

    Raises:
        SourceNotFoundError: so it is.
    """
    for name in sorted(beside):
        ending = next((e for e in _UNFINISHED if name.endswith(e)), None)
        stem = name.removesuffix(ending) if ending else ""
        if stem.endswith((".safetensors", ".gguf")) and (stem not in files or ending == ".aria2"):
            raise SourceNotFoundError(
                f"{directory} has {name}, so {stem} is not complete: finish the download, or remove {name}"
            )


def chosen_index(directory: Path, indices: Sequence[Path]) -> Path:
    """The only index of a directory.

    Raises:
        SourceError: there are several.
    """
    if len(indices) > 1:
        listed = ", ".join(index.name for index in indices)
        raise SourceError(f"{directory} has several indices ({listed}): give the path of one of them")
    return indices[0]
