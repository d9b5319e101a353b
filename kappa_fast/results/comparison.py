"""Comparison: how two rankings differ, and which of the differences are certain."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .._version import __version__
from ..errors import OptionError, missing_extra
from . import consumers, serialize
from .entries import TensorKappa
from .ranking import Ranking
from .selection import Selection
from .statistics import STATISTICS
from .units import UnitName

if TYPE_CHECKING:
    import pandas

    from .consumers import ComparisonTable

COMPARISON_FORMAT = "kappa_fast comparison"
Verdict = Literal["identical", "within", "up", "down", "incomparable"]


@dataclass(frozen=True)
class Change:
    """One matrix in both rankings."""

    before: TensorKappa
    after: TensorKappa

    @property
    def key(self) -> str:
        """The key of the matrix in the first ranking."""
        return self.before.key

    @property
    def ratio(self) -> float:
        """Kappa after over kappa before; nan where one of both is not known, 1 if both are infinite."""
        before, after = self.before.kappa, self.after.kappa
        if math.isinf(before) and math.isinf(after):
            return 1.0
        return _divided(after, before)

    @property
    def at_least(self) -> float:
        """The factor by which kappa certainly moved, up or down: 1 if intervals touch, inf if a nan or inf appeared.

        For any kappas within both intervals, their ratio is at least this factor, or at most its inverse.
        """
        if self.verdict == "up":
            return _divided(self.after.lower, self.before.upper)
        if self.verdict == "down":
            return _divided(self.before.lower, self.after.upper)
        return math.inf if self.broke else 1.0

    @property
    def broke(self) -> bool:
        """Whether the weights have NaNs or infinities after, and had none before."""
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
        if a.status == "scored":  # without kappa its statistics tell
            return "identical" if same and _statistics(a) == _statistics(b) else "within"
        return "identical" if same and (a.kappa == b.kappa or a.status == "bounded") else "within"

    @property
    def size(self) -> float:
        """The ratio of the larger to the smaller estimate, at least 1; 0 where it is not known."""
        ratio = self.ratio
        if math.isnan(ratio):
            return 0.0
        return max(ratio, 1 / ratio) if ratio > 0 else math.inf


@dataclass(frozen=True)
class Unpaired:
    """A matrix that only one ranking has. ``reason``: why the other ranking skipped it, "" if it lacks the matrix."""

    key: str
    reason: str


@dataclass(frozen=True)
class Overlap:
    """The selections of one budget from both rankings. Keys are those of the first ranking that has the matrix.

    jaccard: matrices in both selections over matrices in either.  params: the same ratio for weights, nan where sizes
    are unknown.
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
        only_before, only_after: the matrices in one ranking only.
        score: whose correlation it is, by name: "kappa" unless ``compare`` was asked for another one.
        correlation: Spearman's rank correlation of it over the matrices that have it in both (``correlated`` of them).
        caveats: sentences that say what makes both rankings hard to compare.
    """

    changes: tuple[Change, ...]
    only_before: tuple[Unpaired, ...]
    only_after: tuple[Unpaired, ...]
    score: str
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
        """The changes of status, except what depends on how far a ranking was resolved: to or from "bounded", and
        between "ok" and "scored"."""
        statuses = [(change, {change.before.status, change.after.status}) for change in self.changes]
        other = (change for change, both in statuses if len(both) > 1 and both != {"ok", "scored"})
        return tuple(c for c in other if "bounded" not in (c.before.status, c.after.status))

    def moved(self, direction: Literal["up", "down"]) -> list[Change]:
        """The changes in which kappa rose or fell, by the certain and then by the estimated factor, largest first."""
        up = direction == "up"
        found = [change for change in self.changes if change.verdict == direction]
        found += [c for c in self.changes if c.verdict == "within" and c.size > 1 and (c.ratio > 1) == up]
        return sorted(found, key=lambda change: (-change.at_least, -change.size, change.key))

    def exceeding(self, ratio: float) -> list[Change]:
        """The changes that certainly exceed this factor, up or down, and those in which a NaN or inf appeared.

        Raises:
            OptionError: the ratio is not a number from 1 on, or nothing exceeds it and some matrices have no kappa,
                because they were ranked by a score that needs none.
        """
        number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        if not number or not 1 <= ratio < math.inf:
            raise OptionError(f"ratio={ratio!r}: give a factor from 1 on, such as 1.5")
        found = [change for change in self.changes if change.at_least > ratio]
        unknown = [c for c in self.changes if "scored" in (c.before.status, c.after.status) and math.isnan(c.ratio)]
        if unknown and not found:
            raise OptionError(
                f"nothing is known of kappa for {len(unknown)} matrices, {unknown[0].key!r} among them, whose score "
                "needs none: rank both models by kappa, without score="
            )
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
        fill: bool = False,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> Overlap:
        """The selections of the same budget from both rankings; the options are those of ``Ranking.select``.

        Raises:
            OptionError: select() raises it; the message says for which ranking.
        """
        options: dict[str, Any] = dict(num_tensors=num_tensors, top_p=top_p, max_kappa=max_kappa)
        options |= dict(max_params=max_params, per_group=per_group, unit=unit, fill=fill)
        options |= dict(include=include, exclude=exclude)
        chosen = [_select(r, options, which) for r, which in ((self._before, "first"), (self._after, "second"))]
        first, second = ({entry.key: entry for entry in selection} for selection in chosen)
        partner = {change.after.key: change.before.key for change in self.changes}
        names = {key: partner.get(key, key) for key in second}
        here = {names[key] for key in second if key in partner}  # an equal key of an unpaired matrix does not count
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
        return consumers.html_of_comparison(self)

    def __str__(self) -> str:
        return self.to_text()

    def table(self, limit: int | None = 10, overlap: Overlap | None = None) -> ComparisonTable:
        """A table for ``rich`` with ``limit`` moves in each direction (None: all), fitted to the width of the page."""
        return consumers.ComparisonTable(self, limit, overlap)

    def to_text(self, limit: int | None = 10, overlap: Overlap | None = None, width: int = 100) -> str:
        """The comparison as plain text.

        Raises:
            OptionError: less than 60 columns, or ``limit`` is not a count.
        """
        return self.table(limit, overlap).to_text(width)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each matrix in both: key, layer, group, shape, verdict, ratio, at_least, and both entries' kappa,
        lower, upper, status, certified and dtype.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise missing_extra("pandas", "dataframe", "Comparison.to_dataframe()") from error
        return consumers.frame_of_comparison(self, pandas)

    def plot(self, path: str | os.PathLike[str] | None = None, *, ax: Any = None) -> Any:
        """Draw the factors by which kappa moved, layers by types of matrices; returns the matplotlib Figure.

        Args:
            path: a file for the figure; its name ends in .png, .svg or .pdf.
            ax: axes to draw into.

        Raises:
            OptionError: the name has another ending, or there is nothing to plot.
            MissingExtraError: matplotlib is not installed.
            RankingFileError: the file cannot be written.
        """
        return consumers.plot_comparison(self, path, ax)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write an HTML page: the matrices that moved, the picture of ``plot()``, and the matrices of one ranking only.

        Raises:
            MissingExtraError: jinja2 or matplotlib is not installed.
            RankingFileError: the file cannot be written.
        """
        consumers.write_comparison(self, path)

    def to_json(self, path: str | os.PathLike[str], overlap: Overlap | None = None) -> None:
        """Write the comparison to a file, replacing it all at once.

        Raises:
            RankingFileError: the file cannot be written.
        """
        serialize.write_document(path, self.document(overlap))

    def document(self, overlap: Overlap | None = None) -> dict[str, Any]:
        """The comparison as plain JSON: the rankings and their settings, then the differences."""
        document = {
            "format": COMPARISON_FORMAT,
            "version": serialize.VERSION,
            "kappa_fast": __version__,
            "names": [consumers.title_of(r.metadata) for r in (self._before, self._after)],
            "settings": [serialize.thaw(r.metadata.get("settings", {})) for r in (self._before, self._after)],
            "sources": [serialize.thaw(r.metadata.get("source", {})) for r in (self._before, self._after)],
            "counts": dict(self.counts),
            "score": self.score,
            "correlation": self.correlation,
            "correlated": self.correlated,
            "caveats": list(self.caveats),
            "selection": None if overlap is None else vars(overlap),
            "changes": [_encode(change) for change in self.changes],
            "only_before": [vars(lone) for lone in self.only_before],
            "only_after": [vars(lone) for lone in self.only_after],
        }
        found: dict[str, Any] = serialize.thaw(serialize.freeze(document, "comparison"))
        return found


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


def _statistics(entry: TensorKappa) -> list[float | None]:
    return [getattr(entry, name) for name in STATISTICS]


def _divided(a: float, b: float) -> float:
    # A file may claim that a kappa is 0, although none can be.
    return a / b if b else math.nan if not a else math.inf
