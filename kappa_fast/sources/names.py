"""Roles of parameters (embedding, head, router, adapter, ...) by their names, from tables of the names in use."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

# Names of the wrappers of PEFT, and of the tensors that its methods add.
_PEFT = re.compile(r"^base_model\.|\.base_layer\.|\.modules_to_save\.|\.original_module\.|(?:^|\.)lora_")
_ADAPTER = re.compile(
    r"(?:^|\.)(?:lora_|lycoris_|(?:\w+_)?lora\.(?:up|down|[abAB])(?:\.|$)|hada_w[12]_|lokr_w[12](?:_|$)"
    r"|modules_to_save(?:\.|$))"
)
_ADAPTER_IN_PEFT = re.compile(
    r"^prompt_encoder\.|(?:^|\.)(?:adamss|adaption|beft|boft|bone|c3a|deft|delora|fourierft|frod|glora|gralora|hada|hira"
    r"|hra|ia3|lily|ln_tuning|lokr|miss|oft|osf|peanut|poly|prompt_embeddings|psoft|pvera|randlora|road|shadow|shira"
    r"|supertuning|tinylora|trainable_tokens|unilora|vblora|vera|waveft|xlora)(?:_|\.|$)"
)

# Names of modules that are embeddings, such as "embed_tokens", "word_embeddings", "pos_embed", ...
_EMBEDDING = re.compile(
    r"(?:\w+_)?(?:emb|embs|embd|embed|embeds|embedding|embeddings|embedder)(?:_\w+)?|wte|wpe|\w*position_bias_table"
    r"|relative_attention_bias|rel_pos_[hw]|token_types|(?:cls|mask|class|dist)_tokens?"
)
# ... and words in names of modules that project, normalize or cut into patches instead of looking up.
_NO_EMBEDDING = re.compile(
    r"patch|conv|proj|norm|dense|linear|transform|mapping|dropout|rotary|time|bbox|class_embed|decoder_embed$"
)
_SHARED = re.compile(r"(?:^|model\.)shared\.weight$")
_HEAD = re.compile(
    r"(?:^|\.)(?:\w+_)?(?:lm_head|unembed|vocab_projector|codec_head)(?:\.(?:decoder|out_proj))?(?:\.weight)?$"
    r"|(?:^|\.)(?:embed_out|(?:predictions|mlm_score)\.decoder|pred_layer\.proj)\.weight$"
)
# Names that heads and other projections have.
_VAGUE_HEAD = re.compile(r"(?:^|\.)(?:output|decoder|output_projection|proj_out|head)\.weight$")

_ROUTER = re.compile(
    r"(?:^|\.)(?:[a-z_]+_)?router(?:\.|$)|(?:^|\.)(?:shared_experts?_gate|ffn_gate_inp(?:_shexp)?)(?:\.|$)"
)
_GATE = re.compile(r"^(?P<block>(?:.*\.)?)gate(?:\.wg)?\.weight$")
_MOE = re.compile(r"moe|expert|sparse")

_CONVOLUTION = re.compile(r"conv(?!er|ne)|patch_embed(?:dings?)?\.(?:proj|projection)\.")
_PARAMETER = re.compile(
    r"(?:\w+_)?weights?|weight_[ih]h_l\d+(?:_reverse)?|weight_hr_l\d+(?:_reverse)?|original\d?|\w*bias\w*"
    r"|(?:gate|up|down|gate_up|q|k|v|o|x|dt|in|out|text|visual|image|vision)_proj(?:ection)?|proj(?:ection)?|w[1-3]|v1"
    r"|A_log|A|\w*(?:embed|embedding|position|positional|token|tokens|latents?|query|queries|probe|sinks|codevectors)\w*"
)
_BUFFER = re.compile(
    r"(?:^|\.)(?:attn|attention|self_attn)\.(?:bias|masked_bias)$|(?:^|[._])(?:inv_freq|(?:attn|causal|attention)_mask)$"
    r"|(?:^|[._])(?:(?:diagonal|key|query)_decay|slope_rate|final_logits_bias|e_score_correction_bias)$"
    r"|(?:^|\.)(?:cos|sin|pe|alibi|fb|window|mel_filters?|mel_basis|filter_?banks?|(?:forward|inverse)_basis)$"
    r"|(?:^|[._])(?:[qkv]|kv|input|output|act|smooth)_scales?$"
    r"|(?:^|[._])(?:position_ids|(?:cos|sin)_cached?|freqs_cis|running_(?:mean|var)|num_batches_tracked)$"
)


# Weights that layers pass to functions and kernels instead of calling the module; from the code of transformers 5.23.
_READ_DIRECTLY = {
    "deberta": re.compile(r"\.attention\.self\.in_proj\.weight$"),
    "wavlm": re.compile(r"\.attention\.(?:[qkv]|out)_proj\.weight$"),
    **dict.fromkeys(("mamba", "falcon_mamba"), re.compile(r"\.mixer\.(?:x|dt|out)_proj\.weight$")),
    "mamba2": re.compile(r"\.mixer\.out_proj\.weight$"),
    "jamba": re.compile(r"\.mamba\.(?:x|dt|out)_proj\.weight$"),
}


def is_embedding(name: str) -> bool:
    """Return True for tables of embeddings: of tokens, positions, segments."""
    words = [word for word in name.split(".") if word not in ("weight", "weights")]
    owner = words[-1] if words else ""
    found = _EMBEDDING.fullmatch(owner) is not None and _NO_EMBEDDING.search(owner) is None
    return (found and owner != "embed_out") or _SHARED.search(name) is not None


def is_output_head(name: str, as_an_embedding: bool) -> bool:
    """Return True for the projection onto the vocabulary.

    as_an_embedding: True if an embedding of the model has the same shape.
    """
    return _HEAD.search(name) is not None or (as_an_embedding and _VAGUE_HEAD.search(name) is not None)


def is_router(name: str, names: Collection[str]) -> bool:
    """Return True for the router of a mixture of experts; a plain ``gate`` is one if its block has experts."""
    if _ROUTER.search(name):
        return True
    gate = _GATE.match(name)
    if gate is None:
        return False
    owner = gate["block"].rstrip(".").rpartition(".")[2]
    return _MOE.search(owner) is not None or any(
        other.startswith((gate["block"] + "expert", gate["block"] + "local_expert")) for other in names
    )


def is_read_directly(name: str, names: Collection[str], model_types: Collection[str]) -> bool:
    """Return True for weights of layers whose parent reads the weight and does not call the layer.

    An adapter on such a layer has no effect. names: the names of all tensors; nn.MultiheadAttention is recognized by
    its ``in_proj_weight``.
    """
    block = name.removesuffix("out_proj.weight")
    if block != name and any(block + beside in names for beside in ("in_proj_weight", "q_proj_weight")):
        return True
    return any(kind in _READ_DIRECTLY and _READ_DIRECTLY[kind].search(name) for kind in model_types)


def has_adapters(names: Iterable[str]) -> bool:
    """Return True if PEFT has wrapped the model that has these names."""
    return any(_PEFT.search(name) for name in names)


def is_adapter(name: str, in_peft: bool) -> bool:
    """Return True for the tensors that PEFT adds to a model; ``in_peft`` is the result of ``has_adapters``."""
    return _ADAPTER.search(name) is not None or (in_peft and _ADAPTER_IN_PEFT.search(name) is not None)


def is_convolution(name: str) -> bool:
    """Return True for names of kernels of convolutions."""
    return _CONVOLUTION.search(name) is not None


def is_parameter(name: str) -> bool:
    """Return True for the names that parameters with two or more dimensions have in torch.nn and transformers."""
    return _PARAMETER.fullmatch(name.rpartition(".")[2]) is not None or is_embedding(name)


def is_buffer(name: str) -> bool:
    """Return True for names of masks, rotary tables and statistics, which a state dict contains too."""
    return _BUFFER.search(name) is not None
