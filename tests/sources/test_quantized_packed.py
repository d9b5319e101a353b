"""GPTQ and AWQ, packed here bit by bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from models import matrices, reasons
from packed_codes import COLUMNS, GROUP, ROWS, awq, config, gptq, in_turn
from packing import check, check_complete, saved, trained

import kappa_fast
from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source


def shuffled() -> np.ndarray:
    """Inputs in the order of their activations, as desc_act stores them."""
    return np.random.default_rng(0).permutation(in_turn())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_of_every_width(bits, symmetric, tmp_path):
    stored, values = gptq(trained(ROWS, COLUMNS), bits, in_turn(), symmetric=symmetric)
    path = saved(tmp_path, stored, quantization_config=config(bits, sym=symmetric))
    ranking = check(path, {"a.weight": values})
    (entry,) = ranking
    assert (entry.name, entry.aliases, entry.shape) == ("a.weight", ("a.qweight",), (ROWS, COLUMNS))
    assert (entry.quantization, entry.dtype) == (f"gptq {bits} bits, groups of 32", "float16")
    assert ranking.metadata["num_parameters"] == ROWS * COLUMNS
    check_complete(stored, ranking)


@pytest.mark.parametrize("bits", [3, 4])
def test_inputs_in_the_order_of_their_activations(bits, tmp_path):
    group = shuffled()
    stored, values = gptq(trained(ROWS, COLUMNS), bits, group, symmetric=False)
    assert not np.array_equal(values, gptq(trained(ROWS, COLUMNS), bits, in_turn(), symmetric=False)[1])
    check(saved(tmp_path, stored, quantization_config=config(bits, desc_act=True)), {"a.weight": values}, certify=True)


def test_the_second_version_stores_zero_points_as_they_are(tmp_path):
    stored, values = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=False, offset=0)
    path = saved(tmp_path, stored, quantization_config=config(4, checkpoint_format="gptq_v2"))
    check(path, {"a.weight": values})


def test_a_zero_point_of_zero_is_stored_as_the_largest_in_the_first_version(tmp_path):
    weight = trained(ROWS, COLUMNS).abs()  # nothing is negative, so that 0 is the lowest code
    stored, values = gptq(weight, 4, in_turn(), symmetric=False)
    assert int(stored["a.qzeros"][0, 0]) == -1
    check(saved(tmp_path, stored, quantization_config=config(4)), {"a.weight": values})


@pytest.mark.parametrize("offset", [0, 1])
def test_a_state_dict_tells_the_version_by_symmetric_zero_points_only(offset):
    stored, values = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=True, offset=offset)
    check(stored, {"a.weight": values})
    stored, _ = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=False, offset=offset)
    with pytest.raises(SourceError, match=r"the zero points of 'a\.qweight' may be those of version 1 or 2 of GPTQ's"):
        kappa_fast.rank(stored)


def test_one_group_for_all_inputs_and_no_g_idx(tmp_path):
    stored, values = gptq(trained(ROWS, COLUMNS), 4, in_turn(COLUMNS), symmetric=False)
    del stored["a.g_idx"]
    (entry,) = check(saved(tmp_path, stored, quantization_config=config(4, -1)), {"a.weight": values})
    assert entry.quantization == "gptq 4 bits, one group"


def test_a_last_group_that_is_cut_off_needs_the_config(tmp_path):
    group = in_turn(64, 160)
    stored, values = gptq(trained(ROWS, 160), 4, group, symmetric=True)
    del stored["a.g_idx"]
    check(saved(tmp_path, stored, quantization_config=config(4, 64)), {"a.weight": values})
    check(stored, {"a.weight": values})  # 160 inputs in three groups: only 64 goes
    stored, values = gptq(trained(ROWS, 192), 4, in_turn(128, 192), symmetric=True)
    check(saved(tmp_path, stored, quantization_config=config(4, 128)), {"a.weight": values})
    del stored["a.g_idx"]  # 192 in two: of 96, or of 128
    with pytest.raises(SourceError, match="2 groups of 192 inputs do not determine the size of a group"):
        open_source(stored, Filters())


def test_layers_of_other_widths_than_the_config_says(tmp_path):
    stored, values = gptq(trained(ROWS, COLUMNS), 8, in_turn(64), symmetric=False)
    dynamic = {r"+:.*a.*": {"bits": 8, "group_size": 64}}
    (entry,) = check(saved(tmp_path, stored, quantization_config=config(4, dynamic=dynamic)), {"a.weight": values})
    assert entry.quantization == "gptq 8 bits, groups of 64"


def test_older_checkpoints_have_a_file_of_their_own(tmp_path):
    stored, values = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=False)
    path = saved(tmp_path, stored)
    (path / "quantize_config.json").write_text(json.dumps(config(4)))
    check(path, {"a.weight": values})
    first = {key: value for key, value in config(4).items() if key != "quant_method"}  # before there were others
    (path / "quantize_config.json").write_text(json.dumps(first))
    check(path, {"a.weight": values})
    (path / "quantize_config.json").write_text(json.dumps(first | {"is_marlin_format": True}))
    assert kappa_fast.rank(path, progress=False).entries == ()
    (path / "quantize_config.json").write_text("{")
    with pytest.raises(SourceError, match=r"quantize_config\.json cannot be read"):
        open_source(path, Filters())


def test_awq(tmp_path):
    stored, values = awq(trained(ROWS, COLUMNS), GROUP)
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    ranking = check(saved(tmp_path, stored, quantization_config=settings), {"a.weight": values})
    (entry,) = ranking
    assert (entry.name, entry.quantization, entry.dtype) == ("a.weight", "awq 4 bits, groups of 32", "float16")
    check_complete(stored, ranking)
    check(stored, {"a.weight": values})


def test_layouts_of_other_kernels_and_other_methods_are_skipped_by_name(tmp_path):
    stored, _ = awq(trained(ROWS, COLUMNS), GROUP)
    for settings in ({"quant_method": "awq", "version": "gemv"}, {"quant_method": "hqq"}):
        found = reasons(saved(tmp_path, stored | {"b": torch.ones(16, 16)}, quantization_config=settings))
        assert found["a.qweight"] == (
            "quantized codes that need their scales (qzeros, scales); this quantized format is not supported "
            f"({settings['quant_method']})"
        )
        assert set(found) == {"a.qweight", "a.qzeros", "a.scales"}


@pytest.mark.parametrize("name", ["qzeros", "scales"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_missing_companion_is_an_error_where_the_config_promises_it(name, method, tmp_path):
    stored, _ = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=True)
    del stored[f"a.{name}"]
    path = saved(tmp_path, stored, quantization_config={"quant_method": method})
    with pytest.raises(SourceError, match=rf"'a\.qweight' of shape .16, 96. holds .* '{name}' beside it is missing"):
        kappa_fast.rank(path)
    assert reasons(stored | {"b": torch.ones(16, 16)})["a.qweight"].startswith("quantized codes that need their scales")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"scales": torch.ones(4, 95).half()}, "as many columns as qweight has"),
        ({"scales": torch.ones(384).half()}, "a row for each group of inputs"),
        ({"scales": torch.ones(4, 96, dtype=torch.float8_e4m3fn)}, "scales are float16, bfloat16 or float32"),
        (
            {"scales": torch.ones(5, 96).half(), "qzeros": torch.ones(5, 12).int()},
            "the config says groups of 32 inputs",
        ),
        ({"qzeros": torch.ones(3, 12).int()}, "a row for each row of scales"),
        ({"qzeros": torch.ones(4, 11).int()}, "96 zero points of 2, 3, 4 or 8 bits do not fill it"),
        ({"qzeros": torch.ones(4, 12)}, "zero points are packed into int32"),
        ({"g_idx": torch.zeros(127).int()}, "the group of each of 128 inputs as an int32"),
        ({"g_idx": torch.zeros(128)}, "the group of each of 128 inputs as an int32"),
    ],
)
def test_companions_of_gptq_that_do_not_fit_are_refused(changes, why, tmp_path):
    stored, _ = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=True)
    path = saved(tmp_path, stored | {f"a.{k}": v for k, v in changes.items()}, quantization_config=config(4))
    with pytest.raises(SourceError, match=rf"does not fit the codes 'a\.qweight' of shape .16, 96., int32: .*{why}"):
        kappa_fast.rank(path)


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("scales", torch.ones(4, 90).half(), "a scale for each output is expected, eight for each column of qweight"),
        ("qzeros", torch.ones(4, 11).int(), "96 zero points of 4 bits do not fill it"),
    ],
)
def test_companions_of_awq_that_do_not_fit_are_refused(name, tensor, why):
    stored, _ = awq(trained(ROWS, COLUMNS), GROUP)
    with pytest.raises(SourceError, match=rf"'a\.{name}' .* does not fit the codes 'a\.qweight'.*{why}"):
        kappa_fast.rank(stored | {f"a.{name}": tensor})


def test_a_group_that_does_not_divide_the_inputs_of_awq_is_refused():
    stored, _ = awq(trained(ROWS, 160), 32)
    stored["a.scales"], stored["a.qzeros"] = stored["a.scales"][:3], stored["a.qzeros"][:3]
    with pytest.raises(SourceError, match="3 groups of 160 inputs do not determine"):
        kappa_fast.rank(stored)


@pytest.mark.parametrize("group", [-1, 4])
def test_a_g_idx_that_names_a_group_without_scales_is_refused(group):
    stored, _ = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=True)
    stored["a.g_idx"][5] = group
    with pytest.raises(SourceError, match=r"g_idx of 'a\.qweight' has groups from .* there are scales for 4"):
        kappa_fast.rank(stored)


def test_a_weight_that_is_there_as_codes_and_plain_is_refused():
    stored, _ = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=True)
    with pytest.raises(SourceError, match=r"'a\.weight' is stored twice, unquantized and as the codes 'a\.qweight'"):
        kappa_fast.rank(stored | {"a.weight": torch.ones(ROWS, COLUMNS)})


def test_plain_names_decide_what_is_an_embedding_and_patterns_see_both_names():
    stored, _ = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=True)
    tensors = {
        name.replace("a.", f"{owner}."): t.clone() for owner in ("lm_head", "q_proj") for name, t in stored.items()
    }
    source = open_source(tensors, Filters())
    assert {m.name for m in source.matrices} == {"q_proj.weight"}
    assert {s.name: s.reason for s in source.skipped}["lm_head.weight"].startswith("embedding or output head")
    assert set(matrices(tensors, Filters(exclude=r"q_proj\.qweight", embeddings=True))) == {"lm_head.weight"}
    assert set(matrices(tensors, Filters(include=r"q_proj\.weight$"))) == {"q_proj.weight"}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("sym", [True, False])
def test_symmetric_zero_points_of_the_version_that_the_config_does_not_say_are_refused(bits, offset, sym, tmp_path):
    stored, values = gptq(trained(ROWS, COLUMNS), bits, in_turn(), symmetric=True, offset=offset)
    stated, other = ("gptq", "gptq_v2") if offset else ("gptq_v2", "gptq")
    right = config(bits, sym=sym, checkpoint_format=stated)
    check(saved(tmp_path, stored, quantization_config=right), {"a.weight": values})
    path = saved(tmp_path, stored, quantization_config=right | {"checkpoint_format": other})
    with pytest.raises(SourceError, match=rf"config says '{other}': set checkpoint_format .* to '{stated}'"):
        kappa_fast.rank(path)
    assert len(kappa_fast.rank(path, exclude="a.weight")) == 0


def test_asymmetric_zero_points_are_those_of_the_version_that_is_said(tmp_path):
    for offset, stated in ((1, "gptq"), (0, "gptq_v2")):
        stored, values = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=False, offset=offset)
        check(saved(tmp_path, stored, quantization_config=config(4, checkpoint_format=stated)), {"a.weight": values})


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
@pytest.mark.parametrize("layout", ["gptq_p", "marlin", "gptq_marlin", "exl2", "bitblas", "llm-awq"])
def test_a_layout_that_is_not_known_is_skipped_and_its_scales_too(key, layout, tmp_path):
    stored, _ = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=True)
    path = saved(tmp_path, stored, quantization_config=config(4) | {key: layout})
    assert matrices(path) == {}
    assert {"a.qweight", "a.qzeros", "a.scales"} == set(reasons(path))


@pytest.mark.parametrize("version", ["2.1", 2])
def test_a_version_in_numbers_is_that_of_a_tool(version, tmp_path):
    stored, values = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=True)
    check(saved(tmp_path, stored, quantization_config=config(4, version=version)), {"a.weight": values})


def test_groups_that_no_input_is_in_are_refused(tmp_path):
    stored, _ = gptq(trained(ROWS, COLUMNS), 4, in_turn(), symmetric=True)
    stored["a.g_idx"] = torch.zeros(COLUMNS, dtype=torch.int32)  # as tools left it that never set it
    path = saved(tmp_path, stored, quantization_config=config(4, sym=True))
    with pytest.raises(SourceError, match=r"g_idx of 'a.qweight' has inputs in 1 groups, .* scales for 4"):
        kappa_fast.rank(path)
