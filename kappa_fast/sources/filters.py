"""The options of rank() that decide which weights are ranked, with a reason for every weight that they leave out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import OptionError
from . import classes, names
from .admission import Neighbors
from .base import Stored

Patterns = str | Sequence[str] | None

_ROUTER_CLASS = re.compile(r"Router|TopKGat|MoE\w*Gate$", re.IGNORECASE)


@dataclass(frozen=True)
class Filters:
    """The options of rank() that decide which weights are ranked.

    Attributes:
        include, exclude: a regular expression or several, searched (``re.search``) in every name of a parameter.
        embeddings: True ranks embeddings and output heads.
        routers: True ranks the routers of mixtures of experts.
        fused: "split" ranks the parts of fused projections, "stored" ranks the tensors as stored.
        min_dim: matrices whose smaller side is below it are skipped.
        max_dim: matrices whose larger side is above it are skipped.
        adapters: "merged" ranks weights with PEFT adapters merged into them, "base" without.

    Raises:
        OptionError: a pattern is not a regular expression, or a value has the wrong type or is out of range.
    """

    include: Patterns = None
    exclude: Patterns = None
    embeddings: bool = False
    routers: bool = False
    fused: Literal["split", "stored"] = "split"
    min_dim: int = 16
    max_dim: int | None = None
    adapters: Literal["base", "merged"] = "base"

    def __post_init__(self) -> None:
        for option in ("include", "exclude"):
            object.__setattr__(self, option, _patterns(option, getattr(self, option)))
        for option in ("embeddings", "routers"):
            if not isinstance(getattr(self, option), bool):
                raise OptionError(f"{option}={getattr(self, option)!r}: give True or False")
        if self.fused not in ("split", "stored"):
            raise OptionError(f"fused={self.fused!r}: give 'split' or 'stored'")
        if self.adapters not in ("base", "merged"):
            raise OptionError(f"adapters={self.adapters!r}: give 'base' or 'merged'")
        _check_size("min_dim", self.min_dim)
        if self.max_dim is not None:
            _check_size("max_dim", self.max_dim)

    def reason(self, stored: Stored, around: Neighbors) -> str | None:
        """Return why the options leave this weight out, or None; ``size_reason`` checks the sizes."""
        for pattern in self.exclude or ():
            if any(re.search(pattern, name) for name in stored.names):
                return f"excluded by the pattern {pattern!r}"
        if self.include is not None and not any(re.search(p, name) for p in self.include for name in stored.names):
            return "matched by none of the include patterns"
        if not self.embeddings and _is_embedding_or_head(stored, around):
            return "embedding or output head (embeddings=True ranks it)"
        if not self.routers and _is_router(stored, around):
            return "router (routers=True ranks it)"
        return None

    def size_reason(self, shape: tuple[int, int]) -> str | None:
        """Return why a matrix of this shape is not ranked, or None."""
        if min(shape) < self.min_dim:
            return f"too small: its smaller side is below min_dim={self.min_dim}"
        if self.max_dim is not None and max(shape) > self.max_dim:
            return f"too large: its larger side is above max_dim={self.max_dim}"
        return None


def is_router_module(module: torch.nn.Module) -> bool:
    """Return True for modules that choose among experts, by their class."""
    return any(_ROUTER_CLASS.search(name) for name in classes.class_names(module)[:1])


def _is_embedding_or_head(stored: Stored, around: Neighbors) -> bool:
    if not stored.roles.isdisjoint({"embedding", "head"}):
        return True
    alike = stored.shape in around.embedding_shapes
    called = classes.is_called_embedding(stored, around.shapes)
    return called or any(names.is_output_head(name, alike) for name in stored.names)


def _is_router(stored: Stored, around: Neighbors) -> bool:
    return "router" in stored.roles or any(names.is_router(name, around.shapes) for name in stored.names)


def _check_size(option: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{option}={value!r}: give a positive integer")


def _patterns(option: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    given = (value,) if isinstance(value, str) else value
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(pattern, str) for pattern in found):
        raise OptionError(f"{option}={value!r}: give a regular expression or a list of them")
    if not found and option == "include":
        raise OptionError("include has no pattern, so nothing would be ranked: give one, or None for everything")
    for pattern in found:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise OptionError(f"{option}={pattern!r} is not a regular expression: {error}") from error
    return found
