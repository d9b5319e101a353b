"""The GPU kernels. Their files live in the top-level folder ``kernels/`` of the repository.

That folder has no ``__init__.py``: a package called ``kernels`` would hide the one of Hugging Face from everybody who
runs Python in the clone. The build copies the files beside this one; in a clone, and so in an editable install, they
are found where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_root = Path(__file__).resolve().parents[2]
_folder = _root / "kernels"

# In site-packages the same path may be somebody else's package: only a source tree, and only a bare folder, will do.
if (_root / "setup.py").is_file() and _folder.is_dir() and not (_folder / "__init__.py").exists():
    __path__.append(str(_folder))


def warmup(
    weights: torch.nn.Module | Iterable[torch.Tensor],
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Compile now, on all cores, what ``kappa_fast.rank`` will launch for these weights: see jit_cache.warmup."""
    from kappa_fast.kernels.jit_cache import warmup as compile_for

    return compile_for(weights, device, progress)
