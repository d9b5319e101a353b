"""What the names of parameters tell: layer, group, role. Tables of the names in use; nothing here sees a tensor."""

from __future__ import annotations

import re
from collections.abc import Collection

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

# Wrappers that put themselves between a module and its weight; the weight keeps the name it has without them.
_WRAPPED = re.compile(r"\.(?:base_layer|original_module)(?=\.|$)")

_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens(?:_per_layer)?|embed_in|embed_out|embed_positions|wte|wpe|tok_embeddings|token_embedding"
    r"|word_embeddings(?:_layernorm)?|position_embeddings?|positional_embedding(?:_vlm)?|token_type_embeddings|pos_embed"
    r"|cls_token|relative_attention_bias|lm_head)(?:\.(?:decoder\.)?weight)?$"
    r"|^(?:model\.)?(?:shared|output)\.weight$|(?:^|\.)predictions\.decoder\.weight$"
)
_ROUTER = re.compile(r"(?:^|\.)(?:router|[a-z_]+_router|shared_expert_gate)(?:\.|$)")
_GATE = re.compile(r"^(?P<block>.*)\.gate(?:\.wg)?\.weight$")
_ADAPTER = re.compile(
    r"(?:^|[._])(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|lora_[a-z]+|modules_to_save|ia3_l|vera_[A-Za-z]+|hada_\w+"
    r"|lokr_\w+|oft_\w+|boft_\w+|prompt_encoder|prompt_embeddings|adaption_\w+|trainable_tokens_\w+)(?:\.|$)"
)
_CONVOLUTION = re.compile(
    r"(?:^|\.)conv\w*(?:\.\d+)?\.weight$|\.(?:patch_embeddings?\.projection|patch_embed\.proj)\.weight$"
)
_MASK = re.compile(r"(?:^|\.)(?:attn|attention|self_attn)\.(?:bias|masked_bias)$|(?:^|\.)(?:inv_freq|position_ids)$")

# Last words of names that belong to the codes of a quantized weight, by what they are called on disk.
SCALE_SUFFIXES = (
    "weight_scale_inv",
    "weight_scale_2",
    "weight_scale",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "input_scale",
    "scales",
    "qzeros",
    "g_idx",
    "SCB",
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
)


def base_name(name: str) -> str:
    """The name without the wrappers of PEFT."""
    return _WRAPPED.sub("", name)


def layer_of(name: str) -> int | None:
    """The first number among the components of the name."""
    found = _NUMBER.search(name)
    return int(found.group()) if found else None


def group_of(name: str) -> str:
    """The name with its numbers as ``*``."""
    return _NUMBER.sub("*", name)


def is_embedding(name: str) -> bool:
    """True for embeddings, positional ones too, and output heads."""
    return _EMBEDDING.search(name) is not None


def is_router(name: str, names: Collection[str]) -> bool:
    """True for the router of a mixture of experts; a plain ``gate`` is one where its block has experts."""
    if _ROUTER.search(name):
        return True
    gate = _GATE.match(name)
    return gate is not None and any(other.startswith(gate["block"] + ".expert") for other in names)


def is_adapter(name: str) -> bool:
    """True for the tensors that PEFT adds to a model."""
    return _ADAPTER.search(name) is not None


def is_convolution(name: str) -> bool:
    """True for kernels of convolutions, as far as a name can tell."""
    return _CONVOLUTION.search(name) is not None


def is_mask(name: str) -> bool:
    """True for buffers that a state dict holds beside the weights."""
    return _MASK.search(name) is not None


def scale_owner(name: str, names: Collection[str]) -> str | None:
    """The weight whose scales (or zero points, ...) this tensor holds, or None if it is no such tensor."""
    if name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in names:
        return name.removesuffix("_scales") + "_blocks"
    prefix, _, last = name.rpartition(".")
    if last not in SCALE_SUFFIXES:
        return None
    for codes in ("weight", "qweight", "weight_packed", "weight_blocks"):
        candidate = f"{prefix}.{codes}" if prefix else codes
        if candidate in names:
            return candidate
    return prefix if prefix in names else None


def scale_of(name: str, names: Collection[str]) -> str | None:
    """The scales that lie beside a weight, or None."""
    if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in names:
        return name.removesuffix("_blocks") + "_scales"
    prefix, _, last = name.rpartition(".")
    candidates = [f"{name}.{suffix}" for suffix in SCALE_SUFFIXES]
    candidates += [
        f"{name}_{suffix.removeprefix('weight_')}" for suffix in SCALE_SUFFIXES if suffix.startswith("weight_")
    ]
    if last in ("weight", "qweight", "weight_packed"):
        candidates += [f"{prefix}.{suffix}" if prefix else suffix for suffix in SCALE_SUFFIXES]
    return next((c for c in candidates if c in names and c != name), None)
