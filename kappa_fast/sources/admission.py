"""Decides whether a tensor is a weight, from what its reader found and from the other tensors of the model.

The result is the evidence for, or the reason against. The options of rank() are applied in ``filters.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..results.names import group_of
from . import classes, codes, names
from .base import Inventory, Stored


@dataclass(frozen=True)
class Neighbors:
    """Facts about all tensors of a model, for the decision about each of them.

    Attributes:
        shapes: the shapes of all tensors by all of their names; those of buffers are ().
        scales: the names of the companions of quantized weights.
        embedding_shapes: the shapes of all embeddings.
        in_peft: True if PEFT has wrapped the model.
    """

    shapes: Mapping[str, tuple[int, ...]]
    scales: frozenset[str]
    embedding_shapes: frozenset[tuple[int, ...]]
    in_peft: bool

    @classmethod
    def of(cls, inventory: Inventory) -> Neighbors:
        """Collect the facts about all tensors of an inventory."""
        shapes: dict[str, tuple[int, ...]] = {name: () for name in inventory.buffers}
        shapes |= {name: stored.shape for stored in inventory.tensors for name in stored.names}
        scales: set[str] = set()
        embeddings: set[tuple[int, ...]] = set()
        for stored in inventory.tensors:
            beside = {c for name in stored.names for c in codes.companions(name, shapes)}
            # Zero points are never weights, even those of a weight that was calibrated but is not quantized yet.
            scales |= beside if codes.may_be_codes(stored.dtype) else {c for c in beside if c.endswith("_zero_point")}
            if "embedding" in stored.roles or classes.is_called_embedding(stored, shapes):
                embeddings.add(stored.shape)
        return cls(shapes, frozenset(scales), frozenset(embeddings), inventory.in_peft)


@dataclass(frozen=True)
class Admission:
    """The decision about a tensor.

    Attributes:
        evidence: why the tensor is a weight, in a few words; "" if it is not a weight.
        reason: why the tensor is not a weight; None if it is a weight.
    """

    evidence: str = ""
    reason: str | None = None


def admit(stored: Stored, around: Neighbors, without_values: bool = False) -> Admission:
    """Decide whether the values of a tensor are weights, whatever the options of rank() are.

    Args:
        stored: a tensor with two or more dimensions.
        around: facts about the other tensors.
        without_values: accept tensors on the meta device.

    Raises:
        SourceError: the tensor is a weight, but cannot be read (``Stored.error``).
    """
    if stored.error is not None:
        raise stored.error
    reason = _reason(stored, around, without_values)
    return Admission(reason=reason) if reason is not None else Admission(_evidence(stored))


def _reason(stored: Stored, around: Neighbors, without_values: bool) -> str | None:
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
    # The tensors of a module are parameters, whatever their names; a file has buffers too, recognized by their names.
    if stored.parent is None and any(names.is_buffer(name) for name in stored.names):
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


def _is_stack_of_biases(stored: Stored, around: Neighbors) -> bool:
    """Return True for a bias [experts, width] of a weight [experts, ., .]."""
    for name in stored.names:
        for ending, of_weight in (("_bias", ""), (".bias", ".weight"), ("_bias", "_weight")):
            shape = around.shapes.get(name.removesuffix(ending) + of_weight, ()) if name.endswith(ending) else ()
            if len(stored.shape) == 2 and len(shape) == 3 and shape[0] == stored.shape[0]:
                return True
    return False


def _evidence(stored: Stored) -> str:
    owners = classes.class_names(stored.parent)
    owner = f" of {owners[0]}" if owners else ""
    if stored.evidence:
        return stored.evidence
    if stored.quantization is not None:
        return f"codes{owner} in a known format: {stored.quantization}"
    if owner:
        return "parameter" + owner
    return f"floats named {stored.name.rpartition('.')[2]!r}, and no other tensor says otherwise"


def by_evidence(admitted: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the names of the tensors with each evidence; one pattern (``layers.*.weight``) if a group shares it.

    Args:
        admitted: name and evidence of each tensor.
    """
    found = list(admitted)
    of_group: dict[str, set[str]] = {}
    for name, evidence in found:
        of_group.setdefault(group_of(name), set()).add(evidence)
    listed: dict[str, dict[str, None]] = {}
    for name, evidence in found:
        group = group_of(name)
        listed.setdefault(evidence, {})[group if len(of_group[group]) == 1 else name] = None
    return {evidence: list(under) for evidence, under in listed.items()}
