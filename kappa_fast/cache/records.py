"""Records, which hold what the cache knows of one content, and queries, which say when that answers a step of a run.

The cache, the steps of ``execution/`` and the ranks of ``distributed/`` use both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar, get_args

from ..results.entries import Status
from ..results.statistics import COUNTS, STATISTICS, Statistics
from ..spectrum.resolution import Goal, Resolution

R = TypeVar("R")


@dataclass(frozen=True)
class StoredResolution:
    """A resolution, and the smallest ``rtol`` for which computing again would bring nothing better (inf: none)."""

    resolution: Resolution
    rtol: float

    def serves(self, goal: Goal) -> bool:
        """Whether ``resolve`` need not be called for this goal, proofs aside."""
        return self.is_narrow(goal) or self.rtol <= goal.rtol

    def is_narrow(self, goal: Goal) -> bool:
        """Whether the interval is what the goal wants, or shows that kappa is beyond its cutoff, or there is none."""
        resolution = self.resolution
        return resolution.status != "ok" or resolution.half_width <= goal.rtol or resolution.lower > goal.cutoff


@dataclass(frozen=True)
class Probe:
    """A proven lower bound of kappa that was looked for above ``cutoff``; 1 where that could not be shown."""

    lower: float
    cutoff: float


@dataclass(frozen=True)
class Record:
    """All that is known of one content: the resolution without proofs, the one with proofs, the bound of a probe, and
    the statistics that were measured without a resolution.

    A proof may be wider than an estimate, so each has a place of its own. A query reads the place that a run without a
    cache would have filled: a run that was killed and goes on finds what it had found, and decides as it would have.
    """

    plain: StoredResolution | None = None
    proven: StoredResolution | None = None
    probe: Probe | None = None
    measured: StoredResolution | None = None

    def merged(self, later: Record) -> Record:
        """Both together: of two resolutions the tighter one, with all statistics, and of two probes the later one."""
        return Record(
            _tighter(self.plain, later.plain),
            _tighter(self.proven, later.proven),
            later.probe or self.probe,
            _tighter(self.measured, later.measured),
        )


def _tighter(old: StoredResolution | None, new: StoredResolution | None) -> StoredResolution | None:
    if old is None or new is None:
        return new or old
    demanding = new if new.rtol <= old.rtol else old
    if old.resolution.status != "ok" or new.resolution.status != "ok":
        kept = demanding
    else:
        kept = min((demanding, old, new), key=lambda stored: stored.resolution.half_width)
    known = kept.resolution.statistics.filled((new if kept is old else old).resolution.statistics)
    return StoredResolution(replace(kept.resolution, statistics=known), demanding.rtol)


class Query(Protocol[R]):
    """What a step of a run needs to know of every matrix."""

    @property
    def certify(self) -> bool:
        """Whether the result must be proven."""

    def answer(self, record: Record) -> R | None:
        """The result that the record holds, if it is good enough; else None."""

    def record_of(self, result: R) -> Record:
        """The record of a result that was computed."""


@dataclass(frozen=True)
class ResolutionQuery(Query[Resolution]):
    """A Resolution that meets the goal."""

    goal: Goal

    @property
    def certify(self) -> bool:
        """As the goal says."""
        return self.goal.certify

    def answer(self, record: Record) -> Resolution | None:
        plain, proven = (self._measured(stored) for stored in (record.plain, record.proven))
        if not self.goal.ends:
            # An interval of the flatness is wide where the rtol was: what another run had may not be narrow enough.
            resolved = next((s.resolution for s in (plain, proven) if s is not None and s.serves(self.goal)), None)
            measured = self._measured(record.measured)
            if resolved is not None or measured is None or measured.rtol > self.goal.rtol:
                return resolved
            return measured.resolution
        if not self.goal.certify:
            if plain is not None and plain.serves(self.goal):
                return plain.resolution
            # A proof that came out wider than asked for must not stand in for the narrower estimate.
            return proven.resolution if proven is not None and proven.is_narrow(self.goal) else None
        if proven is not None and proven.serves(self.goal):
            return proven.resolution
        if plain is None or not plain.is_narrow(self.goal):
            return None
        estimate = plain.resolution  # of these there is nothing to prove, or it is proven, or it will only be a bound
        final = estimate.status != "ok" or estimate.certified or estimate.lower > self.goal.cutoff
        return estimate if final else None

    def _measured(self, stored: StoredResolution | None) -> StoredResolution | None:
        """The resolution if it has the statistics that are wanted."""
        if stored is None or stored.resolution.status == "non_finite":
            return stored
        known = stored.resolution.statistics
        return None if any(getattr(known, name) is None for name in self.goal.statistics) else stored

    def record_of(self, result: Resolution) -> Record:
        if result.status == "bounded":
            return Record(measured=StoredResolution(result, self.goal.rtol))
        stopped = result.status == "ok" and result.half_width > self.goal.rtol and result.lower > self.goal.cutoff
        stored = StoredResolution(result, math.inf if stopped else self.goal.rtol)
        return Record(proven=stored) if self.goal.certify else Record(plain=stored)


@dataclass(frozen=True)
class LowerBoundQuery(Query[float]):
    """A proven lower bound of kappa, looked for above ``cutoff``."""

    cutoff: float

    @property
    def certify(self) -> bool:
        """False: a lower bound needs no proof of the upper end."""
        return False

    def answer(self, record: Record) -> float | None:
        probe = record.probe
        if probe is not None and (probe.lower > self.cutoff or probe.cutoff == self.cutoff):
            return probe.lower
        resolutions = [stored.resolution for stored in (record.plain, record.proven) if stored is not None]
        lowers = [resolution.lower for resolution in resolutions if resolution.status == "ok"]
        if lowers:
            return max(1.0, *lowers)
        return 1.0 if resolutions else None  # singular or not finite: to be reported as such, not as a bound

    def record_of(self, result: float) -> Record:
        return Record(probe=Probe(result, self.cutoff))


def encode(record: Record) -> dict[str, Any]:
    """Plain JSON; what JSON has no numbers for as "nan", "inf", "-inf"."""
    document: dict[str, Any] = {}
    for name, stored in (("plain", record.plain), ("proven", record.proven), ("measured", record.measured)):
        if stored is not None:
            document[name] = {"rtol": _number(stored.rtol)}
            numbers = {key: _number(value) for key, value in vars(stored.resolution).items() if key != "statistics"}
            known = {key: _number(value) for key, value in vars(stored.resolution.statistics).items()}
            document[name] |= numbers | {key: value for key, value in known.items() if value is not None}
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
    plain, proven, measured = (_resolution(document.get(name)) for name in ("plain", "proven", "measured"))
    if any(found is not None and found.resolution.status == "bounded" for found in (plain, proven)):
        raise ValueError("a resolution without kappa")
    return Record(plain, proven, probe, measured)


_FLOATS = tuple(
    item.name for item in fields(Resolution) if item.name not in ("status", "method", "certified", "statistics")
)
_STATUSES = get_args(Status)


def _resolution(raw: Any) -> StoredResolution | None:
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ValueError("no resolution")
    numbers = {name: _float(raw, name) for name in _FLOATS}
    status: Any = raw.get("status")
    method, certified = raw.get("method"), raw.get("certified")
    if status not in _STATUSES or not isinstance(method, str) or not isinstance(certified, bool):
        raise ValueError("no status, method or certified")
    found: dict[str, Any] = {name: _float(raw, name) for name in STATISTICS if raw.get(name) is not None}
    if any(not found[name].is_integer() for name in COUNTS if name in found):
        raise ValueError("a count that is none")
    known = Statistics(**found | {name: int(found[name]) for name in COUNTS if name in found})
    resolution = Resolution(status=status, method=method, certified=certified, statistics=known, **numbers)
    if not _is_possible(resolution):
        raise ValueError("an interval that is none")
    rtol = _float(raw, "rtol")
    if not rtol >= 0:
        raise ValueError("an rtol that is none")
    return StoredResolution(resolution, rtol)


def _is_possible(resolution: Resolution) -> bool:
    kappa, lower, upper = resolution.kappa, resolution.lower, resolution.upper
    if not _are_possible(resolution.statistics):
        return False
    if resolution.status == "ok":
        return 1 <= lower <= kappa <= upper and math.isfinite(kappa)
    if resolution.status == "rank_deficient":
        return kappa == upper == math.inf and lower >= 1
    if resolution.status == "bounded":
        return math.isnan(kappa) and lower >= 1 and upper == math.inf
    return resolution.status == "non_finite" and math.isnan(kappa)


def _are_possible(found: Statistics) -> bool:
    if any(value is not None and math.isnan(value) for value in vars(found).values()):
        return False
    if found.flatness is None:
        return found.flatness_lower is found.flatness_upper is found.flatness_by_shape is None
    if found.flatness_lower is None or found.flatness_upper is None:
        return False
    return found.flatness_lower <= found.flatness <= found.flatness_upper <= 0


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
