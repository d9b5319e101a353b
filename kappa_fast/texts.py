"""Text that comes from strangers (names, paths, addresses) as a terminal, a log and a comment can bear it."""

from __future__ import annotations

import re
import warnings

# The part of an address that may hold a password, and what tokens of the hub look like.
_USER = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/@?#'\"]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_PARAMETER = re.compile(
    r"(?<=[?&])(?P<key>[\w-]{0,40}(?:token|key|secret|signature|password)[\w-]{0,40})=[^\s&'\"]+", re.IGNORECASE
)


def printable(text: str) -> str:
    """``text`` with everything escaped that is no visible character: names come from files of strangers."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def without_secrets(text: str) -> str:
    """``text`` without the user and password of an address, and without tokens."""
    if "://" not in text and "hf_" not in text:
        return text
    text = _USER.sub(r"\g<scheme>***@", text)
    return _TOKEN.sub("hf_***", _PARAMETER.sub(r"\g<key>=***", text))


def cleaned(text: str) -> str:
    """``text`` for a message: on one line, nothing in it that a terminal would obey, and no password."""
    return without_secrets(printable(text))


def warn(message: str, stacklevel: int) -> None:
    """A UserWarning with ``cleaned`` text, said to come from where ``warnings.warn`` with this stacklevel would say."""
    warnings.warn(cleaned(message), stacklevel=stacklevel + 1)


def format_seconds(value: float) -> str:
    """Two or three digits in the unit that fits: "0.42 s", "3.1 min", "5.2 h"."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 0.1:
        return f"{format_digits(value * 1e3)} ms"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if value < limit:
            return f"{format_digits(value / size)} {unit}"
    return f"{format_digits(value / 86400)} days"


def format_digits(value: float) -> str:
    """Three significant digits below a hundred, whole numbers from there on."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
