"""difference(): what training did to the weights, from both models, matrix by matrix."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from .errors import ComputeError, OptionError
from .execution.executor import LINALG_ERROR, usable_device
from .machine import signals as stops
from .machine.memory import is_out_of_memory
from .machine.torch_state import undisturbed
from .matching.checkpoint_names import places_of
from .results import consumers
from .results.comparison import Unpaired
from .results.difference import Difference, Update, checked_directions
from .results.entries import Skipped
from .results.pairing import pair
from .sources import open_source
from .sources.base import Matrix, Source
from .sources.filters import Filters, Patterns
from .spectrum.updates import UpdateNumbers, is_finite, looks_transposed, measure_update

Model = torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str]
SHOWN = 3


def difference(
    before: Model,
    after: Model,
    *,
    k: int = 10,
    threshold: float = 0.5,
    include: Patterns = None,
    exclude: Patterns = None,
    embeddings: bool = False,
    routers: bool = False,
    fused: Literal["split", "stored"] = "split",
    adapters: Literal["base", "merged"] = "merged",
    min_dim: int = 16,
    max_dim: int | None = None,
    device: torch.device | str | None = None,
) -> Difference:
    """What training did to the weight matrices of a model: size, rank and place of the change, and new directions.

    One matrix of each model is held at a time. Matrices are paired by name, as ``Ranking.compare`` pairs them, and
    everything about a pair is computed in float64 by exact decompositions; matrices that did not change cost nothing.
    docs/scores.md has the formulas and their sources.

    Args:
        before, after: two models as ``rank()`` takes them: modules, mappings, files, directories, ids on the hub. A
            model that is trained in place needs a copy or a checkpoint as ``before``.
        k: how many leading singular directions to look at; 0 leaves out shares and intruders, and with them all SVDs.
        threshold: a leading singular vector of the new weights whose absolute cosine with every singular vector of the
            old weights is below this counts as an intruder.
        include, exclude: regular expressions (re.search) on parameter names.
        embeddings, routers: take in embeddings and output heads, and the routers of mixtures of experts.
        fused: "split" compares the parts of fused projections on their own, "stored" the tensor as it is.
        adapters: "merged" takes the weights with what adapters of PEFT learned, "base" without.
        min_dim, max_dim: skip matrices whose smaller side is below, or whose larger side is above.
        device: where to compute; by default where the weights of ``before`` are.

    Returns:
        A Difference. Neither model is changed.

    Raises:
        OptionError: an argument cannot work, or the models have no matrix in common.  SourceError: a model cannot be
            read.  ShardedError: a model is spread over several processes.
        ComputeError: a pair does not fit into memory, or a decomposition of it failed.
    """
    k, threshold = checked_directions(k, threshold)
    chosen: dict[str, Any] = dict(include=include, exclude=exclude, embeddings=embeddings, routers=routers)
    chosen |= dict(fused=fused, adapters=adapters, min_dim=min_dim, max_dim=max_dim)
    filters = Filters(**chosen)
    place = usable_device(device)
    with undisturbed():
        first, second = (_opened(model, filters) for model in (before, after))
        pairs = [(first.matrices[i], second.matrices[j]) for i, j in pair(first.matrices, second.matrices)]
        if not pairs:
            raise OptionError(_nothing_in_common(first, second))
        refused = [
            Unpaired(a.key, f"its shape is {a.shape} before and {b.shape} after")
            for a, b in pairs
            if a.shape != b.shape
        ]
        updates: list[Update] = []
        alike = [(a, b) for a, b in pairs if a.shape == b.shape]
        for a, b in sorted(alike, key=lambda both: both[0].location or ("", 0)):  # in the order of the disk
            stops.check()
            found = _compared(a, b, k, threshold, place)
            if isinstance(found, Update):
                updates.append(found)
            else:
                refused.append(found)
    if not updates:
        raise OptionError(f"no matrix of both models can be compared: {refused[0].key!r}, {refused[0].reason}")
    order = {matrix.key: i for i, matrix in enumerate(first.matrices)}
    return Difference(
        updates=tuple(sorted(updates, key=lambda update: order[update.key])),
        only_before=_lone(first, {a.key for a, _ in pairs}, second),
        only_after=_lone(second, {b.key for _, b in pairs}, first),
        refused=tuple(sorted(refused, key=lambda lone: order[lone.key])),
        skipped=first.skipped,
        caveats=tuple(_caveats(alike, refused)),
        names=(_title(first), _title(second)),
        settings={**chosen, "include": filters.include, "exclude": filters.exclude, "k": k, "threshold": threshold},
    )


def _opened(model: Model, filters: Filters) -> Source:
    opened = open_source(model, filters, places_of)
    if opened.shards is not None:
        opened.shards.check_here()
    return opened


def _compared(a: Matrix, b: Matrix, k: int, threshold: float, place: torch.device | None) -> Update | Unpaired:
    """The update of one matrix, or why its entries cannot be subtracted."""
    where = place or (a.device if a.device.type == "cuda" else torch.device("cpu"))
    try:
        old, new = (matrix.load(where).to(where, torch.float64) for matrix in (a, b))
        if not (is_finite(old) and is_finite(new)):
            return _update(a, b, k, threshold, None)
        if a.shape[0] == a.shape[1] and looks_transposed(old, new):
            return Unpaired(a.key, "it looks transposed after: the new weights are near the transpose of the old ones")
        return _update(a, b, k, threshold, measure_update(old, new, k))
    except Exception as error:
        crowded = is_out_of_memory(error)
        if not crowded and not isinstance(error, LINALG_ERROR):
            raise
        what = "there is not enough memory to compare" if crowded else f"a decomposition failed ({error}) on"
        raise ComputeError(
            f"{what} {a.key!r} of shape {tuple(a.shape)}: free memory, use another device, or leave it out with "
            f"exclude={a.name!r}",
            out_of_memory=crowded,
        ) from error


def _update(a: Matrix, b: Matrix, k: int, threshold: float, numbers: UpdateNumbers | None) -> Update:
    known = numbers or UpdateNumbers(math.nan, math.nan, math.nan)
    changed: Literal["changed", "unchanged"] = "changed" if known.changed else "unchanged"
    return Update(
        key=a.key,
        key_after=b.key,
        layer=a.layer,
        group=a.group,
        shape=a.shape,
        dtype_before=str(a.dtype).removeprefix("torch."),
        dtype_after=str(b.dtype).removeprefix("torch."),
        status="non_finite" if numbers is None else changed,
        norm=known.norm,
        norm_before=known.norm_before,
        spectral_norm=known.spectral_norm,
        k=min(k, *a.shape),
        share_left=known.share_left,
        share_right=known.share_right,
        share=known.share,
        similarities=known.similarities,
        threshold=threshold,
    )


def _lone(source: Source, paired: set[str], other: Source) -> tuple[Unpaired, ...]:
    reasons = {skipped.name: skipped.reason for skipped in other.skipped}
    return tuple(
        Unpaired(m.key, reasons.get(m.key) or reasons.get(m.name, "")) for m in source.matrices if m.key not in paired
    )


def _caveats(pairs: Sequence[tuple[Matrix, Matrix]], refused: Sequence[Unpaired]) -> Iterator[str]:
    if refused:
        names = ", ".join(f"{lone.key!r} ({lone.reason})" for lone in refused[:SHOWN])
        yield f"{len(refused)} matrices of both cannot be subtracted and are left out, such as {names}"
    kinds = Counter((str(a.dtype), str(b.dtype), a.quantization, b.quantization) for a, b in pairs)
    for (old, new, stored, restored), count in kinds.most_common():
        if stored != restored:
            yield f"quantization is {stored} and {restored} in {count} matrices: its error is part of the difference"
        elif old != new:
            kinds_of = (name.removeprefix("torch.") for name in (old, new))
            yield f"dtype is {' and '.join(kinds_of)} in {count} matrices: rounding is part of the difference"


def _nothing_in_common(first: Source, second: Source) -> str:
    held = [
        ", ".join(repr(m.key) for m in source.matrices[:SHOWN]) or _why_nothing(source.skipped)
        for source in (first, second)
    ]
    return (
        f"the models have no matrix in common: the first holds {held[0]}, the second {held[1]}. "
        "Compare models with the same names"
    )


def _why_nothing(skipped: Sequence[Skipped]) -> str:
    return f"nothing ({skipped[0].name!r}: {skipped[0].reason})" if skipped else "nothing"


def _title(source: Source) -> str:
    return consumers.title_of({"source": source.metadata})
