"""Matches the entries of a selection with the parameters of a model, by name and shape."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import OptionError
from ..io.patterns import compile_pattern
from ..results.entries import Index, TensorKappa
from ..results.names import plain_name
from ..results.selection import Selection
from ..sources.base import Place
from ..sources.effective import ingredients_of
from .gguf_names import is_from_gguf, resolve_gguf
from .pieces import Box, box_of, disjoint, index_of

SHOWN = 3  # examples in an error message


@dataclass(frozen=True)
class Target:
    """A parameter of the model, and which parts of it are selected.

    name: the name in ``model.named_parameters()``.  indices: an index for each selected part; the parts are disjoint
    and in the order of memory; ``((),)`` selects all of it.  entries: the entries of the selection that match it, with
    indices into this parameter; empty if an ``including`` pattern has added the parameter.
    """

    name: str
    parameter: nn.Parameter
    indices: tuple[Index, ...]
    entries: tuple[TensorKappa, ...]

    @property
    def whole(self) -> bool:
        """True if all of the parameter is selected."""
        return self.indices == ((),)

    @property
    def numel(self) -> int:
        """The number of selected weights."""
        return (
            self.parameter.numel() if self.whole else sum(box_of(i, self.parameter.shape).numel for i in self.indices)
        )


def holds_codes(parameter: torch.Tensor) -> bool:
    """Return True for parameters that hold quantized codes, whose shape may differ from that of the weight.

    Such are integers and eight-bit floats, bytes that bitsandbytes stores as floats, and tensor subclasses that have a
    ``dequantize`` method of their own.
    """
    if not (parameter.is_floating_point() or parameter.is_complex()) or parameter.dtype.itemsize == 1:
        return True
    itself = type(parameter).dequantize is not torch.Tensor.dequantize
    return itself or getattr(parameter, "quant_state", None) is not None


def require_module(model: object) -> None:
    """Raise OptionError for anything but a module."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"expected the model, a torch.nn.Module, not a {type(model).__name__}: give the model")


def match(selection: Selection, model: nn.Module) -> list[Target]:
    """Return the parameters of ``model`` that ``selection`` names, in the order of ``named_parameters()``.

    The names may be those of the model, with or without wrappers and the prefix of the base model; those of a
    checkpoint that transformers converts when it loads it; or those of llama.cpp if a GGUF file was ranked. Names and
    shapes are compared, values are not.

    Raises:
        OptionError: ``model`` is not a module; it lacks a selected parameter, has it in another shape, or holds codes
            where a part of it is selected; or an ``including`` pattern matches nothing.
        MissingExtraError: the names of a checkpoint need transformers, or those of llama.cpp need gguf, and it is not
            installed.
    """
    require_module(model)
    names = _Names(model)
    chosen: dict[str, list[tuple[Index, TensorKappa]]] = {}
    unknown: list[TensorKappa] = []
    computed: dict[str, TensorKappa] = {}
    for entry in selection.entries:
        parts = names.parts((entry.name, *entry.aliases))
        if parts:
            if entry.index:
                raise OptionError(
                    f"{entry.key!r} is a part of a weight that the model computes from {', '.join(map(repr, parts))}, "
                    f"and none of these belongs to that part alone: leave it out with excluding({entry.name!r})"
                )
            computed |= dict.fromkeys(parts, entry)
            continue
        found = names.find((entry.name, *entry.aliases))
        if found is None:
            unknown.append(entry)
        else:
            chosen.setdefault(found, []).append((entry.index, entry))
    prefixed = names.match_by_prefix(unknown)
    for entry in unknown if prefixed else ():
        chosen.setdefault(prefixed[entry.name], []).append((entry.index, entry))
    if unknown and not prefixed:
        total = len(selection.entries)
        if is_from_gguf(selection):
            places = resolve_gguf(model, unknown, names.plain)
        else:
            places = _from_checkpoint(model, names, unknown, total)
        _add_from_disk(names, unknown, places, chosen, total)
    _check_shapes(names, chosen)
    included, excluded = names.matching(selection.include), names.matching(selection.exclude)
    for pattern in selection.include:
        if not names.matching([pattern]):
            raise OptionError(f"including({pattern!r}) matches no parameter of the model: {_some(names.parameters)}")
    targets = []
    for name, parameter in names.parameters.items():
        if name in excluded or not (name in chosen or name in included or name in computed):
            continue
        if name in computed and name not in chosen:
            targets.append(Target(name, parameter, ((),), (computed[name],)))
            continue
        pairs = chosen.get(name, [])
        boxes = [box_of(index, parameter.shape) for index, _ in pairs]
        whole = name in included or not parameter.shape
        indices = ((),) if whole else _indices(name, boxes, parameter.shape)
        targets.append(Target(name, parameter, indices, tuple(entry for _, entry in pairs)))
    return targets


class _Names:
    """The parameters of a model by their first names, and look-up by all of their other names."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.buffers = {plain_name(name) for name, _ in model.named_buffers()}
        first = {id(parameter): name for name, parameter in self.parameters.items()}
        self._first = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
        plain: dict[str, set[str]] = {}
        for name, canonical in self._first.items():
            plain.setdefault(plain_name(name), set()).add(canonical)
        # A plain name that two parameters share matches neither.
        self.plain = {name: next(iter(found)) for name, found in plain.items() if len(found) == 1}
        self._computed: dict[str, list[str]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            start = f"{prefix}." if prefix else ""
            for leaf, parts in ingredients_of(module).items():
                found = [self._first[start + part] for part in parts if start + part in self._first]
                self._computed |= dict.fromkeys((start + leaf, plain_name(start + leaf)), found)
        bases = {getattr(module, "base_model_prefix", "") for module in model.modules()}
        self._bases = sorted(base for base in bases if isinstance(base, str) and base)

    def find(self, names: Iterable[str]) -> str | None:
        """Return the parameter with one of these names, up to wrappers and the prefix of a base model.

        None if there is none, or more than one.
        """
        given = list(names)
        for name in given:
            if name in self._first:
                return self._first[name]
        plain = [plain_name(name) for name in given]
        for name in plain:
            if name in self.plain:
                return self.plain[name]
        longer = {f"{base}.{name}" for base in self._bases for name in plain}
        shorter = {name.removeprefix(f"{base}.") for base in self._bases for name in plain}
        found = {self.plain[name] for name in longer | shorter if name in self.plain}
        return found.pop() if len(found) == 1 else None

    def match_by_prefix(self, entries: Sequence[TensorKappa]) -> dict[str, str]:
        """Return parameters by the names of the entries, if one added or removed prefix matches all of the names.

        Empty unless exactly one prefix does, with parameters that have the shapes of the entries.
        """
        given = {entry.name: plain_name(entry.name) for entry in entries}
        if not any("." in plain for plain in given.values()):
            return {}  # "weight" is the end of many names: a shape that fits one of them would decide by chance
        first = next(iter(given.values()))
        dots = [end + 1 for end, letter in enumerate(first) if letter == "."]
        longer = [name.removesuffix(first) for name in self.plain if name.endswith(f".{first}")]
        tries = [{n: prefix + plain for n, plain in given.items()} for prefix in longer]
        tries += [
            {n: plain[end:] for n, plain in given.items()}
            for end in dots
            if all(plain.startswith(first[:end]) for plain in given.values())
        ]
        found = [
            {n: self.plain[name] for n, name in one.items()}
            for one in tries
            if all(name in self.plain for name in one.values())
        ]
        found = [
            one
            for one in found
            if all(not e.numel or _fits(self.parameters[one[e.name]].shape, e.index, e.shape) for e in entries)
        ]
        return found[0] if len(found) == 1 else {}

    def parts(self, names: Iterable[str]) -> list[str]:
        """Return the parameters from which a weight with one of these names is computed (weight_norm, pruning, ...)."""
        return next((self._computed[n] for name in names for n in (name, plain_name(name)) if n in self._computed), [])

    def matching(self, patterns: Iterable[str]) -> set[str]:
        """Return the parameters of which a name, full or plain, matches one of the patterns."""
        compiled = [compile_pattern(pattern) for pattern in patterns]
        return {
            canonical
            for name, canonical in self._first.items()
            if any(pattern.search(name) or pattern.search(plain_name(name)) for pattern in compiled)
        }


def _from_checkpoint(model: nn.Module, names: _Names, unknown: Sequence[TensorKappa], total: int) -> dict[str, Place]:
    """Return, by key, the places of entries with names of a checkpoint that transformers converts."""
    from .conversion import resolve_names

    try:
        found_by_plain = resolve_names(model, {plain_name(e.name): e.shape for e in unknown}, plain_name)
    except OptionError as error:
        raise OptionError(f"{_missing(names, unknown, total)} ({error})") from error
    # An entry that is a part of a tensor cannot be found if the whole tensor becomes a part of a parameter.
    places = {e.name: place for e in unknown if (place := found_by_plain.get(plain_name(e.name))) is not None}
    found = {e.key: (places[e.name], e.index) for e in unknown if e.name in places}
    return {key: replace(p, index=p.index or index) for key, (p, index) in found.items() if not (p.index and index)}


def _add_from_disk(
    names: _Names,
    unknown: Sequence[TensorKappa],
    places: Mapping[str, Place],
    chosen: dict[str, list[tuple[Index, TensorKappa]]],
    total: int,
) -> None:
    """Add the entries that have a place, under the names of their parameters, to ``chosen``."""
    for entry in unknown:
        place = places.get(entry.key)
        found = names.find((place.name,)) if place is not None else None
        if place is None or found is None:
            raise OptionError(_missing(names, [e for e in unknown if e.key not in places] or [entry], total))
        chosen.setdefault(found, []).append((place.index, replace(entry, index=place.index)))


def _missing(names: _Names, unknown: Sequence[TensorKappa], total: int) -> str:
    """Return the message that lists the entries which the model lacks, with the closest names of the model."""
    lines = []
    for entry in unknown[:SHOWN]:
        close = difflib.get_close_matches(plain_name(entry.name), names.parameters, 1, 0.5)
        lines.append(repr(entry.key) + (f" (the model has {close[0]!r})" if close else ""))
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    coded = {name for entry in unknown for name in entry.aliases} & names.buffers
    if coded:
        return (
            f"the model holds {min(coded)!r} in place of the weight: it is quantized, and codes cannot be trained. "
            "Train adapters for them: kappa_fast.integrations.peft.lora_config(selection), without model="
        )
    return (
        f"the model lacks {len(unknown)} of the {total} selected matrices: {', '.join(lines)}{more}. "
        f"The model has {_some(names.parameters)}: was the ranking made from another model?"
    )


def _some(parameters: Iterable[str]) -> str:
    found = list(parameters)
    return ", ".join(map(repr, found[:SHOWN])) + (", ..." if len(found) > SHOWN else "") if found else "no parameters"


def _check_shapes(names: _Names, chosen: dict[str, list[tuple[Index, TensorKappa]]]) -> None:
    wrong = []
    for name, pairs in chosen.items():
        shape, coded = names.parameters[name].shape, holds_codes(names.parameters[name])
        for index, entry in pairs:
            if coded and index and not _fits(shape, index, entry.shape):
                raise OptionError(
                    f"{entry.key!r} is a part of {name!r}, which holds codes ({names.parameters[name].dtype}) that "
                    f"cannot be trained: leave it out with excluding({entry.name!r})"
                )
            if entry.numel and not (coded and index == ()) and not _fits(shape, index, entry.shape):
                wrong.append(f"{entry.key!r} is {tuple(entry.shape)} in the ranking, but {name!r} is {tuple(shape)}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise OptionError(
            f"the shapes of {len(wrong)} matrices differ: {'; '.join(wrong[:SHOWN])}{more}. "
            "Was the ranking made from another model?"
        )


def _fits(shape: torch.Size, index: Index, wanted: tuple[int, int]) -> bool:
    try:
        piece = box_of(index, shape).shape
    except IndexError:
        return False
    flat = (piece[0], math.prod(piece[1:])) if piece else ()
    return wanted in (flat, flat[::-1])


def _indices(name: str, boxes: Sequence[Box], shape: torch.Size) -> tuple[Index, ...]:
    try:
        kept = disjoint(boxes)
    except ValueError as error:
        raise OptionError(f"selected parts of {name!r} overlap, and neither contains the other: {error}") from error
    if sum(box.numel for box in kept) == shape.numel():
        return ((),)
    # Where all parts of an expert are selected, one index selects the expert, which is contiguous in memory.
    experts: dict[Index, list[Box]] = {}
    for box in kept:
        expert: Index = tuple(r.start for r, gone in zip(box.ranges, box.dropped, strict=True) if gone)
        experts.setdefault(expert, []).append(box)
    found: list[Index] = []
    for expert, parts in experts.items():
        complete = sum(box.numel for box in parts) == box_of(expert, shape).numel
        found += [expert] if complete else [index_of(box, shape) for box in parts]
    return tuple(found)
