"""The exceptions that kappa_fast raises. Each one is also a built-in exception (ValueError, RuntimeError, ...).

Every message names the tensor or the file, the reason, and what the user can do.
"""

from __future__ import annotations

from .texts import cleaned


class KappaError(Exception):
    """The base class of all errors of kappa_fast.

    Messages quote names, paths and URLs from untrusted files: control characters in a message are escaped, and
    passwords and tokens are removed.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(cleaned(item) if isinstance(item, str) else item for item in arguments))


class OptionError(KappaError, ValueError):
    """An argument is not valid (wrong type, out of range, two budgets at once)."""


class SourceError(KappaError, ValueError):
    """The source is not a model, or it holds data that cannot be read as weights.

    ``says_exclude``: whether the message already says that ``exclude=`` leaves the weight out.
    """

    def __init__(self, *arguments: object, says_exclude: bool = False) -> None:
        super().__init__(*arguments)
        self.says_exclude = says_exclude


class ShardedError(SourceError, NotImplementedError):
    """Weights are spread over several processes in a way that cannot be read from where it was asked."""


class SourceNotFoundError(SourceError, FileNotFoundError):
    """A file, directory or shard does not exist."""


class RankingFileError(KappaError, ValueError):
    """A JSON file is not a ranking or a selection, is damaged, or cannot be written."""


class BackendError(KappaError, RuntimeError):
    """A backend is unknown, is not available on this machine, or cannot do what was asked."""


class ComputeError(KappaError, RuntimeError):
    """A matrix could not be processed: there was too little memory (``out_of_memory``), or a library routine failed."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class ProcessGroupError(KappaError, RuntimeError):
    """Another rank of the process group has failed, does not answer, or has called rank() with other arguments.

    ``rank`` is the number of that rank within the process group that rank() was given.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class MissingExtraError(KappaError, ImportError):
    """An optional dependency is not installed; the message names the extra that installs it."""


def missing_extra(package: str, extra: str, what: str) -> MissingExtraError:
    """Return the error for ``what`` needing ``package``, which ``pip install 'kappa_fast[extra]'`` installs."""
    return MissingExtraError(f"{what} needs the package {package!r}: pip install 'kappa_fast[{extra}]'")
