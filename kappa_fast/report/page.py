"""The page of a ranking: one HTML file that loads no other file and uses no network."""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import missing_extra
from ..results import serialize
from ..texts import printable
from .data import page_data, to_script_text
from .table import format_number

if TYPE_CHECKING:
    from ..results.ranking import Ranking
    from ..results.selection import Selection

# Every script may use the ones before; all of them together are the body of one function.
_SCRIPTS = (
    "data",
    "format",
    "shown",
    "cut",
    "tip",
    "heatmap",
    "curve",
    "histogram",
    "table",
    "summary",
    "skipped",
    "main",
)
_STATUSES = {
    "rank_deficient": "rank deficient",
    "bounded": "only bounded from below",
    "scored": "without kappa, which the score does not need",
    "non_finite": "with NaN or inf",
}


def write_page(
    ranking: Ranking, path: str | os.PathLike[str], selection: Selection | None = None, show: str | None = None
) -> None:
    """Write ``render_page`` to a file, replacing it all at once.

    Raises:
        OptionError: ``selection`` holds a matrix that is not in the ranking, or no matrix has what is to be shown.
        MissingExtraError: jinja2 is not installed.
        RankingFileError: the file cannot be written.
    """
    serialize.write_text(path, render_page(ranking, selection, show))


def render_page(ranking: Ranking, selection: Selection | None = None, show: str | None = None) -> str:
    """The page as text. The same ranking and selection give the same text. ``show``: see ``Ranking.to_html``.

    Its content security policy allows only the style and the script in it, by their hashes: neither the network nor a
    script that a name contains.

    Raises:
        OptionError: ``selection`` holds a matrix that is not in the ranking, or no matrix has what is to be shown.
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing_extra("jinja2", "report", "Ranking.to_html()") from error
    data = to_script_text(page_data(ranking, selection, show))
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style, script = _template("page.css"), _script()
    return environment.from_string(_template("page.html")).render(
        title=title_of(ranking.metadata),
        facts=list(_facts(ranking)),
        settings=list(_flat(ranking.metadata)),
        partial=bool(ranking.metadata.get("partial")),
        version=__version__,
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=data,
    )


def write_static(path: str | os.PathLike[str], picture: bytes | None, **words: Any) -> None:
    """Write a page of text, a picture (SVG) and one table, without a script; an old file is replaced all at once.

    Raises:
        MissingExtraError: jinja2 is not installed.
        RankingFileError: the file cannot be written.
    """
    try:
        import jinja2
    except ImportError as error:
        raise missing_extra("jinja2", "report", "to_html()") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    encoded = "" if picture is None else base64.b64encode(picture).decode()
    page = environment.from_string(_template("comparison.html"))
    serialize.write_text(path, page.render(picture=encoded, version=__version__, **words))


@cache
def _template(name: str) -> str:
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _script() -> str:
    parts = "\n".join(_template(f"{name}.js") for name in _SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();\n'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def title_of(metadata: Mapping[str, Any]) -> str:
    """The name of the model of a ranking: that of its file or directory, else its class or type."""
    source = serialize.mapping_of(metadata.get("source"))
    path = source.get("path")
    if isinstance(path, str) and PurePath(path).name:
        return printable(PurePath(path).name)
    kind = source.get("kind", "model")
    return printable(str(source.get("class") or source.get("model_type") or f"a {kind}"))


def _facts(ranking: Ranking) -> Iterator[tuple[str, str]]:
    """The facts at the head of the page as (name, value)."""
    metadata, source = ranking.metadata, serialize.mapping_of(ranking.metadata.get("source"))
    if source.get("model_type"):
        yield "Model type", printable(str(source["model_type"]))
    count = metadata.get("num_parameters")
    if isinstance(count, int):
        yield "Parameters", f"{count:,}"
    yield "Matrices", ", ".join(_counts(ranking))
    kappas = [entry.kappa for entry in ranking if entry.status == "ok"]
    if kappas:
        yield "kappa", f"{format_number(min(kappas))} to {format_number(max(kappas))}"
    quantized = Counter(str(kind) for entry in ranking if (kind := getattr(entry, "quantization", None)))
    if quantized:
        yield "Quantized", printable(", ".join(f"{number:,} {kind}" for kind, number in quantized.most_common()))
    seconds = metadata.get("seconds")
    if isinstance(seconds, (int, float)) and not isinstance(seconds, bool):
        yield "Computed in", f"{seconds:.3g} s{_where(metadata)}"
    cached = metadata.get("cache")
    if cached:
        yield "Cache", printable(_text(cached))
    versions = metadata.get("versions")
    if isinstance(versions, Mapping) and "kappa_fast" in versions:
        yield "kappa_fast", printable(_text(versions["kappa_fast"]))
    if source.get("path"):
        yield "Path", printable(str(source["path"]))


def _counts(ranking: Ranking) -> Iterator[str]:
    yield f"{len(ranking):,} ranked"
    proven = sum(entry.certified for entry in ranking)
    if proven:
        yield f"{proven:,} proven"
    statuses = Counter[str](entry.status for entry in ranking)
    for status, words in _STATUSES.items():
        if statuses[status]:
            yield f"{statuses[status]:,} {words}"
    yield f"{len(ranking.skipped):,} skipped"


def _where(metadata: Mapping[str, Any]) -> str:
    device, backend = metadata.get("device"), metadata.get("backend")
    names = [_text(device)] if device else []
    names += [_text(backend)] if backend else []
    return f" ({printable(', '.join(names))})" if names else ""


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested metadata as rows of dotted names and texts."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif name:
        yield printable(name), printable(_text(value))


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) or "-"
    if isinstance(value, tuple):
        return ", ".join(map(_text, value)) or "-"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return str(value)
