"""What a family of quantized formats says about a weight, and the Stored that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from ...errors import SourceError
from ...results.entries import Index
from .. import codes
from ..base import Stamp, Stored


@dataclass(frozen=True)
class Candidate:
    """A tensor that may be codes, and what lies beside it.

    Attributes:
        codes: as the reader found it, in a dtype that codes have.
        companions: by what they are to the codes, see ``codes.role_of``.
        config: the ``quantization_config`` of the model; empty if there is none.
        header: what the headers of the files say beside names and shapes; torchao says there what it has stored.
    """

    codes: Stored
    companions: Mapping[str, Stored]
    config: Mapping[str, Any] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.codes.name

    @property
    def plain_name(self) -> str:
        return codes.plain_name(self.codes.name)

    @property
    def names(self) -> list[str]:
        """Of the companions."""
        return [companion.name for companion in self.companions.values()]

    def find(self, *roles: str) -> Stored | None:
        """The first companion that is one of these to the codes."""
        return next((self.companions[role] for role in roles if role in self.companions), None)

    def missing(self, what: str) -> SourceError:
        """The error for a companion that has to be there."""
        return SourceError(
            f"{self.name!r} of shape {self.codes.shape} holds quantized codes, but {what!r} beside it is missing: give "
            "the directory if it is in another file, else download it again"
        )


@dataclass(frozen=True)
class Recipe:
    """How one weight is made of its codes.

    Attributes:
        quantization: the format in a few words, such as "gptq 4 bits, groups of 128".
        shape: of the weight: (out, in), or (experts, ., .) for a stack of matrices.
        dtype: of what ``dequantize`` returns.
        inputs: the tensors that are read, by the names that ``dequantize`` knows them by. In a stack, those with the
            experts as their first dimension are cut there, and the others read whole.
        dequantize: makes one matrix, of the last two sizes of ``shape``, of the inputs.
        peak: bytes for each weight that ``dequantize`` needs at its peak beside inputs and result.
        detail: what the values depend on beside the inputs. Needed where ``dequantize`` closes over something; of a
            function, or a partial one, its keywords tell.
    """

    quantization: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Mapping[str, Stored]
    dequantize: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] = field(repr=False)
    peak: int = 8
    detail: str | None = None


def refuse(candidate: Candidate, companion: Stored, why: str) -> SourceError:
    """The error for a companion that does not fit the codes."""
    found, about = candidate.codes, companion
    return SourceError(
        f"{about.name!r} of shape {about.shape}, {_dtype_name(about)}, does not fit the codes {found.name!r} of shape "
        f"{found.shape}, {_dtype_name(found)}: {why}. Compare them with the config, or download them again"
    )


def fills_tiles(shape: tuple[int, ...]) -> bool:
    """Whether block scales of this shape may lie in tiles of 128 x 4, as cuBLAS wants them; then nothing tells."""
    return len(shape) == 2 and shape[0] % 128 == 0 and shape[1] % 4 == 0


def in_unknown_order(candidate: Candidate, method: str) -> SourceError:
    """The error for block scales that may be in rows or in tiles."""
    return SourceError(
        f"the scales of {candidate.name!r} of shape {candidate.codes.shape} may lie in rows ({method}) or in tiles of "
        "128 x 4 (ComfyUI), and nothing says which: give the checkpoint's directory with its config.json, or the file "
        "with its comfy_quant markers"
    )


def _dtype_name(stored: Stored) -> str:
    return str(stored.dtype).removeprefix("torch.")


class Family(Protocol):
    """Formats that have something in common.

    ``recognize`` returns None for what is not of the family, a text with the reason for what is of it and cannot be
    dequantized, and raises SourceError for what is damaged: a companion that is missing, or has a wrong shape or dtype.
    """

    name: str

    def recognize(self, candidate: Candidate, /) -> Recipe | str | None: ...


def compose(stored: Stored, recipe: Recipe) -> Stored:
    """The weight in place of its codes: under its plain name, with that of the codes among the aliases."""
    # Readers give a Stored what else they know of it; that of the companions is to be combined with it here. The
    # location stays that of the codes: their companions are small, and mostly next to them.
    names = (*(codes.plain_name(name) for name in stored.names), *stored.names)
    matrix = recipe.shape[-2] * recipe.shape[-1]
    read = sum(_nbytes(item) // (item.shape[0] if _per_expert(item, recipe) else 1) for item in recipe.inputs.values())
    return replace(
        stored,
        names=tuple(dict.fromkeys(names)),
        shape=recipe.shape,
        dtype=recipe.dtype,
        take=_Taker(recipe),
        quantization=recipe.quantization,
        overhead=read + matrix * recipe.peak,
        is_spread=any(part.is_spread for part in recipe.inputs.values()),
        prefetch=None if stored.prefetch is None else partial(_prefetch, recipe),
        stamp=_stamp(recipe),
    )


def _stamp(recipe: Recipe) -> Stamp | None:
    """What identifies the values: those of the inputs, and all that decides what is made of them (config, headers)."""
    function: Any = recipe.dequantize
    detail = recipe.detail
    if detail is None:
        keywords: Mapping[str, Any] = {}
        if isinstance(function, partial):
            function, keywords = function.func, function.keywords
        if getattr(function, "__closure__", None) is not None:
            return None  # it may depend on anything
        detail = str(sorted(keywords.items()))
    how = f"{recipe.quantization} {recipe.shape} {recipe.dtype} {detail}"
    return Stamp.joined([item.stamp for item in recipe.inputs.values()], how)


@dataclass(frozen=True)
class _Taker:
    """``Stored.take`` of a quantized weight: reads the codes of one matrix, moves them, dequantizes them."""

    recipe: Recipe

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        if len(self.recipe.shape) == 2:
            return _part(self._matrix(None, device), index)
        if index and isinstance(index[0], int):
            return _part(self._matrix(index[0], device), index[1:])
        experts = [self._matrix(expert, device) for expert in range(self.recipe.shape[0])]
        return _part(torch.stack(experts), index)

    def _matrix(self, expert: int | None, device: torch.device | None) -> torch.Tensor:
        taken = {}
        for role, stored in self.recipe.inputs.items():
            one = expert is not None and _per_expert(stored, self.recipe)
            tensor = stored.take((expert,) if one else ())  # type: ignore[arg-type]
            taken[role] = tensor if device is None else _moved(tensor, device)
        return self.recipe.dequantize(taken)


def _prefetch(recipe: Recipe, index: Index) -> None:
    """``Stored.prefetch``: what ``_Taker`` reads for the index."""
    expert = index[0] if len(recipe.shape) == 3 and index and isinstance(index[0], int) else None
    for stored in recipe.inputs.values():
        if stored.prefetch is not None:
            stored.prefetch((expert,) if expert is not None and _per_expert(stored, recipe) else ())


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # From pinned memory a copy runs beside everything else, on the stream that dequantizes.
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)


def _part(tensor: torch.Tensor, index: Index) -> torch.Tensor:
    return tensor[index].clone() if index else tensor  # a copy, or the rest of the tensor would stay in memory


def _per_expert(stored: Stored, recipe: Recipe) -> bool:
    return len(recipe.shape) == 3 and stored.shape[:1] == recipe.shape[:1]


def _nbytes(stored: Stored) -> int:
    return stored.numel * (stored.dtype.itemsize if stored.dtype is not None else 1)
