"""Facts about parameters that follow from the class of the module that owns them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import names
from .base import Stored

# Containers that torch.export and torch.fx put in place of the original modules.
_CONTAINERS = frozenset({"GraphModule", "InterpreterModule", "UnflattenedModule"})
_LINEAR = re.compile(r"Linear$|^Conv1D$")
_CONV = re.compile(r"Conv(?!er|[Nn]e|Bert)|conv(?!er|ne)")
_STACK = re.compile(r"Expert|MoE|Bilinear", re.IGNORECASE)


def class_names(module: nn.Module | None) -> tuple[str, ...]:
    """Return the names of the class of a module and of its base classes; () if the class says nothing.

    A TorchScript module has the name of its original class. The class says nothing for a plain nn.Module and for
    modules that torch.export or torch.fx made.
    """
    if module is None or type(module) is nn.Module:
        return ()
    if isinstance(module, torch.jit.ScriptModule) and hasattr(module, "original_name"):
        kind = getattr(nn, str(module.original_name), None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return tuple(c.__name__ for c in kind.__mro__)
        return (str(module.original_name),) if module.original_name != "Module" else ()
    found = tuple(c.__name__ for c in type(module).__mro__)
    return () if not _CONTAINERS.isdisjoint(found) else found


def is_linear(module: nn.Module | None) -> bool:
    """Return True for modules that multiply their input with ``weight``, by their class."""
    return any(_LINEAR.search(name) or name == _ConvNd.__name__ for name in class_names(module))


def looks_up(module: nn.Module | None) -> bool:
    """Return True for modules that look up rows of ``weight``, by their class."""
    kinds = class_names(module)
    tables = any(kind in ("Embedding", "EmbeddingBag") for kind in kinds)
    return (tables or bool(kinds and kinds[0].endswith("Embedding"))) and not is_linear(module)


def is_called_embedding(stored: Stored, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return True for an embedding by its name, unless its class or a bias shows that it is a projection.

    shapes: the shapes of all tensors, by name.
    """
    if is_linear(stored.parent):
        return False
    biases = {name: shapes.get(name.removesuffix(".weight") + ".bias", ()) for name in stored.names}
    return any(names.is_embedding(n) and not (n.endswith(".weight") and bias) for n, bias in biases.items())


def convolution(module: nn.Module | None, shape: tuple[int, ...]) -> str | None:
    """Return None if the class of the module is not a convolution, else a note: "" if it is certain."""
    kinds = class_names(module)
    if _ConvNd.__name__ in kinds:
        return ""
    sizes = vars(module).get("kernel_size") if module is not None and kinds else None
    kernel = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,) * (len(shape) - 2)
    if sizes is not None and kernel == tuple(shape[2:]):
        return ""
    return f"treated as a convolution because of its class {kinds[0]}" if kinds and _CONV.search(kinds[0]) else None


def is_stack(module: nn.Module | None) -> bool:
    """Return True for modules whose three-dimensional parameters are stacks of matrices, by their class."""
    return any(_STACK.search(name) for name in class_names(module))
