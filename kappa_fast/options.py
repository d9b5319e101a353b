"""Options: the arguments of rank() that decide a result. Every caller builds them here, where they are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .errors import OptionError
from .results.scores import KAPPA, NamedScore, Score, text_of
from .results.statistics import REQUESTED
from .sources.filters import Filters, Patterns
from .spectrum.resolution import Goal


@dataclass(frozen=True)
class Options:
    """The arguments of rank() under their own names; the docstring of rank() says what each of them means.

    Attributes:
        filters: selects the parameters that are ranked.
        goal: says how narrow the interval of every matrix has to be.

    Raises:
        OptionError: a value has the wrong type, is out of range, or cannot be combined with another value.
    """

    top: int | float | None = None
    top_per_group: bool = False
    rtol: float = 1e-2
    certify: bool | Literal["selection"] = False
    score: Score = "kappa"
    statistics: str | Sequence[str] | None = None
    include: Patterns = None
    exclude: Patterns = None
    embeddings: bool = False
    routers: bool = False
    fused: Literal["split", "stored"] = "split"
    adapters: Literal["base", "merged"] | None = None
    min_dim: int = 16
    max_dim: int | None = None
    filters: Filters = field(init=False, repr=False, compare=False)
    goal: Goal = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_top()
        if not isinstance(self.rtol, (int, float)) or isinstance(self.rtol, bool) or not 1e-8 <= self.rtol < 1:
            raise OptionError(f"rtol={self.rtol!r}: give a relative half-width from 1e-8 to below 1")
        if not isinstance(self.certify, bool) and not (isinstance(self.certify, str) and self.certify == "selection"):
            raise OptionError(f"certify={self.certify!r}: give True, False or 'selection'")
        if isinstance(self.certify, str) and self.top is None:
            raise OptionError("certify='selection' proves what decides who is in the top: give top= as well")
        self._check_score()
        chosen = {f.name: getattr(self, f.name) for f in fields(Filters)}
        object.__setattr__(self, "filters", Filters(**{**chosen, "adapters": self.adapters or "base"}))
        named = None if callable(self.score) else NamedScore.of(self.score)
        ends = named is None or named.needs_ends or self.certify is not False
        wanted = tuple(dict.fromkeys((*(() if named is None else named.statistics), *self._requested())))
        object.__setattr__(self, "goal", Goal(self.rtol, self.certify is True, ends=ends, statistics=wanted))

    def _check_score(self) -> None:
        if callable(self.score):
            return
        named = NamedScore.of(self.score)
        if self.top is not None and named != KAPPA and self.certify != "selection":
            raise OptionError(
                f"top= with score={str(self.score)!r} would save nothing, since no bound of such a score is cheaper "
                "than the score itself: leave top out, and then select(num_tensors=10) takes the first 10"
            )

    def _requested(self) -> list[str]:
        """The statistics that ``statistics`` asks for."""
        several = isinstance(self.statistics, list | tuple | set | frozenset)
        given: tuple[Any, ...] = () if self.statistics is None else (self.statistics,)
        given = tuple(self.statistics or ()) if several else given
        if any(not isinstance(name, str) or name not in REQUESTED for name in given):
            raise OptionError(
                f"statistics={self.statistics!r}: give one or several of {', '.join(map(repr, REQUESTED))}"
            )
        if given and self.top is not None and self.score == "kappa":
            raise OptionError("statistics= takes every matrix, and top= leaves some: give one of both")
        return [statistic for name in given for statistic in REQUESTED[name]]

    def _check_top(self) -> None:
        if self.top is not None:
            count = isinstance(self.top, int) and not isinstance(self.top, bool) and self.top >= 1
            share = isinstance(self.top, float) and 0 < self.top <= 1
            if not (count or share):
                raise OptionError(
                    f"top={self.top!r}: give a count (1 or more) or a share of all entries as a float in (0, 1]"
                )
        if not isinstance(self.top_per_group, bool):
            raise OptionError(f"top_per_group={self.top_per_group!r}: give True or False")

    @property
    def proofs(self) -> bool:
        """Whether at least one interval has to be proven."""
        return self.certify is not False

    def settings(self) -> dict[str, Any]:
        """Plain JSON for ``Ranking.metadata["settings"]`` and ``Plan.settings``; a callable is given by its name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        found["score"] = text_of(self.score)
        found["adapters"] = self.filters.adapters
        found["statistics"] = self.statistics if isinstance(self.statistics, str | None) else list(self.statistics)
        for name in ("include", "exclude"):
            kept = getattr(self.filters, name)
            found[name] = found[name] if isinstance(found[name], str) or kept is None else list(kept)
        return found
