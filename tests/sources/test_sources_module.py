"""Modules and state dicts: names, ties, adapters, what cannot be ranked, and that nothing is changed by looking."""

from __future__ import annotations

import random
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from models import EVERYTHING, Config, Experts, LoraLinear, ModulesToSave, matrices, reasons, weights
from torch import nn

from kappa_fast.errors import OptionError, SourceError
from kappa_fast.sources import Filters, open_source


class Tiny(nn.Module):
    """A model with a bit of everything: embedding, tied head, experts with a router, a convolution, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(24, 16)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(16, 20), "norm": nn.LayerNorm(16)}) for _ in "ab")
        self.mlp = nn.Module()
        self.mlp.experts, self.mlp.gate = Experts(3, 16, 18), nn.Linear(16, 3, bias=False)
        self.conv = nn.Conv2d(16, 17, 3)
        self.lm_head = nn.Linear(16, 24, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("mask", torch.ones(16, 16))


def test_every_parameter_with_two_dimensions_is_ranked_or_skipped():
    model = Tiny()
    source = open_source(model, Filters())
    named = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    ranked, skipped = {m.name for m in source.matrices}, {s.name for s in source.skipped}
    assert ranked | skipped == named
    assert ranked.isdisjoint(skipped)
    assert {m.name for m in open_source(model, EVERYTHING).matrices} == named


def test_matrices_come_in_the_order_of_the_model():
    model = Tiny()
    order = list(dict.fromkeys(m.name for m in open_source(model, EVERYTHING).matrices))
    assert order == [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def test_every_weight_is_counted_once_tied_ones_and_vectors_too():
    model = Tiny()
    assert open_source(model, Filters()).num_parameters == sum(p.numel() for p in model.parameters())
    assert open_source(model.state_dict(), Filters()).num_parameters == sum(p.numel() for p in model.parameters()) + 256


def test_buffers_and_scales_of_a_state_dict_are_no_weights_to_count():
    source = weights(w=(16, 16), rotary__inv_freq=(8,), norm=(4,)) | {"position_ids": torch.arange(9)}
    source |= {"q.weight": torch.zeros(16, 16, dtype=torch.int8), "q.SCB": torch.ones(16)}
    assert open_source(source, Filters()).num_parameters == 256 + 4 + 256


def test_a_module_and_its_state_dict_give_the_same_matrices_for_the_same_reasons():
    model = Tiny()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "mask"}
    live, plain = open_source(model, Filters()), open_source(state, Filters())
    assert [(m.key, m.index, m.shape, m.aliases, m.group) for m in live.matrices] == [
        (m.key, m.index, m.shape, m.aliases, m.group) for m in plain.matrices
    ]
    assert live.skipped == plain.skipped


def attributes(model: nn.Module) -> dict[str, dict[str, object]]:
    """What every module holds: hooks, parameters and buffers by name, everything else by identity."""
    inside = lambda value: [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)  # noqa: E731
    return {n: {k: inside(v) for k, v in vars(module).items()} for n, module in model.named_modules()}


def test_looking_and_loading_change_nothing():
    model = Tiny()
    model.layers[0]["up"].weight.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    modules = attributes(model)
    for m in open_source(model, EVERYTHING).matrices:
        found = m.load()
        assert not found.requires_grad
        assert found.grad_fn is None
        assert found.dtype == m.dtype
        assert found.device == m.device
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert (p.requires_grad, p.data_ptr()) == before[name][1:]
        assert p.grad is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert attributes(model) == modules


def test_loading_gives_views_wherever_the_storage_allows_one():
    model = Tiny()
    starts = {name: p.untyped_storage().data_ptr() for name, p in model.named_parameters()}
    for m in open_source(model, EVERYTHING).matrices:
        assert m.load().untyped_storage().data_ptr() == starts[m.name]
        assert m.load().data_ptr() == m.load().data_ptr()


def test_tensors_may_be_views_with_any_strides():
    base = torch.randn(40, 40)
    source = {"t": base[:20].t(), "s": base[::2, 1::3], "e": torch.randn(1, 20).expand(20, 20)}
    for key, m in matrices(source).items():
        assert m.load().data_ptr() == source[key].data_ptr()
        assert m.load().stride() == source[key].stride()


def test_tied_weights_are_one_matrix_with_all_names():
    model = nn.ModuleDict(OrderedDict(z=nn.Linear(16, 16), b=nn.Linear(16, 16), a=nn.Linear(16, 16)))
    model["b"].weight = model["a"].weight = model["z"].weight
    (found,) = matrices(model).values()
    assert (found.name, found.aliases) == ("z.weight", ("a.weight", "b.weight"))


def test_a_module_that_is_used_twice_is_one_with_two_names():
    shared = nn.Linear(16, 16)
    (found,) = matrices(nn.Sequential(shared, shared)).values()
    assert (found.name, found.aliases) == ("0.weight", ("1.weight",))


def test_different_parameters_over_the_same_memory_are_tied_and_different_views_are_not():
    base = torch.randn(32, 16)
    (found,) = matrices({"a": base, "b": base.view(32, 16)}).values()
    assert (found.name, found.aliases) == ("a", ("b",))
    assert set(matrices({"a": base[:16], "b": base[16:], "c": base})) == {"a", "b", "c"}
    assert set(matrices({"a": base[:16], "b": base[:16].t()})) == {"a", "b"}


def test_an_embedding_that_is_tied_to_a_plain_name_is_an_embedding_under_both():
    model = nn.ModuleDict({"proj": nn.Linear(16, 24), "table": nn.Embedding(24, 16)})
    model["table"].weight = model["proj"].weight
    assert reasons(model, Filters()) == {"proj.weight": "embedding or output head (embeddings=True ranks it)"}


def test_what_the_model_calls_its_output_head_is_one_whatever_its_name():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.project = nn.Linear(16, 16), nn.Linear(16, 40)

        def get_output_embeddings(self) -> nn.Module:
            return self.project

    class Without(nn.Linear):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    model = nn.ModuleDict({"lm": Model(), "vision": Without(16, 16)})
    assert set(matrices(model, Filters())) == {"lm.body.weight", "vision.weight"}


def test_embeddings_are_known_by_their_class():
    class VocabEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 16))

    class PatchEmbedding(nn.Conv2d):
        pass

    model = nn.ModuleDict({"a": nn.Embedding(20, 16), "b": nn.EmbeddingBag(20, 16), "c": VocabEmbedding()})
    model["d"] = PatchEmbedding(16, 16, 3)
    assert set(matrices(model, Filters())) == {"d.weight"}


def test_routers_are_known_by_their_class_but_a_whole_model_is_none():
    class TopKRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.choose = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 16)

    class ModelRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pick = nn.Linear(16, 16), TopKRouter()
            self.own = nn.Parameter(torch.randn(16, 16))

    assert set(reasons(ModelRouter(), Filters())) == {"pick.weight", "pick.choose.weight"}
    assert set(matrices(ModelRouter(), Filters())) == {"own", "body.weight"}


def test_adapters_are_skipped_and_what_they_wrap_keeps_its_name():
    model = nn.Module()
    model.q_proj = LoraLinear(nn.Linear(16, 16), 16)
    model.head = ModulesToSave(nn.Linear(16, 20), nn.Linear(16, 20))
    assert set(matrices(model)) == {"q_proj.weight", "head.weight"}
    assert reasons(model) == dict.fromkeys(
        ["q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight", "head.modules_to_save.default.weight"],
        "adapter weight",
    )
    assert torch.equal(matrices(model)["q_proj.weight"].load(), model.q_proj.base_layer.weight)
    assert torch.equal(matrices(model)["head.weight"].load(), model.head.original_module.weight)
    plain = model.state_dict()
    assert set(matrices(plain)) == {"q_proj.weight", "head.weight"}


def test_an_adapter_of_a_kind_unknown_by_name_is_known_by_the_layer_that_lists_it():
    class NewLayer(nn.Module):
        adapter_layer_names = ("new_factors",)

        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(16, 16)
            self.new_factors = nn.ModuleDict({"default": nn.Linear(16, 16)})

    assert reasons(NewLayer()) == {"new_factors.default.weight": "adapter weight"}


def test_a_prompt_encoder_is_an_adapter_beside_a_wrapped_model_and_nowhere_else():
    parts = {"base_model": nn.Linear(16, 16), "prompt_encoder": nn.ModuleDict({"default": nn.Linear(16, 16)})}
    assert reasons(nn.ModuleDict(parts)) == {"prompt_encoder.default.weight": "adapter weight"}
    parts["image_encoder"] = parts.pop("base_model")
    assert reasons(nn.ModuleDict(parts)) == {}


def test_a_meta_parameter_is_skipped_and_says_where_its_values_are():
    with torch.device("meta"):
        model = nn.Linear(16, 16)
    assert reasons(model) == {"weight": "on the meta device, without values: rank from the checkpoint"}
    assert open_source(model, Filters()).num_parameters == 272


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_skipped_by_name(layout):
    nested = torch.nested.nested_tensor([torch.randn(20, 30), torch.randn(10, 30)], layout=layout)
    found = open_source({"a": torch.randn(20, 30), "n": nested}, Filters())
    assert [m.key for m in found.matrices] == ["a"]
    assert reasons({"a": torch.randn(20, 30), "n": nested}) == {"n": "nested: it has several shapes"}


def test_a_lazy_parameter_is_skipped_until_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 16))
    assert set(matrices(model)) == {"1.weight"}
    assert reasons(model) == dict.fromkeys(["0.weight", "0.bias"], "lazy, without a shape yet: run the model once")
    assert open_source(model, Filters()).num_parameters == 272


class Quantized(torch.Tensor):
    """What torchao does: a tensor with other values than those in its storage."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Quantized:
        return torch.Tensor._make_subclass(cls, data)


def test_subclasses_of_tensor_are_skipped_by_name():
    source = {"w": Quantized(torch.randn(16, 16)), "v": torch.randn(16, 16)}
    reason = "quantized or other tensor subclass Quantized; this quantized format is not supported"
    assert reasons(source) == {"w": reason}
    model = nn.Linear(16, 16)
    model.weight = nn.Parameter(Quantized(torch.randn(16, 16)))
    assert reasons(model) == {"weight": reason}


@pytest.mark.parametrize("attribute", ["quant_state", "SCB"])
def test_a_parameter_that_carries_its_scales_is_codes(attribute):
    model = nn.Linear(16, 16)
    setattr(model.weight, attribute, torch.ones(16))
    assert reasons(model)["weight"].startswith(f"quantized codes that need their scales ({attribute})")


@pytest.mark.parametrize("keep", ["parameter", "buffer", "attribute"])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale"])
def test_a_float8_weight_is_multiplied_by_the_scale_that_its_module_keeps(keep, name):
    model = nn.ModuleDict({"a": nn.Linear(16, 16, bias=False), "b": nn.Linear(16, 16, bias=False)})
    for module in model.values():
        module.weight = nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    scale = torch.rand(2, 2)
    if keep == "parameter":
        setattr(model["a"], name, nn.Parameter(scale))
    elif keep == "buffer":
        model["a"].register_buffer(name, scale)
    else:
        setattr(model["a"], name, scale)
    found = matrices(model)
    assert set(found) == {"a.weight"}
    expected = model["a"].weight.float() * scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(found["a.weight"].load(), expected)
    assert reasons(model) == {
        f"a.{name}": f"scales or zero points of quantized weights ({name}), not a weight",
        "b.weight": "float8 without a scale, although other weights of the model have one: its values may be codes",
    }
    assert open_source(model, Filters()).num_parameters == 512


def test_float8_experts_are_multiplied_by_scales_in_a_buffer():
    model = nn.Module()
    model.experts = Experts(2, 32, 16)
    model.experts.gate_up_proj.data = model.experts.gate_up_proj.data.to(torch.float8_e4m3fn)
    model.experts.register_buffer("gate_up_proj_scale_inv", torch.rand(2, 2, 2))
    blocks = model.experts.gate_up_proj_scale_inv.repeat_interleave(16, 1).repeat_interleave(16, 2)
    expected = model.experts.gate_up_proj.float() * blocks
    found = matrices(model)
    assert set(found) == {
        f"experts.{n}" for e in "01" for n in (f"gate_up_proj[{e}].gate", f"gate_up_proj[{e}].up")
    } | {
        "experts.down_proj[0]",
        "experts.down_proj[1]",
    }
    for e, half in ((0, "gate"), (1, "up")):
        rows = slice(16) if half == "gate" else slice(16, None)
        assert torch.equal(found[f"experts.gate_up_proj[{e}].{half}"].load(), expected[e, rows])


@pytest.fixture
def mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_dtensor_of_which_this_process_has_all_is_read(mesh):
    from torch.distributed.tensor import distribute_tensor

    weight = torch.randn(16, 16)
    (found,) = open_source({"w": distribute_tensor(weight, mesh)}, Filters()).matrices
    assert torch.equal(found.load(), weight)


def test_a_zero3_parameter_is_refused_unless_it_is_gathered():
    model = nn.Linear(16, 16)
    model.weight.ds_shape = torch.Size((16, 16))
    assert set(matrices(model)) == {"weight"}
    model.weight.data = torch.empty(0)
    with pytest.raises(NotImplementedError, match=r"weight of shape \(16, 16\) is sharded .*\(ZeRO-3\).*gathered"):
        open_source(model, Filters())


def test_fsdp_is_refused_by_its_wrapper_or_its_flat_parameter():
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {})
    with pytest.raises(NotImplementedError, match=r"^1 is sharded over several processes \(FSDP\)"):
        open_source(nn.Sequential(nn.Linear(16, 16), wrapper(nn.Linear(16, 16))), Filters())
    model = nn.Linear(16, 16)
    model.bias._is_flat_param = True
    with pytest.raises(NotImplementedError, match=r"bias of shape \(16,\) is sharded .*\(FSDP\)"):
        open_source(model, Filters())


def test_a_module_describes_itself():
    model = Tiny()
    model.config = Config(model_type="tiny", hidden_size=16)
    metadata = open_source(model, Filters()).metadata
    assert metadata["kind"] == "module"
    assert metadata["class"] == "Tiny"
    assert metadata["model_type"] == "tiny"
    assert re.fullmatch("[0-9a-f]{64}", metadata["fingerprint"])


def test_the_fingerprint_follows_names_shapes_and_dtypes_and_no_values():
    mark = lambda source: open_source(source, Filters()).metadata["fingerprint"]  # noqa: E731
    base = weights(a=(16, 16), b=(16,))
    assert mark(base) == mark({name: torch.zeros_like(t) for name, t in base.items()})
    assert mark(base) == mark(dict(reversed(base.items())))
    assert mark(base) != mark(base | {"a": base["a"].half()})
    assert mark(base) != mark({"a2": base["a"], "b": base["b"]})
    assert mark(base) != mark(base | {"b": torch.zeros(17)})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a": torch.ones(2, 2), "b": 3.0}, "the mapping has 'b': float, but names and tensors are expected"),
        ({"w": np.ones((2, 2))}, "the mapping has 'w': ndarray"),
        ({"w": None}, r"the mapping has 'w': NoneType.*pass model\.state_dict\(\)"),
        ({1: torch.ones(2, 2)}, "the mapping has 1: Tensor"),
        ({"state_dict": {"w": torch.ones(2, 2)}, "epoch": 3}, r"'state_dict': dict.*source\['state_dict'\]"),
        ({}, "the mapping has no parameter with two or more dimensions, so there is nothing to rank"),
        ({"norm": torch.ones(9)}, "the mapping has no parameter with two or more dimensions"),
        (nn.LayerNorm(9), "LayerNorm has no parameter with two or more dimensions"),
        (nn.Sequential(), "Sequential has no parameter"),
    ],
)
def test_sources_that_hold_no_weights_are_refused(source, message):
    with pytest.raises(SourceError, match=message):
        open_source(source, Filters())


@pytest.mark.parametrize("source", [None, 3, torch.ones(3, 3), [torch.ones(3, 3)], nn.Linear, b"model"])
def test_what_is_no_source_is_an_option_error(source):
    with pytest.raises(OptionError, match=f"source is of type {type(source).__name__}, which is not a model"):
        open_source(source, Filters())
