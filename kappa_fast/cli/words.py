"""The translation of the library's messages for the command line, where ``top=5`` is ``--top 5``."""

from __future__ import annotations

import re

# The options of rank, plan and select that have the same names in Python and on the command line.
_NAMES = (
    *("top", "top_per_group", "rtol", "certify", "include", "exclude", "embeddings", "routers", "fused", "min_dim"),
    *("max_dim", "device", "backend", "memory_budget", "num_tensors", "top_p", "max_kappa", "max_params", "per_group"),
    *("unit", "fill", "order", "seed", "match", "score", "statistics", "show"),
)
_VALUE = r"""(?P<value>r?'[^']*'|r?"[^"]*"|\[[^\]]*\]|\('[^)]*\)|\.\.\.|[\w.+-]*\w)?"""
_GIVEN = re.compile(rf"(?<![\w'\"./=-])(?P<name>{'|'.join(_NAMES)})=(?!=){_VALUE}")
_BARE = re.compile(rf"(?<![\w'\"./=-])(?P<name>{'|'.join(n for n in _NAMES if '_' in n)})(?![\w'\"=])")
_SELECT = re.compile(r"\b(?P<name>select|rank)\((?P<inside>[^()]*)\)")
_CALL = re.compile(r"\b(?P<name>including|excluding)\((?P<inside>[^()]*)\)")
_REMOVED = (" (ranking.skipped says why)", " (see .partial)", "a callable that takes a TensorKappa, or ")
_REPLACED = {"sort with ranking.by()": "sort the file with --score", "leave top out": "leave --top out"}


def as_options(text: str) -> str:
    """The text with options of Python written as options of the command line."""
    for words in _REMOVED:
        text = text.replace(words, "")
    for words, others in _REPLACED.items():
        text = text.replace(words, others)
    text = _CALL.sub(lambda found: f"--{found['name']} {found['inside']}".rstrip(), text)
    text = _SELECT.sub(lambda found: found["inside"] or f"kappa-fast {found['name']}", text)
    text = _GIVEN.sub(lambda found: _option(found["name"], found["value"]), text)
    return _BARE.sub(lambda found: _option(found["name"], None), text)


def _option(name: str, value: str | None) -> str:
    option = "--" + name.replace("_", "-")
    if value is not None and value.startswith("("):
        return " ".join(f"{option} {each}" for each in re.findall(r"'([^']*)'", value))
    if value is not None:
        value = value.removeprefix("r") if value[:2] in ("r'", 'r"') else value
        value = value[1:-1] if re.fullmatch(r"""(['"])[\w.-]+\1""", value) else value
    if name == "certify":
        return f"{option} {'all' if value == 'True' else value or ''}".rstrip()
    if value is not None and value.startswith("-"):
        return f"{option}={value}"  # after a space it would be taken for an option
    return option if value in (None, "True") else f"{option} {value}"
