"""Units: one or more matrices that select() takes or leaves together, with one kappa, one score and one interval."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..errors import OptionError
from ..io.limits import MOST_DIGITS
from .entries import Status, TensorKappa
from .scores import KAPPA, LOGARITHMIC, NamedScore

UnitName = Literal["matrix", "expert", "parameter"]

# One tensor per expert and projection: "mlp.experts.3.gate_proj.weight", "ffn.experts.expert_3.fc1.weight".
_OWN_TENSOR = re.compile(rf"(?P<module>(?:.*\.)?experts)\.(?:expert_)?(?P<expert>\d{{1,{MOST_DIGITS}}})(?:\.|$)")
# One tensor for all experts of a module: "mlp.experts.gate_up_proj", "ffn.experts.mlp.w1".
_STACK_IN_EXPERTS = re.compile(r"(?P<module>(?:.*\.)?experts)\.")
# Stacks in a module that is not called experts ("moe.input_linear.weight"): known projections are parts of one expert.
_STACK_OF_PROJECTION = re.compile(
    r"(?P<module>.+)\.(?:gate_up_proj|gate_proj|up_proj|down_proj|input_linear|output_linear|w1|w2|w3|v1)(?:\.weight)?$"
)
_PART_EXPERT = re.compile(rf"\[(\d{{1,{MOST_DIGITS}}})\]")

# Logarithms and exponentials of numbers up to 1e308 err by about 1e-13 at most; intervals are widened by more.
_MEAN_ROUNDING = 1e-12


@dataclass(frozen=True)
class Unit:
    """Matrices that are selected together.

    ``[lower, upper]`` holds the geometric mean of the true kappas, ``[score_lower, score_upper]`` the score: the same
    interval where scores are kappas, that of the flatness where this is the score, and (-inf, inf) for other scores.
    """

    key: str
    group: str
    members: tuple[TensorKappa, ...]
    status: Status
    kappa: float
    lower: float
    upper: float
    score: float
    score_lower: float
    score_upper: float
    numel: int

    @property
    def is_singular(self) -> bool:
        """Whether it is proven to be rank deficient."""
        return self.status == "rank_deficient" and self.lower == math.inf

    @property
    def is_unsure(self) -> bool:
        """Whether it may be rank deficient and may be of full rank, which float64 cannot tell."""
        return self.status == "rank_deficient" and self.lower < math.inf


def expert_of(entry: TensorKappa) -> str | None:
    """A name for the expert that the entry belongs to, such as "layers.0.mlp.experts[3]"; None outside of experts."""
    if own := _OWN_TENSOR.match(entry.name):
        return f"{own['module']}[{int(own['expert'])}]"
    if not (part := _PART_EXPERT.match(entry.part)):
        return None
    stack = _STACK_IN_EXPERTS.match(entry.name) or _STACK_OF_PROJECTION.match(entry.name)
    return f"{stack['module'] if stack else entry.name}[{part[1]}]"


_KEYS: dict[str, Callable[[TensorKappa], str]] = {
    "matrix": lambda entry: entry.key,
    "expert": lambda entry: expert_of(entry) or entry.key,
    "parameter": lambda entry: entry.name,
}


def check_unit(unit: object) -> None:
    """Raises OptionError unless ``unit`` is one of UnitName."""
    if unit not in get_args(UnitName):
        raise OptionError(f"unit={unit!r} is unknown: use one of {', '.join(map(repr, get_args(UnitName)))}")


def make_units(entries: Iterable[TensorKappa], unit: UnitName, score: NamedScore | None = KAPPA) -> list[Unit]:
    """The units of a ranking that is sorted by ``score`` (None: by a callable), in the order of their first entries.

    Raises:
        OptionError: ``unit`` is unknown, or the scores of a unit with several matrices are not all positive.
    """
    check_unit(unit)
    entries = tuple(entries)
    resolved = [entry for entry in entries if entry.status in ("ok", "rank_deficient", "scored")]
    if score is not None and any(score.value(entry) not in (None, entry.score) for entry in resolved):
        score = None  # made by hand: the metadata does not tell
    members: dict[str, list[TensorKappa]] = {}
    for entry in entries:
        members.setdefault(_KEYS[unit](entry), []).append(entry)
    return [_make_unit(key, tuple(group), score) for key, group in members.items()]


def _make_unit(key: str, members: tuple[TensorKappa, ...], by: NamedScore | None) -> Unit:
    statuses = {entry.status for entry in members}
    # One nan makes the unit non-finite; one infinite kappa makes its mean infinite, even if others are unresolved.
    order: tuple[Status, ...] = ("non_finite", "rank_deficient", "bounded", "scored", "ok")
    status = next(status for status in order if status in statuses)
    known = status in ("ok", "rank_deficient", "scored") and "bounded" not in statuses
    lower, upper = _interval(members) if status != "non_finite" else (math.nan, math.nan)
    if known:
        kappa = _kappa_mean(members) if "scored" not in statuses else math.inf if status != "scored" else math.nan
        score = _score_mean(key, members, by)
    else:
        kappa = score = math.inf if status == "rank_deficient" else math.nan
    score_interval = (lower, upper)
    if by is None or by.name != "kappa" or by.highest:
        score_interval = (-math.inf, math.inf)
        one = by.interval(members[0]) if by is not None and len(members) == 1 and known else None
        if one is not None:
            score_interval = one
        # The interval of a singular matrix is that of kappa alone: its other statistics are estimates.
        elif known and (status != "rank_deficient" or math.isinf(score)):
            score_interval = (score, score) if all(e.lower == e.upper for e in members) else score_interval
    return Unit(
        key=key,
        group=" + ".join(sorted({entry.group for entry in members})),
        members=members,
        status=status,
        kappa=kappa,
        lower=lower,
        upper=upper,
        score=score,
        score_lower=score_interval[0],
        score_upper=score_interval[1],
        numel=sum(entry.numel for entry in members),
    )


def _interval(members: Sequence[TensorKappa]) -> tuple[float, float]:
    lower = geometric_mean([max(entry.lower, 1.0) for entry in members])
    upper = geometric_mean([entry.upper for entry in members])
    if len(members) == 1:
        return lower, upper
    return lower * (1 - _MEAN_ROUNDING), upper * (1 + _MEAN_ROUNDING)


def _kappa_mean(members: Sequence[TensorKappa]) -> float:
    return geometric_mean([entry.kappa for entry in members])


def _score_mean(key: str, members: Sequence[TensorKappa], by: NamedScore | None) -> float:
    if by is not None and by.highest:  # minus the mean of the statistic itself
        return -_score_mean(key, [replace(entry, score=-entry.score) for entry in members], NamedScore(by.name))
    scores = [entry.score for entry in members]
    if by is not None and by.name in LOGARITHMIC:
        infinite = [x for x in scores if math.isinf(x)]
        return infinite[0] if infinite else math.fsum(scores) / len(scores)
    if len(scores) > 1 and min(scores) <= 0:
        raise OptionError(
            f"the scores of {key} have no geometric mean, because one of them is {min(scores)!r}: "
            'use a positive score, or select with unit="matrix"'
        )
    return geometric_mean(scores)


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers: exact for one number, independent of their order, inf if one is inf."""
    if len(values) == 1:
        return values[0]
    logarithms = [math.log(value) for value in values]
    # The mean cannot exceed the largest, nor can rounding then carry it past the largest float.
    return math.exp(min(math.fsum(logarithms) / len(logarithms), max(logarithms)))
