"""Checks for the readers of files: they refuse rankings and selections whose numbers contradict each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from .entries import TensorKappa
from .orders import OrderName
from .scores import KAPPA, score_of
from .statistics import COUNTS, STATISTICS
from .units import UnitName

ROUNDING = 1e-9  # of statistics that have a least value

Budgets = Mapping[str, tuple[str, Callable[[Any], bool]]]  # by name: the valid values in words, and a check


def contradiction(entry: TensorKappa) -> str | None:
    """A sentence that says what is wrong with the entry, else None. Unknown numbers are nan, unknown sizes 0."""
    size = math.prod(entry.shape)
    if entry.numel != size:
        return f"'numel' is {entry.numel}, and its shape {list(entry.shape)} has {size}"
    settled = entry.status in ("ok", "rank_deficient")
    if entry.certified and not settled:
        return f"'certified' is true, and its status {entry.status!r} leaves nothing to prove"
    if entry.status == "non_finite":
        return None if math.isnan(entry.kappa) else f"'kappa' is {entry.kappa!r} for weights that are not finite"
    if not (1 <= entry.lower <= entry.upper):
        return f"'lower' is {entry.lower!r} and 'upper' {entry.upper!r}, which is not an interval from 1 on"
    if entry.status == "ok" and not (math.isfinite(entry.kappa) and entry.lower <= entry.kappa <= entry.upper):
        return f"'kappa' is {entry.kappa!r}, outside of its interval from {entry.lower!r} to {entry.upper!r}"
    if entry.status == "rank_deficient" and not entry.kappa == entry.upper == math.inf:
        return f"'kappa' is {entry.kappa!r} and 'upper' {entry.upper!r} for a singular matrix, where both are inf"
    if entry.status in ("bounded", "scored") and not (math.isnan(entry.kappa) and entry.upper == math.inf):
        return f"'kappa' is {entry.kappa!r} and 'upper' {entry.upper!r}, where only a lower bound is known"
    if entry.sigma_max < entry.sigma_min or entry.sigma_min < 0:
        return f"'sigma_max' is {entry.sigma_max!r} and 'sigma_min' {entry.sigma_min!r}"
    if entry.sensitivity < 0:
        return f"'sensitivity' is {entry.sensitivity!r}"
    return _wrong_statistic(entry)


def _wrong_statistic(entry: TensorKappa) -> str | None:
    """A sentence about a statistic that no matrix has, else None."""
    least = {"frobenius": 0.0, "stable_rank": 1.0, "participation_ratio": 1.0, "demmel": 1.0, "snr": 0.0, "alpha": 1.0}
    for name, floor in least.items():
        value = getattr(entry, name)
        if value is not None and value < floor * (1 - ROUNDING):
            return f"{name!r} is {value!r}, which is below {floor:g}"
    counts = {name: getattr(entry, name) or 0 for name in COUNTS}
    crowded = next((name for name, count in counts.items() if count > min(entry.shape)), None)
    if crowded is not None:
        return f"{crowded!r} is more than the {min(entry.shape)} singular values that there are"
    entropy = entry.spectral_entropy
    if entropy is not None and not 0 <= entropy <= 1:
        return f"'spectral_entropy' is {entropy!r}, which is not from 0 to 1"
    ends = (entry.flatness_lower, entry.flatness, entry.flatness_upper)
    if all(x is None for x in ends) and entry.flatness_by_shape is None:
        return None
    lower, flatness, upper = ends
    if lower is None or flatness is None or upper is None:
        return f"'flatness' is {flatness!r}, and its interval from {lower!r} to {upper!r}"
    if not lower <= flatness <= upper <= 0:
        return f"'flatness' is {flatness!r}, outside of its interval from {lower!r} to {upper!r}, or above 0"
    return None


def contradicted_score(entries: Iterable[TensorKappa], metadata: Mapping[str, Any]) -> str | None:
    """A sentence about an entry whose score is not what the metadata of its ranking name, else None.

    A callable has a name that is no score ("flatness()" if it is called like one), and may give any number; so may a
    ranking made by hand, whose settings name none.
    """
    settings = metadata.get("settings")
    named = score_of(metadata) if isinstance(settings, Mapping) and "score" in settings else None
    if named is None:
        return None
    for entry in entries:
        value = named.value(entry)
        if entry.status == "rank_deficient" and value is None:
            value = math.inf
        if entry.status in ("ok", "rank_deficient", "scored") and entry.score != value:
            other = f"{entry.score!r} where its {named} is {'not known' if value is None else repr(value)}"
            return f"it is ranked by {named}, and the score of {entry.key!r} is {other}"
    return None


def with_called_score(entries: Sequence[TensorKappa], metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata, where the score of a callable of an older version is told from the one here with its name.

    Versions without statistics wrote the plain name of a callable, and knew no score by name but kappa.
    """
    named = score_of(metadata)
    unknown = all(getattr(entry, name) is None for entry in entries for name in STATISTICS)
    if named is None or named == KAPPA or not unknown or contradicted_score(entries, metadata) is None:
        return metadata
    return {**metadata, "settings": {**metadata["settings"], "score": f"{named}()"}}


def contradicted_budget(
    entries: Iterable[TensorKappa], settings: Mapping[str, Any], certain: bool, budgets: Budgets
) -> str | None:
    """A sentence about a setting of a selection that is not valid or contradicts the entries; else None."""
    strange = next((e for e in entries if e.status in ("bounded", "non_finite")), None)
    if strange is not None:
        return f"{strange.key!r} is {strange.status}, which no budget selects"
    several = settings.get("budgets")
    if isinstance(several, Mapping) and "budget" not in settings:
        found = ({**settings, "budget": name, "value": value} for name, value in several.items())
        wrong = (contradicted_budget(list(entries), one, certain, budgets) for one in found)
        return next((words for words in wrong if words is not None), None)
    if "budget" not in settings:
        return None
    budget, unit = settings["budget"], settings.get("unit", "matrix")
    value: Any = settings.get("value")
    if not isinstance(budget, str) or budget not in budgets:
        return f"'budget' is {str(budget)[:60]!r}, which is not one of {', '.join(budgets)}"
    expected, is_valid = budgets[budget]
    if isinstance(value, str) or not is_valid(value):
        return f"'value' is {str(value)[:60]!r}, not {expected}"
    if unit not in get_args(UnitName) or not isinstance(settings.get("per_group", False), bool):
        return "'unit' or 'per_group' has a value that select() does not take"
    order = settings.get("order", "lowest")
    if order not in get_args(OrderName):
        return f"'order' is {str(order)[:60]!r}, none of {', '.join(get_args(OrderName))}"
    if unit != "matrix" or settings.get("per_group"):
        return None  # the budget counts units or groups, of which the entries do not tell enough
    if budget == "max_kappa" and order == "lowest":
        beyond = next((e for e in entries if e.kappa > value or (certain and e.upper > value)), None)
        if beyond is not None:
            sure = " for certain" if certain else ""
            return f"{beyond.key!r} with kappa from {beyond.lower!r} to {beyond.upper!r} is not below {value}{sure}"
    listed = list(entries)
    if budget == "num_tensors" and len(listed) > value:
        return f"it holds {len(listed)} matrices, more than num_tensors={value}"
    if budget == "max_params" and isinstance(value, int) and sum(e.numel for e in listed) > value:
        return f"it holds {sum(e.numel for e in listed)} weights, more than max_params={value}"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(check, value))


def _object_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(check, value.values()))


# The metadata of rank() that other code reads: for each name the kind of value in words, and a check.
_TEXT = ("a text or null", lambda value: value is None or _is_text(value))
_TEXTS = ("a list of texts", _list_of(_is_text))
_OBJECT = ("an object", lambda value: isinstance(value, Mapping))
_COUNTS = ("an object with counts", _object_of(_is_count))
_NUMBER = ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool))
_SOURCE: Budgets = {
    **dict.fromkeys(("kind", "path", "id", "revision", "class", "model_type", "format", "fingerprint"), _TEXT),
    **dict.fromkeys(("files", "read_directly"), _TEXTS),
    "quantization": _COUNTS,
    "layouts": ("an object with texts", _object_of(_is_text)),
    "evidence": _OBJECT,
    "computed": ("an object with lists of texts", _object_of(_list_of(_is_text))),
}
_METADATA: Budgets = {
    **dict.fromkeys(("versions", "settings", "source"), _OBJECT),
    **dict.fromkeys(("work", "cache"), _COUNTS),
    "backend": _TEXT,
    "device": _TEXTS,
    "threads": ("a count", _is_count),
    "num_parameters": ("a count", _is_count),
    "took": _COUNTS,
    "seconds": _NUMBER,
    "partial": ("true or false", lambda value: isinstance(value, bool)),
}


def wrong_metadata(metadata: Mapping[str, Any]) -> str | None:
    """A sentence about a value that is not valid in the metadata of a ranking or settings of a selection; else None.

    Names that kappa_fast does not know are not checked.
    """
    source = metadata.get("source")
    for place, values, known in (("", metadata, _METADATA), ("source.", source, _SOURCE)):
        for name, value in values.items() if isinstance(values, Mapping) else ():
            expected, is_valid = known.get(name, ("", lambda _: True))
            if not is_valid(value):
                return f"'{place}{name}' is {str(value)[:60]!r}, not {expected}"
    return None
