"""Which parameters are ranked: the switches of rank(), and the reason for everything they leave out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import OptionError
from . import codes, names
from .base import Inventory, Stored

Patterns = str | Sequence[str] | None

_ROUTER_CLASS = re.compile(r"Router|TopKGat|MoE\w*Gate$", re.IGNORECASE)


@dataclass(frozen=True)
class Surroundings:
    """What the other tensors of a model tell about one of them.

    Attributes:
        shapes: of everything that has a name, buffers (with shape ()) too.
        scales: companions of quantized weights.
        embedding_shapes: of everything that is called an embedding.
        in_peft: whether PEFT has wrapped the model.
    """

    shapes: Mapping[str, tuple[int, ...]]
    scales: frozenset[str]
    embedding_shapes: frozenset[tuple[int, ...]]
    in_peft: bool

    @classmethod
    def of(cls, inventory: Inventory) -> Surroundings:
        """Look at all tensors once."""
        shapes: dict[str, tuple[int, ...]] = {name: () for name in inventory.buffers}
        shapes |= {name: stored.shape for stored in inventory.tensors for name in stored.names}
        scales: set[str] = set()
        embeddings: set[tuple[int, ...]] = set()
        for stored in inventory.tensors:
            beside = {c for name in stored.names for c in codes.companions(name, shapes)}
            # Zero points are never weights, also beside a weight that was calibrated and is not quantized yet.
            scales |= beside if codes.may_be_codes(stored.dtype) else {c for c in beside if c.endswith("_zero_point")}
            if "embedding" in stored.roles or any(names.is_embedding(name) for name in stored.names):
                embeddings.add(stored.shape)
        return cls(shapes, frozenset(scales), frozenset(embeddings), inventory.in_peft)


@dataclass(frozen=True)
class Filters:
    """The options of rank() that decide what is ranked.

    Attributes:
        include, exclude: a regular expression or several, searched (``re.search``) in every name of a parameter.
        embeddings: rank embeddings and output heads.
        routers: rank the routers of mixtures of experts.
        fused: "split" for the parts of fused projections, "stored" for the tensors as they are.
        min_dim, max_dim: matrices with a smaller side below, or a larger side above, are skipped.
        without_values: take parameters on the meta device too, for a plan that never looks at a value.

    Raises:
        OptionError: a pattern is no regular expression, or a value has the wrong type or is out of range.
    """

    include: Patterns = None
    exclude: Patterns = None
    embeddings: bool = False
    routers: bool = False
    fused: Literal["split", "stored"] = "split"
    min_dim: int = 16
    max_dim: int | None = None
    without_values: bool = False

    def __post_init__(self) -> None:
        for option in ("include", "exclude"):
            object.__setattr__(self, option, _patterns(option, getattr(self, option)))
        for option in ("embeddings", "routers"):
            if not isinstance(getattr(self, option), bool):
                raise OptionError(f"{option}={getattr(self, option)!r}: give True or False")
        if self.fused not in ("split", "stored"):
            raise OptionError(f"fused={self.fused!r}: give 'split' or 'stored'")
        _check_size("min_dim", self.min_dim)
        if self.max_dim is not None:
            _check_size("max_dim", self.max_dim)

    def reason(self, stored: Stored, around: Surroundings) -> str | None:
        """Why this tensor is not ranked at all, or None. Sizes of parts are for ``size_reason``."""
        return _structural_reason(stored, around, self.without_values) or self._chosen(stored, around)

    def size_reason(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix of this shape is not ranked, or None."""
        if min(shape) < self.min_dim:
            return f"too small: its smaller side is below min_dim={self.min_dim}"
        if self.max_dim is not None and max(shape) > self.max_dim:
            return f"too large: its larger side is above max_dim={self.max_dim}"
        return None

    def _chosen(self, stored: Stored, around: Surroundings) -> str | None:
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


def is_router_module(module: torch.nn.Module) -> bool:
    """True for modules that choose among experts, going by their class."""
    return _ROUTER_CLASS.search(type(module).__name__) is not None


def _structural_reason(stored: Stored, around: Surroundings, without_values: bool) -> str | None:
    """Why the values of a tensor are no matrix of weights, whatever the options are."""
    if "adapter" in stored.roles or any(names.is_adapter(name, around.in_peft) for name in stored.names):
        return "adapter weight"
    if "scales" in stored.roles or any(name in around.scales for name in stored.names):
        return codes.scales_reason(stored.name)
    if stored.problem is not None:
        return stored.problem
    if codes.may_be_codes(stored.dtype):
        found = {c for name in stored.names for c in codes.companions(name, around.shapes)}
        if found:
            return codes.codes_reason(found)
    if any(names.is_buffer(name) for name in stored.names):
        return "mask or other buffer, not a weight"
    if reason := codes.dtype_reason(stored.dtype):
        return reason
    if stored.numel == 0:
        return "empty"
    if stored.device.type == "meta" and not without_values:
        return codes.ON_META
    if _is_stack_of_biases(stored, around):
        return "stacked biases of experts, not a matrix"
    return None


def _is_stack_of_biases(stored: Stored, around: Surroundings) -> bool:
    """A bias [experts, width] beside a weight [experts, ., .]."""
    for name in stored.names:
        for ending, of_weight in (("_bias", ""), (".bias", ".weight"), ("_bias", "_weight")):
            shape = around.shapes.get(name.removesuffix(ending) + of_weight, ()) if name.endswith(ending) else ()
            if len(stored.shape) == 2 and len(shape) == 3 and shape[0] == stored.shape[0]:
                return True
    return False


def _is_embedding_or_head(stored: Stored, around: Surroundings) -> bool:
    if not stored.roles.isdisjoint({"embedding", "head"}):
        return True
    alike = stored.shape in around.embedding_shapes
    return any(names.is_embedding(name) or names.is_output_head(name, alike) for name in stored.names)


def _is_router(stored: Stored, around: Surroundings) -> bool:
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
        raise OptionError("include holds no pattern, so nothing would be ranked: give one, or None for everything")
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptionError(f"{option}={pattern!r} is no regular expression: {error}") from error
    return found
