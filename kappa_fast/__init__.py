"""kappa_fast: the condition number of every weight matrix of a model, fast, with the certainty of each number."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .entries import Skipped, TensorKappa
    from .errors import (
        BackendError,
        ComputeError,
        Interrupted,
        KappaError,
        MissingExtraError,
        OptionError,
        ProcessGroupError,
        RankingFileError,
        SourceError,
        SourceNotFoundError,
    )
    from .integrations.reference import SelectiveFineTuningOptimizer, get_kappa_lora_config, get_kappatune_lora_model
    from .optimizer import wrap
    from .pipeline import rank
    from .ranking import Ranking
    from .selection import Selection
    from .training.handle import restore

__all__ = [
    "rank",
    "wrap",
    "restore",
    "Ranking",
    "TensorKappa",
    "Skipped",
    "Selection",
    "SelectiveFineTuningOptimizer",
    "get_kappa_lora_config",
    "get_kappatune_lora_model",
    "KappaError",
    "OptionError",
    "SourceError",
    "SourceNotFoundError",
    "RankingFileError",
    "BackendError",
    "ComputeError",
    "ProcessGroupError",
    "MissingExtraError",
    "Interrupted",
    "__version__",
]

_HOMES = {"rank": "pipeline", "Ranking": "ranking", "Selection": "selection", "wrap": "optimizer"}
_HOMES |= {"restore": "training.handle"}
_HOMES |= dict.fromkeys(
    ("SelectiveFineTuningOptimizer", "get_kappa_lora_config", "get_kappatune_lora_model"), "integrations.reference"
)
_HOMES |= {"TensorKappa": "entries", "Skipped": "entries"}


def __getattr__(name: str) -> Any:
    # On first use, so that `kappa-fast --help` need not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
