"""What the class of a module tells about its parameters, where there is a class to ask."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import names
from .base import Stored

# torch.export and torch.fx put containers in place of the modules that they took apart.
_CONTAINERS = frozenset({"GraphModule", "InterpreterModule", "UnflattenedModule"})
_LINEAR = re.compile(r"Linear$|^Conv1D$")
_CONV = re.compile(r"Conv(?!er|[Nn]e|Bert)|conv(?!er|ne)")
_STACK = re.compile(r"Expert|MoE|Bilinear", re.IGNORECASE)


def class_names(module: nn.Module | None) -> tuple[str, ...]:
    """The names of the class of a module and of all it inherits from; () where no class tells what it does.

    A TorchScript module knows the name of the class that it was made from. Modules that torch.export or torch.fx made,
    and a plain nn.Module that only holds parameters, know nothing.
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
    """True for modules whose ``weight`` their inputs are multiplied by, going by their class."""
    return any(_LINEAR.search(name) or name == _ConvNd.__name__ for name in class_names(module))


def looks_up(module: nn.Module | None) -> bool:
    """True for tables of vectors, going by their class."""
    kinds = class_names(module)
    tables = any(kind in ("Embedding", "EmbeddingBag") for kind in kinds)
    return (tables or bool(kinds and kinds[0].endswith("Embedding"))) and not is_linear(module)


def is_called_embedding(stored: Stored, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True for a table by its name, unless its class or a bias beside it says that it is a projection.

    ``shapes``: of all tensors by name.
    """
    if is_linear(stored.parent):
        return False
    biases = {name: shapes.get(name.removesuffix(".weight") + ".bias", ()) for name in stored.names}
    return any(names.is_embedding(n) and not (n.endswith(".weight") and bias) for n, bias in biases.items())


def convolution(module: nn.Module | None, shape: tuple[int, ...]) -> str | None:
    """None if this is no convolution by its class, else a note, "" where there is no doubt."""
    kinds = class_names(module)
    if _ConvNd.__name__ in kinds:
        return ""
    sizes = vars(module).get("kernel_size") if module is not None and kinds else None
    kernel = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,) * (len(shape) - 2)
    if sizes is not None and kernel == tuple(shape[2:]):
        return ""
    return f"taken for a convolution by its class {kinds[0]}" if kinds and _CONV.search(kinds[0]) else None


def is_stack(module: nn.Module | None) -> bool:
    """True for modules whose parameters of three dimensions are stacks of matrices, going by their class."""
    return any(_STACK.search(name) for name in class_names(module))
