"""The exit codes and messages of all commands after success, errors, Ctrl-C, SIGTERM and a closed pipe."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..errors import KappaError, OptionError
from ..machine import signals as stops
from ..results.interruption import Interrupted
from ..texts import cleaned
from .words import as_options

# Packages that transformers imports warn about extensions and enumerations that kappa_fast does not use.
_CHATTY = ("torchao", "torch.utils._pytree")
FAILURE, WRONG_USE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
EXCEEDED, BROKEN, NOTHING = 3, 4, 5  # exit codes of commands that succeeded with a result that a gate should refuse


class Stopped(KeyboardInterrupt):
    """A command was interrupted or terminated; ``state`` says what is done, and where it is kept."""

    def __init__(self, state: str) -> None:
        super().__init__(cleaned(state))
        self.state = cleaned(state)


@contextmanager
def outcome(debug: bool, verbose: int = 0) -> Iterator[None]:
    """Run the body of a command; an exception becomes an exit code and at most one line on stderr.

    Warnings become a line each. ``verbose`` shows the log of kappa_fast (2: all of it), ``debug`` all of it and the
    traceback.

    Raises:
        typer.Exit: with 1 after an error, 2 after an OptionError, 130 after Ctrl-C, 143 after SIGTERM.
    """
    level = logging.DEBUG if debug or verbose > 1 else logging.INFO if verbose else None
    with warnings.catch_warnings(), _logged(level), stops.listening():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _show_warning
        try:
            with stops.working():
                yield
                sys.stdout.flush()  # a failure still gets an exit code here
        except typer.Exit:
            raise
        except BrokenPipeError:
            _discard_output()  # the reader, such as `| head`, has closed the pipe
        except KeyboardInterrupt as stop:
            terminated = stops.received(signal.SIGTERM)
            word = "terminated" if terminated else "interrupted"
            typer.echo(f"{word}: {stop.state}" if isinstance(stop, (Stopped, Interrupted)) else word, err=True)
            raise typer.Exit(TERMINATED if terminated else INTERRUPTED) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            typer.echo(f"error: {_in_one_line(error)}", err=True)
            _flush_or_discard_output()  # the disk may be full
            raise typer.Exit(WRONG_USE if isinstance(error, OptionError) else FAILURE) from None


def use_threads(number: int | None) -> None:
    """Set the number of threads to that of ``--threads``."""
    if number is not None:
        import torch

        torch.set_num_threads(number)


def count_or_share(text: str, option: str) -> int | float:
    """The value of an option that takes a count ("10") or a share ("0.2").

    Raises:
        OptionError: the text is neither.
    """
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    raise OptionError(f"{option} {text}: give a count such as 10, or a share such as 0.2")


def _in_one_line(error: Exception) -> str:
    text = as_options(cleaned(" ".join(str(error).split())))
    if isinstance(error, (KappaError, NotImplementedError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"warning: {as_options(cleaned(' '.join(str(message).split())))}", err=True)


class _Cleaned(logging.Formatter):
    """Cleans the lines of the log, which quote names from untrusted files."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return cleaned(super().formatMessage(record))


@contextmanager
def _logged(level: int | None) -> Iterator[None]:
    log, handler = logging.getLogger("kappa_fast"), logging.StreamHandler()
    handler.setFormatter(_Cleaned())
    others = [logging.getLogger(name) for name in _CHATTY]
    levels = [(logger, logger.level) for logger in (log, *others)]
    if level is not None:
        log.addHandler(handler)
        log.setLevel(level)
    else:
        for logger in others:
            logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.removeHandler(handler)
        for logger, before in levels:
            logger.setLevel(before)


def _flush_or_discard_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()


def _discard_output() -> None:
    # Output that is left in the buffer would raise again when the interpreter closes the stream.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
