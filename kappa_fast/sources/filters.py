"""Which parameters are ranked: the switches of rank(), and the reason for everything they leave out."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import OptionError
from . import names
from .base import Stored

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Filters:
    """The options of rank() that decide what is ranked.

    Raises:
        OptionError: a pattern is no regular expression, or a value is out of range.
    """

    include: Patterns = None
    exclude: Patterns = None
    embeddings: bool = False
    routers: bool = False
    fused: Literal["split", "stored"] = "split"
    min_dim: int = 16
    max_dim: int | None = None

    def __post_init__(self) -> None:
        for option in ("include", "exclude"):
            for pattern in _patterns(getattr(self, option), option):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise OptionError(f"{option}={pattern!r} is no regular expression: {error}") from error
        for option in ("embeddings", "routers"):
            if not isinstance(getattr(self, option), bool):
                raise OptionError(f"{option}={getattr(self, option)!r}: give True or False")
        if self.fused not in ("split", "stored"):
            raise OptionError(f"fused={self.fused!r}: give 'split' or 'stored'")
        _check_size("min_dim", self.min_dim)
        if self.max_dim is not None:
            _check_size("max_dim", self.max_dim)

    def reason(self, stored: Stored, everything: Collection[str]) -> str | None:
        """Why this tensor is not ranked at all, or None. Sizes of parts are for ``size_reason``."""
        return self._structural(stored, everything) or self._chosen(stored, everything)

    def size_reason(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix of this shape is not ranked, or None."""
        if min(shape) < self.min_dim:
            return f"too small: its smaller side is below min_dim={self.min_dim}"
        if self.max_dim is not None and max(shape) > self.max_dim:
            return f"too large: its larger side is above max_dim={self.max_dim}"
        return None

    def _structural(self, stored: Stored, everything: Collection[str]) -> str | None:
        if any(names.is_adapter(name) for name in stored.names):
            return "adapter weight"
        if stored.numel == 0:
            return "empty"
        if stored.problem is not None:
            return stored.problem
        owner = next((o for o in (names.scale_owner(name, everything) for name in stored.names) if o), None)
        if owner is not None:
            return f"scales of {owner}, not a weight"
        if stored.device.type == "meta":
            return "on the meta device, without values: rank from the checkpoint"
        if names.is_mask(stored.name):
            return "mask or position buffer, not a weight"
        return _dtype_reason(stored, everything) or _bias_reason(stored, everything)

    def _chosen(self, stored: Stored, everything: Collection[str]) -> str | None:
        for pattern in _patterns(self.exclude, "exclude"):
            if any(re.search(pattern, name) for name in stored.names):
                return f"excluded by the pattern {pattern!r}"
        include = _patterns(self.include, "include")
        if self.include is not None and not any(re.search(p, name) for p in include for name in stored.names):
            return "matched by none of the include patterns"
        if not self.embeddings and (stored.embedding or any(names.is_embedding(name) for name in stored.names)):
            return "embedding or output head (embeddings=True ranks it)"
        if not self.routers and (_is_router_module(stored.parent) or names.is_router(stored.name, everything)):
            return "router (routers=True ranks it)"
        return None


def _check_size(option: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{option}={value!r}: give a positive integer")


def _patterns(value: Patterns, option: str) -> tuple[str, ...]:
    if value is None:
        return ()
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(pattern, str) for pattern in found):
        raise OptionError(f"{option}={value!r}: give a regular expression or a list of them")
    return tuple(found)


def _dtype_reason(stored: Stored, everything: Collection[str]) -> str | None:
    if stored.dtype is None:
        return "stored in a dtype that torch does not have"
    codes = not stored.dtype.is_floating_point or stored.dtype.itemsize == 1
    scales = next((s for s in (names.scale_of(name, everything) for name in stored.names) if s), None)
    if codes and scales is not None:
        return f"quantized codes that need their scales ({scales}); quantized formats are not supported yet"
    if stored.dtype.is_complex:
        return f"complex numbers ({stored.dtype})"
    if not stored.dtype.is_floating_point:
        return f"no floating point weights but {stored.dtype}: codes, indices or a mask"
    if stored.dtype not in RANKED:
        return f"{stored.dtype} packs several weights into one byte: quantized formats are not supported yet"
    return None


def _bias_reason(stored: Stored, everything: Collection[str]) -> str | None:
    if len(stored.shape) != 2:
        return None
    for name in stored.names:
        if name.endswith("_bias") and name.removesuffix("_bias") in everything:
            return f"stacked biases of {name.removesuffix('_bias')}, not a matrix"
        if name.endswith(".bias") and name.removesuffix("bias") + "weight" in everything:
            return f"stacked biases of {name.removesuffix('bias')}weight, not a matrix"
    return None


def _is_router_module(module: torch.nn.Module | None) -> bool:
    return module is not None and re.search(r"(Router|TopKGating|MoEGate|MoeGate)$", type(module).__name__) is not None


RANKED = {torch.float64, torch.float32, torch.bfloat16, torch.float16} | {
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
}
