"""Architectures of transformers, each built small enough for a test from its default config."""

from __future__ import annotations

from typing import Any

import transformers

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

MambaForCausalLM Mamba2ForCausalLM FalconMambaForCausalLM JambaForCausalLM ZambaForCausalLM Zamba2ForCausalLM
BambaForCausalLM FalconH1ForCausalLM NemotronHForCausalLM RecurrentGemmaForCausalLM RwkvForCausalLM xLSTMForCausalLM
GraniteMoeHybridForCausalLM DbrxForCausalLM Llama4ForCausalLM Llama4ForConditionalGeneration
DeepseekV32ForCausalLM DeepseekV4ForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM MiniMaxM2ForCausalLM
Ernie4_5_MoeForCausalLM HunYuanMoEV1ForCausalLM HunYuanDenseV1ForCausalLM Dots1ForCausalLM FlexOlmoForCausalLM
Olmo3ForCausalLM LongcatFlashForCausalLM Lfm2MoeForCausalLM ApertusForCausalLM DogeForCausalLM BitNetForCausalLM
DiffLlamaForCausalLM NemotronForCausalLM GPTNeoForCausalLM GPTNeoXJapaneseForCausalLM CTRLLMHeadModel
OpenAIGPTLMHeadModel ImageGPTForCausalImageModeling BioGptForCausalLM CpmAntForCausalLM ZayaForCausalLM
XLNetLMHeadModel XLMWithLMHeadModel FlaubertWithLMHeadModel CamembertForMaskedLM XLMRobertaForMaskedLM
MobileBertForMaskedLM NystromformerForMaskedLM YosoForMaskedLM MraForMaskedLM CanineModel LukeForMaskedLM
MegatronBertForMaskedLM RemBertForMaskedLM IBertForMaskedLM XmodForMaskedLM SqueezeBertForMaskedLM
BigBirdForMaskedLM FunnelForMaskedLM ReformerModelWithLMHead PerceiverForMaskedLM EsmForMaskedLM TapasForMaskedLM
LayoutLMForMaskedLM MarkupLMModel LiltModel BrosModel MarianMTModel LEDForConditionalGeneration
ProphetNetForConditionalGeneration FSMTForConditionalGeneration M2M100ForConditionalGeneration
NllbMoeForConditionalGeneration PLBartForConditionalGeneration BlenderbotForConditionalGeneration
UMT5ForConditionalGeneration T5GemmaForConditionalGeneration UdopForConditionalGeneration
Pix2StructForConditionalGeneration TrOCRForCausalLM GitForCausalLM

GteModel JinaEmbeddingsV3Model NomicBertModel HrmTextForCausalLM
Kimi_K25ForConditionalGeneration QianfanOCRForConditionalGeneration UnlimitedOcrForConditionalGeneration

BitForImageClassification ResNetForImageClassification RegNetForImageClassification ConvNextForImageClassification
ConvNextV2ForImageClassification SwinForImageClassification Swinv2ForImageClassification
MobileNetV1ForImageClassification MobileNetV2ForImageClassification EfficientNetForImageClassification
SegformerForSemanticSegmentation DPTForDepthEstimation GLPNForDepthEstimation BeitForImageClassification
Data2VecVisionForImageClassification Dinov2ForImageClassification DINOv3ViTModel DINOv3ConvNextModel
CvtForImageClassification LevitForImageClassification PvtForImageClassification PvtV2ForImageClassification
PoolFormerForImageClassification FocalNetForImageClassification SwiftFormerForImageClassification
MobileViTForImageClassification MobileViTV2ForImageClassification HieraForImageClassification ViTMAEForPreTraining
IJepaModel VJEPA2Model VideoMAEForVideoClassification VivitForVideoClassification TimesformerForVideoClassification
GroundingDinoForObjectDetection RfDetrModel Sapiens2Model Tipsv2VisionModel Tipsv2TextModel
OwlViTForObjectDetection SamModel SuperPointForKeypointDetection

EncodecModel DacModel VitsModel SpeechT5ForSpeechToText SpeechT5ForTextToSpeech SpeechT5HifiGan UnivNetModel
FastSpeech2ConformerModel Wav2Vec2ForCTC WavLMForCTC Wav2Vec2BertForCTC Wav2Vec2ConformerForCTC Data2VecAudioForCTC
SEWForCTC SEWDForCTC UniSpeechForCTC UniSpeechSatForCTC ASTForAudioClassification BarkModel
MusicgenForCausalLM MoonshineForConditionalGeneration ParakeetForCTC

BlipForConditionalGeneration Blip2ForConditionalGeneration MllamaForConditionalGeneration ViltModel BridgeTowerModel
FlavaModel LxmertModel VisualBertModel Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration
Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Gemma3ForConditionalGeneration
PaliGemmaForConditionalGeneration Idefics2ForConditionalGeneration Idefics3ForConditionalGeneration
InternVLForConditionalGeneration Mistral3ForConditionalGeneration AriaForConditionalGeneration
Kosmos2ForConditionalGeneration FuyuForCausalLM Phi4MultimodalForCausalLM VoxtralForConditionalGeneration

DecisionTransformerModel InformerForPrediction AutoformerForPrediction TimeSeriesTransformerForPrediction
PatchTSMixerForPrediction TimesFmModelForPrediction
""".split()  # noqa: SIM905

_SIZES: dict[int, str] = {
    128: "vocab_size n_vocab entity_vocab_size max_2d_position_embeddings",
    96: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size d_inner "
    "shared_intermediate_size decoder_intermediate_size dim_feedforward",
    64: "hidden_size d_model n_embd embed_dim dim embedding_size encoder_hidden_size word_embed_proj_dim hidden_dim "
    "projection_dim max_position_embeddings n_positions max_source_positions max_target_positions n_ctx max_seq_len "
    "max_period_positions emb_dim fusion_hidden_size lru_width mamba_dt_rank",
    32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size image_size",
    16: "head_dim d_kv kv_channels attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank "
    "q_lora_rank d_head",
    8: "patch_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_kv_heads num_experts_per_tok eos_token_id",
    1: "n_shared_experts n_group topk_group first_k_dense_replace bos_token_id",
    0: "pad_token_id",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_PER_LAYER = ("layer_types", "mlp_layer_types", "attention_layers", "layers_block_type")
# Where the sizes above do not fit each other.
OWN: dict[str, dict[str, Any]] = {
    "BitForImageClassification": {"hidden_sizes": [128, 256, 256, 256], "depths": [1, 1, 1, 1]},
    "ResNetForImageClassification": {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1]},
    "RegNetForImageClassification": {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1], "groups_width": 32},
    "ConvNextForImageClassification": {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1]},
    "ConvNextV2ForImageClassification": {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1]},
    "DINOv3ConvNextModel": {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1]},
    "FocalNetForImageClassification": {"embed_dim": 32, "depths": [1, 1, 1, 1]},
    "PoolFormerForImageClassification": {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1]},
    "BambaForCausalLM": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "DbrxForCausalLM": {"attn_config.rope_theta": 10000.0, "attn_config.kv_n_heads": 2},
    "DacModel": {"encoder_hidden_size": 16, "decoder_hidden_size": 128, "downsampling_ratios": [2, 2]},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "n_shared_experts": 1},
    "EfficientNetForImageClassification": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 128},
    "EsmForMaskedLM": {"vocab_size": 64},
    "GraniteMoeHybridForCausalLM": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 16},
    "InformerForPrediction": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "AutoformerForPrediction": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "TimeSeriesTransformerForPrediction": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashForCausalLM": {"n_routed_experts": 4, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "NemotronForCausalLM": {"head_dim": 16, "num_key_value_heads": 2},
    "PerceiverForMaskedLM": {"d_latents": 64, "num_latents": 32, "num_self_attends_per_block": 1, "qk_channels": 64},
    "ReformerModelWithLMHead": {"is_decoder": True, "axial_pos_embds_dim": [16, 48]},
    "Swinv2ForImageClassification": {
        **{"embed_dim": 48, "depths": [1, 1], "num_heads": [3, 6]},
        **{"stage_names": ["stem", "stage1", "stage2"], "_out_features": ["stage2"], "_out_indices": [2]},
    },
    "SwinForImageClassification": {"embed_dim": 48, "depths": [1, 1, 1, 1]},
    "Wav2Vec2BertForCTC": {"vocab_size": 64},
    "Wav2Vec2ConformerForCTC": {"vocab_size": 64},
    "XLMWithLMHeadModel": {"emb_dim": 64},
    "FlaubertWithLMHeadModel": {"emb_dim": 64},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}


def _settable(config: Any, key: str) -> bool:
    found = getattr(type(config), key, None)
    return not isinstance(found, property) or found.fset is not None


def shrunk(config: Any) -> Any:
    """The default config of a family with sizes that fit a test."""
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrunk(value)
        elif key in SMALL and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, key, SMALL[key])
        elif key in _PER_LAYER and isinstance(value, (list, tuple)) and _settable(config, key):
            setattr(config, key, list(value)[:2])
    if len(stages := vars(config).get("stage_names") or ()) > 3 and hasattr(config, "num_hidden_layers"):
        config.stage_names, config._out_features, config._out_indices = stages[:3], [stages[2]], [2]
    return config


def small(name: str) -> Any:
    """The model of this class of transformers."""
    kind = getattr(transformers, name)
    config = shrunk(kind.config_class())
    for path, value in OWN.get(name, {}).items():
        *above, key = path.split(".")
        holder = config
        for word in above:
            holder = getattr(holder, word)
        setattr(holder, key, value)
    return kind(config).eval()
