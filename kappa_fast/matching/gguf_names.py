"""Names of llama.cpp to the parameters of a model, by the table of its own package gguf.

The table has, for every tensor of GGUF (``blk.3.attn_q``), the names that models have for it
(``model.layers.3.self_attn.q_proj``), and those of all architectures together: which of them the model at hand has
decides. Rows that llama.cpp has permuted do not matter where a whole matrix is meant.
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
_ALONE = re.compile(rf"(?<=\.experts)\.(\d{{1,{MOST_DIGITS}}})(?=\.)")
_HALF = re.compile(r"(?<=\.ffn_)(gate|up)(?=_exps$)")
_WEIGHT = ".weight"


def is_from_gguf(selection: Selection) -> bool:
    """Whether a GGUF file was ranked, so that names are llama.cpp's."""
    source = selection.settings.get("source")
    return isinstance(source, Mapping) and source.get("format") == "gguf"


def resolve_gguf(model: nn.Module, entries: Sequence[TensorKappa], parameters: Mapping[str, str]) -> dict[str, Place]:
    """Places, by key, of the entries whose names are those of llama.cpp and that have one place in the model.

    ``parameters``: the names of the model as it has them, by their plain ones.

    Raises:
        MissingExtraError: the package gguf is not installed.
    """
    homes = _homes(model, parameters)
    layouts = _Layouts(model, parameters)
    found = {}
    for entry in entries:
        if (place := _place(entry, homes, layouts)) is not None:
            found[entry.key] = place
    return found


Homes = Mapping[tuple[str, int | None], set[str]]  # plain names, by the name in GGUF and the number of the expert


def _place(entry: TensorKappa, homes: Homes, layouts: _Layouts) -> Place | None:
    name = entry.name.removesuffix(_WEIGHT)
    whole = homes.get((name, None), set())
    if len(whole) == 1:
        (parameter,) = whole
        # The model may have its halves elsewhere, or its experts transposed: what counts is what they are.
        return Place(parameter, entry.index) if len(entry.index) < 2 else layouts.part(parameter, entry.part)
    expert = entry.index[0] if entry.index else None
    if not isinstance(expert, int) or len(entry.index) > 1:
        return None
    alone = homes.get((name, expert), set())
    if len(alone) == 1:
        return Place(next(iter(alone)), ())
    half = _HALF.search(name)
    fused = homes.get((_HALF.sub("gate_up", name), None), set()) if half else set()
    if half is None or len(fused) != 1:
        return None
    (parameter,) = fused
    return layouts.part(parameter, f"[{expert}].{half[1]}")


def _homes(model: nn.Module, parameters: Mapping[str, str]) -> Homes:
    """For every name of GGUF the parameters that may be meant; of experts on their own, with their number."""
    bases = {getattr(module, "base_model_prefix", "") for module in model.modules()}
    homes: dict[tuple[str, int | None], set[str]] = defaultdict(set)
    for name in parameters:
        for layer, expert, spelled in _spellings(name.removesuffix(_WEIGHT), bases):
            for stem in _stems(spelled):
                homes[stem.replace("blk.0.", f"blk.{layer}.", 1), expert].add(name)
    return homes


def _spellings(name: str, bases: set[Any]) -> Iterator[tuple[str, int | None, str]]:
    """Layer, expert, and how the table may have the name: in layer 0, without the expert and what is around it."""
    numbers = list(_NUMBER.finditer(f".{name}."))
    layer = numbers[0][0] if numbers else "0"
    inner = _NUMBER.sub("0", f".{name}.", count=1)
    expert = None
    if (alone := _ALONE.search(inner)) is not None:
        expert = int(alone[1])
        inner = inner[: alone.start()] + inner[alone.end() :]
    inner = inner.strip(".")
    text = inner.replace("language_model.", "", 1)
    shorter = {text.removeprefix(f"{base}.") for base in bases if isinstance(base, str) and base}
    for spelled in dict.fromkeys((inner, text, *sorted(shorter))):
        yield layer, expert, spelled


class _Layouts:
    """How the fused parameters of a model are cut into matrices."""

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
    raise AssertionError("only the shape is asked for")


@cache
def _stems(spelled: str) -> frozenset[str]:
    """What any architecture calls the tensor in GGUF."""
    found = {table.get_name(spelled) for table in _tables()}
    return frozenset(stem for stem in found if isinstance(stem, str))


@cache
def _tables() -> tuple[Any, ...]:
    """Of every architecture, for a model of one layer."""
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("gguf", "gguf", "resolving the names of a GGUF file") from error
    return tuple(gguf.get_tensor_name_map(architecture, 1) for architecture in gguf.MODEL_ARCH)
