"""Scores by name: what a ranking is sorted by, as a number that every entry has or has not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from ..errors import OptionError
from .entries import TensorKappa
from .statistics import OF_SPECTRUM, STATISTICS

Score = str | Callable[[TensorKappa], float]

# The fields that sort a ranking: of either end of the spectrum, of a factor or a norm, and (OF_SPECTRUM) of all of it.
OF_ENDS = ("kappa", "demmel", "sigma_max", "stable_rank", "sensitivity")
WITHOUT_ENDS = ("flatness", "flatness_by_shape", "frobenius", "participation_ratio")
NAMES = (*OF_ENDS, *WITHOUT_ENDS, *OF_SPECTRUM)
COUNTED = ("outliers_above", "outliers_below")  # to outliers_undecided
LOGARITHMIC = ("flatness", "flatness_by_shape")  # means over several matrices add them up


@dataclass(frozen=True)
class NamedScore:
    """A field of the entries as a score, lowest first; ``highest`` first is minus that field, "-flatness"."""

    name: str
    highest: bool = False

    @classmethod
    def of(cls, text: object, option: str = "score") -> NamedScore:
        """The score that a text names: one of NAMES, after a minus for the highest first.

        option: whose value the text is, for the error.

        Raises:
            OptionError: it is no such text.
        """
        name = text.removeprefix("-") if isinstance(text, str) else ""
        if not isinstance(text, str) or name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(
                f"{option}={text!r}: give a callable that takes a TensorKappa, or one of {', '.join(NAMES)}, "
                f"with a minus in front for the highest first{hint}"
            )
        return cls(name, text.startswith("-"))

    def __str__(self) -> str:
        return f"-{self.name}" if self.highest else self.name

    @property
    def needs_ends(self) -> bool:
        """Whether it takes sigma_max or sigma_min."""
        return self.name in OF_ENDS

    @property
    def statistics(self) -> tuple[str, ...]:
        """What has to be known of the statistics that not every rung gives."""
        return (self.name,) if self.name in STATISTICS else ()

    def value(self, entry: TensorKappa) -> float | None:
        """The score of an entry; None where the entry does not have it."""
        found: float | None = getattr(entry, self.name)
        if found is None or math.isnan(found):
            return None
        return -found if self.highest else found

    def interval(self, entry: TensorKappa) -> tuple[float, float] | None:
        """The interval that holds the true score; None where none is known.

        A singular matrix comes last whatever its score, as if that were inf: where it is proven to be singular this is
        the interval, else it begins where the score of a matrix of full rank may lie. Counts sort proven ones among
        themselves, so these keep their interval.
        """
        lower, upper = {
            "kappa": (entry.lower, entry.upper),
            "flatness": (entry.flatness_lower, entry.flatness_upper),
        }.get(self.name, (None, None))
        singular = entry.status == "rank_deficient"
        counted = getattr(entry, self.name) if self.name in COUNTED else None
        if counted is not None and entry.outliers_undecided is not None:
            lower, upper = counted - entry.outliers_undecided, counted + entry.outliers_undecided
        if lower is None or upper is None:
            return None
        lower, upper = (-upper, -lower) if self.highest else (lower, upper)
        if not singular:
            return lower, upper
        if entry.lower < math.inf:
            return lower, math.inf
        return (math.inf, math.inf) if counted is None else (lower, upper)


KAPPA = NamedScore("kappa")


def text_of(score: Score) -> str:
    """What the metadata of a ranking says of its score: a callable by its name, which is told from those here."""
    if isinstance(score, str):
        return str(NamedScore.of(score))
    name = str(getattr(score, "__name__", "callable"))
    return f"{name}()" if name.removeprefix("-") in NAMES else name


def score_of(metadata: Mapping[str, Any]) -> NamedScore | None:
    """The score by which a ranking with this metadata is sorted; None for a callable, kappa where it does not say."""
    settings = metadata.get("settings")
    text = settings.get("score", "kappa") if isinstance(settings, Mapping) else "kappa"
    name = text.removeprefix("-") if isinstance(text, str) else ""
    return NamedScore(name, str(text).startswith("-")) if name in NAMES else None


def scored(entry: TensorKappa, score: Score) -> TensorKappa:
    """The entry with its score by another measure; status "scored" or "bounded" where kappa is only bounded.

    Raises:
        OptionError: a callable raised or returned no number, or an entry with a known kappa does not have the score.
    """
    if entry.status == "non_finite":
        return replace(entry, score=math.nan)
    known = entry.status in ("ok", "rank_deficient")
    if callable(score):
        return entry if entry.status == "bounded" else replace(entry, score=_called(score, entry))
    chosen = NamedScore.of(score)
    value = chosen.value(entry)
    if value is not None:
        return replace(entry, score=value, status=entry.status if known else "scored")
    if entry.status == "rank_deficient":  # such as the sensitivity: they come last in any case
        return replace(entry, score=math.inf)
    if not known:
        return replace(entry, score=math.nan, status="bounded")
    if reason := _undefined(chosen.name, entry):
        raise OptionError(
            f"{chosen.name!r} of {entry.key!r} is not defined, because {reason}: rank with another score, or "
            "leave it out with exclude="
        )
    raise OptionError(
        f"{chosen.name!r} of {entry.key!r} is not known (method {entry.method!r}): "
        f"rank the weights again with score={str(score)!r}"
    )


def _undefined(name: str, entry: TensorKappa) -> str:
    """Why an entry of full rank can never have this statistic; empty if it may have it."""
    if min(entry.shape) == 1 and name in ("flatness_by_shape", *OF_SPECTRUM):
        return "it has a single singular value"
    return "no two of its singular values differ" if name == "alpha" and entry.snr is not None else ""


def _called(score: Callable[[TensorKappa], float], entry: TensorKappa) -> float:
    try:
        value: object = score(entry)
    except Exception as error:
        raise OptionError(f"score() raised {type(error).__name__} for {entry.key!r}: {error}") from error
    try:
        number = float(value) if isinstance(value, Real) else math.nan  # numpy's numbers are Real
    except OverflowError:
        raise OptionError(f"score() returned a number for {entry.key!r} that is too large for a float") from None
    if math.isnan(number):
        raise OptionError(f"score() returned {value!r} for {entry.key!r}: it must return a number")
    return number
