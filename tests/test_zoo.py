"""Architectures of transformers, built small: every parameter is ranked or skipped, and file and module agree."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import kappa_fast

transformers = pytest.importorskip("transformers")

FAST = ("LlamaForCausalLM", "MixtralForCausalLM", "GPTNeoXForCausalLM", "BertForMaskedLM")
NAMES = """
LlamaForCausalLM MistralForCausalLM MixtralForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM
Qwen3MoeForCausalLM Qwen3NextForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM PhiForCausalLM
Phi3ForCausalLM PhimoeForCausalLM OlmoForCausalLM Olmo2ForCausalLM OlmoeForCausalLM DeepseekV2ForCausalLM
DeepseekV3ForCausalLM GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeSharedForCausalLM
Glm4ForCausalLM Glm4MoeForCausalLM GlmForCausalLM CohereForCausalLM Cohere2ForCausalLM StableLmForCausalLM
Starcoder2ForCausalLM FalconForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM GPTJForCausalLM GPTBigCodeForCausalLM
CodeGenForCausalLM OPTForCausalLM BloomForCausalLM MptForCausalLM JetMoeForCausalLM PersimmonForCausalLM
SmolLM3ForCausalLM Ernie4_5ForCausalLM HeliumForCausalLM Lfm2ForCausalLM MiniMaxForCausalLM ArceeForCausalLM
XGLMForCausalLM BertForMaskedLM RobertaForMaskedLM DebertaV2ForMaskedLM DebertaForMaskedLM DistilBertForMaskedLM
ElectraForMaskedLM AlbertForMaskedLM ModernBertForMaskedLM MPNetForMaskedLM FNetForMaskedLM RoFormerForMaskedLM
ConvBertForMaskedLM LongformerForMaskedLM T5ForConditionalGeneration MT5ForConditionalGeneration
BartForConditionalGeneration PegasusForConditionalGeneration MBartForConditionalGeneration
SwitchTransformersForConditionalGeneration LongT5ForConditionalGeneration WhisperForConditionalGeneration
Speech2TextForConditionalGeneration ViTForImageClassification DeiTForImageClassification CLIPModel SiglipModel
LlavaForConditionalGeneration PatchTSTForPrediction YolosForObjectDetection LayoutLMv3Model HubertForCTC
""".split()  # noqa: SIM905

_SIZES: dict[int, str] = {
    128: "vocab_size n_vocab entity_vocab_size max_2d_position_embeddings",
    96: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size d_inner "
    "shared_intermediate_size decoder_intermediate_size",
    64: "hidden_size d_model n_embd embed_dim dim embedding_size encoder_hidden_size word_embed_proj_dim hidden_dim "
    "projection_dim max_position_embeddings n_positions max_source_positions max_target_positions n_ctx max_seq_len",
    32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size image_size",
    16: "head_dim d_kv kv_channels attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank "
    "q_lora_rank",
    8: "patch_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_kv_heads num_experts_per_tok eos_token_id",
    1: "n_shared_experts n_group topk_group first_k_dense_replace bos_token_id",
    0: "pad_token_id",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}


def shrunk(config: Any) -> Any:
    """The default config of a family with sizes that fit a test."""
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrunk(value)
        elif (
            key in SMALL and isinstance(value, (int, type(None))) and not isinstance(value, bool) and value is not None
        ):
            setattr(config, key, SMALL[key])
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:2]
    return config


def attribute(model: Any, name: str) -> torch.Tensor:
    """The weight as the model itself has it, computed where it is computed."""
    for word in name.split("."):
        model = getattr(model, word)
    return model.detach()


def about(ranking: kappa_fast.Ranking) -> set[tuple[str, str]]:
    """What was skipped and why, but for buffers, which only files hold, and parts of weights that are ranked whole."""
    found = {(re.sub(r"\.\d+\.", ".*.", s.name), s.reason) for s in ranking.skipped}
    return {(name, why) for name, why in found if not re.search("buffer|^(?:one of the )?parts? ", why)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_model_and_what_it_saves_have_the_same_entries_and_every_interval_holds_the_true_kappa(name, tmp_path):
    kind = getattr(transformers, name)
    model = kind(shrunk(kind.config_class())).eval()
    live = kappa_fast.rank(model, progress=False)
    ranked = {n for e in live for n in (e.name, *e.aliases)} | {re.sub(r"\[.*", "", s.name) for s in live.skipped}
    assert {n for n, p in model.named_parameters() if p.ndim >= 2} <= ranked
    for entry in live:
        weight = attribute(model, entry.name)[entry.index]
        sigma = torch.linalg.svdvals(weight.double().flatten(1))
        # A norm over a weight in float32, of which another is computed, depends on the number of threads.
        slack = 1e-6 if entry.name in live.metadata["source"].get("computed", ()) else 1e-9
        if entry.status == "ok":
            assert entry.lower * (1 - slack) <= sigma[0] / sigma[-1] <= entry.upper * (1 + slack), entry.key
    model.save_pretrained(tmp_path)
    saved = kappa_fast.rank(tmp_path, progress=False)
    assert {e.key: (e.kappa, e.shape) for e in saved} == {e.key: (e.kappa, e.shape) for e in live}
    assert about(saved) == about(live)
