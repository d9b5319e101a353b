"""What the cache knows of one content, and when that answers a question.

A Record has three places, since a proof may be wider than the estimate: what was found without proofs, with them, and
the lower bound of a probe. A question (Wanted, Bound) reads the place that a run without a cache would have filled; so
a run that was killed and goes on finds exactly what it had found, and decides as it would have decided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar, get_args

from ..results.entries import Status
from ..spectrum.resolution import Goal, Resolution

R = TypeVar("R")


@dataclass(frozen=True)
class Answer:
    """A result, and the smallest ``rtol`` for which asking again would bring nothing better (inf: none)."""

    found: Resolution
    rtol: float

    def serves(self, goal: Goal) -> bool:
        """Whether ``resolve`` need not be called for this goal, proofs aside."""
        return self.is_narrow(goal) or self.rtol <= goal.rtol

    def is_narrow(self, goal: Goal) -> bool:
        """Whether the interval is what the goal wants, or shows that kappa is beyond its cutoff, or there is none."""
        found = self.found
        return found.status != "ok" or found.half_width <= goal.rtol or found.lower > goal.cutoff


@dataclass(frozen=True)
class Probe:
    """A proven lower bound of kappa that was looked for above ``cutoff``; 1 where that could not be shown."""

    lower: float
    cutoff: float


@dataclass(frozen=True)
class Record:
    """All that is known of one content."""

    plain: Answer | None = None
    proven: Answer | None = None
    probe: Probe | None = None

    def merged(self, later: Record) -> Record:
        """Both together: of two answers the tighter one, of two probes the later one."""
        return Record(_tighter(self.plain, later.plain), _tighter(self.proven, later.proven), later.probe or self.probe)


def _tighter(old: Answer | None, new: Answer | None) -> Answer | None:
    if old is None or new is None:
        return new or old
    demanding = new if new.rtol <= old.rtol else old
    if old.found.status != "ok" or new.found.status != "ok":
        return demanding
    narrow = min((demanding, old, new), key=lambda answer: answer.found.half_width)
    return Answer(narrow.found, demanding.rtol)


class Question(Protocol[R]):
    """What is to be known of every matrix of a wave."""

    def answer(self, record: Record) -> R | None:
        """The answer, if the record holds one that is good enough."""

    def record(self, found: R) -> Record:
        """What was found by computing."""


@dataclass(frozen=True)
class Wanted(Question[Resolution]):
    """A Resolution that meets the goal."""

    goal: Goal

    def answer(self, record: Record) -> Resolution | None:
        plain, proven = record.plain, record.proven
        if not self.goal.certify:
            if plain is not None and plain.serves(self.goal):
                return plain.found
            # A proof that came out wider than asked for must not stand in for the narrower estimate.
            return proven.found if proven is not None and proven.is_narrow(self.goal) else None
        if proven is not None and proven.serves(self.goal):
            return proven.found
        if plain is None or not plain.is_narrow(self.goal):
            return None
        found = plain.found  # of these there is nothing to prove, or it is proven, or it will only be a bound
        final = found.status != "ok" or found.certified or found.lower > self.goal.cutoff
        return found if final else None

    def record(self, found: Resolution) -> Record:
        stopped = found.status == "ok" and found.half_width > self.goal.rtol and found.lower > self.goal.cutoff
        answer = Answer(found, math.inf if stopped else self.goal.rtol)
        return Record(proven=answer) if self.goal.certify else Record(plain=answer)


@dataclass(frozen=True)
class Bound(Question[float]):
    """A proven lower bound of kappa, wanted above ``cutoff``."""

    cutoff: float

    def answer(self, record: Record) -> float | None:
        probe = record.probe
        if probe is not None and (probe.lower > self.cutoff or probe.cutoff == self.cutoff):
            return probe.lower
        answers = [answer.found for answer in (record.plain, record.proven) if answer is not None]
        lowers = [found.lower for found in answers if found.status == "ok"]
        if lowers:
            return max(1.0, *lowers)
        return 1.0 if answers else None  # singular or not finite: to be reported as such, not as a bound

    def record(self, found: float) -> Record:
        return Record(probe=Probe(found, self.cutoff))


def encode(record: Record) -> dict[str, Any]:
    """Plain JSON; what JSON has no numbers for as "nan", "inf", "-inf"."""
    document: dict[str, Any] = {}
    for name, answer in (("plain", record.plain), ("proven", record.proven)):
        if answer is not None:
            document[name] = {"rtol": _number(answer.rtol)}
            document[name] |= {key: _number(value) for key, value in vars(answer.found).items()}
    if record.probe is not None:
        document["probe"] = {"lower": _number(record.probe.lower), "cutoff": _number(record.probe.cutoff)}
    return document


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode(document: Any) -> Record:
    """What ``encode`` wrote.

    Raises:
        ValueError: it is no such thing, or says what cannot be.
    """
    if not isinstance(document, dict):
        raise ValueError("no record")
    raw = document.get("probe")
    if raw is not None and not isinstance(raw, dict):
        raise ValueError("no probe")
    probe = None if raw is None else Probe(_float(raw, "lower"), _float(raw, "cutoff"))
    if probe is not None and (not probe.lower >= 1 or math.isnan(probe.cutoff)):
        raise ValueError("a bound that is none")
    return Record(_answer(document.get("plain")), _answer(document.get("proven")), probe)


_FLOATS = tuple(item.name for item in fields(Resolution) if item.name not in ("status", "method", "certified"))
_STATUSES = get_args(Status)


def _answer(raw: Any) -> Answer | None:
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ValueError("no answer")
    numbers = {name: _float(raw, name) for name in _FLOATS}
    status: Any = raw.get("status")
    method, certified = raw.get("method"), raw.get("certified")
    if status not in _STATUSES or not isinstance(method, str) or not isinstance(certified, bool):
        raise ValueError("no status, method or certified")
    found = Resolution(status=status, method=method, certified=certified, **numbers)
    if not _says_what_can_be(found):
        raise ValueError("an interval that is none")
    rtol = _float(raw, "rtol")
    if not rtol >= 0:
        raise ValueError("an rtol that is none")
    return Answer(found, rtol)


def _says_what_can_be(found: Resolution) -> bool:
    if found.status == "ok":
        return 1 <= found.lower <= found.kappa <= found.upper and math.isfinite(found.kappa)
    if found.status == "rank_deficient":
        return found.kappa == found.upper == math.inf and found.lower >= 1
    return found.status == "non_finite" and math.isnan(found.kappa)


def _float(raw: dict[str, Any], name: str) -> float:
    value = raw.get(name)
    if type(value) is float:  # nearly always
        return value
    if value in ("nan", "inf", "-inf") or (isinstance(value, int) and not isinstance(value, bool)):
        try:
            return float(value)
        except OverflowError:
            pass
    raise ValueError(f"{name!r} is no number")
