"""compare(): it pairs the matrices of two rankings, and says what makes the rankings hard to compare."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import OptionError
from . import serialize
from .comparison import Change, Comparison, Unpaired
from .entries import TensorKappa
from .pairing import pair
from .ranking import Ranking
from .scores import KAPPA, NamedScore

# Settings that change numbers although the weights are equal, or hide that weights differ; each with its caveat.
_SETTINGS = {
    "rtol": "intervals of one are wider than those of the other",
    "certify": "the intervals of only one are proven",
    "fused": "parts of fused projections are in only one of them",
    "adapters": "the weights of only one have in them what adapters of PEFT learned",
    "score": "the orders mean different things",
}
SHOWN = 3


def compare(before: Ranking, after: object, score: str = "kappa") -> Comparison:
    """See ``Ranking.compare``."""
    named = NamedScore.of(score)
    if not isinstance(after, Ranking):
        raise OptionError(f"compare() takes a Ranking, not {type(after).__name__}: Ranking.from_json(path) reads one")
    pairs = [(before.entries[i], after.entries[j]) for i, j in pair(before.entries, after.entries)]
    same = [Change(a, b) for a, b in pairs if _same_size(a, b)]
    reshaped = [(a, b) for a, b in pairs if not _same_size(a, b)]
    if not same:
        raise OptionError(_nothing_in_common(before, after, reshaped))
    paired = ({change.before.key for change in same}, {change.after.key for change in same})
    settled = [c for c in same if {c.before.status, c.after.status} <= {"ok", "rank_deficient", "scored"}]
    pairs_of_scores = [(named.value(c.before), named.value(c.after)) for c in settled]
    known = [(a, b) for a, b in pairs_of_scores if a is not None and b is not None]
    if not known and named != KAPPA:
        raise OptionError(
            f"no matrix has {named.name!r} in both rankings: rank the weights of both again with score={named.name!r}"
        )
    return Comparison(
        changes=tuple(same),
        only_before=_lone(before, paired[0], after),
        only_after=_lone(after, paired[1], before),
        score=named.name,
        correlation=spearman([a for a, _ in known], [b for _, b in known]),
        correlated=len(known),
        caveats=tuple(_caveats(before, after, same, reshaped)),
        _before=before,
        _after=after,
    )


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values get their mean rank. nan for fewer than two different values."""
    if not first:
        return math.nan
    x, y = (_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second))
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / norm)) if norm else math.nan


def _ranks(values: Any) -> Any:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _same_size(a: TensorKappa, b: TensorKappa) -> bool:
    """Whether shapes are equal or transposed; entries of the reference implementation have no shape and always fit."""
    return not (a.numel and b.numel) or sorted(a.shape) == sorted(b.shape)


def _lone(ranking: Ranking, paired: set[str], other: Ranking) -> tuple[Unpaired, ...]:
    reasons = {skipped.name: skipped.reason for skipped in other.skipped}
    return tuple(
        Unpaired(e.key, reasons.get(e.key) or reasons.get(e.name, "")) for e in ranking.entries if e.key not in paired
    )


def _nothing_in_common(before: Ranking, after: Ranking, reshaped: Sequence[tuple[TensorKappa, TensorKappa]]) -> str:
    if reshaped:
        a, b = reshaped[0]
        return (
            f"the rankings have {len(reshaped)} names in common, but each with another shape, such as {a.key!r} with "
            f"{a.shape} and {b.shape}: they are of different models, compare rankings of one"
        )
    held = [", ".join(repr(e.key) for e in r.entries[:SHOWN]) or "nothing" for r in (before, after)]
    return (
        f"the rankings have no matrix in common: the first holds {held[0]}, the second {held[1]}. "
        "Compare rankings of one model, with the same names"
    )


def _caveats(
    before: Ranking, after: Ranking, changes: Sequence[Change], reshaped: Sequence[tuple[TensorKappa, TensorKappa]]
) -> Iterator[str]:
    ours, theirs = (serialize.mapping_of(r.metadata.get("settings")) for r in (before, after))
    for name, why in _SETTINGS.items():
        if name in ours and name in theirs and ours[name] != theirs[name]:
            yield f"{name} is {ours[name]!r} and {theirs[name]!r}: {why}"
    for ranking, which in ((before, "first"), (after, "second")):
        if ranking.metadata.get("partial"):
            yield f"the {which} ranking was interrupted: matrices are missing in it"
        if sum(entry.method == serialize.REFERENCE_METHOD for entry in ranking.entries):
            yield f"the {which} ranking has no intervals, so that no change is certain"
        if bounded := sum(entry.status == "bounded" for entry in ranking.entries):
            yield f"{bounded} matrices of the {which} ranking are only bounded (top=)"
        if scored := sum(entry.status == "scored" for entry in ranking.entries):
            yield f"{scored} matrices of the {which} ranking have no kappa, since its score needs none: rank with kappa"
    if reshaped:
        names = ", ".join(repr(a.key) for a, _ in reshaped[:SHOWN])
        yield f"{len(reshaped)} matrices have another shape in the second ranking and are left out, such as {names}"
    for what in ("dtype", "quantization"):
        kinds = Counter((getattr(c.before, what, None), getattr(c.after, what, None)) for c in changes)
        other = [kind for kind, _ in kinds.most_common() if kind[0] != kind[1] and "unknown" not in kind]
        for old, new in other[:SHOWN]:
            count = kinds[old, new]
            yield f"{what} is {old} and {new} in {count} matrices: kappa is that of the rounded weights"
    prints = [serialize.mapping_of(r.metadata.get("source")).get("fingerprint") for r in (before, after)]
    # If every matrix has its counterpart, other differences between the sources do not matter.
    paired = len(changes) == len(before.entries) == len(after.entries)
    if None not in prints and prints[0] != prints[1] and not paired:
        yield "the sources differ in names, shapes or dtypes: are they the same model?"
