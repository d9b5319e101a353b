"""What lies beside weights in a file and is none: never ranked, never counted, always with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import matrices, reasons, weights
from packed_codes import awq, gptq, in_turn
from packing import saved, trained

from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source

FLOATS, BYTES = torch.randn(64, 64), torch.randint(0, 256, (64, 64), dtype=torch.uint8)
HALVES = torch.randint(-(2**15), 2**15, (4, 4, 64), dtype=torch.int16)
OWNER = "layers.0.mlp.up_proj"

# What formats that nobody reads here keep for one layer: codes, and floats that look like weights.
UNREAD = {
    "fp_quant": {
        "qweight": BYTES,
        "scales": BYTES,
        "forward_hadamard_matrix": FLOATS,
        "backward_hadamard_matrix": FLOATS,
    },
    "svdquant": {"qweight": BYTES.char(), "wscales": FLOATS, "proj_down": FLOATS, "proj_up": FLOATS},
    "aqlm": {"codes": BYTES.char().view(64, 32, 2), "codebooks": torch.randn(2, 256, 1, 8), "scales": FLOATS},
    "vptq": {"indices": BYTES.view(torch.int32), "centroids": FLOATS, "weight_scale": FLOATS, "perm": FLOATS},
    "exl3": {"trellis": HALVES, "suh": FLOATS, "svh": FLOATS},
    "quip": {"Qidxs": HALVES.view(16, 64), "SU": FLOATS, "codebook": FLOATS},
    "spqr": {"dense_weights": BYTES.view(torch.int64), "in_perm": BYTES, "scales": FLOATS},
    "qqq": {"B": BYTES.view(torch.int32), "s_channel": FLOATS, "s_group": FLOATS},
    "bitnet": {"weight": BYTES, "weight_scale": FLOATS, "rotation": FLOATS},
    "sinq": {"W_q": BYTES, "scale_rows": FLOATS, "shift": FLOATS},
    "quanto": {"weight._data._data": BYTES, "weight._scale": FLOATS, "weight._shift": FLOATS},
}


@pytest.mark.parametrize("method", UNREAD)
@pytest.mark.parametrize("said", [True, False])
def test_nothing_of_a_layer_whose_codes_are_not_read_is_a_weight(method, said, tmp_path):
    tensors = {f"{OWNER}.{name}": tensor.clone() for name, tensor in UNREAD[method].items()}
    plain = weights(layers__0__mlp__down_proj__weight=(64, 32), layers__0__mlp__gate__bias=(64,))
    config = {"quantization_config": {"quant_method": method}} if said else {}
    path = saved(tmp_path, tensors | plain, **config)
    for source in (path, tensors | plain):
        assert set(matrices(source)) == {"layers.0.mlp.down_proj.weight"}
        assert {name for name, tensor in tensors.items() if tensor.dim() >= 2} == set(reasons(source))


@pytest.mark.parametrize("stray", ["R1", "model.hadamard", "layers.0.self_attn.had_K"])
def test_a_model_of_an_unknown_method_has_no_weights_but_those_with_names_of_parameters(stray, tmp_path):
    tensors = {f"{OWNER}.qweight": BYTES} | {n: FLOATS.clone() for n in (stray, "embed.pos_embed", "a.weight")}
    path = saved(tmp_path, tensors, quantization_config={"quant_method": "spinquant"})
    assert set(matrices(path)) == {"embed.pos_embed", "a.weight"}
    assert reasons(path)[stray].startswith("not a parameter by its name, in a model quantized by spinquant")


BESIDE = ("weight_mask_ema", "importance", "fisher", "exp_avg", "hessian", "weight_absmax", "lora_a", "smooth_scale")
BELOW = ("weight.exp_avg", "weight.m", "weight.v", "weight.in_sum2", "weight.lora_a", "weight.grad")
OPTIMIZER = ("exp_avg.layers.0.weight", "optimizer.state.layers.0.weight", "state.3.exp_avg_sq", "0.momentum_buffer")
OPTIMIZER += ("adam_m.a.weight", "exp_avg_sq_col.a.weight")


@pytest.mark.parametrize("name", [*(f"a.{leaf}" for leaf in (*BESIDE, *BELOW)), *OPTIMIZER])
def test_statistics_masks_and_the_state_of_optimizers_are_no_weights(name, tmp_path):
    tensors = weights(a__weight=(64, 48)) | {name: torch.randn(64, 48)}
    path = saved(tmp_path, tensors)
    opened = open_source(path, Filters())
    assert [m.name for m in opened.matrices] == ["a.weight"]
    assert [s.name for s in opened.skipped] == [name]
    assert opened.num_parameters == 64 * 48


def test_what_modules_have_beside_a_weight_and_without_one_stays():
    names = dict(a__weight=(20, 30), a__bias_k=(1, 30), b__weight_ih_l0=(80, 20), b__weight_hh_l0=(80, 20))
    names |= dict(
        m__in_proj_weight=(60, 20), m__A_log=(32, 16), experts__gate_up_proj=(2, 40, 20), c__rel_bias=(20, 20)
    )
    found = open_source(weights(**names), Filters(min_dim=1, embeddings=True))
    assert {m.name for m in found.matrices} == {name.replace("__", ".") for name in names}


@pytest.mark.parametrize("stranger", ["theta", "channel_scales", "pre_quant_scale", "lora_A", "smooth_factor", "perm"])
@pytest.mark.parametrize("format", [awq, gptq])
def test_codes_with_something_unknown_beside_them_are_not_read(stranger, format):
    """ParoQuant rotates what it stores as AWQ, modelopt scales the inputs of what it stores as NVFP4, ..."""
    if format is awq:
        stored, _ = awq(trained(64, 64), 32)
    else:
        stored, _ = gptq(trained(64, 64), 4, in_turn(32, 64), symmetric=True)
    assert set(matrices(stored | {"a.bias": torch.ones(64), "a.input_scale": torch.ones(())})) == {"a.weight"}
    source = stored | {f"a.{stranger}": torch.randn(64)}
    assert matrices(source) == {}
    assert f"but the layer also has {stranger}, " in reasons(source)["a.qweight"]


def test_an_importance_matrix_of_llama_cpp_is_no_model(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = Path(tmp_path, "imatrix.gguf")
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", torch.rand(4, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Exception, match=r"has an importance matrix \(statistics of a model\): give the model itself"):
        open_source(path, Filters())


FILTERS = (
    "stft.forward_basis",
    "mel.fb",
    "featurizer.mel_filters",
    "rope.cos",
    "rope.sin",
    "pos_encoder.pe",
    "x.alibi",
    "attn.k_scale",
)
ADAPTERS = (
    "processor.to_q_lora.down.weight",
    "lycoris_x.diff",
    "x.hada_w1_a",
    "x.lokr_w2",
    "unet.to_q.lora.down.weight",
    "x.lora_down.weight",
    "lora_te_x.lora_up.weight",
)


@pytest.mark.parametrize("name", [*FILTERS, *ADAPTERS])
def test_filter_banks_tables_and_adapters_are_no_weights(name):
    assert set(matrices({name: torch.randn(32, 24), "a.weight": torch.randn(32, 20)})) == {"a.weight"}


def test_everything_of_a_layer_goes_with_its_codes_but_not_what_is_beside_plain_indices():
    coded = {"a.weight": BYTES.char(), "a.bias": torch.randn(1, 64)}
    assert matrices(coded) == {}
    indexed = {"a.idx": BYTES.view(torch.int32), "a.table": FLOATS, "b.relative_position_index": BYTES.long()}
    indexed |= {"a.tree_mask": BYTES.clone()}
    assert set(matrices(indexed | {"b.relative_position_bias_table": FLOATS.clone()})) == {
        "a.table",
        "b.relative_position_bias_table",
    }


def test_parameters_that_fsdp_has_flattened_are_not_passed_over():
    source = {"_fsdp_wrapped_module._flat_param": torch.randn(4096), "a.weight": torch.randn(32, 20)}
    with pytest.raises(SourceError, match="as one flat tensor of FSDP"):
        open_source(source, Filters())


def test_a_rotation_in_a_module_of_its_own_inside_a_quantized_layer_is_no_weight():
    """compressed-tensors keeps its transforms so."""
    stored, _ = awq(trained(64, 64), 32)
    source = stored | {"a.R1_weight_output.weight": torch.randn(64, 64), "b.weight": torch.randn(32, 20)}
    assert set(matrices(source)) == {"b.weight"}
    assert "but the layer also has R1_weight_output.weight, " in reasons(source)["a.qweight"]
    adapted = stored | {"a.lora_A.weight": torch.randn(8, 64), "a.lora_B.weight": torch.randn(64, 8)}
    assert set(matrices(adapted)) == {"a.weight"}


@pytest.mark.parametrize("name", ["fisher.a.weight", "grad.a.weight", "model_ema.a.weight"])
def test_what_a_file_holds_once_more_for_a_weight_is_none(name):
    source = {"a.weight": torch.randn(32, 20), name: torch.randn(32, 20), "ema.b.weight": torch.randn(32, 20)}
    assert set(matrices(source)) == {"a.weight", "ema.b.weight"}


@pytest.mark.parametrize("name", ["block.rotation", "block.codebooks", "block.inner.had"])
def test_what_lies_above_codes_that_are_not_read_is_a_weight_only_by_its_name(name):
    source = {"block.inner.q.qweight": torch.ones(64, 32, dtype=torch.int8), "block.inner.q.s": torch.rand(64, 16)}
    source |= {name: torch.randn(32, 32)} | weights(block__norm__weight=(20, 30), other__theta=(20, 30))
    assert set(matrices(source)) == {"block.norm.weight", "other.theta"}
    assert "not a parameter by its name" in reasons(source)[name]


COPIED = ("shadow.a.weight", "ema_weights.a.weight", "swa.a.weight", "hessian_diag.a.weight", "imatrix.a.weight")
COPIED += ("task_vector.a.weight", "fisher_diag.a.weight", "masks.a.weight")
COPIED += ("model_ema.aweight", "model_ema.modelbweight", "model_ema.bweight")  # dots taken out, as buffers are called


@pytest.mark.parametrize("name", COPIED)
def test_averages_and_statistics_under_other_names_are_no_weights(name):
    kept = weights(a__weight=(32, 20), model__b__weight=(32, 20), query__b__weight=(32, 20), mask__b__weight=(32, 20))
    opened = open_source(kept | {name: torch.randn(32, 20)}, Filters())
    assert {m.name for m in opened.matrices} == set(kept)  # a module called mask is one
    assert opened.num_parameters == 4 * 32 * 20
    assert matrices(kept | {name: torch.randn(20, 32)}).keys() == {*kept, name}  # no copy with another shape


@pytest.mark.parametrize("word", ["ema", "ema_model", "model_swa"])
def test_a_second_model_of_averages_is_none_but_a_module_of_that_name_is(word):
    model = weights(model__a__weight=(32, 20), model__b__weight=(20, 32))
    assert set(matrices(model | {name.replace("model", word, 1): t + 1 for name, t in model.items()})) == set(model)
    modules = weights(attn__proj__weight=(32, 20)) | {f"{word}.proj.weight": torch.randn(32, 20)}
    assert set(matrices(modules)) == set(modules)


@pytest.mark.parametrize("leaf", ["lut", "state"])
def test_a_table_in_bytes_makes_no_codes_of_the_weight_beside_it(leaf):
    source = weights(m__weight=(20, 30)) | {f"m.{leaf}": torch.ones(20, 20, dtype=torch.uint8)}
    assert set(matrices(source)) == {"m.weight"}


def test_modules_called_weight_and_second_weights_and_biases_stay():
    source = weights(weight__proj__weight=(20, 30), a__weight=(20, 30), a__weight2=(20, 30), a__pos_bias_u=(20, 30))
    assert set(matrices(source)) == set(source)


@pytest.mark.parametrize("zeros", ["zeros", "qzeros", "biases"])
def test_floats_that_may_be_codes_are_not_ranked(zeros):
    codes = torch.randint(0, 16, (64, 64)).half()
    source = {"a.weight": codes, "a.scales": torch.rand(64, 2), f"a.{zeros}": torch.rand(64, 2)}
    assert matrices(source) == {}
    assert "the values may be codes" in reasons(source)["a.weight"]
    assert open_source(source, Filters()).num_parameters == 64 * 64
