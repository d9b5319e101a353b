"""SIGTERM and Ctrl-C, remembered: an exception alone can get lost, in a library that is just imported for instance.

The command line listens; the library asks ``check()`` after imports and between waves, and does nothing where nobody
listens.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: list[int] = []
_listens = False
_raises = False  # whether the body is at work, and whoever is above it waits for a KeyboardInterrupt


def received(number: int | None = None) -> bool:
    """Whether such a signal, or any, has come since ``listening`` began."""
    return bool(_received) if number is None else number in _received


def check() -> None:
    """Stop where a signal has come whose exception got lost.

    Raises:
        KeyboardInterrupt: so it is.
    """
    if _received and _raises:
        raise KeyboardInterrupt


@contextmanager
def working() -> Iterator[None]:
    """Within the body a signal raises KeyboardInterrupt; one that came before, or got lost, does at its beginning or
    its end. Outside of it signals are only remembered.
    """
    global _raises
    _raises = True
    try:
        check()
        yield
        check()
    finally:
        _raises = False


@contextmanager
def listening() -> Iterator[None]:
    """Remember SIGTERM and SIGINT while the body runs; a second one of a kind does what it would have done before.

    In another thread than the main one, where no signals arrive, and within another ``listening``, it does nothing.
    """
    global _listens
    if threading.current_thread() is not threading.main_thread() or _listens:
        yield
        return
    _received.clear()
    _listens = True
    # Ctrl-C may have been switched off, as a shell does for what runs in its background.
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) not in (None, signal.SIG_IGN)]
    before = {number: signal.signal(number, _remember) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _listens = False


def _remember(number: int, _: FrameType | None) -> None:
    _received.append(number)
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if _raises:
        raise KeyboardInterrupt
