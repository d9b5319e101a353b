"""Where a tensor becomes a weight to rank: the one place that decides it, with the evidence or the reason against it.

Readers say what they know (``Stored.evidence``, ``.problem``, ``.error``, ``.roles``, ``.parent``); here it is weighed
against what lies beside the tensor. The options of rank() come later, in ``filters.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..results.names import group_of
from . import classes, codes, names
from .base import Inventory, Stored


@dataclass(frozen=True)
class Neighbors:
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
    def of(cls, inventory: Inventory) -> Neighbors:
        """Look at all tensors once."""
        shapes: dict[str, tuple[int, ...]] = {name: () for name in inventory.buffers}
        shapes |= {name: stored.shape for stored in inventory.tensors for name in stored.names}
        scales: set[str] = set()
        embeddings: set[tuple[int, ...]] = set()
        for stored in inventory.tensors:
            beside = {c for name in stored.names for c in codes.companions(name, shapes)}
            # Zero points are never weights, also beside a weight that was calibrated and is not quantized yet.
            scales |= beside if codes.may_be_codes(stored.dtype) else {c for c in beside if c.endswith("_zero_point")}
            if "embedding" in stored.roles or classes.is_called_embedding(stored, shapes):
                embeddings.add(stored.shape)
        return cls(shapes, frozenset(scales), frozenset(embeddings), inventory.in_peft)


@dataclass(frozen=True)
class Admission:
    """What became of a tensor.

    Attributes:
        evidence: what makes it a weight, in a few words; "" if it is none.
        reason: why it is none, or None.
    """

    evidence: str = ""
    reason: str | None = None


def admit(stored: Stored, around: Neighbors, without_values: bool = False) -> Admission:
    """Decide whether the values of a tensor are weights, whatever the options of rank() are.

    Args:
        stored: a tensor with two or more dimensions.
        around: the others.
        without_values: take what is on the meta device too.

    Raises:
        SourceError: it is a weight, but cannot be read (``Stored.error``).
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
    # In a module what is here is a parameter, whatever its name; a file holds buffers too, and only names tell.
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
    """A bias [experts, width] beside a weight [experts, ., .]."""
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
    return f"floats called {stored.name.rpartition('.')[2]!r}, and nothing beside them says otherwise"


def by_evidence(admitted: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names under each piece of evidence; one pattern (``layers.*.weight``) for those that all share theirs.

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
