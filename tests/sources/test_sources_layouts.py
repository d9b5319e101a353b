"""How parameters are cut: stacks, fused projections, convolutions; by module, model type, sibling or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import EVERYTHING, Config, Experts, matrices, weights
from safetensors.torch import save_file
from torch import nn

from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, Matrix, open_source

STORED = Filters(embeddings=True, routers=True, min_dim=1, fused="stored")


def checkpoint(folder, config: dict[str, object], **shapes: tuple[int, ...]):
    """A directory with random tensors and a config."""
    save_file(weights(**shapes), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def parts(found: dict[str, Matrix]) -> dict[str, tuple[int, int]]:
    return {key: m.shape for key, m in found.items()}


def notes(source: object) -> dict[str, str]:
    return dict(open_source(source, EVERYTHING).metadata["layouts"])


def assert_partition(tensor: torch.Tensor, found: dict[str, Matrix]) -> None:
    """Every weight is in exactly one matrix, and load() gives what the index says."""
    count = torch.zeros(tensor.shape, dtype=torch.int64)
    for m in found.values():
        count[m.index] += 1
        assert torch.equal(m.load(), tensor[m.index].flatten(1))
        assert tuple(m.load().shape) == m.shape
    assert torch.equal(count, torch.ones_like(count))


def test_a_stack_has_one_matrix_for_each_expert():
    tensor = torch.randn(3, 4, 5)
    found = matrices({"experts.down_proj": tensor})
    assert [(m.part, m.index, m.shape) for m in found.values()] == [(f"[{e}]", (e,), (4, 5)) for e in range(3)]
    assert {m.group for m in found.values()} == {"experts.down_proj"}
    assert_partition(tensor, found)


@given(experts=st.integers(1, 4), hidden=st.integers(1, 6), width=st.integers(1, 6), transposed=st.booleans())
def test_gate_and_up_of_experts_partition_the_parameter(experts, hidden, width, transposed):
    module = nn.Module()
    module.experts = Experts(experts, hidden, width, transposed=transposed)
    found = {k: m for k, m in matrices(module).items() if "gate_up" in k}
    assert [m.part for m in found.values()] == [f"[{e}].{half}" for e in range(experts) for half in ("gate", "up")]
    assert {m.shape for m in found.values()} == {(hidden, width) if transposed else (width, hidden)}
    assert {m.group for m in found.values()} == {"experts.gate_up_proj.gate", "experts.gate_up_proj.up"}
    assert_partition(module.experts.gate_up_proj.detach(), found)


def test_the_module_says_whether_columns_take_turns():
    model = nn.Module()
    model.experts = Experts(2, 4, 3, transposed=True)
    index = {m.part: m.index for m in matrices(model).values()}
    assert index["[1].gate"] == (1, slice(None), slice(0, 6, 2))
    assert index["[1].up"] == (1, slice(None), slice(1, 6, 2))
    model.experts.is_concatenated = True
    index = {m.part: m.index for m in matrices(model).values()}
    assert index["[1].gate"] == (1, slice(None), slice(0, 3))
    assert index["[1].up"] == (1, slice(None), slice(3, 6))


def test_an_odd_number_of_rows_has_no_halves():
    model = nn.Module()
    model.experts = Experts(2, 4, 3)
    model.experts.gate_up_proj = nn.Parameter(torch.randn(2, 5, 4))
    assert parts(matrices(model))["experts.gate_up_proj[0]"] == (5, 4)
    assert "ranked as stored" in notes(model)["experts.gate_up_proj"]


def test_a_stack_in_a_module_needs_no_note():
    assert parts(matrices(nn.Bilinear(4, 5, 2))) == {"weight[0]": (4, 5), "weight[1]": (4, 5)}
    assert notes(nn.Bilinear(4, 5, 2)) == {}


def test_without_a_word_from_the_module_the_sibling_tells_rows():
    model = nn.Module()
    model.experts = Experts(2, 4, 3, told=False)
    assert parts(matrices(model))["experts.gate_up_proj[1].up"] == (3, 4)
    assert notes(model) == {"experts.gate_up_proj": "gate is assumed to come first, as usual"}
    model.config = Config(model_type="some_moe")
    assert notes(model) == {}


def test_a_square_fused_projection_is_split_with_the_help_of_its_sibling():
    source = weights(experts__gate_up_proj=(2, 8, 8), experts__down_proj=(2, 8, 4))
    assert matrices(source)["experts.gate_up_proj[0].gate"].index == (0, slice(0, 4), slice(None))


@pytest.mark.parametrize(
    "shapes",
    [
        dict(experts__gate_up_proj=(2, 4, 6)),
        dict(experts__gate_up_proj=(2, 4, 6), experts__down_proj=(2, 3, 4)),
        dict(experts__gate_up_proj=(2, 5, 4), experts__down_proj=(2, 4, 4)),
    ],
    ids=["no sibling", "columns may take turns", "sibling of another size"],
)
def test_gate_and_up_that_cannot_be_told_apart_are_ranked_as_stored_and_noted(shapes):
    source = weights(**shapes)
    shape = shapes["experts__gate_up_proj"]
    found = parts(matrices(source))
    assert [found[f"experts.gate_up_proj[{e}]"] for e in range(2)] == [shape[1:]] * 2
    assert notes(source) == {
        "experts.gate_up_proj": "module, model type and shapes do not say which half is gate and which is up: "
        "ranked as stored"
    }


@pytest.mark.parametrize(
    ("model_type", "gate", "up"),
    [
        ("gpt_oss", slice(0, 6, 2), slice(1, 6, 2)),
        ("llama4_text", slice(0, 3), slice(3, 6)),
        ("llama4", slice(0, 3), slice(3, 6)),
        ("qwen3_vl_moe", slice(0, 3), slice(3, 6)),
    ],
)
def test_the_model_type_of_a_checkpoint_tells_how_columns_are_arranged(model_type, gate, up, tmp_path):
    source = checkpoint(
        tmp_path, {"model_type": model_type}, experts__gate_up_proj=(2, 4, 6), experts__down_proj=(2, 3, 4)
    )
    found = matrices(source)
    assert found["experts.gate_up_proj[1].gate"].index == (1, slice(None), gate)
    assert found["experts.gate_up_proj[1].up"].index == (1, slice(None), up)
    assert notes(source) == {}


def test_the_nearest_config_decides_in_a_module_of_several_models():
    model = nn.ModuleDict({"audio": nn.Module(), "text": nn.Module()})
    for part, kind in (("audio", "phi4_multimodal_audio"), ("text", "phi4_multimodal")):
        model[part].config = Config(model_type=kind)
        model[part].gate_up_proj, model[part].down_proj = nn.Linear(4, 6), nn.Linear(3, 4)
    index = {key: m.index for key, m in matrices(model).items()}
    assert index["audio.gate_up_proj.weight.up"] == (slice(0, 3), slice(None))
    assert index["text.gate_up_proj.weight.up"] == (slice(3, 6), slice(None))


def test_a_text_config_inside_of_a_config_counts(tmp_path):
    config = {"model_type": "some_vision_model", "text_config": {"model_type": "gpt_oss"}}
    source = checkpoint(tmp_path, config, experts__gate_up_proj=(2, 4, 6), experts__down_proj=(2, 3, 4))
    assert matrices(source)["experts.gate_up_proj[0].up"].index == (0, slice(None), slice(1, 6, 2))


def test_dense_gate_and_up_are_split_where_the_sibling_fits():
    source = weights(mlp__gate_up_proj__weight=(6, 4), mlp__down_proj__weight=(4, 3))
    found = matrices(source)
    assert found["mlp.gate_up_proj.weight.gate"].index == (slice(0, 3), slice(None))
    assert found["mlp.gate_up_proj.weight.up"].index == (slice(3, 6), slice(None))
    assert parts(matrices(weights(mlp__gate_up_proj__weight=(6, 4)))) == {"mlp.gate_up_proj.weight": (6, 4)}


def test_jetmoe_and_granite_call_gate_and_up_input_linear(tmp_path):
    shapes = dict(a__mlp__input_linear__weight=(2, 6, 4), a__mlp__output_linear__weight=(2, 4, 3))
    shapes |= dict(
        a__self_attention__experts__input_linear__weight=(2, 6, 4), a__self_attention__kv_proj__weight=(6, 4)
    )
    found = parts(matrices(checkpoint(tmp_path, {"model_type": "jetmoe"}, **shapes)))
    assert found["a.mlp.input_linear.weight[1].up"] == (3, 4)
    assert found["a.self_attention.experts.input_linear.weight[1]"] == (6, 4)
    assert found["a.self_attention.kv_proj.weight.v"] == (3, 4)
    shapes = dict(a__block_sparse_moe__input_linear__weight=(2, 6, 4), a__shared_mlp__input_linear__weight=(6, 4))
    found = parts(matrices(checkpoint(tmp_path, {"model_type": "granitemoeshared"}, **shapes)))
    assert found["a.block_sparse_moe.input_linear.weight[0].gate"] == (3, 4)
    assert found["a.shared_mlp.input_linear.weight.gate"] == (3, 4)


def test_dbrx_keeps_its_experts_below_each_other():
    source = weights(b__ffn__experts__mlp__w1=(12, 4), b__ffn__router__layer__weight=(3, 4))
    found = {k: m for k, m in matrices(source).items() if "w1" in k}
    assert [(m.part, m.index) for m in found.values()] == [
        (f"[{e}]", (slice(4 * e, 4 * e + 4), slice(None))) for e in range(3)
    ]
    assert_partition(source["b.ffn.experts.mlp.w1"], found)
    uneven = weights(b__ffn__experts__mlp__w1=(13, 4), b__ffn__router__layer__weight=(3, 4))
    assert parts(matrices(uneven))["b.ffn.experts.mlp.w1"] == (13, 4)
    alone = weights(b__ffn__experts__mlp__w1=(12, 4))
    assert parts(matrices(alone)) == {"b.ffn.experts.mlp.w1": (12, 4)}


@pytest.mark.parametrize(
    ("model_type", "shapes", "expected"),
    [
        ("phi3", dict(a__qkv_proj=(16, 8), a__o_proj=(8, 8)), {"q": (8, 8), "k": (4, 8), "v": (4, 8)}),
        ("phi3", dict(a__qkv_proj=(20, 8), a__o_proj=(8, 12)), {"q": (12, 8), "k": (4, 8), "v": (4, 8)}),
        ("dbrx", dict(a__Wqkv=(16, 8), a__out_proj=(8, 8)), {"q": (8, 8), "k": (4, 8), "v": (4, 8)}),
        ("mpt", dict(a__Wqkv=(24, 8), a__out_proj=(8, 8)), {"q": (8, 8), "k": (8, 8), "v": (8, 8)}),
        ("modernbert", dict(a__Wqkv=(24, 8), a__Wo=(8, 8)), {"q": (8, 8), "k": (8, 8), "v": (8, 8)}),
        ("gpt2", dict(a__c_attn=(8, 24), a__c_proj=(8, 8)), {"q": (8, 8), "k": (8, 8), "v": (8, 8)}),
        ("gpt2", dict(a__c_attn=(8, 16), a__q_attn=(8, 8)), {"k": (8, 8), "v": (8, 8)}),
    ],
)
def test_contiguous_q_k_and_v_are_split(model_type, shapes, expected, tmp_path):
    source = checkpoint(tmp_path, {"model_type": model_type}, **{f"{n}__weight": s for n, s in shapes.items()})
    name = f"{next(iter(shapes)).replace('__', '.')}.weight"
    found = {k: m for k, m in matrices(source).items() if m.name == name}
    assert {m.part: m.shape for m in found.values()} == {f".{piece}": shape for piece, shape in expected.items()}
    assert_partition(weights(**{f"{n}__weight": s for n, s in shapes.items()})[name], found)
    assert notes(source) == {}


@pytest.mark.parametrize(
    ("model_type", "name", "shapes"),
    [
        ("gpt_neox", "a.query_key_value.weight", {}),
        ("bloom", "a.query_key_value.weight", {}),
        ("minimax", "a.qkv_proj.weight", {}),
        ("codegen", "a.qkv_proj.weight", {}),
        ("phi3", "a.qkv_proj.weight", dict(a__o_proj__weight=(8, 24))),
        ("phi3", "a.qkv_proj.weight", dict(a__o_proj__weight=(8, 7))),
        (None, "a.qkv_proj.weight", dict(a__o_proj__weight=(8, 8))),
        (None, "visual.blocks.0.attn.qkv.weight", {}),
    ],
)
def test_q_k_and_v_that_alternate_or_are_unknown_are_ranked_as_stored_and_noted(model_type, name, shapes, tmp_path):
    source = checkpoint(tmp_path, {"model_type": model_type}, **{name.replace(".", "__"): (24, 8), **shapes})
    assert parts(matrices(source))[name] == (24, 8)
    assert list(notes(source).values()) == ["fused q, k and v, interleaved or of unknown layout: ranked as stored"]


def test_the_input_projections_of_torch_attention_are_split():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    found = matrices(model)
    assert [k for k in found if "in_proj" in k] == [f"self_attn.in_proj_weight.{piece}" for piece in "qkv"]
    assert matrices(model.state_dict()).keys() == found.keys()
    assert_partition(model.self_attn.in_proj_weight.detach(), {k: m for k, m in found.items() if "in_proj" in k})


def test_an_in_proj_weight_of_another_module_may_mean_something_else():
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.randn(24, 8))

    assert parts(matrices(Mixer())) == {"in_proj_weight": (24, 8)}
    assert list(notes(Mixer()).values()) == ["fused q, k and v, interleaved or of unknown layout: ranked as stored"]


def test_a_mixers_in_proj_is_no_fused_attention():
    source = weights(mixer__in_proj__weight=(24, 8))
    assert parts(matrices(source)) == {"mixer.in_proj.weight": (24, 8)}
    assert notes(source) == {}


def test_fused_stored_splits_nothing_but_stacks_and_notes_nothing(tmp_path):
    shapes = dict(experts__gate_up_proj=(2, 6, 4), experts__down_proj=(2, 4, 3), a__qkv_proj__weight=(12, 4))
    source = checkpoint(tmp_path, {"model_type": "gpt_neox"}, **shapes)
    found = {key: m.part for key, m in matrices(source, STORED).items()}
    assert set(found.values()) == {"", "[0]", "[1]"}
    assert open_source(source, STORED).metadata["layouts"] == {}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 6, 3), (6, 12)),
        (nn.Conv2d(4, 6, (3, 2)), (6, 24)),
        (nn.Conv2d(4, 6, 3, groups=2), (6, 18)),
        (nn.Conv3d(2, 6, 2), (6, 16)),
        (nn.ConvTranspose2d(4, 6, 3), (4, 54)),
    ],
)
def test_convolutions_are_flattened_behind_their_first_dimension(module, shape):
    ((key, found),) = matrices(module).items()
    assert (key, found.part, found.index, found.shape) == ("weight", "", (), shape)
    assert torch.equal(found.load(), module.weight.detach().flatten(1))
    assert notes(module) == {}


def test_weight_normalized_convolutions_are_convolutions_too():
    module = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    assert parts(matrices(module))["weight"] == (6, 12)


def test_in_a_state_dict_a_convolution_is_known_by_its_name():
    source = weights(encoder__conv1__weight=(6, 4, 3), patch_embed__proj__weight=(6, 3, 2, 2), other=(6, 4, 3))
    found = parts(matrices(source))
    assert found["encoder.conv1.weight"] == (6, 12)
    assert found["patch_embed.proj.weight"] == (6, 12)
    assert found["other[5]"] == (4, 3)
    assert notes(source) == {
        "encoder.conv1.weight": "treated as a convolution because of its name",
        "other": "3 dimensions, treated as a stack of matrices",
    }


def test_a_module_with_four_dimensions_that_is_no_convolution_is_flattened_and_noted():
    module = nn.Module()
    module.table = nn.Parameter(torch.randn(5, 4, 3, 2))
    assert parts(matrices(module)) == {"table": (5, 24)}
    assert notes(module) == {"table": "4 dimensions of unknown meaning, flattened like a convolution"}


def test_a_channels_last_convolution_loads_in_the_order_of_its_dimensions():
    weight = torch.randn(6, 4, 3, 2).to(memory_format=torch.channels_last)
    (found,) = matrices({"conv.weight": weight}).values()
    assert torch.equal(found.load(), weight.contiguous().flatten(1))


def test_pieces_below_min_dim_are_skipped_on_their_own(tmp_path):
    shapes = dict(a__qkv_proj__weight=(48, 32), a__o_proj__weight=(32, 32))
    source = open_source(checkpoint(tmp_path, {"model_type": "phi3"}, **shapes), Filters())
    assert [m.key for m in source.matrices] == ["a.o_proj.weight", "a.qkv_proj.weight.q"]
    assert [(s.name, s.shape) for s in source.skipped] == [
        ("a.qkv_proj.weight.k", (8, 32)),
        ("a.qkv_proj.weight.v", (8, 32)),
    ]
    shapes = dict(a__qkv_proj__weight=(48, 32), a__o_proj__weight=(32, 8))
    source = open_source(checkpoint(tmp_path, {"model_type": "phi3"}, **shapes), Filters())
    assert [m.key for m in source.matrices] == ["a.qkv_proj.weight.k", "a.qkv_proj.weight.v"]
    assert [s.name for s in source.skipped] == ["a.o_proj.weight", "a.qkv_proj.weight.q"]


def test_a_parameter_may_not_be_called_like_a_part_of_another():
    both = weights(**{"e": (2, 16, 20), "e[1]": (16, 16), "w": (16, 16)})
    message = (
        r"a parameter and a part of another one have the same name 'e\[1\]': rename one, leave one out with exclude="
    )
    with pytest.raises(SourceError, match=message):
        matrices(both)
    assert set(matrices(both, Filters(exclude=r"^e$"))) == {"e[1]", "w"}
