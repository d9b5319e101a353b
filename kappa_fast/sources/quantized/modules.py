"""Modules that keep quantized weights: what belongs to their codes beside the parameters, and what is out of reach.

The codes of most formats are buffers, with scales beside them as parameters, buffers or plain attributes. What is found
here goes through the same families as the tensors of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import codes
from ..base import Stored

# Classes whose buffers are those of the checkpoint. gptqmodel's other kernels rearrange them under the same names when
# the model is loaded, and nothing in the buffers tells.
_AS_STORED = re.compile(r"(?:Torch|TritonV2)(?:Quant)?Linear|Awq(?:Torch|GEMM)(?:Quant)?Linear|WQLinear_GEMM")
_AWQ = ("Awq", "AWQ", "WQLinear")
# Classes of formats that no family reads, by name: all that they hold is codes, code books and scales.
_UNREAD = {
    "BitLinear": "bitnet",
    "EetqLinear": "eetq",
    "FPQuantLinear": "fp_quant",
    "FourOverSixLinear": "fouroversix",
    "HiggsLinear": "higgs",
    "MetalLinear": "metal",
    "NVFP4Linear": "nvfp4 for one kernel",
    "QParamsLinear": "quark",
    "QuantizedLinear": "aqlm or spqr",
    "SINQLinear": "sinq",
    "VQuantLinear": "vptq",
}
# Classes of transformers that keep scales the other way round than the weight, for the kernel they call.
_TURNED = {
    "CompressedTensorsFP8Linear": ("weight_scale",),  # [1, out] beside [out, in]
    "FbgemmFp8Llama4TextExperts": ("down_proj_scale",),  # [experts, out, 1] beside [experts, in, out]
}
# Attributes under which transformers' Mxfp4GptOssExperts keeps objects of triton_kernels in place of parameters.
_STACKS = ("gate_up_proj", "down_proj")


def beside_codes(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers and plain attributes of a module that are codes, or belong to codes, by their names in the module."""
    own: dict[str, torch.Tensor] = {n: t for n, t in module._parameters.items() if t is not None}
    buffers = {n: t for n, t in module._buffers.items() if t is not None}  # TorchScript's are no dictionaries
    if not any(codes.may_be_codes(t.dtype) for t in (*own.values(), *buffers.values())):
        return {}
    attributes = {n: t for n, t in vars(module).items() if isinstance(t, torch.Tensor)}
    every = {**attributes, **buffers, **own}
    belongs: set[str] = set()
    for name, tensor in (*own.items(), *buffers.items()):
        found = codes.companions(name, every) if codes.may_be_codes(tensor.dtype) and tensor.dim() >= 2 else []
        if found:
            belongs.update((name, *found))
    return {n: t for n, t in {**buffers, **attributes}.items() if n in belongs and n not in own}


def as_on_disk(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A view of a tensor of a module as checkpoints have it, where the module has turned it."""
    turned = any(name in _TURNED.get(c.__name__, ()) for c in type(module).__mro__)
    return tensor.transpose(-1, -2) if turned and tensor.dim() >= 2 else tensor


def problem_of(module: nn.Module, name: str) -> str | None:
    """Why the tensor of this name in a module is no weight, whatever is beside it; None if its class is no reason."""
    kinds = [c.__name__ for c in type(module).__mro__]
    unread = next((kind for kind in kinds if kind in _UNREAD), None)
    if unread is not None and name != "bias":
        return f"part of a quantized layer ({unread}, {_UNREAD[unread]}); {codes.NOT_SUPPORTED}"
    if name == "qweight" and not _AS_STORED.fullmatch(kinds[0]):  # other kernels inherit from these classes
        return f"codes in the order of one kernel ({kinds[0]}): rank the checkpoint"
    return None


def is_scale(module: nn.Module, name: str) -> bool:
    """True for what compressed-tensors keeps beside a weight that it has calibrated and not compressed yet.

    The weight is as it was, and rounded in every forward pass; zero points may come in float8, as if they were codes.
    """
    own = dict(module._parameters.items())
    weight = own.get("weight")
    plain = weight is not None and not codes.may_be_codes(weight.dtype)
    if not plain or getattr(module, "quantization_scheme", None) is None:
        return False
    return name in codes.companions("weight", own) or name.startswith(("input_", "output_"))


def config_of(module: nn.Module | None, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the config of the model says about quantization, corrected by what the module knows better.

    gptqmodel changes the zero points of GPTQ while it loads, and compressed-tensors has a scheme for every module.
    """
    found = dict(config)
    version = getattr(module, "qzero_format", None)
    if any(c.__name__.startswith(_AWQ) for c in type(module).__mro__):  # gptqmodel's have a version too, of no meaning
        found |= {"quant_method": "awq"}
    elif callable(version):
        found |= {"quant_method": "gptq", "checkpoint_format": "gptq" if version() == 1 else "gptq_v2"}
    weights: Any = getattr(getattr(module, "quantization_scheme", None), "weights", None)
    if callable(getattr(weights, "model_dump", None)):
        group = {"targets": ["Linear"], "weights": weights.model_dump()}
        found |= {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return found


def config_in(config: object) -> Mapping[str, Any]:
    """``quantization_config`` of a model's config, an object or what JSON made of one; empty if it has none."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        text = getattr(config, "text_config", None)
        found = getattr(text, "quantization_config", None)
    if callable(getattr(found, "to_dict", None)):
        found = found.to_dict()
    return dict(found) if isinstance(found, Mapping) else {}


def out_of_reach(model: nn.Module) -> Iterator[Stored]:
    """Stacks of experts that are in no tensor of the model, but in an object of one kernel."""
    for name, module in model.named_modules():
        kind, start = type(module).__name__, f"{name}." if name else ""
        for stack in _STACKS:
            kept = vars(module).get(stack)
            shape = getattr(kept, "shape", None)
            if kept is not None and not isinstance(kept, torch.Tensor) and shape is not None and len(shape) == 3:
                yield unread(start + stack, shape, f"codes in the order of one kernel ({kind}): rank the checkpoint")


def unread(name: str, shape: Iterable[Any], reason: str) -> Stored:
    """A weight of which nothing but its place and size is known, for ``skipped`` and the number of parameters."""

    def take(index: object, device: torch.device | None = None) -> torch.Tensor:
        raise AssertionError(f"{name!r} has a problem and is not read")

    sizes = tuple(int(size) for size in shape)
    return Stored((name,), sizes, None, torch.device("cpu"), take, reason, out_of_sight=True)
