"""Finds weights that are neither parameters nor buffers: packed for a kernel, or frozen into a graph.

These are layers of torch.ao (linear, convolutional, recurrent, embeddings), TorchScript after ``torch.jit.freeze``, and
any layer that has attributes with its sizes but no matrix. The weights are listed and counted, but cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from .base import Stored
from .quantized.modules import unread

_RECURRENT = re.compile("LSTM|GRU|RNN")
_PACKED = ("_packed_params", "_packed_weight_ih", "_packed_weight_hh", "param")
# Rows of each weight of a recurrent layer, as multiples of hidden_size.
_GATES = {"LSTM": 4, "GRU": 3}


def packed_weights(model: nn.Module, shown: Collection[str]) -> Iterator[Stored]:
    """Yield the weights of a model that are neither parameters nor buffers.

    Args:
        model: the whole model.
        shown: the names of all modules that hold a matrix, themselves or in a child.
    """
    covered: set[str] = set()
    for name, module in model.named_modules():
        start = f"{name}." if name else ""
        if any(name.startswith(above) for above in covered) or name in shown:
            continue
        scripted = isinstance(module, torch.jit.ScriptModule)
        found = list(_frozen(module) if scripted else _sizes(module)) or list(_objects(module))
        if found:
            covered.add(start)
        for leaf, shape in found:
            kind = module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
            yield unread(start + leaf, shape, f"packed by {kind}, so that it cannot be read: rank the checkpoint")


def _sizes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the weights of a layer, by its attributes with sizes; biases are left out."""
    told = vars(module)

    def sizes(*names: str) -> tuple[int, ...] | None:
        found = [told.get(name) for name in names]
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in found)
        return tuple(found) if whole else None  # type: ignore[arg-type]

    matrices = any(isinstance(t, torch.Tensor) and t.dim() > 1 for t in module._buffers.values())
    kernel: Any = told.get("kernel_size")
    table = sizes("num_embeddings", "embedding_dim") if not matrices else None
    if shape := sizes("out_features", "in_features") or table:
        yield "weight", shape
    elif kernel is not None and (channels := sizes("out_channels", "in_channels")) and not matrices:
        rows, columns = channels[::-1] if told.get("transposed") else channels
        yield "weight", (rows, columns // told.get("groups", 1), *((kernel,) if isinstance(kernel, int) else kernel))
    elif _RECURRENT.search(type(module).__name__) and (recurrent := sizes("hidden_size", "input_size")):
        yield from _recurrent(module, *recurrent)


def _recurrent(module: nn.Module, hidden: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    told = vars(module)
    kind = str(told.get("mode", type(module).__name__))
    rows = next((gates for name, gates in _GATES.items() if name in kind), 1) * hidden
    if "num_layers" not in told:  # a cell
        yield from (("weight_ih", (rows, size)), ("weight_hh", (rows, hidden)))
        return
    directions = ("", "_reverse") if told.get("bidirectional") else ("",)
    for layer in range(told["num_layers"]):
        for direction in directions:
            yield f"weight_ih_l{layer}{direction}", (rows, hidden * len(directions) if layer else size)
            yield f"weight_hh_l{layer}{direction}", (rows, hidden)


def _frozen(module: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of weights that torch.jit.freeze turned into constants of a graph."""
    if not module._c._has_method("forward") or any(True for _ in module.children()):
        return  # freezing leaves no children
    for node in module.graph.findAllNodes("prim::Constant", True):
        if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").dim() >= 2:
            yield node.output().debugName().removeprefix("self."), tuple(node.t("value").shape)


def _objects(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of weights in packed objects of torch.ao, in modules and in TorchScript modules."""
    for leaf in _PACKED:
        packed = getattr(module, leaf, None)
        if isinstance(packed, torch.ScriptObject):
            yield leaf.removeprefix("_packed_").replace("params", "weight"), _shape_of(packed)


def _shape_of(packed: torch.ScriptObject) -> tuple[int, ...]:
    """Return the shape of the weight in a packed object; (0, 0) if torch cannot unpack it."""
    for kind in ("linear", "conv2d", "conv3d"):
        try:
            return tuple(getattr(torch.ops.quantized, f"{kind}_unpack")(packed)[0].shape)
        except RuntimeError:  # the object is of another kind
            continue
    return (0, 0)
