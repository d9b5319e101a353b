"""Modules that keep quantized weights: made by the library of the format, or with the names that it gives them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from models import Config, LoraLinear, matrices, reasons
from packed_codes import GROUP, awq, gptq, in_turn
from packing import at_blocks, check, numbers, trained
from torch import nn

import kappa_fast
from kappa_fast.errors import OptionError, SourceError
from kappa_fast.sources import Filters, open_source

pytestmark = pytest.mark.filterwarnings("ignore")


def content(model: nn.Module) -> dict[str, Any]:
    """Everything that modules hold, tensors by identity and content, also those in plain attributes."""

    def of(value: object) -> object:
        if isinstance(value, torch.Tensor):
            changes = None if value.is_inference() else value._version
            return id(value), changes, value.requires_grad, value.detach().reshape(-1).view(torch.uint8).tolist()
        if isinstance(value, dict):
            return {k: of(v) for k, v in value.items()}
        return id(value) if isinstance(value, nn.Module) else (type(value), repr(value))

    return {name: {k: of(v) for k, v in vars(module).items()} for name, module in model.named_modules()}


def check_unchanged(model: nn.Module, truth: Mapping[str, np.ndarray], **options: object) -> kappa_fast.Ranking:
    """As ``check``, and the model is left as it was."""
    before = content(model)
    ranking = check(model, truth, **options)
    assert content(model) == before
    return ranking


# FP8 by transformers


def test_fp8_linear_of_transformers_is_codes_times_blocks_of_scales():
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = finegrained.FP8Linear(200, 300, block_size=(128, 128), has_bias=True)
    layer.weight.data.copy_(trained(300, 200) * 100)
    layer.weight_scale_inv.data.copy_(torch.rand(3, 2) + 0.5)
    model = nn.ModuleDict({"q_proj": layer, "plain": nn.Linear(200, 64)})
    values = numbers(layer.weight.detach()) * at_blocks(layer.weight_scale_inv.detach().numpy(), (300, 200), (128, 128))
    model.config = Config(quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128]))
    ranking = check_unchanged(model, {"q_proj.weight": values})
    assert ranking["q_proj.weight"].quantization == "fp8 e4m3, 128x128 blocks"
    assert ranking["plain.weight"].quantization is None
    assert ranking.metadata["num_parameters"] == 300 * 200 + 300 + 200 * 64 + 64
    assert [s.name for s in ranking.skipped] == ["q_proj.weight_scale_inv"]
    # What PEFT's selector takes, the codes as they stand, is another number altogether.
    raw = torch.linalg.svdvals(layer.weight.detach().double())
    assert not ranking["q_proj.weight"].lower <= float(raw[0] / raw[-1]) <= ranking["q_proj.weight"].upper


def fp8_experts(**options: object) -> nn.Module:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = Config(num_local_experts=3, hidden_size=256, intermediate_size=128, hidden_act="silu")
    model = nn.Module()
    model.experts = finegrained.FP8Experts(config, **options)
    return model


def test_fp8_experts_of_transformers_are_ranked_one_by_one_and_in_halves():
    model = fp8_experts(block_size=(128, 128))
    truth = {}
    for name in ("gate_up_proj", "down_proj"):
        codes, scales = getattr(model.experts, name), getattr(model.experts, f"{name}_scale_inv")
        codes.data.copy_(torch.randn(codes.shape) * 50)
        scales.data.copy_(torch.rand(scales.shape) + 0.5)
        for e in range(3):
            blocks = at_blocks(scales[e].detach().numpy(), codes.shape[1:], (128, 128))
            values = numbers(codes[e].detach()) * blocks
            halves = {".gate": values[:128], ".up": values[128:]} if name == "gate_up_proj" else {"": values}
            truth |= {f"experts.{name}[{e}]{half}": part for half, part in halves.items()}
    ranking = check_unchanged(model, truth)
    assert len(ranking) == 9
    assert {s.reason.partition(" (")[0] for s in ranking.skipped} == {"scales or zero points of quantized weights"}


def test_four_bit_experts_of_transformers_are_decoded_where_the_config_says_so():
    pytest.importorskip("transformers.integrations.mxfp4")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    model = fp8_experts(expert_dtype="fp4")
    codes, scales = model.experts.down_proj, model.experts.down_proj_scale_inv
    codes.data.random_(-128, 128)
    scales.data.copy_(2.0 ** torch.randint(-4, 4, scales.shape))
    expected = Fp8Dequantize(None)._dequantize_one(codes.data, scales.data)
    del model.experts.gate_up_proj, model.experts.gate_up_proj_scale_inv
    assert reasons(model)["experts.down_proj"].startswith("quantized codes that need their scales")
    model.config = Config(quantization_config=dict(quant_method="fp8", expert_dtype="fp4"))
    found = matrices(model)
    assert all(torch.equal(found[f"experts.down_proj[{e}]"].load(), expected[e]) for e in range(3))


@pytest.mark.parametrize("rows", [96, 128, 256])
def test_scales_that_a_module_has_turned_for_its_kernel_go_with_their_rows(rows):
    # Also where the weight is square, and where a row of scales would fit into its columns as blocks.
    integration = pytest.importorskip("transformers.integrations.compressed_tensors")
    layer = integration.CompressedTensorsFP8Linear(128, rows)
    layer.weight.data.copy_(trained(rows, 128) * 100)
    layer.weight_scale.data.copy_(torch.rand(1, rows) + 0.5)
    values = numbers(layer.weight.detach()) * layer.weight_scale.detach().numpy().T
    for source in (nn.ModuleDict({"q": layer}), {f"q.{n}": t for n, t in layer.state_dict().items() if n != "bias"}):
        assert check(source, {"q.weight": values})[0].quantization == "fp8 e4m3, a scale for each row"


def test_the_transposed_experts_of_fbgemm_are_scaled_by_their_outputs():
    integration = pytest.importorskip("transformers.integrations.fbgemm_fp8")
    sizes = dict(num_local_experts=2, intermediate_size=64, hidden_size=64)
    config = Config(**sizes, hidden_act="silu", model_type="llama4_text")
    model = nn.Module()
    model.experts, model.config = integration.FbgemmFp8Llama4TextExperts(config), config
    truth = {}
    for name in ("gate_up_proj", "down_proj"):
        codes, scales = getattr(model.experts, name), getattr(model.experts, f"{name}_scale")
        codes.data.copy_(torch.randn(codes.shape) * 50)
        scales.data.copy_(torch.rand(scales.shape) + 0.5)
        for e in range(2):  # the outputs are the columns
            values = numbers(codes[e].detach()) * scales[e].detach().numpy().reshape(1, -1)
            halves = {".gate": values[:, :64], ".up": values[:, 64:]} if name == "gate_up_proj" else {"": values}
            truth |= {f"experts.{name}[{e}]{half}": part for half, part in halves.items()}
    check_unchanged(model, truth)


# compressed-tensors


def calibrated(preset: str) -> nn.Module:
    """A layer with the scales of its weight, which is still as it was."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.utils import calculate_qparams

    model = nn.ModuleDict({"q": nn.Linear(256, 96, bias=False)}).bfloat16()
    model["q"].weight.data.copy_(trained(96, 256))
    groups = {"all": quantization.preset_name_to_scheme(preset, ["Linear"])}
    quantization.apply_quantization_config(model, quantization.QuantizationConfig(config_groups=groups))
    layer, arguments = model["q"], model["q"].quantization_scheme.weights
    weight, more = layer.weight.data, {}
    if arguments.group_size:
        weight = weight.view(96, -1, arguments.group_size)
    if arguments.strategy == "tensor_group":
        layer.weight_global_scale.data.fill_(448 * 6 / float(weight.abs().max()))
        more = {"global_scale": layer.weight_global_scale}
    if arguments.strategy == "tensor":
        weight = weight.flatten()
    scale, zero = calculate_qparams(weight.amin(-1), weight.amax(-1), arguments, **more)
    for name, value in (("weight_scale", scale), ("weight_zero_point", zero)):
        if hasattr(layer, name):
            held = getattr(layer, name)
            held.data = value.to(held.dtype).reshape(held.shape)
    return model


PRESETS = {
    "W4A16": ("int4", "bfloat16"),
    "W4A16_ASYM": ("int4", "bfloat16"),
    "W8A8": ("int8", "bfloat16"),
    "FP8": ("fp8", "float32"),
    "FP8_DYNAMIC": ("fp8", "float32"),
    "NVFP4A16": ("nvfp4", "float32"),
    "MXFP4A16": ("mxfp4", "float32"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_compressed_tensors_modules_are_ranked_in_every_state(preset):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model = calibrated(preset)
    plain = model["q"].weight.detach().float().numpy()
    ranking = check_unchanged(model, {"q.weight": plain})  # calibrated: the weight is as it was
    assert (ranking[0].quantization, len(ranking)) == (None, 1)
    assert set(matrices({n: t.detach() for n, t in model.state_dict().items()}, Filters(min_dim=2))) <= {
        "q.weight",
        "q.weight_scale",
    }
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    assert "weight" not in dict(model["q"].named_parameters()) or model["q"].weight.dtype.itemsize == 1
    later = copy.deepcopy(model)
    compressor.decompress_model(later)
    values = later["q"].weight.detach().float().numpy()
    assert not np.array_equal(values, plain)
    method, dtype = PRESETS[preset]
    if dtype == "float32":  # the library rounds to bfloat16 what is exact here
        (loaded,) = [m.load() for m in matrices(model, Filters()).values()]
        np.testing.assert_array_equal(loaded.bfloat16().float().numpy(), values)
        values = loaded.numpy()
    ranking = check_unchanged(model, {"q.weight": values})
    assert (method in ranking[0].quantization, ranking[0].dtype, len(ranking)) == (True, dtype, 1)
    assert ranking[0].shape == (96, 256)
    assert check(later, {"q.weight": later["q"].weight.detach().float().numpy()})[0].quantization is None


def test_a_group_of_its_own_for_a_module_comes_before_the_config_of_the_model():
    pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.compressors import ModelCompressor

    model = calibrated("W4A16_ASYM")
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    del model["q"].weight_zero_point
    with pytest.raises(SourceError, match=r"'q\.weight_packed' .* 'weight_zero_point' beside it is missing"):
        open_source(model, Filters())


# GPTQ and AWQ: gptqmodel is too heavy to install, so these are its classes by name, with its buffers and attributes


class BaseQuantLinear(nn.Module):
    def __init__(self, tensors: Mapping[str, torch.Tensor], version: int = 1) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.rpartition(".")[2], tensor)
        self.in_features, self.out_features, self.bits, self.group_size = 128, 96, 4, GROUP
        self._version = version

    def qzero_format(self) -> int:
        return self._version


class TorchQuantLinear(BaseQuantLinear):
    pass


class TritonV2QuantLinear(BaseQuantLinear):
    pass


class AwqTorchLinear(BaseQuantLinear):
    pass


class WQLinear_GEMM(BaseQuantLinear):
    qzero_format = None


class MarlinQuantLinear(BaseQuantLinear):
    pass


class IPEXQuantLinear(TorchQuantLinear):
    pass


@pytest.mark.parametrize("kind", [TorchQuantLinear, TritonV2QuantLinear])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_layers_are_read_from_their_buffers_in_the_version_that_they_say(kind, version):
    # Loading a checkpoint of the first version turns its zero points into those of the second.
    stored, values = gptq(trained(96, 128), 4, in_turn(), symmetric=False, offset=2 - version)
    model = nn.ModuleDict({"a": kind(stored, version), "plain": nn.Linear(128, 32)})
    model.config = Config(quantization_config=dict(quant_method="gptq", bits=4, group_size=GROUP))
    ranking = check_unchanged(model, {"a.weight": values})
    entry = ranking["a.weight"]
    assert (entry.quantization, entry.aliases) == (f"gptq 4 bits, groups of {GROUP}", ("a.qweight",))
    assert ranking.metadata["num_parameters"] == 96 * 128 + 128 * 32 + 32
    assert {s.name for s in ranking.skipped} == {"a.qzeros", "a.scales"}


@pytest.mark.parametrize("kind", [AwqTorchLinear, WQLinear_GEMM])
@pytest.mark.parametrize("told", [False, True])
def test_awq_layers_are_read_from_their_buffers(kind, told):
    stored, values = awq(trained(96, 128), GROUP)
    model = nn.ModuleDict({"a": kind(stored)})
    if told:
        model.config = Config(quantization_config=dict(quant_method="awq", bits=4, group_size=GROUP))
    assert check_unchanged(model, {"a.weight": values})[0].quantization.startswith("awq 4 bits")


@pytest.mark.parametrize("kind", [MarlinQuantLinear, IPEXQuantLinear])
def test_a_layer_whose_kernel_orders_the_codes_is_refused_by_name(kind):
    stored, _ = gptq(trained(96, 128), 4, in_turn(), symmetric=False)
    model = nn.ModuleDict({"a": kind(stored), "plain": nn.Linear(128, 32)})
    assert set(matrices(model, Filters())) == {"plain.weight"}
    assert reasons(model)["a.qweight"] == f"codes in the order of one kernel ({kind.__name__}): rank the checkpoint"
    assert reasons(model)["a.scales"].startswith("scales or zero points of quantized weights")


def test_under_an_adapter_a_quantized_layer_keeps_the_name_of_its_weight():
    stored, values = gptq(trained(96, 128), 4, in_turn(), symmetric=False, offset=0)
    layer = TorchQuantLinear(stored, 2)
    layer.weight = None
    model = nn.ModuleDict({"q_proj": LoraLinear(layer, 16)})
    assert check(model, {"q_proj.weight": values})[0].name == "q_proj.weight"
    assert {s.reason for s in open_source(model, Filters()).skipped if "lora" in s.name} == {"adapter weight"}


def test_a_selection_of_layers_without_parameters_says_that_codes_cannot_be_trained():
    stored, _ = gptq(trained(96, 128), 4, in_turn(), symmetric=False, offset=0)
    model = nn.ModuleDict({"a": TorchQuantLinear(stored, 2), "plain": nn.Linear(128, 32)})
    selection = kappa_fast.rank(model).select(num_tensors=2)
    with pytest.raises(OptionError, match=r"holds 'a\.qweight' in place of the weight: it is quantized"):
        selection.apply(model)


# HQQ


def hqq_library():
    """Not in the extra "test": once it is there, transformers imports it everywhere, and torch's compiler with it."""
    return pytest.importorskip("hqq.core.quantize", reason="pip install hqq to test its layers")


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_layers_are_ranked_by_what_they_dequantize_to(bits, axis):
    hqq = hqq_library()
    how = hqq.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    linear = nn.Linear(128, 96, bias=False)
    linear.weight.data.copy_(trained(96, 128))
    model = nn.ModuleDict({"q": hqq.HQQLinear(linear, how, compute_dtype=torch.float32, device="cpu")})
    expected = model["q"].dequantize()
    before = content(model)
    (found,) = matrices(model).values()
    assert (found.key, found.shape, found.quantization) == ("q.weight", (96, 128), f"hqq {bits} bits, groups of 64")
    assert torch.equal(found.load(), expected)
    assert type(found.load()) is torch.Tensor
    (entry,) = kappa_fast.rank(model)
    s = torch.linalg.svdvals(expected.double())
    assert entry.status != "ok" or entry.lower <= float(s[0] / s[-1]) <= entry.upper
    assert content(model) == before
    assert open_source(model, Filters()).num_parameters == 96 * 128


def test_hqq_scales_that_are_quantized_are_left_so():
    hqq = hqq_library()
    how = hqq.BaseQuantizeConfig(nbits=4, group_size=64, quant_zero=True, quant_scale=True)
    layer = hqq.HQQLinear(nn.Linear(128, 96, bias=False), how, compute_dtype=torch.bfloat16, device="cpu")
    expected = layer.dequantize()
    seen: list[dict[str, object]] = []
    original = hqq.HQQLinear.dequantize
    before = content(layer), dict(layer.meta)

    def dequantize(self: nn.Module) -> torch.Tensor:
        seen.append(self.meta)
        return original(self)

    try:
        hqq.HQQLinear.dequantize = dequantize
        (found,) = matrices(layer).values()
        assert torch.equal(found.load(), expected)
    finally:
        hqq.HQQLinear.dequantize = original
    assert seen[0] is not layer.meta  # it writes to the dictionary while it works
    assert (content(layer), dict(layer.meta)) == before


class HQQLinear(nn.Module):
    """An HQQLinear that gives back something else than it says."""

    def __init__(self) -> None:
        super().__init__()
        self.W_q = nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)
        self.meta = {"shape": (32, 32), "nbits": 4, "group_size": 64}
        self.compute_dtype = torch.float32

    def dequantize(self) -> torch.Tensor:
        return torch.zeros(32, 16)


def test_an_hqq_layer_that_dequantizes_to_another_shape_is_an_error():
    with pytest.raises(
        SourceError, match=r"'weight': dequantize\(\) of HQQLinear returns \(32, 16\) instead of \(32, 32\)"
    ):
        kappa_fast.rank(HQQLinear())
