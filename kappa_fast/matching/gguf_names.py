"""The parameters of a model that the tensor names of llama.cpp stand for, for matching a ranking of a GGUF file.

The table of the package gguf maps the names of parameters (``model.layers.3.self_attn.q_proj``) to the name of the
tensor in GGUF (``blk.3.attn_q``). The tables of all architectures are searched for the parameters that the model has.
llama.cpp permutes the rows of some matrices, which does not matter where a whole matrix is selected.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from ..errors import missing_extra
from ..io.limits import MOST_DIGITS
from ..results.entries import Index, TensorKappa
from ..results.selection import Selection
from ..sources.base import Place, Stored
from ..sources.layouts import layout_of
from ..sources.tensors import model_types_in

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(rf"(?<=\.experts)\.(\d{{1,{MOST_DIGITS}}})(?=\.)")
_HALF = re.compile(r"(?<=\.ffn_)(gate|up)(?=_exps$)")
_WEIGHT = ".weight"


def is_from_gguf(selection: Selection) -> bool:
    """Return whether the selection comes from a ranking of a GGUF file, which has the names of llama.cpp."""
    source = selection.settings.get("source")
    return isinstance(source, Mapping) and source.get("format") == "gguf"


def resolve_gguf(model: nn.Module, entries: Sequence[TensorKappa], parameters: Mapping[str, str]) -> dict[str, Place]:
    """Return, by key, the places of the entries that have the name of a GGUF tensor and one place in the model.

    ``parameters``: the full names of the model's parameters, by their plain names.

    Raises:
        MissingExtraError: the package gguf is not installed.
    """
    by_gguf_name = _by_gguf_name(model, parameters)
    layouts = _Layouts(model, parameters)
    found = {}
    for entry in entries:
        if (place := _place(entry, by_gguf_name, layouts)) is not None:
            found[entry.key] = place
    return found


# The plain names of parameters, by their name in GGUF and the number of the expert.
ByGgufName = Mapping[tuple[str, int | None], set[str]]


def _place(entry: TensorKappa, by_gguf_name: ByGgufName, layouts: _Layouts) -> Place | None:
    name = entry.name.removesuffix(_WEIGHT)
    whole = by_gguf_name.get((name, None), set())
    if len(whole) == 1:
        (parameter,) = whole
        # The model may order gate and up differently, or store experts transposed: parts are found by their labels.
        return Place(parameter, entry.index) if len(entry.index) < 2 else layouts.part(parameter, entry.part)
    expert = entry.index[0] if entry.index else None
    if not isinstance(expert, int) or len(entry.index) > 1:
        return None
    separate = by_gguf_name.get((name, expert), set())
    if len(separate) == 1:
        return Place(next(iter(separate)), ())
    half = _HALF.search(name)
    fused = by_gguf_name.get((_HALF.sub("gate_up", name), None), set()) if half else set()
    if half is None or len(fused) != 1:
        return None
    (parameter,) = fused
    return layouts.part(parameter, f"[{expert}].{half[1]}")


def _by_gguf_name(model: nn.Module, parameters: Mapping[str, str]) -> ByGgufName:
    """Return for every GGUF name the parameters that it may stand for."""
    bases = {getattr(module, "base_model_prefix", "") for module in model.modules()}
    found: dict[tuple[str, int | None], set[str]] = defaultdict(set)
    for name in parameters:
        for layer, expert, spelled in _spellings(name.removesuffix(_WEIGHT), bases):
            for stem in _stems(spelled):
                found[stem.replace("blk.0.", f"blk.{layer}.", 1), expert].add(name)
    return found


def _spellings(name: str, bases: set[Any]) -> Iterator[tuple[str, int | None, str]]:
    """Yield layer, expert, and a form in which the table may have the name.

    The form has layer 0, and lacks the number of the expert, ``language_model.`` or the prefix of the base model.
    """
    numbers = list(_NUMBER.finditer(f".{name}."))
    layer = numbers[0][0] if numbers else "0"
    inner = _NUMBER.sub("0", f".{name}.", count=1)
    expert = None
    if (numbered := _EXPERT.search(inner)) is not None:
        expert = int(numbered[1])
        inner = inner[: numbered.start()] + inner[numbered.end() :]
    inner = inner.strip(".")
    text = inner.replace("language_model.", "", 1)
    shorter = {text.removeprefix(f"{base}.") for base in bases if isinstance(base, str) and base}
    for spelled in dict.fromkeys((inner, text, *sorted(shorter))):
        yield layer, expert, spelled


class _Layouts:
    """The parts into which fused parameters of a model are split, by their labels."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, str]) -> None:
        self._model, self._parameters = model, parameters
        self._parts: dict[str, dict[str, Place]] = {}

    def part(self, name: str, label: str) -> Place | None:
        if name not in self._parts:
            real = self._parameters[name]
            owner = self._model.get_submodule(real.rpartition(".")[0])
            kinds = next((k for m in (owner, self._model) if (k := model_types_in(getattr(m, "config", None)))), ())
            weight = self._model.get_parameter(real)
            stored = Stored((name,), tuple(weight.shape), weight.dtype, weight.device, _never, None, owner, kinds)
            self._parts[name] = {
                p.label: Place(name, p.index, p.label) for p in layout_of(stored, {}, split=True).parts
            }
        return self._parts[name].get(label)


def _never(index: Index, device: torch.device | None = None) -> torch.Tensor:
    raise AssertionError("the layout needs only the shape")


@cache
def _stems(spelled: str) -> frozenset[str]:
    """Return the names that the tables of all architectures give the tensor in GGUF."""
    found = {table.get_name(spelled) for table in _tables()}
    return frozenset(stem for stem in found if isinstance(stem, str))


@cache
def _tables() -> tuple[Any, ...]:
    """Return the table of names of every architecture, for a model of one layer."""
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("gguf", "gguf", "resolving the names of a GGUF file") from error
    return tuple(gguf.get_tensor_name_map(architecture, 1) for architecture in gguf.MODEL_ARCH)
