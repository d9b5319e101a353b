"""Finds codes and scales in modules that hold quantized weights, and weights in modules that cannot be read.

The codes of most formats are buffers; their scales are parameters, buffers or plain attributes. The tensors found here
are recognized by the same families of formats as those of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import codes
from ..base import Stored

# Classes whose buffers are as in the checkpoint. Other kernels of gptqmodel reorder the buffers when the model is
# loaded, under the same names.
_AS_STORED = re.compile(r"(?:Torch|TritonV2)(?:Quant)?Linear|Awq(?:Torch|GEMM)(?:Quant)?Linear|WQLinear_GEMM")
_AWQ = ("Awq", "AWQ", "WQLinear")
# Classes of unsupported formats, which hold only codes, code books and scales.
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
# Classes of transformers that transpose scales, for the kernel that they call.
_TRANSPOSED = {
    "CompressedTensorsFP8Linear": ("weight_scale",),  # [1, out] beside [out, in]
    "FbgemmFp8Llama4TextExperts": ("down_proj_scale",),  # [experts, out, 1] beside [experts, in, out]
}
# Attributes of transformers' Mxfp4GptOssExperts that are objects of triton_kernels instead of parameters.
_STACKS = ("gate_up_proj", "down_proj")


def quantized_attributes(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers and plain attributes of a module that are codes or their companions, by their names."""
    own: dict[str, torch.Tensor] = {n: t for n, t in module._parameters.items() if t is not None}
    buffers = {n: t for n, t in module._buffers.items() if t is not None}  # TorchScript has no dictionaries
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
    """Return a tensor of a module as checkpoints have it: a transposed view if the module has transposed it."""
    transposed = any(name in _TRANSPOSED.get(c.__name__, ()) for c in type(module).__mro__)
    return tensor.transpose(-1, -2) if transposed and tensor.dim() >= 2 else tensor


def problem_of(module: nn.Module, name: str) -> str | None:
    """Return why a tensor of a module is not a weight because of the module's class, or None."""
    kinds = [c.__name__ for c in type(module).__mro__]
    unread = next((kind for kind in kinds if kind in _UNREAD), None)
    if unread is not None and name != "bias":
        return f"part of a quantized layer ({unread}, {_UNREAD[unread]}); {codes.NOT_SUPPORTED}"
    if name == "qweight" and not _AS_STORED.fullmatch(kinds[0]):  # other kernels inherit from these classes
        return f"codes in the order of one kernel ({kinds[0]}): rank the checkpoint"
    return None


def is_scale(module: nn.Module, name: str) -> bool:
    """Return True for scales and zero points of a weight that compressed-tensors has calibrated but not compressed.

    Such a weight is unchanged, and is rounded in every forward pass; zero points may be float8, as codes are.
    """
    own = dict(module._parameters.items())
    weight = own.get("weight")
    plain = weight is not None and not codes.may_be_codes(weight.dtype)
    if not plain or getattr(module, "quantization_scheme", None) is None:
        return False
    return name in codes.companions("weight", own) or name.startswith(("input_", "output_"))


def config_of(module: nn.Module | None, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization config of the model, corrected by the attributes of the module.

    gptqmodel changes the zero points of GPTQ when it loads, and compressed-tensors has a scheme for every module.
    """
    found = dict(config)
    version = getattr(module, "qzero_format", None)
    if any(c.__name__.startswith(_AWQ) for c in type(module).__mro__):  # in gptqmodel these have a meaningless version
        found |= {"quant_method": "awq"}
    elif callable(version):
        found |= {"quant_method": "gptq", "checkpoint_format": "gptq" if version() == 1 else "gptq_v2"}
    weights: Any = getattr(getattr(module, "quantization_scheme", None), "weights", None)
    if callable(getattr(weights, "model_dump", None)):
        group = {"targets": ["Linear"], "weights": weights.model_dump()}
        found |= {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return found


def config_in(config: object) -> Mapping[str, Any]:
    """Return ``quantization_config`` of a model's config, which may be an object or a dict; empty if it has none."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        text = getattr(config, "text_config", None)
        found = getattr(text, "quantization_config", None)
    if callable(getattr(found, "to_dict", None)):
        found = found.to_dict()
    return dict(found) if isinstance(found, Mapping) else {}


def unreadable_stacks(model: nn.Module) -> Iterator[Stored]:
    """Yield stacks of experts that are not tensors of the model, but objects of a kernel."""
    for name, module in model.named_modules():
        kind, start = type(module).__name__, f"{name}." if name else ""
        for stack in _STACKS:
            kept = vars(module).get(stack)
            shape = getattr(kept, "shape", None)
            if kept is not None and not isinstance(kept, torch.Tensor) and shape is not None and len(shape) == 3:
                yield unread(start + stack, shape, f"codes in the order of one kernel ({kind}): rank the checkpoint")


def unread(name: str, shape: Iterable[Any], reason: str) -> Stored:
    """Return a weight of which only name and shape are known, for ``skipped`` and the number of parameters."""

    def take(index: object, device: torch.device | None = None) -> torch.Tensor:
        raise AssertionError(f"{name!r} has a problem, and is never read")

    sizes = tuple(int(size) for size in shape)
    return Stored((name,), sizes, None, torch.device("cpu"), take, reason, out_of_sight=True)
