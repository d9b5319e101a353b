"""kappa_fast: the condition number of every weight matrix of a model, fast, with the certainty of each number."""

from ._version import __version__
from .entries import Skipped, TensorKappa
from .errors import (
    BackendError,
    ComputeError,
    Interrupted,
    KappaError,
    MissingExtraError,
    OptionError,
    RankingFileError,
    SourceError,
    SourceNotFoundError,
)
from .pipeline import rank
from .ranking import Ranking
from .selection import Selection

__all__ = [
    "rank",
    "Ranking",
    "TensorKappa",
    "Skipped",
    "Selection",
    "KappaError",
    "OptionError",
    "SourceError",
    "SourceNotFoundError",
    "RankingFileError",
    "BackendError",
    "ComputeError",
    "MissingExtraError",
    "Interrupted",
    "__version__",
]
