"""What is left out and why: options, names, dtypes, codes and their scales."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import EVERYTHING, matrices, reasons, skips, weights

from kappa_fast.errors import OptionError, SourceError
from kappa_fast.results.names import base_name, group_of, in_model_order, layer_of
from kappa_fast.sources import Filters
from kappa_fast.sources.names import (
    has_adapters,
    is_adapter,
    is_buffer,
    is_convolution,
    is_embedding,
    is_output_head,
    is_router,
)

SQUARE = (16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(include="("), r"include='\(' is not a regular expression: .*position 0"),
        (dict(exclude=["a", "[z"]), r"exclude='\[z' is not a regular expression"),
        (dict(include=3), "include=3: give a regular expression or a list of them"),
        (dict(exclude=["a", 3]), r"exclude=\['a', 3\]: give a regular expression"),
        (dict(include=[]), "include has no pattern, so nothing would be ranked"),
        (dict(embeddings=1), "embeddings=1: give True or False"),
        (dict(routers=None), "routers=None: give True or False"),
        (dict(fused="halves"), "fused='halves': give 'split' or 'stored'"),
        (dict(fused=None), "fused=None: give 'split' or 'stored'"),
        (dict(min_dim=0), "min_dim=0: give a positive integer"),
        (dict(min_dim=16.0), r"min_dim=16\.0: give a positive integer"),
        (dict(min_dim=True), "min_dim=True: give a positive integer"),
        (dict(min_dim=None), "min_dim=None: give a positive integer"),
        (dict(max_dim=0), "max_dim=0: give a positive integer"),
        (dict(max_dim="9"), "max_dim='9': give a positive integer"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Filters(**options)


def test_filters_are_frozen_and_equal_by_value():
    assert Filters(include="a") == Filters(include=["a"])
    assert hash(Filters(exclude=["a"])) == hash(Filters(exclude=("a",)))
    with pytest.raises(AttributeError):
        Filters().min_dim = 3


def test_include_and_exclude_search_in_names():
    source = weights(a__up__weight=SQUARE, a__down__weight=SQUARE, b__up__weight=SQUARE)
    assert set(matrices(source, Filters(include="up"))) == {"a.up.weight", "b.up.weight"}
    assert set(matrices(source, Filters(include=[r"^b\.", "down"]))) == {"a.down.weight", "b.up.weight"}
    assert set(matrices(source, Filters(include="up", exclude=[r"^b"]))) == {"a.up.weight"}
    assert set(matrices(source, Filters(exclude=[]))) == set(source)
    assert reasons(source, Filters(include="up", exclude=r"^b")) == {
        "a.down.weight": "matched by none of the include patterns",
        "b.up.weight": "excluded by the pattern '^b'",
    }


def test_patterns_see_every_name_of_a_tied_tensor():
    tied = torch.randn(SQUARE)
    source = {"first.weight": tied, "second.weight": tied, "third.weight": torch.randn(SQUARE)}
    assert set(matrices(source, Filters(include="second"))) == {"first.weight"}
    assert set(matrices(source, Filters(exclude="second"))) == {"third.weight"}


def test_sizes_are_those_of_the_matrix_not_of_the_tensor():
    source = weights(tall=(64, 15), wide=(16, 65), stack=(3, 15, 64), conv__weight=(16, 8, 2, 2), mlp__w=(16, 64))
    limits = Filters(min_dim=16, max_dim=64)
    assert set(matrices(source, limits)) == {"conv.weight", "mlp.w"}
    assert reasons(source, limits) == {
        "tall": "too small: its smaller side is below min_dim=16",
        "wide": "too large: its larger side is above max_dim=64",
        "stack": "too small: its smaller side is below min_dim=16",
    }
    # A stack that is skipped as a whole is one entry, with the shape of the parameter.
    assert [s.shape for s in skips(source, limits) if s.name == "stack"] == [(3, 15, 64)]


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), low=st.integers(1, 40), high=st.integers(1, 40))
def test_a_matrix_is_ranked_exactly_if_its_sides_are_within_the_limits(rows, columns, low, high):
    source = {"w": torch.empty(rows, columns)}
    ranked = bool(matrices(source, Filters(min_dim=low, max_dim=high)))
    assert ranked == (min(rows, columns) >= low and max(rows, columns) <= high)


EMBEDDINGS = [
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "shared.weight",
    "model.shared.weight",
    "bert.embeddings.word_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "model.decoder.embed_positions.weight",
    "gpt_neox.embed_in.weight",
    "text_model.embeddings.token_embedding.weight",
    "visual.positional_embedding",
    "vit.embeddings.position_embeddings",
    "pos_embed",
    "tok_embeddings.weight",
    "cls_token",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "model.language_model.embed_tokens_per_layer.weight",
    "layers.0.blocks.1.attn.relative_position_bias_table",
    "transformer.tokens_embed.weight",
    "backbone.embeddings.weight",
    "distance_embedding.weight",
    "embed_tokens.weight",
    "x.y_position_embeddings.weight",
    "decoder.embed.weight",
    "rel_pos_h",
]
HEADS = [
    "lm_head.weight",
    "model.lm_head.weight",
    "generator_lm_head.weight",
    "embed_out.weight",
    "lm_head.decoder.weight",
    "cls.predictions.decoder.weight",
    "mlm_score.decoder.weight",
    "vocab_projector.weight",
    "lm_head.out_proj.weight",
]
PROJECTIONS = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "mlp.gate_up_proj",
    "lm_head.dense.weight",
    "visual.patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embedding.weight",
    "wav2vec2.encoder.pos_conv_embed.conv.weight_v",
    "albert.encoder.embedding_hidden_mapping_in.weight",
    "pooler.dense.weight",
    "classifier.weight",
    "score.weight",
    "decoder.layers.0.fc1.weight",
    "encoder.layer.0.output.dense.weight",
    "decoder_embed.weight",
    "model.layers.0.mlp.shared_experts.up_proj.weight",
    "embeddings_project.weight",
    "encoder.member.weight",
    "rotary_emb.weight",
]


def test_embeddings_heads_and_projections_are_told_apart_by_their_names():
    assert [name for name in EMBEDDINGS if not is_embedding(name)] == []
    assert [name for name in HEADS if not is_output_head(name, as_an_embedding=False)] == []
    assert [name for name in PROJECTIONS if is_embedding(name) or is_output_head(name, as_an_embedding=False)] == []


def test_an_output_or_a_decoder_is_a_head_only_where_it_has_the_shape_of_an_embedding():
    table = weights(tok_embeddings__weight=(40, 16), output__weight=(40, 16), layers__0__output__weight=(16, 16))
    assert set(reasons(table, Filters())) == {"tok_embeddings.weight", "output.weight"}
    assert set(matrices(weights(encoder__weight=SQUARE, decoder__weight=SQUARE), Filters())) == {
        "encoder.weight",
        "decoder.weight",
    }


def test_embeddings_and_heads_are_ranked_on_demand():
    source = weights(model__embed_tokens__weight=(40, 16), lm_head__weight=(40, 16), w=SQUARE)
    assert set(matrices(source, Filters())) == {"w"}
    assert set(reasons(source, Filters()).values()) == {"embedding or output head (embeddings=True ranks it)"}
    assert set(matrices(source, Filters(embeddings=True))) == set(source)


ROUTERS = [
    "model.layers.0.mlp.router.weight",
    "model.layers.0.feed_forward.router.weight",
    "transformer.blocks.0.ffn.router.layer.weight",
    "model.layers.0.block_sparse_moe.gate.weight",
    "encoder.block.1.layer.1.mlp.router.classifier.weight",
    "model.layers.0.block_sparse_moe.router.layer.weight",
    "model.layers.0.mlp.shared_expert_gate.weight",
]
NO_ROUTERS = [
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.gate_up_proj.weight",
    "model.layers.0.mlp.experts.0.gate_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.self_attn.gate.weight",
    "mlp.gate.weight",
    "model.routers_list.weight",
    "model.layers.0.self_attn.gate_proj.weight",
]


def test_routers_are_told_from_gates():
    assert [name for name in ROUTERS if not is_router(name, ())] == []
    assert [name for name in NO_ROUTERS if is_router(name, ())] == []


@pytest.mark.parametrize("name", ["layers.1.mlp.gate.weight", "layers.1.mlp.gate.wg.weight"])
def test_a_gate_is_a_router_where_its_block_has_experts(name):
    beside = {name, "layers.1.mlp.experts.0.up_proj.weight"}
    assert is_router(name, beside)
    assert is_router(name, {name, "layers.1.mlp.local_experts.0.w1.weight"})
    assert not is_router(name, {name, "layers.2.mlp.experts.0.up_proj.weight", "layers.1.mlp.up.weight"})


def test_routers_are_ranked_on_demand():
    source = weights(mlp__gate__weight=SQUARE, mlp__experts__gate_up_proj=(2, 16, 16))
    assert reasons(source, Filters(fused="stored")) == {"mlp.gate.weight": "router (routers=True ranks it)"}
    assert "mlp.gate.weight" in matrices(source, Filters(routers=True))


IN_PEFT = "base_model.model.layers.0.q_proj"


@pytest.mark.parametrize(
    "ending",
    [
        "lora_A.default.weight",
        "lora_B.weight",
        "lora_embedding_A.default",
        "lora_magnitude_vector.default.weight",
        "hada_w1_a.default",
        "lokr_w1.default",
        "ia3_l.default",
        "oft_R.default.weight",
        "boft_R.default",
        "vera_lambda_d.default",
        "token_adapter.trainable_tokens_delta.default",
        "modules_to_save.default.weight",
    ],
)
def test_what_peft_adds_is_skipped_whatever_the_options(ending):
    source = weights(**{f"{IN_PEFT}.base_layer.weight".replace(".", "__"): SQUARE})
    source[f"{IN_PEFT}.{ending}"] = torch.randn(SQUARE)
    assert reasons(source) == {f"{IN_PEFT}.{ending}": "adapter weight"}
    assert set(matrices(source)) == {f"{IN_PEFT}.weight"}


def test_words_that_peft_uses_too_mean_nothing_outside_of_it():
    source = weights(prompt_encoder__mask__weight=SQUARE, road_head__weight=SQUARE, shadow__weight=SQUARE)
    assert not has_adapters(source)
    assert set(matrices(source)) == set(source)
    assert not is_adapter("prompt_encoder.default.embedding.weight", in_peft=False)
    assert is_adapter("prompt_encoder.default.embedding.weight", in_peft=True)


def test_wrappers_of_peft_are_taken_out_of_names_unless_two_tensors_would_share_one():
    assert base_name("a.q_proj.base_layer.weight") == "a.q_proj.weight"
    assert base_name("lm_head.original_module.weight") == "lm_head.weight"
    assert base_name("embed_tokens.token_adapter.base_layer.weight") == "embed_tokens.weight"
    assert base_name("experts.base_layer.base_layer.gate_up_proj") == "experts.gate_up_proj"
    assert base_name("base_layers.0.weight") == "base_layers.0.weight"
    both = weights(q__base_layer__weight=SQUARE, q__weight=SQUARE)
    assert set(matrices(both)) == {"q.base_layer.weight", "q.weight"}


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        ("a.weight", "a.weight_scale_inv"),
        ("a.weight", "a.weight_scale"),
        ("a.weight", "a.SCB"),
        ("a.weight", "a.weight.absmax"),
        ("a.weight", "a.weight.quant_state.bitsandbytes__nf4"),
        ("a.weight", "a.scale"),
        ("a.qweight", "a.scales"),
        ("a.qweight", "a.qzeros"),
        ("a.weight_packed", "a.weight_scale"),
        ("a._weight_qdata", "a._weight_scale"),
        ("experts.gate_up_proj_blocks", "experts.gate_up_proj_scales"),
        ("experts.gate_up_proj", "experts.gate_up_proj_scale_inv"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn])
def test_codes_are_never_ranked_where_their_scales_lie_beside_them_nor_are_the_scales(codes, scales, dtype):
    # Of a shape and dtype that no format gives them: the codes are skipped, or refused where they look damaged.
    source = {codes: torch.ones(4, 32, 32).to(dtype), scales: torch.ones(16, 16), "b.weight": torch.randn(SQUARE)}
    try:
        ranked = set(matrices(source))
    except SourceError as error:
        refused = str(error)
    else:
        refused = ""
        assert ranked == {"b.weight"}
    if refused:
        assert codes in refused
        assert re.search("does not fit the codes|beside it is missing|is damaged|is quantized by torchao", refused)
        return
    last = scales if "bitsandbytes" in scales else scales.rpartition(".")[2]
    found = reasons(source)
    assert re.fullmatch(r"quantized codes that need their scales \(.*\); this quantized format is .*", found[codes])
    assert last.removeprefix("a.weight.") in found[codes]
    assert found[scales].startswith("scales or zero points of quantized weights (")


def test_the_reason_of_codes_says_what_they_lack_and_is_the_same_in_every_layer():
    source = {f"{i}.weight": torch.zeros(32, 32, dtype=torch.uint8) for i in range(3)}
    source |= {f"{i}.SCB": torch.ones(32) for i in range(3)} | {"w": torch.randn(SQUARE)}
    assert set(reasons(source).values()) == {
        "quantized codes that need their scales (SCB); this quantized format is not supported"
    }


def test_only_whole_words_make_scales_and_only_codes_need_them():
    source = {"a": torch.zeros(16, 16, dtype=torch.int8), "ascale": torch.randn(SQUARE)}
    source |= {"b.weight": torch.zeros(SQUARE, dtype=torch.complex64), "b.scale": torch.randn(SQUARE)}
    assert set(matrices(source)) == {"ascale"}
    assert (
        reasons(source)["b.scale"]
        == "modules with a weight have no other parameter with two or more dimensions (scale)"
    )
    assert reasons(source)["b.weight"].startswith("complex numbers")


def test_a_float8_weight_without_scales_is_ranked_and_so_is_a_bfloat16_one_beside_some():
    source = {"a.weight": torch.randn(SQUARE).to(torch.float8_e4m3fn), "b.weight": torch.randn(SQUARE).bfloat16()}
    source["b.weight_scale"] = torch.ones(SQUARE)
    assert set(matrices(source)) == {"a.weight", "b.weight"}
    assert matrices(source)["a.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fnuz]
)
def test_every_float_format_that_holds_weights_is_ranked_as_it_is(dtype):
    tensor = torch.randn(SQUARE).to(dtype)
    (found,) = matrices({"w": tensor}).values()
    assert (found.dtype, found.load().data_ptr()) == (dtype, tensor.data_ptr())


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(SQUARE, dtype=torch.complex64), r"complex numbers \(complex64\)"),
        (torch.zeros(SQUARE, dtype=torch.int64), "int64 values: codes, indices or a mask, not weights"),
        (torch.zeros(SQUARE, dtype=torch.uint8), "uint8 values: codes, indices or a mask, not weights"),
        (torch.zeros(SQUARE, dtype=torch.bool), "bool values: codes, indices or a mask, not weights"),
        (torch.ones(SQUARE).to(torch.float8_e8m0fnu), "float8_e8m0fnu holds scales or packed codes, not weights: .*"),
        (torch.zeros(0, 16), "empty"),
        (torch.zeros(3, 16, 0), "empty"),
        (torch.zeros(SQUARE, device="meta"), "on the meta device, without values: rank from the checkpoint"),
        (torch.eye(16).to_sparse(), "stored as sparse_coo: only dense tensors are ranked"),
    ],
)
def test_what_holds_no_weights_is_skipped_with_the_reason(tensor, reason):
    assert re.fullmatch(reason, reasons({"x": tensor, "w": torch.randn(SQUARE)})["x"])


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.0.attn.bias",
        "gpt_neox.layers.0.attention.bias",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "layers.0.blocks.1.attn_mask",
        "model.rotary_emb.inv_freq",
    ],
)
def test_buffers_of_a_state_dict_are_no_weights(name):
    assert is_buffer(name)
    source = {name: torch.ones(1, 1, 32, 32), "w": torch.randn(SQUARE)}
    assert reasons(source) == {name: "mask or other buffer, not a weight"}


def test_a_bias_beside_a_stack_of_experts_is_no_matrix_and_other_biases_are():
    source = weights(
        experts__gate_up_proj=(16, 32, 16),
        experts__gate_up_proj_bias=(16, 32),
        moe__weight=(16, 32, 16),
        moe__bias=(16, 32),
        linear__weight=SQUARE,
        linear__bias=SQUARE,
        other__weight=(16, 32, 16),
        other__bias=(17, 32),
    )
    assert reasons(source, Filters(fused="stored")) == dict.fromkeys(
        ["experts.gate_up_proj_bias", "moe.bias"], "stacked biases of experts, not a matrix"
    )


def test_convolutions_are_known_by_their_names():
    for name in ("conv1.weight", "mixer.conv1d.weight", "feature.conv_layers.0.conv.weight", "depthwise_conv.weight"):
        assert is_convolution(name)
    for name in ("mlp.experts.gate_up_proj", "convnext.weight", "converter.weight", "moe.input_linear.weight"):
        assert not is_convolution(name)


@pytest.mark.parametrize(
    ("name", "layer", "group"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12, "model.layers.*.mlp.up_proj.weight"),
        ("model.layers.3.mlp.experts.7.w1.weight", 3, "model.layers.*.mlp.experts.*.w1.weight"),
        ("ffn.experts.expert_3.fc1.weight", None, "ffn.experts.expert_*.fc1.weight"),
        ("experts.7.w1.weight", None, "experts.*.w1.weight"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", 2, "encoder.block.*.layer.*.SelfAttention.q.weight"),
        ("lm_head.weight", None, "lm_head.weight"),
        ("layer4.1.conv2.weight", 1, "layer4.*.conv2.weight"),
        ("0.weight", 0, "*.weight"),
    ],
)
def test_layers_and_groups_are_read_from_names(name, layer, group):
    assert (layer_of(name), group_of(name)) == (layer, group)
    (found,) = matrices({name: torch.randn(SQUARE)}).values()
    assert (found.layer, found.group) == (layer, group)


@given(st.lists(st.from_regex(r"\A[a-z.]{0,3}\d{0,3}[a-z.]{0,3}\d{0,2}\Z"), unique=True))
def test_the_order_of_names_is_total_and_does_not_depend_on_where_it_starts(names):
    assert in_model_order(names) == in_model_order(reversed(names))
    assert sorted(in_model_order(names)) == sorted(names)


def test_layer_2_comes_before_layer_10():
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "embed", "norm", "layers.2.a2"]
    assert in_model_order(names) == ["embed", "layers.2.a", "layers.2.a2", "layers.2.b", "layers.10.a", "norm"]


def test_min_dim_1_with_both_switches_ranks_everything():
    source = weights(embed_tokens__weight=(9, 3), mlp__router__weight=(2, 3), lm_head__weight=(9, 3), w=(1, 1))
    assert set(matrices(source, EVERYTHING)) == set(source)
