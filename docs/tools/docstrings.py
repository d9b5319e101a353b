"""An extension of griffe: where a docstring says one thing of several names, the reference says it of each."""

from __future__ import annotations

import re
from typing import Any

import griffe

# "include, exclude: what both are", and "OptionError: why.  SourceError: why." with two spaces between.
# and "top, ..., memory_budget: as for rank()".
_SEVERAL = re.compile(r"^( +)((?:[\w.]+, )+\w+): (.*(?:\n\1 +\S.*)*)", re.MULTILINE)
_SECTION = re.compile(r"^(Args|Attributes|Raises|Warns):\n((?:(?: .*)?\n?)+)", re.MULTILINE)


class OneEntryEach(griffe.Extension):
    """Give every name in Args, Attributes and Raises an entry of its own."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring before it is parsed."""
        if obj.docstring is None:
            return
        signature = [parameter.name for parameter in obj.parameters] if isinstance(obj, griffe.Function) else []

        def one_each(found: re.Match[str]) -> str:
            names = _spelled_out(found[2].split(", "), signature)
            return "\n".join(f"{found[1]}{name}: {found[3]}" for name in names)

        def in_section(found: re.Match[str]) -> str:
            title, body = found[1], found[2]
            if title in ("Raises", "Warns"):
                return f"{title}:\n" + re.sub(r"(?<=\S)  (?=[A-Z]\w+: )", "\n    ", body)
            return f"{title}:\n" + _SEVERAL.sub(one_each, body)

        obj.docstring.value = _SECTION.sub(in_section, obj.docstring.value)


def _spelled_out(names: list[str], signature: list[str]) -> list[str]:
    """The names; three dots between two stand for all parameters between these."""
    if "..." not in names:
        return names
    at = names.index("...")
    first, last = signature.index(names[at - 1]), signature.index(names[at + 1])
    return names[:at] + signature[first + 1 : last] + names[at + 1 :]
