"""How the families of quantized formats describe a weight (Recipe), and the Stored that is built from a Recipe."""

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
    """A tensor that may be codes, with its companions.

    Attributes:
        codes: the tensor as the reader found it, in a dtype of codes.
        companions: scales, zero points and the like, by their roles (``codes.role_of``).
        config: the ``quantization_config`` of the model; empty if there is none.
        header: the metadata in the headers of the files, in which torchao and ComfyUI describe their formats.
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
        return codes.weight_name(self.codes.name)

    @property
    def names(self) -> list[str]:
        """The names of the companions."""
        return [companion.name for companion in self.companions.values()]

    def find(self, *roles: str) -> Stored | None:
        """Return the companion with the first of these roles that there is, or None."""
        return next((self.companions[role] for role in roles if role in self.companions), None)

    def missing(self, what: str) -> SourceError:
        """Return the error for a required companion that is missing."""
        return SourceError(
            f"{self.name!r} of shape {self.codes.shape} holds quantized codes, but {what!r} beside it is missing: give "
            "the directory if it is in another file, else download it again"
        )


@dataclass(frozen=True)
class Recipe:
    """How a weight is computed from its codes.

    Attributes:
        quantization: the format in a few words, such as "gptq 4 bits, groups of 128".
        shape: the shape of the weight: (out, in), or (experts, ., .) for a stack of matrices.
        dtype: the dtype of the result of ``dequantize``.
        inputs: the tensors that are read, by the keys that ``dequantize`` uses. In a stack, tensors whose first
            dimension is that of the experts are read expert by expert, and the others as a whole.
        dequantize: computes one matrix, of the last two sizes of ``shape``, from the inputs.
        peak: bytes per weight that ``dequantize`` needs at its peak in addition to inputs and result.
        detail: identifies everything else that the values depend on. It is required if ``dequantize`` is a closure; for
            a function or a ``partial`` the default is the keywords.
    """

    quantization: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Mapping[str, Stored]
    dequantize: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] = field(repr=False)
    peak: int = 8
    detail: str | None = None


def refuse(candidate: Candidate, companion: Stored, why: str) -> SourceError:
    """Return the error for a companion that does not fit the codes."""
    found, about = candidate.codes, companion
    return SourceError(
        f"{about.name!r} of shape {about.shape}, {_dtype_name(about)}, does not fit the codes {found.name!r} of shape "
        f"{found.shape}, {_dtype_name(found)}: {why}. Compare them with the config, or download them again"
    )


def fills_tiles(shape: tuple[int, ...]) -> bool:
    """Return whether block scales of this shape may be in tiles of 128 x 4 (cuBLAS); the shape does not prove it."""
    return len(shape) == 2 and shape[0] % 128 == 0 and shape[1] % 4 == 0


def in_unknown_order(candidate: Candidate, method: str) -> SourceError:
    """Return the error for block scales that may be in rows or in tiles."""
    return SourceError(
        f"the scales of {candidate.name!r} of shape {candidate.codes.shape} may be in rows ({method}) or in tiles of "
        "128 x 4 (ComfyUI), and the file does not say which: give the checkpoint's directory with its config.json, or "
        "the file with its comfy_quant markers"
    )


def _dtype_name(stored: Stored) -> str:
    return str(stored.dtype).removeprefix("torch.")


class Family(Protocol):
    """A family of related formats.

    ``recognize`` returns None if the candidate does not belong to the family, and a reason if it does but cannot be
    dequantized. It raises SourceError if the candidate is damaged: a companion is missing, or has a wrong shape or
    dtype.
    """

    name: str

    def recognize(self, candidate: Candidate, /) -> Recipe | str | None: ...


def compose(stored: Stored, recipe: Recipe) -> Stored:
    """Return the weight that replaces its codes, under its name in the model; the name of the codes is an alias."""
    # The location stays that of the codes: their companions are small, and usually stored next to them.
    names = (*(codes.weight_name(name) for name in stored.names), *stored.names)
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
    """Return the stamp of the weight: the stamps of the inputs, and everything that dequantization depends on."""
    function: Any = recipe.dequantize
    detail = recipe.detail
    if detail is None:
        keywords: Mapping[str, Any] = {}
        if isinstance(function, partial):
            function, keywords = function.func, function.keywords
        if getattr(function, "__closure__", None) is not None:
            return None  # a closure may depend on anything
        detail = str(sorted(keywords.items()))
    how = f"{recipe.quantization} {recipe.shape} {recipe.dtype} {detail}"
    return Stamp.joined([item.stamp for item in recipe.inputs.values()], how)


@dataclass(frozen=True)
class _Taker:
    """``Stored.take`` of a quantized weight: reads the codes of one matrix, moves them and dequantizes them."""

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
    """``Stored.prefetch`` of a quantized weight: reads ahead what ``_Taker`` reads for the index."""
    expert = index[0] if len(recipe.shape) == 3 and index and isinstance(index[0], int) else None
    for stored in recipe.inputs.values():
        if stored.prefetch is not None:
            stored.prefetch((expert,) if expert is not None and _per_expert(stored, recipe) else ())


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # A copy from pinned memory is asynchronous, on the stream that dequantizes.
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)


def _part(tensor: torch.Tensor, index: Index) -> torch.Tensor:
    return tensor[index].clone() if index else tensor  # a view would keep the whole tensor in memory


def _per_expert(stored: Stored, recipe: Recipe) -> bool:
    return len(recipe.shape) == 3 and stored.shape[:1] == recipe.shape[:1]


def _nbytes(stored: Stored) -> int:
    return stored.numel * (stored.dtype.itemsize if stored.dtype is not None else 1)
