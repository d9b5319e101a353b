"""FP8 weights with scales: for blocks, rows, columns, experts and whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fp8_codes import FP8, dequantized, quantized
from models import matrices, reasons
from packing import KINDS, check, check_complete, powers, saved, trained

import kappa_fast
from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source

KIND_NAMES = dict(zip(KINDS, ("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"), strict=True))


def test_ragged_blocks_of_a_checkpoint_are_multiplied_by_their_scales(tmp_path):
    codes, scale = quantized(trained(300, 200), (128, 128))
    stored = {"q_proj.weight": codes, "q_proj.weight_scale_inv": scale, "norm.weight": torch.ones(200)}
    ranking = check(
        saved(tmp_path, stored, quantization_config=FP8),
        {"q_proj.weight": dequantized(codes, scale.numpy(), (128, 128))},
        certify=True,
    )
    (entry,) = ranking
    assert entry.certified
    assert (entry.quantization, entry.dtype, entry.aliases) == ("fp8 e4m3, 128x128 blocks", "float32", ())
    assert {s.name: s.reason for s in ranking.skipped} == {
        "q_proj.weight_scale_inv": "scales or zero points of quantized weights (weight_scale_inv), not a weight"
    }
    assert ranking.metadata["source"]["quantization"] == {"fp8 e4m3, 128x128 blocks": 1}
    assert ranking.metadata["num_parameters"] == 300 * 200 + 200
    check_complete(stored, ranking)


@pytest.mark.parametrize("dtype", list(KINDS))
def test_every_eight_bit_float_is_read_from_a_state_dict(dtype):
    codes, scale = quantized(trained(272, 144), (128, 128), dtype)
    source = {"a.weight": codes, "a.weight_scale_inv": scale}
    (entry,) = check(source, {"a.weight": dequantized(codes, scale.numpy(), (128, 128))})
    assert entry.quantization == f"fp8 {KIND_NAMES[dtype]}, 128x128 blocks"


@pytest.mark.parametrize("kept_as", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_that_are_powers_of_two_in_a_byte(kept_as):
    codes, scale = quantized(trained(272, 144), (128, 128))
    scale = scale.log2().ceil().exp2().to(torch.float8_e8m0fnu).view(kept_as)
    check({"a.weight": codes, "a.weight_scale_inv": scale}, {"a.weight": dequantized(codes, powers(scale), (128, 128))})


def test_bfloat16_scales_are_multiplied_in_float32():
    codes, scale = quantized(trained(256, 128), (128, 128))
    scale = scale.bfloat16()
    check(
        {"a.weight": codes, "a.weight_scale_inv": scale},
        {"a.weight": dequantized(codes, scale.float().numpy(), (128, 128))},
    )


@pytest.mark.parametrize("block", [(64, 32), (96, 128), (1, 32), (128, 128)])
def test_other_block_sizes_are_taken_from_the_config(block, tmp_path):
    codes, scale = quantized(trained(300, 200), block)
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    path = saved(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale}, quantization_config=config)
    (entry,) = check(path, {"a.weight": dequantized(codes, scale.numpy(), block)})
    assert entry.quantization == f"fp8 e4m3, {block[0]}x{block[1]} blocks"


def test_a_block_size_that_shapes_leave_open_is_refused():
    codes, scale = quantized(trained(288, 288), (128, 128))  # three scales for 288 rows: of 96 each, or of 128
    with pytest.raises(SourceError, match="3 scales along 288 rows do not determine the size of a block"):
        open_source({"a.weight": codes, "a.weight_scale_inv": scale}, Filters())


@pytest.mark.parametrize("block", [(64, 64), (256, 256), (1, 256), (128, 256), (256, 128)])
def test_scales_for_other_blocks_than_those_of_the_config_are_refused(block, tmp_path):
    codes, scale = quantized(trained(256, 256), block)
    path = saved(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale}, quantization_config=FP8)
    with pytest.raises(
        SourceError,
        match=r"'a\.weight_scale_inv' of shape .*, float32, does not fit the codes .* do not fit blocks",
    ):
        open_source(path, Filters())


@pytest.mark.parametrize(
    ("shape", "block", "words"),
    [
        ((), (256, 192), "one scale"),
        ((1,), (256, 192), "one scale"),
        ((1, 1), (256, 192), "one scale"),
        ((256,), (1, 192), "a scale for each row"),
        ((256, 1), (1, 192), "a scale for each row"),
        ((1, 192), (256, 1), "a scale for each column"),
    ],
)
def test_a_scale_for_the_whole_matrix_or_each_row_or_column(shape, block, words, tmp_path):
    codes, scale = quantized(trained(256, 192), block)
    stored = {"a.weight": codes, "a.weight_scale": scale.reshape(shape)}
    truth = {"a.weight": dequantized(codes, scale.numpy(), block)}
    (entry,) = check(stored, truth)
    assert entry.quantization == f"fp8 e4m3, {words}"
    check(saved(tmp_path, stored, quantization_config={"quant_method": "fbgemm_fp8"}), truth)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1), (3, 272), (3, 272, 1), (3, 1, 96), (3, 3, 1), (1,)])
def test_fused_experts_have_scales_of_their_own(shape):
    per = {1: (272, 96), 96: (272, 1), 272: (1, 96), 3: (128, 96)}
    block = per[next((size for size in shape[1:] if size != 1), 1)]
    stack = torch.stack([trained(272, 96, layer) * (1 + layer) for layer in range(3)])
    codes, scale = quantized(stack, block)
    if shape == (1,):  # for all experts
        scale = scale[:1].expand(3, 1, 1)
    stored = {
        "experts.down_proj": codes,
        "experts.down_proj_scale": (scale[:1] if shape == (1,) else scale).reshape(shape),
    }
    expected = dequantized(codes, scale.numpy(), block)
    ranking = check(stored, {f"experts.down_proj[{e}]": expected[e] for e in range(3)})
    check_complete(stored, ranking)
    assert ranking.metadata["num_parameters"] == 3 * 272 * 96


def test_the_halves_of_fused_experts_with_scales_for_blocks(tmp_path):
    stack = torch.stack([trained(2 * 160, 96, layer) for layer in range(2)])
    down = torch.stack([trained(96, 160, layer) for layer in range(2)])
    stored = {}
    for name, weight in (("gate_up_proj", stack), ("down_proj", down)):
        stored[f"mlp.experts.{name}"], stored[f"mlp.experts.{name}_scale_inv"] = quantized(weight, (128, 128))
    up = dequantized(
        stored["mlp.experts.gate_up_proj"], stored["mlp.experts.gate_up_proj_scale_inv"].numpy(), (128, 128)
    )
    truth = {f"mlp.experts.gate_up_proj[{e}].gate": up[e, :160] for e in range(2)}
    truth |= {f"mlp.experts.gate_up_proj[{e}].up": up[e, 160:] for e in range(2)}
    path = saved(tmp_path, stored, model_type="qwen3_moe", quantization_config=FP8)
    check_complete(stored, check(path, truth))


def test_gate_and_up_of_fused_experts_with_one_scale_each_and_no_config():
    """As transformers keeps FP8 experts in memory; of 272 rows two blocks of 256 would leave 136 in doubt."""
    stack = torch.stack([trained(272, 384, layer) for layer in range(2)])
    codes, scale = quantized(stack, (136, 384))
    expected = dequantized(codes, scale.numpy(), (136, 384))
    truth = {f"experts.gate_up_proj[{e}]": expected[e] for e in range(2)}
    check({"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scale}, truth)


def test_gate_and_up_that_are_lower_than_a_block_together_have_one_scale_each(tmp_path):
    codes, scale = quantized(torch.stack([trained(96, 256, layer) for layer in range(2)]), (48, 128))
    stored = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scale}
    expected = dequantized(codes, scale.numpy(), (48, 128))
    truth = {f"experts.gate_up_proj[{e}]": expected[e] for e in range(2)}
    check(saved(tmp_path, stored, quantization_config=FP8), truth)


def test_values_are_those_of_transformers():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scale = quantized(trained(256, 384), (128, 128))
    (found,) = matrices({"a.weight": codes, "a.weight_scale_inv": scale}).values()
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=torch.float32)
    assert torch.equal(found.load(), theirs)


def test_deepseek_calls_the_scales_of_blocks_scale_and_other_scales_of_that_name_are_not_trusted():
    codes, scale = quantized(trained(384, 256), (128, 128))
    check({"a.weight": codes, "a.scale": scale}, {"a.weight": dequantized(codes, scale.numpy(), (128, 128))})
    source = {"a.weight": codes, "a.scale": torch.ones(1), "b.weight": torch.randn(16, 16)}
    assert reasons(source)["a.weight"].startswith("quantized codes that need their scales (scale)")


def test_the_scale_weight_of_comfyui_multiplies_the_whole_matrix():
    codes, scale = quantized(trained(128, 96), (128, 96))
    source = {"a.weight": codes, "a.scale_weight": scale.reshape(())}
    (entry,) = check(source, {"a.weight": dequantized(codes, scale.numpy(), (128, 96))})
    assert entry.quantization == "fp8 e4m3, one scale"


def test_two_scales_of_one_weight_are_not_guessed_at():
    codes, scale = quantized(trained(256, 96), (128, 96))
    source = {"a.weight": codes, "a.weight_scale_inv": scale, "a.weight_scale": scale, "b": torch.randn(16, 16)}
    assert reasons(source)["a.weight"].startswith("quantized codes that need their scales (weight_scale, weight_scale")


def test_one_without_a_scale_among_others_that_have_one_is_not_ranked_as_it_stands():
    codes, scale = quantized(trained(256, 256), (128, 128))
    stored = {"a.weight": codes, "a.weight_scale_inv": scale, "b.weight": codes.clone()}
    ranking = kappa_fast.rank(stored)
    assert [entry.key for entry in ranking] == ["a.weight"]
    assert {s.name: s.reason for s in ranking.skipped}["b.weight"] == (
        "float8 without a scale, although other weights of the model have one: its values may be codes"
    )


def test_fp8_without_scales_stays_what_it_is_unless_the_config_promises_them(tmp_path):
    codes, _ = quantized(trained(128, 128), (128, 128))
    (found,) = matrices({"a.weight": codes}).values()
    assert (found.dtype, found.quantization) == (torch.float8_e4m3fn, None)
    path = saved(tmp_path, {"a.weight": codes}, quantization_config=FP8 | {"modules_to_not_convert": ["a"]})
    (found,) = matrices(path).values()
    assert found.quantization is None


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"])
def test_a_missing_scale_is_an_error_that_names_the_weight(method, tmp_path):
    codes, _ = quantized(trained(128, 128), (128, 128))
    path = saved(tmp_path, {"a.weight": codes, "b.bias": torch.ones(3)}, quantization_config={"quant_method": method})
    with pytest.raises(SourceError, match=rf"'a\.weight' of shape \(128, 128\) is FP8, .*'{method}'.*scale is missing"):
        kappa_fast.rank(path)


@pytest.mark.parametrize(
    ("scale", "why"),
    [
        (torch.ones(3, 2), "3 scales along 256 rows do not determine|does not fit"),
        (torch.ones(2, 2, 2), "one scale, one for each row, or one for each block is expected"),
        (torch.ones(7), "one scale, one for each row, or one for each block is expected"),
        (torch.ones(2, 0), "0 scales along 256 columns"),
        (torch.ones(2, 2, dtype=torch.int32), "scales are float32, bfloat16, float16 or E8M0"),
        (torch.ones(2, 2, dtype=torch.float64), "scales are float32, bfloat16, float16 or E8M0"),
    ],
)
def test_a_scale_that_does_not_fit_is_refused(scale, why):
    codes, _ = quantized(trained(256, 256), (128, 128))
    with pytest.raises(SourceError, match=why) as refused:
        open_source({"a.weight": codes, "a.weight_scale_inv": scale}, Filters())
    assert "'a.weight_scale_inv'" in str(refused.value)
    assert "'a.weight'" in str(refused.value)


def test_nan_among_the_codes_is_reported_as_such():
    codes, scale = quantized(trained(64, 32), (128, 128))
    codes.view(torch.uint8)[3, 3] = 0x7F
    (entry,) = kappa_fast.rank({"a.weight": codes, "a.weight_scale_inv": scale})
    assert entry.status == "non_finite"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_one_line_of_scales_beside_a_square_weight_is_for_rows_unless_the_codes_show_columns(dtype):
    weight = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    codes, scale = quantized(weight, (1, 48), dtype)
    (entry,) = kappa_fast.rank({"a.weight": codes, "a.weight_scale": scale.reshape(1, 48)}, progress=False)
    sigma = np.linalg.svd(dequantized(codes, scale.numpy(), (1, 48)).astype(np.float64), compute_uv=False)
    assert entry.lower <= sigma[0] / sigma[-1] <= entry.upper
    codes, scale = quantized(weight, (48, 1), dtype)
    state = {"a.weight": codes, "a.weight_scale": scale, "b.weight": weight}
    with pytest.raises(SourceError, match=r"every column of 'a\.weight' reaches .* leave the weight out with exclude="):
        kappa_fast.rank(state, progress=False)
    assert [e.name for e in kappa_fast.rank(state, exclude="a.weight", progress=False)] == ["b.weight"]


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(
    ("name", "shape", "fits"),
    [
        ("a.weight_scale", (1, 48), "row"),
        ("a.weight_scale", (48,), "row"),
        ("a.weight_scale_inv", (1, 48), "column"),
        ("a.scale_weight", (1, 48), "column"),
        ("experts.down_proj_scale", (1, 48), "row"),
        ("experts.down_proj_scale", (1, 1, 48), "column"),
    ],
)
def test_a_line_of_scales_is_refused_where_the_codes_show_the_other_lines(name, shape, fits, dead):
    weight = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    if dead:  # as padding is
        weight[5], weight[:, 7] = 0, 0
    owner = name.removesuffix("_inv").removesuffix("_scale").replace("scale_weight", "weight")
    for shown in ("row", "column"):
        codes, scale = quantized(weight, (1, 48) if shown == "row" else (48, 1))
        codes = codes.float().nan_to_num(0).to(codes.dtype)  # what nothing was divided by
        stack = codes[None] if owner.startswith("experts") else codes
        state = {owner: stack, name: scale.reshape(shape), "b.weight": weight + torch.eye(48)}
        if shown != fits:
            with pytest.raises(
                SourceError, match=f"every {shown} of .* for {shown}s, although their shape and name say {fits}"
            ):
                kappa_fast.rank(state, progress=False)
            assert [e.name for e in kappa_fast.rank(state, exclude=owner, progress=False)] == ["b.weight"]
        elif not dead:
            entry = next(e for e in kappa_fast.rank(state, progress=False) if e.name == owner)
            block = (1, 48) if shown == "row" else (48, 1)
            sigma = np.linalg.svd(dequantized(codes, scale.numpy(), block).astype(np.float64), compute_uv=False)
            assert entry.lower <= sigma[0] / sigma[-1] <= entry.upper
