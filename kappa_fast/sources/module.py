"""Weights from a torch.nn.Module, which is only looked at."""

from __future__ import annotations

import torch

from .base import Inventory
from .tensors import fingerprint, identity, plain_config, stored


def read_module(model: torch.nn.Module) -> Inventory:
    """The parameters of a model, tied ones once with all their names.

    Raises:
        NotImplementedError: a parameter is sharded (DTensor, ZeRO-3).
    """
    groups: dict[object, list[str]] = {}
    found: dict[str, tuple[torch.nn.Parameter, torch.nn.Module]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            found[name] = parameter, module
            groups.setdefault(identity(parameter), []).append(name)
    # A module that is used twice has its parameters under both names, but named_modules() shows it once.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        members = groups.setdefault(identity(parameter), [])
        if name not in members:
            members.append(name)
    head = _output_head(model)
    tensors = []
    for key, names in groups.items():
        parameter, module = next(found[name] for name in names if name in found)
        embedding = any(isinstance(found[n][1], torch.nn.Embedding) for n in names if n in found)
        embedding = embedding or (head is not None and identity(head) == key)
        tensors.append(stored(tuple(names), parameter, module, embedding))
    config = plain_config(getattr(model, "config", None))
    metadata = {"kind": "module", "class": type(model).__name__, "model_type": config.get("model_type")}
    return Inventory(tensors, sum(t.numel for t in tensors), config, {**metadata, "fingerprint": fingerprint(tensors)})


def _output_head(model: torch.nn.Module) -> torch.Tensor | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        weight = getattr(getter(), "weight", None) if callable(getter) else None
    except (AttributeError, NotImplementedError, TypeError):  # a model without one may say so in any of these ways
        return None
    return weight if isinstance(weight, torch.Tensor) else None
