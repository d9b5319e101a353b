"""Replaces the codes of quantized weights and their companions by weights that are dequantized when they are read.

Each family of formats is a file with a class that recognizes them by names, shapes and dtypes (``Family``). Codes that
no family recognizes are left as they are, and skipped with a reason from ``sources/codes.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import SourceError
from .. import codes
from ..base import Stored
from ..ownership import by_owner, unexpected_tensors
from .bitsandbytes import STATE, TABLES, Bitsandbytes
from .comfy import Comfy
from .compressed import NVFP4, CompressedInts
from .config import is_left_plain, method_of, unknown_method
from .fp8 import FORMATS, FP8
from .hqq import HQQ
from .mlx import MLX
from .mxfp4 import MXFP4
from .packed import PackedInts
from .quanto import Quanto
from .recipe import Candidate, Family, Recipe, compose
from .sparse import Sparse
from .torchao import Torchao

_WORDS = re.compile(r"[\w.]*")  # names that need no escaping in a regular expression

__all__ = ["FAMILIES", "weights_of"]

LONE_FP8 = "float8 without a scale, although other weights of the model have one: its values may be codes"

# The first family that recognizes codes reads them.
FAMILIES: tuple[Family, ...] = (
    *(
        Comfy(),
        Bitsandbytes(),
        Torchao(),
        Quanto(),
    ),  # the families below would mistake the codes of these for their own
    *(FP8(), MXFP4(), NVFP4(), PackedInts(), CompressedInts(), MLX()),
    *(HQQ(), Sparse()),
)


def weights_of(
    found: Sequence[Stored],
    config: Mapping[str, Any] | Callable[[Stored], Mapping[str, Any]] | None,
    header: Mapping[str, str] | None = None,
) -> list[Stored]:
    """Return the tensors with codes replaced by the weights that they encode; no values of weights are read.

    Args:
        found: all tensors of a checkpoint or a state dict.
        config: its ``quantization_config``, None or empty if it has none, or a function that returns that of a tensor.
        header: the metadata in the headers of its files.

    Returns:
        A tensor for each of ``found``, in the same order. Companions (scales, zero points) stay, with the role
        "scales". ``Stored.error`` says if a companion is missing or does not fit, or if a weight appears twice, as
        codes and unquantized.
    """
    by_name = {name: t for t in found if t.problem is None for name in t.names}
    undecided = [t for t in found if t.problem is None and t.quantization is None and "scales" not in t.roles]
    coded = [t for t in undecided if _may_be_codes(t, by_name)]
    candidates = [
        _candidate(t, by_name, (config(t) if callable(config) else config) or {}, header or {}) for t in coded
    ]
    companions = {id(companion) for candidate in candidates for companion in candidate.companions.values()}
    replaced: dict[int, Stored] = {}
    # Tensors that carry their scales are dequantized already; a state dict may list these scales once more.
    complete = (name for t in found if t.quantization is not None for name in t.names)
    scales = {companion for name in complete for companion in codes.companions(name, by_name)}
    own = {name for c in candidates for t in (c.codes, *c.companions.values()) for name in t.names}
    owned = by_owner(by_name)
    for stored, candidate in zip(coded, candidates, strict=True):
        if id(stored) in companions:  # scales may come in the dtypes of codes
            continue
        if any(t.device.type == "meta" for t in (stored, *candidate.companions.values())):
            replaced[id(stored)] = replace(stored, problem=codes.ON_META)
            scales.update(candidate.names)
            continue
        try:
            recipe = _recognized(candidate)
            if isinstance(recipe, Recipe):
                _check_single(candidate, by_name)
        except SourceError as error:
            replaced[id(stored)] = _unreadable(candidate, error)
            scales.update(candidate.names)
            continue
        if isinstance(recipe, str):
            replaced[id(stored)] = replace(stored, problem=recipe)
            scales.update(candidate.names)
            continue
        if recipe is None:
            if candidate.companions and (method := method_of(candidate.config)):
                replaced[id(stored)] = replace(stored, problem=codes.codes_reason(candidate.names, method))
            continue
        if unexpected := _unexpected_tensors(candidate, own, owned):
            replaced[id(stored)] = replace(stored, problem=codes.unexpected_reason(recipe.quantization, unexpected))
            scales.update(candidate.names)
            continue
        replaced[id(stored)] = compose(stored, recipe)
        scales.update(name for companion in candidate.companions.values() for name in companion.names)
    scales |= {name for name in by_name if codes.is_orphan(name, by_name)}
    if any((t.quantization or "").startswith(FP8.name) for t in replaced.values()):
        replaced |= {
            id(c.codes): replace(c.codes, problem=LONE_FP8)
            for c in candidates
            if _lacks_scales(c, replaced, companions)
        }
    return [
        replaced.get(id(t)) or (t if scales.isdisjoint(t.names) else replace(t, roles=t.roles | {"scales"}))
        for t in found
    ]


def _recognized(candidate: Candidate) -> Recipe | str | None:
    """Return the result of the first family that recognizes the codes; None if the quantization method is unknown."""
    if unknown_method(candidate.config):
        return codes.codes_reason(candidate.names, method_of(candidate.config)) if candidate.companions else None
    return next((r for family in FAMILIES if (r := family.recognize(candidate)) is not None), None)


def _unexpected_tensors(candidate: Candidate, own: Collection[str], owned: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of tensors that the format does not have; not for modules, whose class identifies the format."""
    if candidate.codes.parent is not None:
        return []
    return sorted({s for name in candidate.codes.names for s in unexpected_tensors(name, own, owned)})


def _unreadable(candidate: Candidate, error: SourceError) -> Stored:
    """Return the codes with the error, and also under the name of the weight, by which ``exclude`` may find them."""
    name = candidate.plain_name
    message = str(error)
    if not error.says_exclude:
        message += f", or leave the weight out with exclude={name if _WORDS.fullmatch(name) else re.escape(name)!r}"
    names = dict.fromkeys((name, *candidate.codes.names))
    return replace(candidate.codes, names=tuple(names), error=type(error)(message, says_exclude=True))


def _lacks_scales(candidate: Candidate, replaced: Collection[int], companions: Collection[int]) -> bool:
    """Return True for FP8 without scales that the config does not list as unquantized."""
    stored = candidate.codes
    known = id(stored) in replaced or id(stored) in companions
    return stored.dtype in FORMATS and not known and not is_left_plain(candidate.plain_name, candidate.config)


def _may_be_codes(stored: Stored, by_name: Mapping[str, Stored]) -> bool:
    """Return True for codes, even if stored as floats (bitsandbytes' quant_storage, HQQ's view_as_float)."""
    if codes.may_be_codes(stored.dtype):
        return True
    return any(
        any(f"{name}.{STATE}{kind}" in by_name for kind in TABLES)
        or (name.endswith("W_q") and f"{name.removesuffix('W_q')}packing" in by_name)
        for name in stored.names
    )


def _candidate(
    stored: Stored, by_name: Mapping[str, Stored], config: Mapping[str, Any], header: Mapping[str, str]
) -> Candidate:
    beside: dict[str, Stored] = {}
    for name in stored.names:
        for companion in codes.companions(name, by_name):
            beside.setdefault(codes.role_of(name, companion), by_name[companion])
    return Candidate(stored, beside, config, header)


def _check_single(candidate: Candidate, by_name: Mapping[str, Stored]) -> None:
    for name in candidate.codes.names:
        plain = codes.weight_name(name)
        if plain != name and plain in by_name:
            raise SourceError(f"{plain!r} is stored twice, unquantized and as the codes {name!r}: remove one of them")
