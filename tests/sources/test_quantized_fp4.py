"""Four-bit floats: gpt-oss' MXFP4, that of compressed-tensors and of FP8 checkpoints, and NVFP4 of two kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fp4_codes import as_in_gpt_oss, microscaled, nvfp4
from models import matrices
from packing import at_blocks, check, check_complete, from_nibbles, in_bytes, numbers, powers, saved, trained

import kappa_fast
from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source

COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}


def gpt_oss() -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """A layer of two experts that are 64 wide inside of a model that is 96 wide."""
    block = "model.layers.0.mlp.experts"
    up, gate_up = as_in_gpt_oss(f"{block}.gate_up_proj", torch.stack([trained(96, 128, layer) for layer in range(2)]))
    down, down_values = as_in_gpt_oss(
        f"{block}.down_proj", torch.stack([trained(64, 96, layer) for layer in range(2, 4)])
    )
    rest = {f"{block}.gate_up_proj_bias": torch.randn(2, 128).bfloat16(), "model.norm.weight": torch.ones(96)}
    truth = {f"{block}.down_proj[{e}]": down_values[e] for e in range(2)}
    for e in range(2):
        truth[f"{block}.gate_up_proj[{e}].gate"] = gate_up[e, :, 0::2]
        truth[f"{block}.gate_up_proj[{e}].up"] = gate_up[e, :, 1::2]
    return up | down | rest, truth


def test_gpt_oss_experts_are_cut_as_those_of_the_bfloat16_checkpoint_are(tmp_path):
    stored, truth = gpt_oss()
    path = saved(tmp_path, stored, model_type="gpt_oss", quantization_config={"quant_method": "mxfp4"})
    ranking = check(path, truth)
    check_complete(stored, ranking)
    assert {(e.quantization, e.dtype) for e in ranking} == {("mxfp4", "bfloat16")}
    entry = ranking["model.layers.0.mlp.experts.gate_up_proj[1].gate"]
    assert entry.aliases == ("model.layers.0.mlp.experts.gate_up_proj_blocks",)
    assert entry.index == (1, slice(None), slice(0, 128, 2))
    assert entry.group == "model.layers.*.mlp.experts.gate_up_proj.gate"
    skipped = {s.name.rpartition(".")[2]: s.reason for s in ranking.skipped}
    assert skipped["gate_up_proj_bias"] == "stacked biases of experts, not a matrix"
    assert skipped["gate_up_proj_scales"].startswith("scales or zero points of quantized weights")
    assert ranking.metadata["num_parameters"] == 2 * (96 * 128 + 64 * 96) + 2 * 128 + 96


def test_gpt_oss_experts_of_a_state_dict_are_ranked_as_stored():
    stored, truth = gpt_oss()
    down = {key: values for key, values in truth.items() if "down" in key}
    check_complete(stored, check(stored, down, fused="stored"))


def test_gpt_oss_values_are_those_of_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 64, 3, 16), dtype=torch.uint8)
    scales = torch.randint(90, 140, (2, 64, 3), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales)
    found = matrices({"e.down_proj_blocks": blocks, "e.down_proj_scales": scales})
    for expert in range(2):
        assert torch.equal(found[f"e.down_proj[{expert}]"].load(), theirs[expert])


def test_the_whole_stack_is_what_its_experts_are():
    stored, truth = gpt_oss()
    (down,) = [t for t in _stored(stored) if t.name.endswith("down_proj")]
    whole = down.take(())
    assert whole.shape == down.shape == (2, 64, 96)
    for key in (k for k in truth if "down" in k):
        np.testing.assert_array_equal(whole[int(key[-2])].double().numpy(), truth[key])
    assert torch.equal(down.take((slice(0, 1), slice(3, 5))), whole[0:1, 3:5])


def _stored(tensors):
    from kappa_fast.sources.tensors import read_mapping

    return read_mapping(tensors).tensors


def test_packed_mxfp4_of_compressed_tensors(tmp_path):
    codes, scales = microscaled(trained(200, 96))
    truth = {"a.weight": from_nibbles(codes) * at_blocks(powers(scales), codes.shape, (1, 32))}
    stored = {"a.weight_packed": in_bytes(codes), "a.weight_scale": scales}
    config = COMPRESSED | {"format": "mxfp4-pack-quantized"}
    (entry,) = check(saved(tmp_path, stored, quantization_config=config), truth)
    assert (entry.name, entry.aliases, entry.quantization) == ("a.weight", ("a.weight_packed",), "mxfp4")
    check_complete(stored, check(stored, truth))


def sixes() -> tuple[torch.Tensor, np.ndarray]:
    """Every one of the 64 codes of E2M3, four in three bytes, and what they stand for."""
    codes = np.random.default_rng(0).permutation(np.arange(64).repeat(64)).reshape(64, 64)
    packed = np.array(
        [[sum(int(c) << 6 * k for k, c in enumerate(four)) for four in row.reshape(-1, 4)] for row in codes]
    )
    octets = np.stack([packed & 255, packed >> 8 & 255, packed >> 16], -1).reshape(64, 48).astype(np.uint8)
    exponent, mantissa = codes >> 3 & 3, codes & 7
    sizes = np.where(exponent == 0, mantissa / 8, (1 + mantissa / 8) * 2.0 ** (exponent - 1))
    return torch.from_numpy(octets), np.where(codes & 32, -sizes, sizes)


def test_mxfp6_is_read_and_not_taken_for_mxfp4(tmp_path):
    from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8

    codes, values = sixes()
    np.testing.assert_array_equal(unpack_fp6_from_uint8(codes, 64, 64, torch.float64).numpy(), values)
    scales = torch.randint(120, 130, (64, 2), dtype=torch.uint8)
    stored = {"a.weight_packed": codes, "a.weight_scale": scales}
    truth = {"a.weight": (values * at_blocks(powers(scales), values.shape, (1, 32))).astype(np.float32)}
    path = saved(tmp_path, stored, quantization_config=COMPRESSED | {"format": "mxfp6-pack-quantized"})
    (entry,) = check(path, truth)
    assert (entry.name, entry.quantization) == ("a.weight", "mxfp6 e2m3")
    check(stored, truth)
    lying = saved(tmp_path, stored, quantization_config=COMPRESSED | {"format": "mxfp4-pack-quantized"})
    with pytest.raises(SourceError, match="config says 'mxfp4-pack-quantized', whose scales have another shape"):
        kappa_fast.rank(lying)


def test_four_bit_experts_of_an_fp8_checkpoint(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = microscaled(trained(200, 96))
    scales = scales.view(torch.float8_e8m0fnu)
    truth = {"experts.0.w1.weight": from_nibbles(codes) * at_blocks(powers(scales), codes.shape, (1, 32))}
    stored = {"experts.0.w1.weight": in_bytes(codes).view(torch.int8), "experts.0.w1.weight_scale_inv": scales}
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    (entry,) = check(saved(tmp_path, stored, quantization_config=config), truth)
    assert entry.quantization == "mxfp4"
    theirs = Fp8Dequantize(None)._dequantize_one(*stored.values(), output_dtype=torch.float32)
    np.testing.assert_array_equal(theirs.numpy(), truth["experts.0.w1.weight"])


def test_the_global_scale_of_nvfp4_divides(tmp_path):
    codes, scale, by = nvfp4(trained(200, 96))
    spread = numbers(scale) / np.float32(by)
    truth = {"a.weight": from_nibbles(codes).astype(np.float32) * at_blocks(spread, codes.shape, (1, 16))}
    stored = {"a.weight_packed": in_bytes(codes), "a.weight_scale": scale, "a.weight_global_scale": torch.tensor([by])}
    config = COMPRESSED | {"format": "nvfp4-pack-quantized"}
    (entry,) = check(saved(tmp_path, stored, quantization_config=config), truth, certify=True)
    assert (entry.name, entry.quantization, entry.dtype, entry.certified) == ("a.weight", "nvfp4", "float32", True)
    check_complete(stored, check(stored, truth))


@pytest.mark.parametrize("experts", [0, 2])
def test_the_second_scale_of_modelopt_multiplies(experts, tmp_path):
    weights = [trained(200, 96, layer) * (1 + layer) for layer in range(max(1, experts))]
    parts = [nvfp4(weight) for weight in weights]
    seconds = [np.float32(1) / np.float32(by) for _, _, by in parts]
    truths = [
        from_nibbles(codes).astype(np.float32) * at_blocks(numbers(scale) * second, codes.shape, (1, 16))
        for (codes, scale, _), second in zip(parts, seconds, strict=True)
    ]
    packed, scales = [in_bytes(codes) for codes, _, _ in parts], [scale for _, scale, _ in parts]
    if experts:
        stored = {"experts.down_proj": torch.stack(packed), "experts.down_proj_scale_2": torch.tensor(seconds)}
        stored["experts.down_proj_scale"] = torch.stack([s.view(torch.uint8) for s in scales]).view(scales[0].dtype)
        truth = {f"experts.down_proj[{e}]": values for e, values in enumerate(truths)}
    else:
        stored = {"a.weight": packed[0], "a.weight_scale": scales[0], "a.weight_scale_2": torch.tensor(seconds[0])}
        truth = {"a.weight": truths[0]}
    ranking = check(stored, truth)
    check_complete(stored, ranking)
    assert {entry.quantization for entry in ranking} == {"nvfp4"}
    check(saved(tmp_path, stored, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}), truth)


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("a.weight_scale", torch.ones(32, 3).to(torch.float8_e4m3fn), "an E4M3 scale for each 16 weights"),
        ("a.weight_scale", torch.ones(32, 4), "an E4M3 scale for each 16 weights"),
        ("a.weight_global_scale", torch.ones(2), "one float32, or one for each expert"),
        ("a.weight_global_scale", torch.ones(1, dtype=torch.float16), "one float32, or one for each expert"),
    ],
)
def test_scales_of_nvfp4_that_do_not_fit_are_refused(name, tensor, why):
    source = {"a.weight_packed": torch.zeros(32, 32, dtype=torch.uint8), "a.weight_global_scale": torch.ones(1)}
    source["a.weight_scale"] = torch.ones(32, 4).to(torch.float8_e4m3fn)
    assert [entry.status for entry in kappa_fast.rank(source)] == ["rank_deficient"]
    with pytest.raises(SourceError, match=rf"'{name}' of shape .* does not fit the codes 'a.weight_packed'.*{why}"):
        open_source(source | {name: tensor}, Filters())


@pytest.mark.parametrize(
    ("scales", "why"),
    [
        (torch.zeros(2, 32, 3, dtype=torch.uint8), "a byte for each row of 16 bytes"),
        (torch.zeros(2, 32, 2), "a byte for each row of 16 bytes"),
    ],
)
def test_scales_of_gpt_oss_that_do_not_fit_are_refused(scales, why):
    source = {"down_proj_blocks": torch.zeros(2, 32, 2, 16, dtype=torch.uint8), "down_proj_scales": scales}
    with pytest.raises(SourceError, match=rf"'down_proj_scales' of shape .* does not fit .*{why}"):
        open_source(source, Filters())


def test_scales_of_packed_mxfp4_that_do_not_fit_are_refused():
    source = {"a.weight_packed": torch.zeros(32, 48, dtype=torch.uint8), "a.weight_scale": torch.zeros(32, 4).byte()}
    with pytest.raises(SourceError, match=r"'a\.weight_scale' of shape .32, 4., uint8, .* one scale for 32 weights"):
        open_source(source, Filters())


def test_scales_of_four_bit_experts_have_to_be_powers_of_two(tmp_path):
    stored = {"a.weight": torch.zeros(32, 32).char(), "a.weight_scale_inv": torch.zeros(32, 2, dtype=torch.int32)}
    path = saved(tmp_path, stored, quantization_config={"quant_method": "fp8", "expert_dtype": "fp4"})
    with pytest.raises(SourceError, match=r"'a\.weight_scale_inv' .* scales of MXFP4 are E8M0"):
        open_source(path, Filters())
