"""Everything kappa_fast raises on purpose.

Each class is also the built-in exception a caller would guess (ValueError, RuntimeError, ...), so code that
knows nothing of kappa_fast can still catch it. Every message names the tensor or file, the reason, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .texts import cleaned

if TYPE_CHECKING:
    pass


class KappaError(Exception):
    """Base of all errors of kappa_fast.

    What messages quote (names, paths, addresses) comes from files of strangers: in them everything is escaped that a
    terminal would obey, and passwords are left out.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(cleaned(item) if isinstance(item, str) else item for item in arguments))


class OptionError(KappaError, ValueError):
    """An argument has a value that cannot work (wrong type, out of range, two budgets at once)."""


class SourceError(KappaError, ValueError):
    """The source is no model, or holds something that cannot be read as weights."""


class ShardedError(SourceError, NotImplementedError):
    """Weights are spread over several processes in a way that cannot be read from where it was asked."""


class SourceNotFoundError(SourceError, FileNotFoundError):
    """A file, directory or shard that was named does not exist."""


class RankingFileError(KappaError, ValueError):
    """A JSON file is not a ranking or a selection, or is damaged."""


class BackendError(KappaError, RuntimeError):
    """A backend is unknown, not available here, or refused the work."""


class ComputeError(KappaError, RuntimeError):
    """A matrix could not be processed (out of memory for a single matrix, a library routine that failed)."""


class ProcessGroupError(KappaError, RuntimeError):
    """Another rank of the process group has failed, hangs, or is about to do something else; ``rank`` is its number.

    The number is that within the group that rank() was given.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class MissingExtraError(KappaError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def missing_extra(package: str, extra: str, what: str) -> MissingExtraError:
    """The error for ``what`` needing ``package``, which ``pip install 'kappa_fast[extra]'`` brings."""
    return MissingExtraError(f"{what} needs the package {package!r}: pip install 'kappa_fast[{extra}]'")
