"""Where tensors of a checkpoint end up in a model of transformers, by its conversion table.

For example, ``experts.3.w1.weight`` becomes a part of ``experts.gate_up_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from ..errors import OptionError, missing_extra
from ..io.limits import MOST_DIGITS
from ..results.entries import Index
from ..sources.base import Division, Home, Place
from ..sources.module import homes_of
from .pieces import box_of, index_of


class Conversion:
    """The conversion table of transformers for one model."""

    def __init__(self, model: nn.Module, plain_name: Callable[[str], str]) -> None:
        """model: a transformers model, or a wrapper around one.  plain_name: removes from a name what wrappers add.

        Raises:
            MissingExtraError: transformers is not installed.  OptionError: ``model`` contains no transformers model.
        """
        try:
            from transformers import PreTrainedModel
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError as error:
            raise missing_extra("transformers", "transformers", "resolving the names of a checkpoint") from error
        found = next(((n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)), None)
        if found is None:
            raise OptionError(
                "the model is not a transformers model, so names of a checkpoint cannot be matched with its parameters"
            )
        self._prefix, self._model = found
        transforms = get_model_conversion_mapping(self._model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._dividing = [c for c in self._converters if len(c.target_patterns) > 1 and len(c.source_patterns) == 1]
        named = list(self._model.named_parameters(remove_duplicate=False))
        self._parameters = {plain_name(name): parameter for name, parameter in named}
        # A file may have any name of a tied weight; a ranking has the first.
        first = {id(parameter): plain_name(name) for name, parameter in self._model.named_parameters()}
        self._first = {plain_name(name): first[id(parameter)] for name, parameter in named}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self._homes: dict[str, Home] | None = None

    def place(self, name: str, shape: tuple[int, ...]) -> Place | None:
        """Return the place of the tensor ``name``, of this shape, of a checkpoint; None if the model does not have it.

        Weights that a module computes, and buffers, have places too.

        Raises:
            OptionError: loading permutes the tensor, so that no index selects it.
        """
        from transformers.core_model_loading import apply_renamings, rename_source_key

        prefix = self._model.base_model_prefix or None
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._parameters)
        if target not in self._parameters:
            home = self._home(target) if pattern is None else None  # a computed weight or a buffer has one
            return (
                None if home is None else Place(f"{self._prefix}.{target}" if self._prefix else target, (), home=home)
            )
        index: Index = ()
        if pattern is not None:
            renamed = apply_renamings(name, self._renamings)
            converter = next(c for c in self._converters if pattern in c.source_patterns)
            index = _index(converter, pattern, renamed, shape, tuple(self._parameters[target].shape))
        home = self._home(target) if pattern is None else None
        target = self._first[target]
        return Place(f"{self._prefix}.{target}" if self._prefix else target, index, home=home)

    def division(self, name: str, shape: tuple[int, ...]) -> Division | None:
        """Return how the rows of the tensor ``name`` of a checkpoint are divided among parameters; None if not."""
        if not self._dividing or not shape:
            return None
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix or None
        first, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._parameters)
        converter = next((c for c in self._dividing if pattern in c.source_patterns), None)
        if converter is None:
            return None
        start = str(converter.target_patterns[0]).replace("\\.", ".")
        names = [first.replace(start, str(t).replace("\\.", ".")) for t in converter.target_patterns]
        shapes = [self.shapes.get(target) for target in names]
        rows = _rows(converter.operations, shape[0], [0 if s is None else s[0] for s in shapes])
        if rows is None or shapes != [(len(range(*r.indices(shape[0]))), *shape[1:]) for r in rows]:
            return None
        full = [f"{self._prefix}.{self._first[n]}" if self._prefix else self._first[n] for n in names]
        return Division(tuple((r, Place(f, (), home=self._home(n))) for r, f, n in zip(rows, full, names, strict=True)))

    def _home(self, name: str) -> Home | None:
        if self._homes is None:
            self._homes = homes_of(self._model)
        return self._homes.get(name)


def _index(converter: Any, pattern: str, name: str, shape: tuple[int, ...], target: tuple[int, ...]) -> Index:
    """Return the index that selects the tensor ``name`` in the converted parameter, by following the operations."""
    box: list[int | slice] = [slice(0, size) for size in shape]
    sizes: list[int] = list(shape)
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist" and operation.dim == 0:
            box, sizes = [_number(pattern, name), *box], [1, *sizes]
        elif kind == "Concatenate":
            start = converter.source_patterns.index(pattern) * sizes[operation.dim]
            box[operation.dim] = slice(start, start + sizes[operation.dim])
        elif kind == "Transpose":
            pair: tuple[list[Any], list[Any]] = (box, sizes)
            for values in pair:
                one, other = operation.dim0, operation.dim1
                values[one], values[other] = values[other], values[one]
        else:
            raise OptionError(
                f"{name!r} is loaded through {kind}, after which no slice of the parameter is that tensor: "
                "rank the loaded model"
            )
    return index_of(box_of(tuple(box), target), target)


def _rows(operations: Iterable[Any], count: int, sizes: Sequence[int]) -> list[slice] | None:
    """Return which rows of a tensor go into each parameter; None if the operations do more than divide rows.

    count: rows of the tensor.  sizes: rows of each parameter. The order of rows within a parameter is ignored: it does
    not change the singular values.
    """
    kinds = [(type(o).__name__, getattr(o, "dim", 0), getattr(o, "inverse", False)) for o in operations]
    if kinds and kinds[-1][0] == "PermuteForRope":
        kinds.pop()
    if kinds in ([("Chunk", 0, False)], [("Split", 0, False)]):
        ends = [*accumulate(sizes)]
        same = len(set(sizes)) == 1 or kinds[0][0] == "Split"
        return [slice(e - s, e) for s, e in zip(sizes, ends, strict=True)] if same and ends[-1] == count else None
    if kinds == [("Interleave", 0, False), ("Chunk", 0, False)] and len(sizes) == 2 and 2 * sizes[0] == count:
        return [slice(0, None, 2), slice(1, None, 2)]
    return None


def _number(pattern: str, name: str) -> int:
    """Return the number of the expert: the part of the name that matches the ``*`` of the pattern."""
    plain = pattern.replace(r"\.", ".").strip("^$")  # some patterns of the table escape their dots
    found = re.search(re.escape(plain).replace(r"\*", rf"(\d{{1,{MOST_DIGITS}}})(?!\d)"), name)
    if found is None:
        raise OptionError(f"{name!r} does not say which expert it belongs to: rank the loaded model")
    return int(found.group(1))


def resolve_names(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], plain_name: Callable[[str], str]
) -> dict[str, Place]:
    """Return the place of each name that has one.

    shapes: by the names of a checkpoint.  plain_name: removes from a name of the model what wrappers add.
    """
    conversion = Conversion(model, plain_name)
    places = {name: conversion.place(name, shape) for name, shape in shapes.items()}
    return {name: place for name, place in places.items() if place is not None}
