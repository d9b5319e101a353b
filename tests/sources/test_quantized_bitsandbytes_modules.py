"""Layers of bitsandbytes in a model: their weights as its own kernels give them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from bitsandbytes_codes import assert_ranked, hard
from models import Experts, LoraLinear, matrices, one_thread, reasons
from safetensors.torch import save_file
from torch import nn
from undisturbed import nothing_changes

import kappa_fast
from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source
from kappa_fast.sources.quantized.bitsandbytes import TABLES

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional

pytestmark = pytest.mark.filterwarnings("ignore")


def linear4bit(weight: torch.Tensor, **options: object) -> nn.Module:
    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, **options)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
    return layer.to("cpu")


def linear8bit(weight: torch.Tensor) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    return layer.to("cpu")


def four(layer: nn.Module) -> torch.Tensor:
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


class Quantized(nn.Module):
    """A bit of everything, embeddings too."""

    def __init__(self) -> None:
        super().__init__()
        self.q = linear4bit(hard(96, 128).bfloat16(), quant_type="nf4", compress_statistics=True)
        self.k = linear4bit(hard(64, 128).half(), quant_type="fp4", quant_storage=torch.bfloat16)
        self.v = linear8bit(hard(80, 128).half())
        self.plain = nn.Linear(64, 32)
        self.embed_tokens = bnb.nn.EmbeddingNF4(40, 64).to("cpu")

    def expected(self) -> dict[str, torch.Tensor]:
        scales = self.v.state.SCB if self.v.weight.SCB is None else self.v.weight.SCB
        eight = functional.int8_vectorwise_dequant(self.v.weight.data, scales)
        return {"q.weight": four(self.q), "k.weight": four(self.k), "v.weight": eight}


def test_modules_are_ranked_by_their_dequantized_weights():
    model = Quantized()
    assert_ranked(model, model.expected(), exclude="plain", certify=True)
    assert reasons(model, Filters()) == {"embed_tokens.weight": "embedding or output head (embeddings=True ranks it)"}
    found = matrices(model)["embed_tokens.weight"]
    assert torch.equal(found.load(), four(model.embed_tokens))
    assert found.shape == (40, 64)
    counted = 96 * 128 + 64 * 128 + 80 * 128 + 64 * 32 + 32 + 40 * 64
    assert open_source(model, Filters()).num_parameters == counted


def test_a_module_its_state_dict_and_its_file_give_the_same_entries(tmp_path):
    model = Quantized()
    del model.embed_tokens  # which the library does not save
    state = model.state_dict()
    assert type(state["q.weight"]) is not torch.Tensor or "q.weight.absmax" in state
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    rankings = [kappa_fast.rank(source) for source in (model, state, tmp_path)]
    entries = [{(e.key, e.kappa, e.lower, e.quantization) for e in ranking} for ranking in rankings]
    assert entries[0] == entries[1] == entries[2]
    assert len(entries[0]) == 4
    assert len({ranking.metadata["num_parameters"] for ranking in rankings}) == 1


def everything_of(model: nn.Module) -> dict[str, object]:
    """All that quantized layers keep outside of parameters and buffers, tensors by identity and content."""

    def of(value: object) -> object:
        if isinstance(value, torch.Tensor):
            plain = value.detach().as_subclass(torch.Tensor).reshape(-1)
            return (id(value), type(value), value._version, value.requires_grad, plain.view(torch.uint8).tolist())
        if type(value).__module__.startswith("bitsandbytes") and hasattr(value, "__dict__"):
            return {k: of(v) for k, v in vars(value).items() if not isinstance(v, nn.Module)}
        return value if isinstance(value, (int, float, str, tuple, torch.dtype, type(None))) else id(value)

    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found[name] = {k: of(v) for k, v in vars(module).items()}
        for leaf, parameter in module._parameters.items():
            attributes = vars(parameter) if parameter is not None else {}
            found[f"{name}.{leaf}"] = {k: of(v) for k, v in attributes.items() if not isinstance(v, nn.Module)}
    return found


@pytest.mark.parametrize("options", [{}, {"certify": True}, {"top": 1}], ids=lambda o: ",".join(o) or "none")
@pytest.mark.parametrize("ran", [False, True], ids=["loaded", "ran"])
def test_a_quantized_model_is_left_as_it_was(ran, options):
    model = Quantized()
    if ran:
        for layer in (model.q, model.k, model.v):
            layer(torch.randn(2, 128, dtype=torch.float16 if layer is not model.q else torch.bfloat16))
        assert model.v.weight.SCB is None  # the scales have moved
    before = everything_of(model)
    with nothing_changes(model), one_thread():
        assert len(kappa_fast.rank(model, embeddings=True, **options)) == 5
    assert everything_of(model) == before
    assert_ranked(model, model.expected(), exclude="plain")


def test_what_is_not_quantized_yet_is_ranked_as_it_is():
    four_later, eight_later = bnb.nn.Linear4bit(32, 48), bnb.nn.Linear8bitLt(32, 48, has_fp16_weights=False)
    sixteen = bnb.nn.Linear8bitLt(32, 48, has_fp16_weights=True)
    model = nn.ModuleDict({"four": four_later, "eight": eight_later, "sixteen": sixteen})
    found = matrices(model)
    assert {key: (m.quantization, m.shape) for key, m in found.items()} == {
        f"{name}.weight": (None, (48, 32)) for name in model
    }
    for name, layer in model.items():
        loaded = found[f"{name}.weight"].load()
        assert type(loaded) is torch.Tensor
        assert loaded.data_ptr() == layer.weight.data_ptr()


def test_the_state_that_a_layer_kept_for_its_weight_is_found():
    layer = linear4bit(hard(64, 128))
    expected = four(layer)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # as FSDP leaves it: the attributes are lost
    assert layer.quant_state is not None
    assert_ranked(layer, {"weight": expected})


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_that_was_packed_for_a_cpu_is_read_in_its_order(kind, nested):
    # With the package "kernels" on a CPU with AVX-512 for bfloat16, the first forward pass does this.
    weight = hard(96, 128, 20.0).bfloat16()
    layer = linear4bit(weight, quant_type=kind, compress_statistics=nested)
    before = four(layer).double()
    state = layer.weight.quant_state
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    assert layer.weight.shape == (96, 64)
    found = matrices(layer)["weight"]
    rounded = layer.weight.quant_state.absmax.t().double().repeat_interleave(64, 1)
    exact = before / before.abs().view(96, 2, 64).amax(-1).repeat_interleave(64, 1)
    assert torch.allclose(found.load().double(), exact * rounded, rtol=2**-7, atol=0)
    assert torch.allclose(found.load().double(), before, rtol=2**-6, atol=0)
    copied = copy.deepcopy(layer.weight.quant_state)
    codes, state = functional._convert_weight_packed_for_cpu_inverse(layer.weight.data.clone(), copied)
    assert torch.equal(found.load(), by_numpy_of_inverse(codes, rounded, kind))


def by_numpy_of_inverse(codes: torch.Tensor, scales: torch.Tensor, kind: str) -> torch.Tensor:
    packed = codes.view(torch.uint8).numpy().ravel()
    code = np.stack([packed >> 4, packed & 15], 1).ravel()
    values = np.array(TABLES[kind], np.float32)[code].reshape(scales.shape) * scales.float().numpy()
    return torch.from_numpy(values).bfloat16()


def test_a_packing_for_cpus_that_is_not_the_known_one_is_refused():
    layer = linear4bit(hard(96, 128).bfloat16())
    state = layer.weight.quant_state
    layer.weight.data, state = functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    state.absmax = state.absmax[:1]
    layer.weight.quant_state = state
    with pytest.raises(
        SourceError, match=r"'weight' of shape \(96, 128\) was packed by bitsandbytes for CPUs in an unknown layout"
    ):
        open_source(layer, Filters())


@pytest.mark.parametrize("nested", [False, True])
def test_experts_that_are_parametrized_are_ranked_one_by_one_and_in_halves(nested):
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = nn.Module()
    model.experts = Experts(3, 128, 64)
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(model.experts, name, compress_statistics=nested, quant_type="nf4")
    up, down = model.experts.gate_up_proj, model.experts.down_proj  # dequantized by the library
    expected = {f"experts.down_proj[{e}]": down[e] for e in range(3)}
    expected |= {f"experts.gate_up_proj[{e}].gate": up[e, :64] for e in range(3)}
    expected |= {f"experts.gate_up_proj[{e}].up": up[e, 64:] for e in range(3)}
    with nothing_changes(model):
        ranking = assert_ranked(model, expected)
    assert {e.name for e in ranking} == {"experts.gate_up_proj", "experts.down_proj"}
    assert "experts.parametrizations.gate_up_proj.original" in next(e for e in ranking if "gate" in e.key).aliases
    assert open_source(model, Filters()).num_parameters == 3 * (2 * 64 * 128 + 128 * 64)
    assert set(matrices(model.state_dict())) == set(expected)  # the library calls them as they were


def test_a_tied_quantized_weight_is_one_matrix():
    shared = linear4bit(hard(64, 64))
    (found,) = matrices(nn.Sequential(shared, shared)).values()
    assert (found.name, found.aliases) == ("0.weight", ("1.weight",))


def test_under_an_adapter_a_quantized_weight_keeps_its_name():
    four_bits, eight_bits = linear4bit(hard(64, 128)), linear8bit(hard(64, 128).half())
    model = nn.ModuleDict({"q_proj": LoraLinear(four_bits, 16), "v_proj": LoraLinear(eight_bits, 16)})
    assert set(matrices(model, Filters())) == {"q_proj.weight", "v_proj.weight"}
    assert set(reasons(model, Filters()).values()) == {"adapter weight"}
    assert torch.equal(matrices(model)["q_proj.weight"].load(), four(four_bits))
