"""Reads the weights of a state dict, and holds helpers that all readers share."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import ShardedError, SourceError
from ..results.names import base_name, unwrapped
from . import codes
from .base import Inventory, Role, Stored, Take
from .names import has_adapters, is_buffer
from .ownership import is_unread, without_ingredients
from .quantized import weights_of
from .quantized.live import weights_in
from .reparametrized import combine_parts
from .unsharded import device_of, stands_for

# Attributes in which quantized parameters keep their scales.
_OF_PARAMETER = ("quant_state", "SCB")


def read_mapping(weights: Mapping[str, torch.Tensor]) -> Inventory:
    """Return the tensors of a state dict; entries with the same memory and shape are one tensor with several names.

    Raises:
        SourceError: a key is not a string, or a value is not a tensor.
        ShardedError: a tensor is a part of a larger one, and it is unknown where the rest is.
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SourceError(_no_tensor(name, tensor))
        groups.setdefault(identity(tensor), []).append(name)
    own = own_names(groups.values(), saved=True)
    stored = [store(own[names[0]], weights[names[0]]) for names in groups.values()]
    metadata = {"kind": "mapping", "model_type": None, "fingerprint": digest_of_headers(stored)}
    tensors = without_ingredients(combine_parts(weights_of(stored, None)))
    return Inventory(tensors, count_weights(tensors), metadata, in_peft=has_adapters(weights))


def store(
    names: tuple[str, ...],
    tensor: torch.Tensor,
    parent: torch.nn.Module | None = None,
    model_types: tuple[str, ...] = (),
    roles: frozenset[Role] = frozenset(),
    holder: torch.nn.Module | None = None,
) -> Stored:
    """Return a tensor in memory as a Stored, which dequantizes a tensor that carries its scales.

    Args:
        names: all names of the tensor.
        tensor: the tensor itself.
        parent, model_types, roles: see ``Stored``.
        holder: the module that has the tensor among its parameters, if that is not ``parent``.

    Raises:
        SourceError: the scales of the tensor do not fit.
        ShardedError: the tensor is a part of a larger one, and it is unknown where the rest is.
    """
    if is_lazy(tensor) or tensor.is_nested:
        why = "nested: it has several shapes" if tensor.is_nested else "lazy, without a shape yet: run the model once"
        return Stored(names, (0, 0), tensor.dtype, tensor.device, _taker(tensor), why, parent, model_types, roles)
    refuse_sharded(names[0], tensor)
    shape, why_not = tuple(tensor.shape), _problem(tensor)
    plain = Stored(names, shape, tensor.dtype, device_of(tensor), _taker(tensor), why_not, parent, model_types, roles)
    plain = _put_together(plain, tensor)
    return weights_in(plain, tensor, holder or parent) or plain


def is_lazy(tensor: torch.Tensor) -> bool:
    """Return True for a parameter that gets its shape with the first input."""
    return isinstance(tensor, (UninitializedParameter, UninitializedBuffer))


def own_names(groups: Iterable[Collection[str]], *, saved: bool = False) -> dict[str, tuple[str, ...]]:
    """Return, by the first name of each tensor, all names of the tensor without the wrappers of PEFT.

    If two different tensors would get the same name, the later one keeps the wrappers in its name.

    Args:
        groups: the names of each tensor of a model.
        saved: True for saved names: the wrappers of torch.compile, DDP and FSDP are removed too, and the names under
            which the tensor was saved come last.
    """
    tied = [tuple(names) for names in groups]
    every = [name for names in tied for name in names]
    plain = unwrapped(every) if saved else dict(zip(every, every, strict=True))
    taken = {name for name in every if base_name(plain[name]) == name}
    own: dict[str, tuple[str, ...]] = {}
    for names in tied:
        short = {name: base_name(plain[name]) for name in names}
        kept = [s if s == name or s not in taken or s in names else name for name, s in short.items()]
        taken.update(kept)
        own[names[0]] = tuple(dict.fromkeys((*kept, *(name for name in names if plain[name] != name))))
    return own


def identity(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same weights under two names."""
    try:
        address = tensor.data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # subclasses and layouts without storage
        address = 0
    if address == 0 or tensor.is_nested or tensor.numel() == 0:
        return id(tensor)
    return address, tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device)


def refuse_sharded(name: str, tensor: torch.Tensor) -> None:
    """Raise for a weight of which this process holds only a part.

    Raises:
        ShardedError: the tensor is a DTensor, belongs to FSDP1, or to ZeRO-3 without being gathered.
    """
    kind = next((c.__name__ for c in type(tensor).__mro__ if c.__name__ in ("DTensor", "ShardedTensor")), None)
    if kind is None and (type(tensor).__name__ == "FlatParameter" or hasattr(tensor, "_is_flat_param")):
        kind = "FSDP"
    shape = tuple(getattr(tensor, "ds_shape", ()))
    if kind is None and shape and tuple(tensor.shape) != shape:
        kind = "ZeRO-3"
    if kind is not None:
        raise ShardedError(sharded(f"{name} of shape {shape or tuple(tensor.shape)}", kind))


def sharded(what: str, kind: str) -> str:
    """Return the message for a weight that is sharded over processes; ``kind`` names the method."""
    return (
        f"{what} is sharded over several processes ({kind}), and nothing here tells "
        "where the rest is: rank the checkpoint directory, or the model before it is sharded or after it is gathered"
    )


def count_weights(tensors: Iterable[Stored]) -> int:
    """Return the number of weights in a checkpoint or state dict: floats, dequantized or not, and codes with scales.

    Scales do not count, nor do other tensors that are not parameters (``ownership.py``).
    """
    tensors = list(tensors)
    names = {name for t in tensors for name in t.names}
    scales = {name for t in tensors if not t.roles.isdisjoint({"scales", "ingredient"}) for name in t.names}
    scales |= {c for t in tensors if codes.may_be_codes(t.dtype) for n in t.names for c in codes.companions(n, names)}
    count = 0
    for t in tensors:
        quantized = is_unread(t) or (
            codes.may_be_codes(t.dtype) and any(codes.companions(name, names) for name in t.names)
        )
        weights = quantized or (t.dtype is not None and t.dtype.is_floating_point and not is_buffer(t.name))
        count += t.numel if weights and scales.isdisjoint(t.names) else 0
    return count


def digest_of_headers(tensors: Iterable[Stored]) -> str:
    """Return the SHA-256 of names, shapes and dtypes, in sorted order; values do not enter.

    Of several names only the first one enters, since a file has no second name for a tied weight.
    """
    lines = sorted(f"{t.name} {t.shape} {t.dtype}\n" for t in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_types_in(config: object) -> tuple[str, ...]:
    """Return ``model_type`` of a config (an object or a dict), and then that of its ``text_config``."""

    def get(holder: object, key: str) -> object:
        return holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)

    found = (get(config, "model_type"), get(get(config, "text_config"), "model_type"))
    return tuple(dict.fromkeys(kind for kind in found if isinstance(kind, str)))


def _put_together(stored: Stored, tensor: torch.Tensor) -> Stored:
    """With a way to the values where the tensor only stands for one that lies on several processes."""
    found = stands_for(tensor)
    if found is None:
        return stored
    shards, spread = found
    error = None if spread.problem is None else ShardedError(f"{stored.name}: {spread.problem}")
    return replace(stored, take=shards.taker(spread), overhead=spread.overhead, is_spread=True, error=error)


def _taker(tensor: torch.Tensor) -> Take:
    return lambda index, device=None: tensor.detach()[index] if index else tensor.detach()


def _no_tensor(name: object, value: object) -> str:
    what = f"the mapping has {name!r}: {type(value).__name__}, but names and tensors are expected"
    if isinstance(value, Mapping):
        return f"{what}: pass the inner mapping, source[{name!r}], if those are the weights"
    return f"{what}: pass model.state_dict() or what safetensors.torch.load_file() returns"


def _problem(tensor: torch.Tensor) -> str | None:
    """Return why the values of a tensor in memory are not weights, or None."""
    found = [attribute for attribute in _OF_PARAMETER if getattr(tensor, attribute, None) is not None]
    if found:
        return codes.codes_reason(found)
    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return f"quantized or other tensor subclass {kind.__name__}; {codes.NOT_SUPPORTED}"
    if tensor.layout != torch.strided:
        return f"stored as {str(tensor.layout).removeprefix('torch.')}: only dense tensors are ranked"
    return None
