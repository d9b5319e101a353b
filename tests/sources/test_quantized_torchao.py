"""torchao's tensors, and others that dequantize themselves: in modules, state dicts and files."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from models import EVERYTHING, Experts, matrices, reasons
from safetensors.torch import save_file
from torch import nn
from torchao_codes import peak_of

import kappa_fast
from kappa_fast.errors import MissingExtraError, SourceError
from kappa_fast.sources import Filters, open_source

logging.disable(logging.WARNING)  # torchao tells at length which of its libraries for GPUs are not there
quantization = pytest.importorskip("torchao.quantization")
mx_formats = pytest.importorskip("torchao.prototype.mx_formats")
MXTensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").MXTensor
NVFP4Tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor").NVFP4Tensor
safetensors_support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
logging.disable(logging.NOTSET)

flatten_tensor_state_dict = safetensors_support.flatten_tensor_state_dict

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS = {
    "Int8Tensor": lambda: quantization.Int8WeightOnlyConfig(),
    "Float8Tensor": lambda: quantization.Float8WeightOnlyConfig(),
    "IntxUnpackedToInt8Tensor": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "MXTensor": lambda: mx_formats.MXDynamicActivationMXWeightConfig(),
    "NVFP4Tensor": lambda: mx_formats.NVFP4WeightOnlyConfig(),
}


def model(kind: str) -> nn.Module:
    """Two layers, one of them quantized, and a norm."""
    made = nn.ModuleDict({"q": nn.Linear(128, 96, bias=False), "k": nn.Linear(128, 64), "norm": nn.LayerNorm(128)})
    made.bfloat16()
    quantization.quantize_(made, CONFIGS[kind](), filter_fn=lambda module, name: name == "q")
    assert type(made["q"].weight).__name__ == kind
    return made


def int4(weight: torch.Tensor, group: int = 32) -> quantization.Int4Tensor:
    """Packed here bit by bit, as FBGEMM's int4_row_quantize_zp and pack_int4 do, because they are for GPUs only."""
    grouped = weight.float().numpy().reshape(*weight.shape[:-1], -1, group)
    low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
    scale = (high - low) / 15
    codes = (np.round((grouped - low) / scale).clip(0, 15) - 8).astype(np.int8).reshape(weight.shape)
    packed = (codes[..., ::2] & 15) | (codes[..., 1::2] << 4)
    turned = [torch.from_numpy(t[..., 0].swapaxes(-1, -2).copy()).to(weight.dtype) for t in (scale, low + 8 * scale)]
    sizes = [1] * (weight.dim() - 1) + [group]
    return quantization.Int4Tensor(torch.from_numpy(packed), *turned, sizes, weight.shape)


def by_numpy(tensor: quantization.Int4Tensor) -> torch.Tensor:
    """Code times scale plus zero point, one column after the other."""
    packed = tensor.qdata.numpy().astype(np.int16) & 255
    found = np.empty(tensor.shape, np.float32)
    for column in range(tensor.shape[-1]):
        code = (packed[..., column // 2] >> (4 * (column % 2))) & 15
        group = column // tensor.block_size[-1]
        scale, zero = tensor.scale[..., group, :].float().numpy(), tensor.zero_point[..., group, :].float().numpy()
        found[..., column] = np.where(code > 7, code - 16, code) * scale + zero
    return torch.from_numpy(found).to(tensor.dtype)


def saved(tensors: Mapping[str, torch.Tensor], path: object) -> None:
    flat, header = flatten_tensor_state_dict(tensors)
    save_file(flat, path, metadata=header)


def assert_holds(ranking: kappa_fast.Ranking, expected: Mapping[str, torch.Tensor]) -> None:
    """The keys are those expected, and every interval holds kappa of the float64 SVD of the expected matrix."""
    assert {entry.key for entry in ranking} == set(expected)
    for entry in ranking:
        s = torch.linalg.svdvals(expected[entry.key].double())
        assert entry.lower <= float(s[0] / s[-1]) <= entry.upper <= 1.05 * entry.lower, entry.key


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_its_state_dict_and_its_file_are_ranked_by_what_torchao_dequantizes(kind, tmp_path):
    made = model(kind)
    state = {name: tensor.detach() for name, tensor in made.state_dict().items()}
    saved(state, tmp_path / "model.safetensors")
    weight = made["q"].weight.dequantize().detach()
    for source in (made, state, tmp_path):
        assert torch.equal(matrices(source)["q.weight"].load(), weight)
        ranking = kappa_fast.rank(source)
        assert_holds(ranking, {"q.weight": weight, "k.weight": made["k"].weight.detach()})
        by_name = {entry.name: entry for entry in ranking}
        assert by_name["q.weight"].quantization == f"torchao {kind}"
        assert by_name["q.weight"].dtype == "bfloat16"
        assert by_name["k.weight"].quantization is None
        assert ranking.metadata["num_parameters"] == 96 * 128 + 64 * 128 + 64 + 256


def test_what_transformers_saves_in_several_files_is_ranked_like_the_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=80),
        **dict(num_key_value_heads=2, bos_token_id=0, eos_token_id=1),
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    how = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    load = transformers.AutoModelForCausalLM.from_pretrained
    made = load(tmp_path / "plain", quantization_config=how, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    found, live = matrices(tmp_path / "saved", Filters()), matrices(made, Filters())
    assert found.keys() == live.keys()
    assert {m.quantization for m in found.values()} == {"torchao Int8Tensor"}
    for key, m in live.items():
        assert torch.equal(found[key].load(), m.load())
        assert torch.equal(m.load(), made.get_parameter(m.name).dequantize())


def test_int4_is_unpacked_as_it_was_packed(tmp_path):
    weight = torch.randn(96, 128).bfloat16()
    tensor = int4(weight)
    expected = by_numpy(tensor)
    assert (expected - weight).abs().max() <= (weight.max() - weight.min()) / 15  # half of one step of the worst group
    made = nn.Linear(128, 96, bias=False)
    made.weight = nn.Parameter(tensor, requires_grad=False)
    saved({"a.weight": tensor}, tmp_path / "model.safetensors")
    for source, name in ((made, "weight"), ({"a.weight": tensor}, "a.weight"), (tmp_path, "a.weight")):
        found = matrices(source)[name]
        assert found.quantization == "torchao Int4Tensor"
        assert torch.equal(found.load(), expected)
    assert_holds(kappa_fast.rank(tmp_path), {"a.weight": expected})


def stack(kind: str) -> torch.Tensor:
    weights = torch.randn(3, 64, 128).bfloat16()
    if kind == "Int4Tensor":
        return int4(weights)
    if kind == "MXTensor":
        return MXTensor.to_mx(weights, torch.float8_e4m3fn, 32)
    if kind == "NVFP4Tensor":
        return NVFP4Tensor.to_nvfp4(weights)
    made = nn.Module()
    made.gate_up_proj = nn.Parameter(weights)
    quantization.quantize_(made, quantization.FqnToConfig({"gate_up_proj": CONFIGS[kind]()}), filter_fn=None)
    return made.gate_up_proj.detach()


@pytest.mark.parametrize("kind", ["Int8Tensor", "Float8Tensor", "Int4Tensor", "MXTensor", "NVFP4Tensor"])
def test_stacked_experts_are_ranked_one_by_one_and_in_halves(kind, tmp_path):
    tensor = stack(kind)
    assert type(tensor).__name__ == kind
    whole = by_numpy(tensor) if kind == "Int4Tensor" else tensor.dequantize()
    made = nn.Module()
    made.experts = Experts(3, 128, 32)
    made.experts.gate_up_proj = nn.Parameter(tensor, requires_grad=False)
    down = made.experts.down_proj.detach()
    saved({"experts.gate_up_proj": tensor, "experts.down_proj": down}, tmp_path / "model.safetensors")
    halves = {"gate": slice(32), "up": slice(32, 64)}
    expected = {f"experts.gate_up_proj[{e}].{h}": whole[e, rows] for e in range(3) for h, rows in halves.items()}
    expected |= {f"experts.down_proj[{e}]": down[e] for e in range(3)}
    for source in (made, tmp_path):
        found = matrices(source)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key].load(), expected[key]) for key in expected)
    assert_holds(kappa_fast.rank(tmp_path), expected)


def test_one_expert_is_dequantized_without_the_others(monkeypatch):
    made = nn.Module()
    made.experts = nn.Parameter(stack("Int8Tensor"), requires_grad=False)
    found = matrices(made)["experts[1]"]
    shapes: list[tuple[int, ...]] = []
    original = quantization.Int8Tensor.dequantize
    monkeypatch.setattr(
        quantization.Int8Tensor, "dequantize", lambda self: shapes.append(tuple(self.shape)) or original(self)
    )
    found.load()
    assert shapes == [(64, 128)]


@pytest.mark.parametrize(("scales", "block"), [((1, 64, 1), [3, 1, 128]), ((1, 1, 1), [3, 64, 128])])
def test_experts_that_share_their_scales_are_dequantized_together(scales, block, tmp_path):
    codes = torch.randint(-127, 128, (3, 64, 128), dtype=torch.int8)
    tensor = quantization.Int8Tensor(codes, torch.rand(scales), block, torch.float32)
    saved({"mlp.experts": tensor}, tmp_path / "model.safetensors")
    for source in ({"mlp.experts": tensor}, tmp_path):
        found = matrices(source)
        assert torch.equal(torch.stack([m.load() for m in found.values()]), tensor.dequantize())


@pytest.mark.parametrize("kind", [*CONFIGS, "Int4Tensor"])
def test_loading_takes_no_more_than_is_counted_and_not_far_less(kind):
    made = nn.Linear(256, 256, bias=False).bfloat16()
    if kind == "Int4Tensor":
        made.weight = nn.Parameter(int4(made.weight.detach()), requires_grad=False)
    else:
        quantization.quantize_(made, CONFIGS[kind]())
    for source in (made, {"experts.up": stack(kind)} if kind != "IntxUnpackedToInt8Tensor" else made):
        m = next(iter(matrices(source).values()))
        m.load()  # whatever is allocated once
        peak = peak_of(m)
        assert peak <= m.nbytes + m.overhead <= 2 * peak


def test_codes_move_before_they_are_dequantized(tmp_path):
    made = model("Int8Tensor")
    saved(made.state_dict() | {"experts.up": stack("Float8Tensor")}, tmp_path / "model.safetensors")
    for source in (made, tmp_path):
        for m in open_source(source, EVERYTHING).matrices:
            if m.quantization is not None:
                found = m.load(torch.device("meta"))
                assert (found.device.type, tuple(found.shape), found.dtype) == ("meta", m.shape, torch.bfloat16)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantized_model_is_left_as_it_was(kind):
    made = model(kind)
    weight = made["q"].weight

    def content() -> dict[str, object]:
        parts, attributes = weight.__tensor_flatten__()
        plain = {part: getattr(weight, part).reshape(-1).view(torch.uint8).tolist() for part in parts}
        where = {part: (id(getattr(weight, part)), getattr(weight, part)._version) for part in parts}
        modules = {n: {k: id(v) for k, v in vars(m).items()} for n, m in made.named_modules()}
        flags = {n: (id(p), p.requires_grad, p.grad) for n, p in made.named_parameters()}
        return plain | {"where": where, "attributes": str(attributes), "modules": modules, "flags": flags}

    before = content()
    assert len(kappa_fast.rank(made, certify=True)) == 2
    assert content() == before


def test_nf4_has_a_way_back_of_its_own_name():
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    tensor = to_nf4(torch.randn(64, 256).bfloat16(), 64, 256)
    (found,) = matrices({"w": tensor}).values()
    assert torch.equal(found.load(), tensor.get_original_weight())
    assert found.quantization == "torchao NF4Tensor"


# Other packages' subclasses, and those that cannot


def quanto() -> object:
    return pytest.importorskip("optimum.quanto")


# Tensors of less than a byte compile their unpacking first.
@pytest.mark.parametrize(
    "kind", ["qint8", "qfloat8", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qint4", "qint2"))]
)
def test_quantos_tensors_are_ranked_by_what_they_dequantize_to(kind):
    package = quanto()
    made = nn.Sequential(nn.Linear(128, 96))
    package.quantize(made, weights=getattr(package, kind))
    package.freeze(made)
    (found,) = matrices(made).values()
    assert found.quantization.startswith("optimum WeightQB")
    assert torch.equal(found.load(), made[0].weight.dequantize())


class Wrapped(torch.Tensor):
    """Numbers that are twice what the storage says."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_subclass(cls, data)

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor) * 2


class Flat(Wrapped):
    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).flatten()


class Broken(Wrapped):
    def dequantize(self) -> torch.Tensor:
        raise RuntimeError("only on a GPU\nand nowhere else")


class Same(Wrapped):
    def dequantize(self) -> torch.Tensor:
        return self


def test_any_subclass_with_a_way_back_to_plain_numbers_is_ranked():
    data = torch.randn(32, 48)
    (found,) = matrices({"w": Wrapped(data)}).values()
    assert torch.equal(found.load(), 2 * data)
    assert type(found.load()) is torch.Tensor
    assert found.quantization == "test_quantized_torchao Wrapped"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Flat, r"test_quantized_torchao Flat; dequantize\(\) returns Tensor of shape \(1536,\), torch.float32"),
        (Broken, r"test_quantized_torchao Broken; dequantize\(\) fails: only on a GPU"),
        (Same, r"test_quantized_torchao Same; dequantize\(\) returns Same of shape \(32, 48\), torch.float32"),
    ],
)
def test_a_subclass_whose_way_back_does_not_lead_to_its_numbers_is_refused_by_name(kind, reason):
    found = reasons({"w": kind(torch.randn(32, 48)), "v": torch.randn(32, 48)})
    assert re.fullmatch(rf"quantized or other tensor subclass {reason}", found["w"])


def test_tensors_that_only_a_kernel_can_read_are_refused_by_name(tmp_path):
    tensor = quantization.Int4TilePackedTo4dTensor(
        torch.zeros(12, 1, 32, 4, dtype=torch.int32), torch.zeros(4, 96, 2).bfloat16(), [1, 32], torch.Size((96, 128))
    )
    named = "Int4TilePackedTo4dTensor"
    assert named in reasons({"q.weight": tensor})["q.weight"]
    saved({"q.weight": tensor, "k.weight": torch.randn(32, 32)}, tmp_path / "model.safetensors")
    found = reasons(tmp_path)
    assert found["q._weight_qdata"] == (
        f"quantized by torchao {named}, which cannot be dequantized (it has no dequantize()): rank the model before it "
        "is quantized"
    )
    assert set(matrices(tmp_path)) == {"k.weight"}


# Bad input


def checkpoint(path: object, *, without: str = "", **header: str) -> object:
    flat, said = flatten_tensor_state_dict({n: t.detach() for n, t in model("Int8Tensor").state_dict().items()})
    flat = {name: tensor for name, tensor in flat.items() if name != without}
    save_file(flat, path / "model.safetensors", metadata={**said, **header})
    return path


def test_without_its_header_a_file_cannot_be_read(tmp_path):
    flat, _ = flatten_tensor_state_dict({"q.weight": model("Int8Tensor")["q"].weight.detach()})
    message = r"'q\._weight_qdata' is quantized by torchao, but the header.*not describe 'q\.weight'"
    with pytest.raises(SourceError, match=message):
        open_source(flat, Filters())


def test_a_part_that_is_missing_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"'q\._weight_scale' beside it is missing"):
        open_source(checkpoint(tmp_path, without="q._weight_scale"), Filters())


@pytest.mark.parametrize(
    "said",
    [
        "{",
        "[]",
        "{}",
        json.dumps({"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": ["qdata", "scale"]}),
        json.dumps({"_type": "Int8Tensor", "_data": {"nonsense": 1}, "_tensor_data_names": ["qdata", "scale"]}),
    ],
)
def test_a_header_that_says_nonsense_is_refused(said, tmp_path):
    message = r"'q\.weight' is quantized by torchao, but its parts are not valid \(.*download the checkpoint again"
    with pytest.raises(SourceError, match=message):
        open_source(checkpoint(tmp_path, **{"q.weight": said}), Filters())


def test_a_kind_of_tensor_that_is_unknown_is_refused_by_name(tmp_path):
    said = json.dumps({"_type": "subprocess.Popen", "_data": {}, "_tensor_data_names": ["qdata"]})
    with pytest.raises(
        SourceError, match=r"as subprocess\.Popen, which the installed version of torchao does not know"
    ):
        open_source(checkpoint(tmp_path, **{"q.weight": said}), Filters())


def test_without_torchao_the_extra_is_named(tmp_path, monkeypatch):
    path = checkpoint(tmp_path)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(
        MissingExtraError, match=r"'q\.weight'.* needs .*'torchao': pip install 'kappa_fast\[torchao\]'"
    ):
        open_source(path, Filters())
