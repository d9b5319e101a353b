"""Comparison: how two rankings differ, and which of the differences are certain."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import serialize
from .entries import TensorKappa
from .errors import OptionError
from .pairing import pair
from .selection import Selection
from .units import UnitName

if TYPE_CHECKING:
    from .ranking import Ranking
    from .report.comparison import ComparisonTable

COMPARISON_FORMAT = "kappa_fast comparison"
Verdict = Literal["identical", "within", "up", "down", "incomparable"]

# What makes numbers differ that are the same, or the same that differ; and how to say it.
_SETTINGS = {
    "rtol": "intervals of one are wider than those of the other",
    "certify": "the intervals of only one are proven",
    "fused": "parts of fused projections are in only one of them",
    "score": "the orders mean different things",
}
SHOWN = 3


@dataclass(frozen=True)
class Change:
    """One matrix in both rankings."""

    before: TensorKappa
    after: TensorKappa

    @property
    def key(self) -> str:
        """As the first ranking has it."""
        return self.before.key

    @property
    def ratio(self) -> float:
        """Kappa after over kappa before; nan where one of them is not known, 1 if both are infinite."""
        before, after = self.before.kappa, self.after.kappa
        if math.isinf(before) and math.isinf(after):
            return 1.0
        return _divided(after, before)

    @property
    def at_least(self) -> float:
        """By which factor kappa certainly moved, up or down: 1 where the intervals touch, inf if a nan or inf appeared.

        Wherever in its interval each kappa is, their ratio is at least this (or at most its inverse).
        """
        if self.verdict == "up":
            return _divided(self.after.lower, self.before.upper)
        if self.verdict == "down":
            return _divided(self.before.lower, self.after.upper)
        return math.inf if self.broke else 1.0

    @property
    def broke(self) -> bool:
        """Whether there are NaNs or infinities among the weights now, and were none before."""
        return self.after.status == "non_finite" != self.before.status

    @property
    def verdict(self) -> Verdict:
        """ "up" and "down" where the intervals are disjoint, "within" where they are not, "identical" to the last bit,
        "incomparable" if the weights of one hold a NaN or inf."""
        a, b = self.before, self.after
        if "non_finite" in (a.status, b.status):
            return "identical" if a.status == b.status else "incomparable"
        if a.upper < b.lower:
            return "up"
        if b.upper < a.lower:
            return "down"
        same = (a.status, a.lower, a.upper) == (b.status, b.lower, b.upper)
        return "identical" if same and (a.kappa == b.kappa or a.status == "bounded") else "within"

    @property
    def size(self) -> float:
        """How far the estimate moved, whichever way: a ratio of at least 1; 0 where it is not known."""
        ratio = self.ratio
        if math.isnan(ratio):
            return 0.0
        return max(ratio, 1 / ratio) if ratio > 0 else math.inf


@dataclass(frozen=True)
class Lone:
    """A matrix that only one ranking has; ``reason`` is why the other one skipped it, "" if it does not know it."""

    key: str
    reason: str


@dataclass(frozen=True)
class Overlap:
    """What one and the same budget takes from both rankings. Keys as in the ranking that has them, first as before.

    jaccard: matrices in both over matrices in either.  params: the same for weights, nan where sizes are unknown.
    """

    budget: str
    before: int
    after: int
    both: tuple[str, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    jaccard: float
    params: float


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """How two rankings of a model differ: before and after training, of one dtype and of another.

    Attributes:
        changes: the matrices in both, in the order of the first ranking.
        only_before, only_after: those in one only.
        correlation: Spearman's rank correlation of kappa over the matrices resolved in both (``correlated`` of them).
        caveats: what makes the two hard to compare, in words.
    """

    changes: tuple[Change, ...]
    only_before: tuple[Lone, ...]
    only_after: tuple[Lone, ...]
    correlation: float
    correlated: int
    caveats: tuple[str, ...]
    _before: Ranking
    _after: Ranking

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    @property
    def counts(self) -> Mapping[Verdict, int]:
        """How many changes have each verdict."""
        found = Counter(change.verdict for change in self.changes)
        return {verdict: found[verdict] for verdict in ("identical", "within", "up", "down", "incomparable")}

    @property
    def status_changes(self) -> tuple[Change, ...]:
        """Those whose status is another. "bounded" is none of the weights, but of how far they were resolved."""
        statuses = [(change, {change.before.status, change.after.status}) for change in self.changes]
        return tuple(change for change, both in statuses if len(both) > 1 and "bounded" not in both)

    def moved(self, direction: Literal["up", "down"]) -> list[Change]:
        """Those whose kappa rose or fell, certainly or not: by how far for certain, then by how far at all."""
        up = direction == "up"
        found = [change for change in self.changes if change.verdict == direction]
        found += [c for c in self.changes if c.verdict == "within" and c.size > 1 and (c.ratio > 1) == up]
        return sorted(found, key=lambda change: (-change.at_least, -change.size, change.key))

    def exceeding(self, ratio: float) -> list[Change]:
        """Those that certainly moved by more than this factor, up or down, or that hold a NaN or inf now.

        Raises:
            OptionError: the ratio is no number from 1 on.
        """
        number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        if not number or not 1 <= ratio < math.inf:
            raise OptionError(f"ratio={ratio!r}: give a factor from 1 on, such as 1.5")
        found = [change for change in self.changes if change.at_least > ratio]
        return sorted(found, key=lambda change: (-change.at_least, change.key))

    def overlap(
        self,
        *,
        num_tensors: int | None = None,
        top_p: float | None = None,
        max_kappa: float | None = None,
        max_params: float | None = None,
        per_group: bool = False,
        unit: UnitName = "matrix",
    ) -> Overlap:
        """What the same budget selects from both; the options are those of ``Ranking.select``.

        Raises:
            OptionError: as select() does; the message says for which of the two.
        """
        options: dict[str, Any] = dict(num_tensors=num_tensors, top_p=top_p, max_kappa=max_kappa)
        options |= dict(max_params=max_params, per_group=per_group, unit=unit)
        chosen = [_select(r, options, which) for r, which in ((self._before, "first"), (self._after, "second"))]
        first, second = ({entry.key: entry for entry in selection} for selection in chosen)
        partner = {change.after.key: change.before.key for change in self.changes}
        names = {key: partner.get(key, key) for key in second}
        here = {names[key] for key in second if key in partner}  # a key that only looks alike is none
        both = tuple(key for key in first if key in here)
        kept = set(both)
        only_before = tuple(key for key in first if key not in kept)
        only_after = tuple(key for key in second if not (key in partner and names[key] in kept))
        weights = [sum(first[k].numel for k in both), sum(first[k].numel for k in only_before)]
        weights.append(sum(second[k].numel for k in only_after))
        known = all(entry.numel for entry in (*first.values(), *second.values()))
        extra = (", per_group" if per_group else "") + (f", unit={unit}" if unit != "matrix" else "")
        return Overlap(
            budget=", ".join(f"{name}={value}" for name, value in chosen[0].budgets.items()) + extra,
            before=len(first),
            after=len(second),
            both=both,
            only_before=only_before,
            only_after=only_after,
            jaccard=len(both) / (len(both) + len(only_before) + len(only_after)),
            params=weights[0] / sum(weights) if known else math.nan,
        )

    def __repr__(self) -> str:
        found = self.counts
        moved = f"{found['up']} certainly up, {found['down']} certainly down, {found['within']} within their intervals"
        lone = f"{len(self.only_before)} and {len(self.only_after)} in one only"
        return f"Comparison({len(self)} matrices in both: {moved}, {found['identical']} identical; {lone})"

    def _repr_html_(self) -> str:
        from .report.notebook import html_of_comparison

        return html_of_comparison(self)

    def __str__(self) -> str:
        return self.to_text()

    def table(self, limit: int | None = 10, overlap: Overlap | None = None) -> ComparisonTable:
        """What ``rich`` prints: ``limit`` moves in each direction (None: all), fitted to the page."""
        from .report.comparison import ComparisonTable

        return ComparisonTable(self, limit, overlap)

    def to_text(self, limit: int | None = 10, overlap: Overlap | None = None, width: int = 100) -> str:
        """The comparison as plain text.

        Raises:
            OptionError: less than 60 columns, or ``limit`` is no count.
        """
        return self.table(limit, overlap).to_text(width)

    def to_json(self, path: str | os.PathLike[str], overlap: Overlap | None = None) -> None:
        """Write the comparison to a file, replacing it all at once.

        Raises:
            RankingFileError: the file cannot be written.
        """
        document = {
            "format": COMPARISON_FORMAT,
            "version": serialize.VERSION,
            "counts": dict(self.counts),
            "correlation": self.correlation,
            "correlated": self.correlated,
            "caveats": list(self.caveats),
            "selection": None if overlap is None else vars(overlap),
            "changes": [_encode(change) for change in self.changes],
            "only_before": [vars(lone) for lone in self.only_before],
            "only_after": [vars(lone) for lone in self.only_after],
        }
        serialize.write_document(path, serialize.thaw(serialize.freeze(document, "comparison")))


def compare(before: Ranking, after: object) -> Comparison:
    """What ``Ranking.compare`` promises."""
    from .ranking import Ranking

    if not isinstance(after, Ranking):
        raise OptionError(f"compare() takes a Ranking, not {type(after).__name__}: Ranking.from_json(path) reads one")
    pairs = [(before.entries[i], after.entries[j]) for i, j in pair(before.entries, after.entries)]
    same = [Change(a, b) for a, b in pairs if _same_size(a, b)]
    reshaped = [(a, b) for a, b in pairs if not _same_size(a, b)]
    if not same:
        raise OptionError(_nothing_in_common(before, after, reshaped))
    paired = ({change.before.key for change in same}, {change.after.key for change in same})
    resolved = [c for c in same if {c.before.status, c.after.status} <= {"ok", "rank_deficient"}]
    return Comparison(
        changes=tuple(same),
        only_before=_lone(before, paired[0], after),
        only_after=_lone(after, paired[1], before),
        correlation=spearman([c.before.kappa for c in resolved], [c.after.kappa for c in resolved]),
        correlated=len(resolved),
        caveats=tuple(_caveats(before, after, same, reshaped)),
        _before=before,
        _after=after,
    )


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, the mean rank where values are equal; nan for fewer than two different values."""
    if not first:
        return math.nan
    x, y = (_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second))
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / norm)) if norm else math.nan


def _ranks(values: Any) -> Any:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _divided(a: float, b: float) -> float:
    # No kappa is 0, but a file may say so.
    return a / b if b else math.nan if not a else math.inf


def _same_size(a: TensorKappa, b: TensorKappa) -> bool:
    """Same shape or transposed; the reference implementation's entries know none."""
    return not (a.numel and b.numel) or sorted(a.shape) == sorted(b.shape)


def _lone(ranking: Ranking, paired: set[str], other: Ranking) -> tuple[Lone, ...]:
    reasons = {skipped.name: skipped.reason for skipped in other.skipped}
    return tuple(
        Lone(e.key, reasons.get(e.key) or reasons.get(e.name, "")) for e in ranking.entries if e.key not in paired
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
    ours, theirs = (_mapping(r.metadata.get("settings")) for r in (before, after))
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
    if reshaped:
        names = ", ".join(repr(a.key) for a, _ in reshaped[:SHOWN])
        yield f"{len(reshaped)} matrices have another shape in the second ranking and are left out, such as {names}"
    for what in ("dtype", "quantization"):
        kinds = Counter((getattr(c.before, what, None), getattr(c.after, what, None)) for c in changes)
        other = [kind for kind, _ in kinds.most_common() if kind[0] != kind[1] and "unknown" not in kind]
        for old, new in other[:SHOWN]:
            count = kinds[old, new]
            yield f"{what} is {old} and {new} in {count} matrices: kappa is that of the rounded weights"
    prints = [_mapping(r.metadata.get("source")).get("fingerprint") for r in (before, after)]
    # Where every matrix has its counterpart, it does not matter what a file calls the rest, or which of it there is.
    paired = len(changes) == len(before.entries) == len(after.entries)
    if None not in prints and prints[0] != prints[1] and not paired:
        yield "the sources differ in names, shapes or dtypes: are they the same model?"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _select(ranking: Ranking, options: Mapping[str, Any], which: str) -> Selection:
    try:
        return ranking.select(**options)
    except OptionError as error:
        raise OptionError(f"the {which} ranking: {error}") from error


def _encode(change: Change) -> dict[str, Any]:
    def known(entry: TensorKappa) -> dict[str, Any]:
        names: Iterable[str] = ("key", "status", "kappa", "lower", "upper", "certified", "dtype")
        return {name: getattr(entry, name) for name in names}

    return {
        "key": change.key,
        "verdict": change.verdict,
        "ratio": change.ratio,
        "at_least": change.at_least,
        "before": known(change.before),
        "after": known(change.after),
    }
