"""Weights from a mapping of names to tensors (a state dict), and what modules and mappings have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..entries import Index
from ..errors import SourceError
from .base import Inventory, Stored
from .names import base_name


def read_mapping(weights: Mapping[str, torch.Tensor]) -> Inventory:
    """The tensors of a state dict; those that share their memory and shape are one tensor with several names.

    Raises:
        SourceError: a key is no text, or a value no tensor.
        NotImplementedError: a tensor is sharded.
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SourceError(
                f"the mapping holds {name!r}: {type(tensor).__name__}, but names and tensors are wanted: "
                "pass model.state_dict() or what safetensors.torch.load_file() returns"
            )
        groups.setdefault(identity(tensor), []).append(name)
    tensors = [stored(tuple(names), weights[names[0]], None) for names in groups.values()]
    count = sum(t.numel for t in tensors)
    return Inventory(tensors, count, {}, {"kind": "mapping", "fingerprint": fingerprint(tensors)})


def stored(
    names: tuple[str, ...], tensor: torch.Tensor, parent: torch.nn.Module | None, embedding: bool = False
) -> Stored:
    """A tensor in memory as the rest of the room wants it."""
    refuse_sharded(names[0], tensor)
    clean = tuple(dict.fromkeys(base_name(name) for name in names))
    return Stored(
        clean,
        tuple(tensor.shape),
        tensor.dtype,
        tensor.device,
        taker(tensor),
        problem(tensor, parent),
        parent,
        embedding,
    )


def taker(tensor: torch.Tensor) -> Callable[[Index], torch.Tensor]:
    """A function that gives a detached view of a part."""
    return lambda index: tensor.detach()[index] if index else tensor.detach()


def identity(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same weights under two names."""
    try:
        address = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # subclasses without storage
        address = 0
    if address == 0 or tensor.numel() == 0:
        return id(tensor)
    return address, tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device)


def refuse_sharded(name: str, tensor: torch.Tensor) -> None:
    """Raise for weights of which this process holds only a part."""
    kind = type(tensor).__name__
    if hasattr(tensor, "ds_shape") or kind in ("DTensor", "ShardedTensor", "FlatParameter"):
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        how = "ZeRO-3" if hasattr(tensor, "ds_shape") else kind
        raise NotImplementedError(
            f"{name!r} of shape {shape} is sharded over several processes ({how}), which is not supported yet: "
            "rank the checkpoint directory, or the model before it is sharded"
        )


def problem(tensor: torch.Tensor, parent: torch.nn.Module | None) -> str | None:
    """Why the values of a tensor in memory are no weights as they stand, or None."""
    for attribute in ("quant_state", "SCB"):
        if getattr(tensor, attribute, None) is not None:
            return f"quantized codes that need their scales ({attribute}); quantized formats are not supported yet"
    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return f"quantized or other tensor subclass {kind.__name__}; quantized formats are not supported yet"
    if tensor.layout != torch.strided:
        return f"stored as {tensor.layout}: only dense tensors are ranked"
    narrow = tensor.dtype.itemsize == 1 or not tensor.is_floating_point()
    for attribute in ("weight_scale_inv", "weight_scale", "SCB", "scales", "scale"):
        if narrow and parent is not None and isinstance(getattr(parent, attribute, None), torch.Tensor):
            return f"quantized codes that need their scales ({attribute}); quantized formats are not supported yet"
    return None


def fingerprint(tensors: Iterable[Stored]) -> str:
    """SHA-256 over names, shapes and dtypes: tells models apart, not their values."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.names} {t.shape} {t.dtype}\n".encode())
    return digest.hexdigest()


def plain_config(config: Any) -> dict[str, Any]:
    """A model's config as a flat dict: what a nested text_config says stands beside what the outer one says."""
    if config is None:
        return {}
    found = config if isinstance(config, Mapping) else getattr(config, "to_dict", lambda: vars(config))()
    if not isinstance(found, Mapping):
        return {}
    text = found.get("text_config")
    return {**text, **found} if isinstance(text, Mapping) else dict(found)
