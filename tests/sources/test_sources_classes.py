"""The class of a module decides what its parameters are, where there is one; what has no values is named."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import EVERYTHING, matrices, reasons, weights
from torch import Tensor, nn

import kappa_fast
from kappa_fast.sources import Filters, open_source

LINEAR = nn.Linear(24, 20)


class Net(nn.Module):
    """A table, a layer, a convolution, a parameter of its own and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.conv = nn.Embedding(30, 24), LINEAR, nn.Conv1d(20, 18, 3)
        self.own = nn.Parameter(torch.randn(18, 18))
        self.register_buffer("shift", torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.layer(self.embed(x)).transpose(1, 2)).transpose(1, 2) @ self.own + self.shift[0, 0]


TOKENS = torch.zeros(1, 5, dtype=torch.long)
MADE = {
    "script": lambda net: torch.jit.script(net),
    "trace": lambda net: torch.jit.trace(net, TOKENS),
    "export": lambda net: torch.export.export(net, (TOKENS,)).module(),
    "unflatten": lambda net: torch.export.unflatten(torch.export.export(net, (TOKENS,))),
    "fx": lambda net: torch.fx.symbolic_trace(net),
    "compile": lambda net: torch.compile(net),
    "data parallel": lambda net: nn.DataParallel(net),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*TracerWarning")
@pytest.mark.parametrize("kind", MADE)
def test_a_compiled_or_exported_model_has_the_matrices_of_the_plain_one(kind):
    net = Net().eval()
    made = MADE[kind](net)
    plain = {m.key: m for m in open_source(net, Filters()).matrices}
    source = open_source(made, Filters())
    found = {m.key.removeprefix("_orig_mod.").removeprefix("module."): m for m in source.matrices}
    assert {k: m.shape for k, m in found.items()} == {k: m.shape for k, m in plain.items()}
    assert plain["conv.weight"].shape == (18, 60)
    assert all(torch.equal(found[key].load(), plain[key].load()) for key in plain)
    assert [s.reason for s in source.skipped] == ["embedding or output head (embeddings=True ranks it)"]
    assert source.num_parameters == open_source(net, Filters()).num_parameters
    guessed = {"conv.weight": "treated as a convolution because of its name"} if kind in ("export", "unflatten") else {}
    assert source.metadata["layouts"] == guessed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_of_a_model_is_read_like_the_rest():
    model = nn.Sequential(nn.Linear(24, 24), torch.jit.script(nn.Sequential(LINEAR)))
    assert set(matrices(model)) == {"0.weight", "1.0.weight"}


@pytest.mark.parametrize("name", ["x_embedder", "context_embedder", "embedding", "token_embed", "wte", "embed_tokens"])
def test_a_linear_layer_is_one_whatever_it_is_called(name):
    model = nn.ModuleDict({name: nn.Linear(24, 20, bias=False), "other": nn.Linear(20, 20)})
    assert set(matrices(model, Filters())) == {f"{name}.weight", "other.weight"}
    conv = nn.ModuleDict({name: nn.Conv2d(24, 20, 3), "other": nn.Linear(20, 20)})
    assert set(matrices(conv, Filters())) == {f"{name}.weight", "other.weight"}
    assert set(reasons(nn.ModuleDict({name: nn.Embedding(24, 20)}), Filters())) == {f"{name}.weight"}


def test_in_a_file_a_bias_tells_a_projection_from_a_table():
    found = weights(x_embedder__weight=(20, 24), x_embedder__bias=(20,), embed_tokens__weight=(30, 24))
    assert set(matrices(found, Filters())) == {"x_embedder.weight"}
    assert set(reasons(found, Filters())) == {"embed_tokens.weight"}


def test_what_is_tied_to_a_table_or_called_the_head_is_one_though_it_is_linear():
    model = nn.ModuleDict({"proj": nn.Linear(16, 24, bias=False), "table": nn.Embedding(24, 16)})
    model["lm_head"] = nn.Linear(16, 24)
    model["table"].weight = model["proj"].weight
    assert set(reasons(model, Filters())) == {"proj.weight", "lm_head.weight"}


class CausalConv(nn.Module):
    """A convolution that inherits from nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 6, 3))


class Sized(nn.Module):
    """Its class says nothing, and its attributes do."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel_size = (3,)
        self.weight = nn.Parameter(torch.randn(20, 6, 3))


class Mixture(nn.Module):
    """Neither."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 20, 16))


def test_a_convolution_of_another_class_is_one_by_its_class_or_its_kernel_and_a_note_says_so():
    source = open_source(nn.ModuleDict({"a": CausalConv(), "b": Sized(), "c": Mixture()}), EVERYTHING)
    assert {m.key: m.shape for m in source.matrices} == {
        "a.weight": (20, 18),
        "b.weight": (20, 18),
        **{f"c.weight[{i}]": (20, 16) for i in range(3)},
    }
    assert source.metadata["layouts"] == {
        "a.weight": "treated as a convolution because of its class CausalConv",
        "c.weight": "3 dimensions, treated as a stack of matrices",
    }


def test_a_weight_that_is_kept_as_a_buffer_is_one():
    model = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 20))
    weight = model[0]._parameters.pop("weight")
    model[0].register_buffer("weight", weight.detach())
    source = open_source(model, Filters())
    assert {m.key for m in source.matrices} == {"0.weight", "1.weight"}
    assert source.num_parameters == 24 * 20 + 20 + 20 * 20 + 20


def quantized() -> nn.Module:
    """Everything that torch.ao keeps packed, beside one plain layer."""
    import torch.ao.nn.quantized as nnq
    import torch.ao.quantization as tq

    dynamic = nn.Sequential(nn.LSTM(24, 16, num_layers=2, bidirectional=True), nn.GRUCell(24, 16), nn.Linear(24, 20))
    dynamic = tq.quantize_dynamic(dynamic, {nn.LSTM, nn.GRUCell, nn.Linear}, dtype=torch.qint8)
    convolutions = nn.ModuleList([nnq.Conv2d(16, 20, 3, groups=2), nnq.ConvTranspose2d(16, 20, 3)])
    return nn.ModuleDict({"d": dynamic, "c": convolutions, "e": nnq.Embedding(30, 16), "plain": nn.Linear(20, 20)})


PACKED = {
    **{f"d.0.weight_ih_l0{r}": (64, 24) for r in ("", "_reverse")},
    **{f"d.0.weight_ih_l1{r}": (64, 32) for r in ("", "_reverse")},
    **{f"d.0.weight_hh_l{i}{r}": (64, 16) for i in "01" for r in ("", "_reverse")},
    "d.1.weight_ih": (48, 24),
    "d.1.weight_hh": (48, 16),
    "d.2.weight": (20, 24),
    "c.0.weight": (20, 8, 3, 3),
    "c.1.weight": (16, 20, 3, 3),
    "e.weight": (30, 16),
}
IGNORED = ("ignore::DeprecationWarning", "ignore::UserWarning:torch", "ignore::FutureWarning")


@pytest.mark.skipif(len(torch.backends.quantized.supported_engines) < 2, reason="no engine for quantized layers")
@pytest.mark.filterwarnings(*IGNORED)
def test_packed_layers_are_named_counted_and_warned_about():
    model = quantized()
    with pytest.warns(UserWarning, match=r"^14 weights of the model have no values .* 'd.0.weight_ih_l0' among them"):
        ranking = kappa_fast.rank(model, progress=False)
    assert [entry.name for entry in ranking] == ["plain.weight"]
    assert {s.name: s.shape for s in ranking.skipped} == PACKED
    assert all("so that it cannot be read: rank the checkpoint" in s.reason for s in ranking.skipped)
    sizes = sum(torch.Size(shape).numel() for shape in PACKED.values())
    assert ranking.metadata["num_parameters"] == sizes + 420 + sum(p.numel() for p in model["d"].parameters())


@pytest.mark.skipif(len(torch.backends.quantized.supported_engines) < 2, reason="no engine for quantized layers")
@pytest.mark.filterwarnings(*IGNORED)
def test_packed_layers_that_were_scripted_and_weights_that_were_frozen_are_named_too():
    packed = torch.jit.script(nn.Sequential(quantized()["d"][2], nn.Linear(20, 20)))
    source = open_source(packed, Filters())
    assert {s.name: s.shape for s in source.absent} == {"0._packed_params.weight": (20, 24)}
    frozen = nn.ModuleDict({"a": torch.jit.freeze(torch.jit.script(Net().eval())), "b": nn.Linear(20, 20)})
    source = open_source(frozen, Filters())
    expected = {"a.own": (18, 18), "a.layer.weight": (20, 24), "a.conv.weight": (18, 20, 3), "a.embed.weight": (30, 24)}
    assert expected.items() <= {s.name: s.shape for s in source.skipped}.items()
    assert source.num_parameters >= sum(torch.Size(shape).numel() for shape in expected.values()) + 420


def test_what_is_on_the_meta_device_is_warned_about_unless_it_is_left_out():
    model = nn.Sequential(nn.Linear(24, 20, device="meta"), nn.Linear(20, 20))
    with pytest.warns(UserWarning, match=r"^1 weights .* '0.weight' among them \(on the meta device"):
        ranking = kappa_fast.rank(model, progress=False)
    assert ranking.metadata["num_parameters"] == 24 * 20 + 20 + 420
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kappa_fast.rank(model, exclude=r"^0\.", progress=False)


@pytest.mark.filterwarnings("ignore::UserWarning:accelerate")
def test_offloaded_layers_are_warned_about(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.disk_offload(nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 20)), str(tmp_path), "cpu")
    with pytest.warns(UserWarning, match=r"^2 weights .* '0.weight' among them \(on the meta device"):
        ranking = kappa_fast.rank(model, progress=False)
    assert {s.name for s in ranking.skipped} == {"0.weight", "1.weight"}


def test_modules_that_only_tell_sizes_of_something_else_hide_no_weight():
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_channels, self.out_channels, self.input_size, self.hidden_size = 16, 16, 24, 24
            self.num_embeddings, self.embedding_dim = 30, 16
            self.register_buffer("sines", torch.randn(30, 16))

    model = nn.ModuleDict({"pool": Pool(), "layer": nn.Linear(20, 20)})
    assert reasons(model) == {}
