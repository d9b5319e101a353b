"""Quantized layers that cannot be read are named, with the way round; what is no weight stays out of the list."""

from __future__ import annotations

import pytest
import torch
from models import Config, Experts, LoraLinear, matrices, reasons
from test_quantized_modules import calibrated
from torch import nn

from kappa_fast.sources import Filters, open_source

pytestmark = pytest.mark.filterwarnings("ignore")


class TritonTensor:
    """What triton_kernels keeps experts in: no torch.Tensor."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape


def test_experts_in_the_layout_of_a_kernel_are_refused_by_name():
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    config = Config(num_local_experts=2, intermediate_size=64, hidden_size=64)
    model = nn.ModuleDict({"experts": integration.Mxfp4GptOssExperts(config), "plain": nn.Linear(64, 32)})
    experts = model["experts"]
    for name, shape in (("gate_up_proj", (2, 64, 128)), ("down_proj", (2, 64, 64))):
        del experts._parameters[name]  # as loading does
        setattr(experts, name, TritonTensor(*shape))
    source = open_source(model, Filters())
    assert {m.name for m in source.matrices} == {"plain.weight"}
    found = {s.name: (s.shape, s.reason) for s in source.skipped}
    reason = "codes in the order of one kernel (Mxfp4GptOssExperts): rank the checkpoint"
    assert found["experts.gate_up_proj"] == ((2, 64, 128), reason)
    assert found["experts.down_proj"] == ((2, 64, 64), reason)
    assert source.num_parameters == 2 * 64 * 128 + 2 * 64 * 64 + 2 * 128 + 2 * 64 + 64 * 32 + 32


class Hidden(nn.Module):
    """A layer whose weight is in no parameter and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 48, 32
        self.bias = nn.Parameter(torch.zeros(32))


def test_a_layer_without_a_matrix_is_listed_and_one_around_a_layer_is_not():
    model = nn.ModuleDict({"q_proj": Hidden(), "v_proj": LoraLinear(nn.Linear(48, 32), 16)})
    model["v_proj"].in_features, model["v_proj"].out_features = 48, 32
    found = {s.name: (s.shape, s.reason) for s in open_source(model, Filters()).skipped}
    assert found.pop("q_proj.weight") == ((32, 48), "packed by Hidden, so that it cannot be read: rank the checkpoint")
    assert {reason for _, reason in found.values()} == {"adapter weight"}
    wrapped = nn.ModuleDict({"q_proj": LoraLinear(Hidden(), 16), "plain": nn.Linear(32, 32)})
    assert "q_proj.weight" in reasons(wrapped)


@pytest.mark.parametrize("kind", ["W4A16_ASYM", "FP8", "bitsandbytes 4", "bitsandbytes 8"])
def test_codes_on_the_meta_device_are_skipped_with_the_way_round(kind):
    if kind.startswith("bitsandbytes"):
        bnb = pytest.importorskip("bitsandbytes")
        four, eight = bnb.nn.Linear4bit(64, 64, bias=False), bnb.nn.Linear8bitLt(64, 64, False, has_fp16_weights=False)
        model = nn.ModuleDict({"q": four if kind.endswith("4") else eight}).to("cpu")
        model["q"].weight = model["q"].weight.to("meta")
    else:
        compressors = pytest.importorskip("compressed_tensors.compressors")
        model = calibrated(kind)
        compressors.ModelCompressor.from_pretrained_model(model).compress_model(model)
        model.to("meta")
    model["plain"] = nn.Linear(32, 32)
    assert set(matrices(model, Filters())) == {"plain.weight"}
    assert "on the meta device, without values: rank from the checkpoint" in reasons(model, Filters()).values()


class EetqLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
        self.weight_scales = nn.Parameter(torch.ones(64).half())
        self.bias = nn.Parameter(torch.zeros(64))


class QuantizedLinear(nn.Module):
    """As of AQLM: the code books are floats, and no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.codebooks = nn.Parameter(torch.randn(2, 256, 1, 8))
        self.codes = nn.Parameter(torch.zeros(64, 8, 2, dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.ones(64, 1, 1, 1))


@pytest.mark.parametrize(("kind", "format"), [(EetqLinear, "eetq"), (QuantizedLinear, "aqlm or spqr")])
def test_layers_of_formats_that_are_not_read_are_refused_by_name(kind, format):
    model = nn.ModuleDict({"q": kind(), "plain": nn.Linear(32, 32)})
    assert set(matrices(model)) == {"plain.weight"}
    found = reasons(model)
    assert found
    assert set(found.values()) == {
        f"part of a quantized layer ({kind.__name__}, {format}); this quantized format is not supported"
    }


def test_buffers_that_are_no_codes_stay_out_of_the_list():
    model = nn.Linear(32, 32)
    model.register_buffer("relative_position_index", torch.zeros(49, 49, dtype=torch.int64))
    model.register_buffer("position_ids", torch.zeros(1, 64, dtype=torch.int64))
    model.register_buffer("mask", torch.ones(16, 16))
    assert reasons(model) == {}
    assert set(matrices(model)) == {"weight"}


def test_codes_in_a_buffer_with_scales_that_no_format_has_are_listed():
    model = nn.Linear(32, 32)
    model.register_buffer("qweight", torch.zeros(16, 32, dtype=torch.int64))
    model.register_buffer("scales", torch.ones(4, 32))
    found = reasons(model)
    assert found["qweight"].startswith("codes in the order of one kernel (Linear)")
    assert found["scales"].startswith("scales or zero points")


def test_experts_of_a_quantized_stack_count_once():
    model = nn.Module()
    model.experts = Experts(2, 32, 32)
    model.experts.gate_up_proj.data = model.experts.gate_up_proj.data.to(torch.float8_e4m3fn)
    model.experts.gate_up_proj_scale_inv = nn.Parameter(torch.ones(2, 1, 1))
    assert open_source(model, Filters()).num_parameters == 2 * (64 * 32 + 32 * 32)
