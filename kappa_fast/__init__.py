"""kappa_fast: the condition number of every weight matrix of a model, fast, with the certainty of each number."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .errors import (
        BackendError,
        ComputeError,
        KappaError,
        MissingExtraError,
        OptionError,
        ProcessGroupError,
        RankingFileError,
        ShardedError,
        SourceError,
        SourceNotFoundError,
    )
    from .execution.progress import Progress
    from .integrations.reference import SelectiveFineTuningOptimizer, get_kappa_lora_config, get_kappatune_lora_model
    from .pipeline import rank
    from .planning import Plan, plan
    from .results.comparison import Comparison
    from .results.difference import Difference
    from .results.entries import Skipped, TensorKappa
    from .results.interruption import Interrupted
    from .results.ranking import Ranking
    from .results.selection import Selection
    from .training.handle import Handle, restore
    from .training.optimizer import wrap
    from .updates import difference

__all__ = [
    "plan",
    "rank",
    "wrap",
    "restore",
    "difference",
    "Plan",
    "Progress",
    "Ranking",
    "TensorKappa",
    "Skipped",
    "Comparison",
    "Difference",
    "Selection",
    "Handle",
    "SelectiveFineTuningOptimizer",
    "get_kappa_lora_config",
    "get_kappatune_lora_model",
    "KappaError",
    "OptionError",
    "SourceError",
    "SourceNotFoundError",
    "ShardedError",
    "RankingFileError",
    "BackendError",
    "ComputeError",
    "ProcessGroupError",
    "MissingExtraError",
    "Interrupted",
    "__version__",
]

_HOMES = {
    "plan": "planning",
    "Plan": "planning",
    "Progress": "execution.progress",
    "Comparison": "results.comparison",
    "Difference": "results.difference",
    "difference": "updates",
    "Handle": "training.handle",
    "rank": "pipeline",
    "wrap": "training.optimizer",
    "restore": "training.handle",
    "Ranking": "results.ranking",
    "Interrupted": "results.interruption",
    "Selection": "results.selection",
    "TensorKappa": "results.entries",
    "Skipped": "results.entries",
    **dict.fromkeys(
        ("SelectiveFineTuningOptimizer", "get_kappa_lora_config", "get_kappatune_lora_model"), "integrations.reference"
    ),
}


def __getattr__(name: str) -> Any:
    # On first use, so that `kappa-fast --help` need not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
