"""Rankings and selections as strict JSON, which reads back to the same bits, and errors that say how a file is damaged.

A document is ``{"format": "kappa_fast ranking", "version": 1, ...}``. Floats have the shortest digits that read back to
the same bits; nan and the infinities are the strings "nan", "inf" and "-inf". A slice is ``[start, stop, step]``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

from ..errors import OptionError, RankingFileError, SourceError, SourceNotFoundError
from ..io.documents import read_document
from ..io.limits import DEEPEST, LARGEST_RANKING, MOST_VALUES_OF_RANKING
from ..io.writing import write_bytes
from .consistency import contradiction
from .entries import FIELDS, Index, Skipped, Status, TensorKappa
from .names import group_of, layer_of
from .statistics import COUNTS, STATISTICS

RANKING_FORMAT = "kappa_fast ranking"
SELECTION_FORMAT = "kappa_fast selection"
VERSION = 1
REFERENCE_METHOD = "reference"

_Record = TypeVar("_Record", TensorKappa, Skipped)
_REWRITE = "the file is damaged: write it again with to_json()"
_FLOAT_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def freeze(value: Any, where: str, depth: int = 0) -> Any:
    """A deep, read-only copy of plain JSON: mappings become MappingProxyType, lists tuples, nan and inf their names.

    Raises:
        OptionError: JSON cannot hold something in ``value`` (called ``where`` in the message), or it is nested more
            than DEEPEST deep.
    """
    if depth > DEEPEST:
        raise OptionError(f"{where[:60]}... is nested more than {DEEPEST} deep: make it flatter")
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise OptionError(f"{where} has the key {key!r}, but JSON knows only text keys: use str(key)")
        return MappingProxyType({key: freeze(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value))
    raise OptionError(f"{where} is of type {type(value).__name__}, which JSON cannot hold: use text, numbers, lists")


def thaw(value: Any) -> Any:
    """A copy of a value of ``freeze`` as dicts and lists, which json and pickle can write."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value


def mapping_of(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one: for metadata, in which a file may have anything."""
    return value if isinstance(value, Mapping) else {}


def encode_entry(entry: TensorKappa) -> dict[str, Any]:
    """One entry as plain JSON; statistics that are not known are left out."""
    known = {name: getattr(entry, name) for name in FIELDS}
    return {name: _as_json(v) for name, v in known.items() if v is not None or name not in STATISTICS}


def encode_skipped(skipped: Skipped) -> dict[str, Any]:
    """One skipped parameter as plain JSON."""
    return {item.name: _as_json(getattr(skipped, item.name)) for item in fields(skipped)}


def _as_json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    return value


def decode_entries(raw: Any, path: Path) -> list[TensorKappa]:
    """The entries of a document. Raises RankingFileError naming the file, the entry and the field that is wrong."""
    entries = []
    for where, item in _items(raw, "entries", path):
        entry = _decode(TensorKappa, _ENTRY_FIELDS, item, where)
        if (wrong := contradiction(entry)) is not None:
            raise RankingFileError(f"{where} ({entry.key!r}) contradicts itself: {wrong}; {_REWRITE}")
        entries.append(entry)
    return entries


def decode_skipped(raw: Any, path: Path) -> list[Skipped]:
    """The skipped parameters of a document. Raises RankingFileError like ``decode_entries``."""
    return [_decode(Skipped, _SKIPPED_FIELDS, item, where) for where, item in _items(raw, "skipped", path)]


def _items(raw: Any, what: str, path: Path) -> Iterable[tuple[str, Any]]:
    if not isinstance(raw, list):
        raise RankingFileError(f"{path}: {what!r} is not a list; {_REWRITE}")
    return ((f"{path}: {what}[{i}]", item) for i, item in enumerate(raw))


def _decode(record: type[_Record], readers: Mapping[str, _Reader], raw: Any, where: str) -> _Record:
    if not isinstance(raw, dict):
        raise RankingFileError(f"{where} is not an object; {_REWRITE}")
    values = {}
    for name, (expected, read) in readers.items():
        if name not in raw and name in _ADDED:
            continue
        if name not in raw:
            raise RankingFileError(f"{where} has no {name!r}; {_REWRITE}")
        try:
            values[name] = read(raw[name])
        except (TypeError, ValueError, OverflowError):
            found = repr(raw[name])[:60]
            raise RankingFileError(f"{where}: {name!r} is {found}, not {expected}; {_REWRITE}") from None
    return record(**values)


_Reader = tuple[str, Callable[[Any], Any]]


def _require(true: bool) -> None:
    if not true:
        raise ValueError


def _read_text(raw: Any) -> str:
    _require(isinstance(raw, str))
    return str(raw)


def read_texts(raw: Any) -> tuple[str, ...]:
    """A list of texts, else ValueError."""
    _require(isinstance(raw, list))
    return tuple(_read_text(item) for item in raw)


def read_flag(raw: Any) -> bool:
    """True or false, else ValueError."""
    _require(isinstance(raw, bool))
    return bool(raw)


def _read_int(raw: Any) -> int:
    _require(isinstance(raw, int) and not isinstance(raw, bool))
    return int(raw)


def _read_count(raw: Any) -> int:
    _require(_read_int(raw) >= 0)
    return int(raw)


def _read_shape(raw: Any) -> tuple[int, ...]:
    _require(isinstance(raw, list))
    return tuple(_read_count(item) for item in raw)


def _read_pair(raw: Any) -> tuple[int, ...]:
    _require(isinstance(raw, list) and len(raw) == 2)
    return _read_shape(raw)


def _read_float(raw: Any) -> float:
    if isinstance(raw, str):
        _require(raw in _FLOAT_NAMES)
        return _FLOAT_NAMES[raw]
    number = float(raw)
    _require(isinstance(raw, (int, float)) and not isinstance(raw, bool) and math.isfinite(number))
    return number


def _read_ordered(raw: Any) -> float:
    number = _read_float(raw)
    _require(not math.isnan(number))
    return number


def _read_index(raw: Any) -> Index:
    def part(item: Any) -> int | slice:
        if not isinstance(item, list):
            return _read_int(item)
        _require(len(item) == 3)
        return slice(*(None if bound is None else _read_int(bound) for bound in item))

    _require(isinstance(raw, list))
    return tuple(part(item) for item in raw)


def _read_status(raw: Any) -> str:
    _require(raw in get_args(Status))
    return str(raw)


_TEXT: _Reader = ("text", _read_text)
_FLOAT: _Reader = ('a number, "nan", "inf" or "-inf"', _read_float)
_STATISTIC: _Reader = ('a number, "inf", "-inf" or null', lambda raw: None if raw is None else _read_ordered(raw))

_ENTRY_FIELDS: dict[str, _Reader] = {
    "name": _TEXT,
    "aliases": ("a list of texts", read_texts),
    "part": _TEXT,
    "index": ("a list of integers and [start, stop, step]", _read_index),
    "layer": ("an integer or null", lambda raw: None if raw is None else _read_int(raw)),
    "group": _TEXT,
    "shape": ("a list of two sizes", _read_pair),
    "dtype": _TEXT,
    "numel": ("a count", _read_count),
    "kappa": _FLOAT,
    "lower": _FLOAT,
    "upper": _FLOAT,
    "sigma_max": _FLOAT,
    "sigma_min": _FLOAT,
    "score": _FLOAT,
    "certified": ("true or false", read_flag),
    "method": _TEXT,
    "sensitivity": _FLOAT,
    "status": ("one of " + ", ".join(get_args(Status)), _read_status),
    "quantization": ("text or null", lambda raw: None if raw is None else _read_text(raw)),
    **dict.fromkeys(STATISTICS, _STATISTIC),
    **dict.fromkeys(COUNTS, ("a count or null", lambda raw: None if raw is None else _read_count(raw))),
}

# Fields that files of older versions do not have; these fields have defaults.
_ADDED = frozenset({"quantization", *STATISTICS})

_SKIPPED_FIELDS: dict[str, _Reader] = {"name": _TEXT, "shape": ("a list of sizes", _read_shape), "reason": _TEXT}


def write_document(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write plain JSON to ``path`` all at once, see ``write_text``.

    Lists get one line per item, so that two files can be compared line by line.

    Raises:
        RankingFileError: the file cannot be written there.
    """
    write_text(path, document_text(document))


def document_text(document: Mapping[str, Any]) -> str:
    """The text of a file of plain JSON."""
    body = ",\n".join(f"  {json.dumps(key)}: {_section(value)}" for key, value in document.items())
    return f"{{\n{body}\n}}\n"


def make_relative(metadata: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Make the path of the source in plain metadata relative to the folder of a file; ids of the hub stay."""
    source = metadata.get("source")
    if isinstance(source, dict) and isinstance(source.get("path"), str):
        folder = os.path.dirname(os.path.abspath(path))
        if "id" in source:  # a model of the hub, whose path lies in the cache of a user
            source["path"] = source["id"]
        else:
            try:
                source["path"] = Path(os.path.relpath(source["path"], folder)).as_posix()
            except ValueError:  # on another drive of Windows
                source["path"] = os.path.basename(source["path"])


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text all at once, see ``writing.write_bytes``.

    Raises:
        RankingFileError: the file cannot be written there.
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise RankingFileError(f"cannot write {path}: the text has an incomplete character in it ({error})") from error
    write_bytes(path, content)


def _section(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n    " + ",\n    ".join(json.dumps(item, allow_nan=False) for item in value) + "\n  ]"
    # A line end in JSON text is always layout, since JSON escapes line ends of texts.
    return json.dumps(value, allow_nan=False, indent=2).replace("\n", "\n  ")


def read_json(path: Path) -> Any:
    """The JSON in the file.

    Raises:
        SourceNotFoundError: there is no such file.
        RankingFileError: the file cannot be read, or is not JSON.
    """
    try:
        return read_document(path, LARGEST_RANKING, MOST_VALUES_OF_RANKING)
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: no such file; to_json() writes one") from error
    except OSError as error:
        raise RankingFileError(f"cannot read {path}: {error.strerror or error}") from error
    except SourceError as error:
        raise RankingFileError(str(error)) from error
    except MemoryError as error:
        raise RankingFileError(f"cannot read {path}: there is not enough memory for it") from error
    except ValueError as error:
        raise RankingFileError(f"{path} is not valid JSON ({error}); {_REWRITE}") from error


def check_format(raw: Any, path: Path, wanted: str) -> dict[str, Any]:
    """``raw`` if it is a document of the wanted format that this version can read, else RankingFileError."""
    found = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or found != wanted:
        known = {RANKING_FORMAT: "Ranking.from_json", SELECTION_FORMAT: "Selection.from_json"}
        advice = (
            f"read it with {known[found]}()"
            if isinstance(found, str) and found in known
            else "to_json() writes one that can be read"
        )
        raise RankingFileError(f"{path} is not a file of the format {wanted!r}: {advice}")
    version = raw.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RankingFileError(f"{path}: 'version' is {version!r}, not a positive integer; {_REWRITE}")
    if version > VERSION:
        raise RankingFileError(
            f"{path} has version {version} of the format, and this kappa_fast reads up to {VERSION}: "
            "upgrade kappa_fast, or write the file again with this one"
        )
    return dict(raw)


def get_object(document: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The object called ``name`` of a document, or RankingFileError."""
    value = document.get(name)
    if not isinstance(value, dict):
        raise RankingFileError(f"{path}: {name!r} is not an object; {_REWRITE}")
    return value


def get_value(document: Mapping[str, Any], name: str, path: Path, expected: str, read: Callable[[Any], Any]) -> Any:
    """The value called ``name`` of a document as ``read`` makes it, or RankingFileError."""
    try:
        return read(document.get(name))
    except ValueError:
        raise RankingFileError(f"{path}: {name!r} is not {expected}; {_REWRITE}") from None


def is_reference(raw: Any) -> bool:
    """Whether this is a file of the reference implementation: an object of names and numbers alone."""
    return (
        isinstance(raw, dict)
        and bool(raw)
        and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in raw.values())
    )


def decode_reference(raw: Mapping[str, float], path: Path) -> list[TensorKappa]:
    """Entries from a ``{name: kappa}`` mapping, which has neither shapes nor intervals.

    So shape is (0, 0), numel 0, dtype "unknown", the interval [1, inf], and method "reference". An ``Infinity`` stands
    for a rank-deficient matrix.

    Raises:
        RankingFileError: a value is not a condition number, which is never below 1.
    """
    return [_reference_entry(name, kappa, path) for name, kappa in raw.items()]


def _reference_entry(name: str, value: float, path: Path) -> TensorKappa:
    try:
        kappa = float(value)
    except OverflowError:
        kappa = math.inf
    if kappa < 1:
        raise RankingFileError(
            f"{path}: {name!r} has the condition number {value!r}, which cannot be below 1: the file is neither a "
            "ranking of kappa_fast nor a {name: condition number} mapping"
        )
    status: Status = "non_finite" if math.isnan(kappa) else "rank_deficient" if math.isinf(kappa) else "ok"
    bounds = (math.nan, math.nan) if status == "non_finite" else (1.0, math.inf)
    return TensorKappa(
        name=name,
        aliases=(),
        part="",
        index=(),
        layer=layer_of(name),
        group=group_of(name),
        shape=(0, 0),
        dtype="unknown",
        numel=0,
        kappa=kappa,
        lower=bounds[0],
        upper=bounds[1],
        sigma_max=math.nan,
        sigma_min=math.nan,
        score=kappa,
        certified=False,
        method=REFERENCE_METHOD,
        sensitivity=math.nan,
        status=status,
    )
