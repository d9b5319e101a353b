"""Turns every unexpected exception in the readers of untrusted files into a SourceError."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..errors import KappaError, SourceError
from ..machine.memory import is_out_of_memory

LONGEST = 300  # characters of a path or a reason in a message


@contextlib.contextmanager
def reading(where: str | os.PathLike[str], field: str = "") -> Iterator[None]:
    """Turn an unexpected exception of the body, which reads a file, into a SourceError.

    The exception may be a bug of kappa_fast, so it is kept as the cause, which ``--debug`` shows.

    Raises:
        SourceError: the body raised an exception that is neither a KappaError nor a Warning.
    """
    try:
        yield
    except (KappaError, Warning):
        raise
    except Exception as error:
        raise unexpected_error(where, field, error) from error


def unexpected_error(where: str | os.PathLike[str], field: str, error: Exception) -> SourceError:
    """Return the SourceError for an unexpected exception while ``field`` of the file ``where`` was read."""
    path = os.fsdecode(where)
    what = f"{field} of {_shortened(path)}" if field else _shortened(path)
    if is_out_of_memory(error):
        return SourceError(
            f"{what} cannot be read: there is not enough memory; free some, raise the memory limit of the process, or "
            "give a single shard"
        )
    reason = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, OSError):
        reason = f"{type(error).__name__}: {reason}"
    return SourceError(
        f"{what} cannot be read ({_shortened(reason)}): check the file and its permissions, or download it again; "
        "if the file is valid, report this with the traceback (--debug shows it)"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
