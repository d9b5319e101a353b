"""Untrusted text (names, paths, addresses) made safe to print in a terminal, a log or a comment."""

from __future__ import annotations

import re
import sys
import warnings

# The part of a URL that may hold a password, and the form of access tokens of the hub.
_USER = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/@?#'\"]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_PARAMETER = re.compile(
    r"(?<=[?&])(?P<key>[\w-]{0,40}(?:token|key|secret|signature|password)[\w-]{0,40})=[^\s&'\"]+", re.IGNORECASE
)
# Modules whose frames a warning passes over: those of this package, and contextlib between them.
_OURS = re.compile(r"kappa_fast(?:\.|$)|contextlib$")


def printable(text: str) -> str:
    """Return ``text`` with every character escaped that is not visible; names come from untrusted files."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def without_secrets(text: str) -> str:
    """Return ``text`` with ``***`` in place of user names and passwords in URLs, and of access tokens."""
    if "://" not in text and "hf_" not in text:
        return text
    text = _USER.sub(r"\g<scheme>***@", text)
    return _TOKEN.sub("hf_***", _PARAMETER.sub(r"\g<key>=***", text))


def cleaned(text: str) -> str:
    """Return ``text`` for a message: on one line, without control characters and without secrets."""
    return without_secrets(printable(text))


def warn(message: str) -> None:
    """Issue a UserWarning with ``cleaned`` text for the line of the user's code that called kappa_fast."""
    frame, level = sys._getframe(1), 2  # of the caller, as warnings.warn counts
    while frame.f_back is not None and _OURS.match(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(cleaned(message), stacklevel=level)


def format_seconds(value: float) -> str:
    """Return a duration in seconds with two or three digits in a fitting unit: "0.42 s", "3.1 min", "5.2 h"."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 0.1:
        return f"{format_digits(value * 1e3)} ms"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if value < limit:
            return f"{format_digits(value / size)} {unit}"
    return f"{format_digits(value / 86400)} days"


def format_digits(value: float) -> str:
    """Return a number with three significant digits below 100, and rounded to an integer from 100 on."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
