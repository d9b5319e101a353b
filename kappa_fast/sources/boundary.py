"""Where what a reader did not foresee becomes a SourceError: files of strangers find every way to fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..errors import KappaError, SourceError
from ..machine.memory import is_out_of_memory

LONGEST = 300  # characters of a path or a reason in a message


@contextlib.contextmanager
def reading(where: str | os.PathLike[str], field: str = "") -> Iterator[None]:
    """The body reads a file. Whatever it raises that is no error of kappa_fast becomes one, with what was raised as its
    cause, which ``--debug`` shows: it may as well be a mistake of kappa_fast.

    Raises:
        SourceError: the body raised something else, warnings and interruptions aside.
    """
    try:
        yield
    except (KappaError, Warning):
        raise
    except Exception as error:
        raise unforeseen(where, field, error) from error


def unforeseen(where: str | os.PathLike[str], field: str, error: Exception) -> SourceError:
    """The error for something that went wrong while that was read."""
    path = os.fsdecode(where)
    what = f"{field} of {_shortened(path)}" if field else _shortened(path)
    if is_out_of_memory(error):
        return SourceError(
            f"{what} cannot be read: there is not enough memory for it; free some, raise the limit of the process, or "
            "give a single shard"
        )
    reason = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, OSError):
        reason = f"{type(error).__name__}: {reason}"
    return SourceError(
        f"{what} cannot be read ({_shortened(reason)}): check the file and your rights to it, or download it again; "
        "if it is sound, report this with the traceback (--debug shows it)"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
