"""Training what was ranked from a GGUF file: names of llama.cpp lead to the parameters of the model, or nowhere."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build
from wrapping import snapshot

import kappa_fast
from kappa_fast.errors import MissingExtraError, OptionError
from kappa_fast.matching import gguf_names
from kappa_fast.matching.names import match
from kappa_fast.results.names import plain_name

gguf = pytest.importorskip("gguf")

# As llama.cpp's converter names the tensors of a layer.
BLOCK = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.qkv_proj.weight": "attn_qkv.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",  # Phi-3: both in one
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "attention.self.query.weight": "attn_q.weight",
    "attention.self.key.weight": "attn_k.weight",
    "attention.self.value.weight": "attn_v.weight",
    "attention.output.dense.weight": "attn_output.weight",
    "intermediate.dense.weight": "ffn_up.weight",
    "output.dense.weight": "ffn_down.weight",
}
TRANSPOSED = ("gpt_oss",)  # experts as [in, out] in transformers, [out, in] in GGUF


def converted(model: torch.nn.Module, family: str) -> dict[str, torch.Tensor]:
    """The matrices of the model's layers under the names, and in the layout, that llama.cpp's converter gives them."""
    tensors = {}
    for name, parameter in model.named_parameters():
        found = re.search(r"layers?\.(\d+)\.(.+)", name)
        if found is None or parameter.dim() < 2 or name.endswith("_bias"):
            continue
        start, value = f"blk.{found[1]}.", parameter.detach()
        value = value.transpose(1, 2) if family in TRANSPOSED and value.dim() == 3 else value
        if found[2] == "mlp.experts.gate_up_proj":
            half = value.shape[1] // 2
            gate, up = (value[:, 0::2], value[:, 1::2]) if family in TRANSPOSED else (value[:, :half], value[:, half:])
            tensors |= {f"{start}ffn_gate_exps.weight": gate, f"{start}ffn_up_exps.weight": up}
        else:
            tensors[start + BLOCK[found[2]]] = value
    return tensors


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order that llama.cpp gives those of q and k."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path: Path, tensors: dict[str, torch.Tensor], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in tensors.items():
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ranked(model: torch.nn.Module, family: str, folder: Path, **options: object) -> kappa_fast.Ranking:
    path = write(folder / "model.gguf", converted(model, family))
    return kappa_fast.rank(path, progress=False, min_dim=4, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_selected_from_the_file_is_what_is_selected_from_the_model(family, tmp_path):
    """Entry by entry: the piece of the model that a name leads to has the singular values of the tensor in the file."""
    model = build(family)
    ranking = ranked(model, family, tmp_path, routers=True)
    assert ranking.metadata["source"]["format"] == "gguf"
    for entry in ranking:
        selection = kappa_fast.Ranking([entry], (), ranking.metadata).select(num_tensors=1)
        (target,) = match(selection, model)
        (index,) = target.indices
        values = torch.linalg.svdvals(target.parameter.detach()[index].double())
        assert float(values[0]) == pytest.approx(entry.sigma_max, rel=1e-3), entry.key
        assert entry.lower <= float(values[0] / values[-1]) <= entry.upper, entry.key
    everything = match(ranking.select(top_p=1.0), model)
    inner = [n for n, p in model.named_parameters() if re.search(r"layers?\.\d", n) and p.dim() > 1]
    assert {plain_name(t.name) for t in everything} == {name for name in inner if not name.endswith("_bias")}
    assert all(target.whole for target in everything)


def test_permuted_rows_are_the_same_matrix(tmp_path):
    model = build("llama")
    tensors = converted(model, "llama")
    name = "blk.0.attn_q.weight"
    tensors[name] = permuted(tensors[name], 2)
    assert not torch.equal(tensors[name], model.get_parameter("model.layers.0.self_attn.q_proj.weight"))
    found = kappa_fast.rank(write(tmp_path / "m.gguf", tensors), include=name, min_dim=4, progress=False)
    (target,) = match(found.select(num_tensors=1), model)
    assert target.name == "model.layers.0.self_attn.q_proj.weight"
    assert found[name].kappa == pytest.approx(float(torch.linalg.cond(target.parameter.detach())), rel=1e-2)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_of_a_file_train_and_nothing_else_moves(family, tmp_path):
    model = build(family)
    selection = ranked(model, family, tmp_path, include="exps").select(num_tensors=5)
    before = snapshot(model)
    optimizer = kappa_fast.wrap(torch.optim.SGD, model, selection, lr=0.1)
    tokens = torch.arange(1, 25).view(3, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert sum(len(target.entries) for target in optimizer.targets) == 5
    may_move = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for target in optimizer.targets:
        for index in target.indices:
            may_move[target.name][index] = True
    assert sum(int(mask.sum()) for mask in may_move.values()) == sum(entry.numel for entry in selection.entries)
    moved = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    assert sum(int(m.sum()) for m in moved.values()) > 0
    assert not any(bool((moved[name] & ~may_move[name]).any()) for name in moved)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_halves_of_one_tensor_are_those_of_the_model_wherever_it_keeps_them(family, tmp_path):
    """As wide as high, so that no shape tells a half of the rows from a half of the columns."""
    model = build(family, hidden_size=48, intermediate_size=24)
    tensors = converted(model, family)
    gate, up = (tensors[f"blk.1.ffn_{half}_exps.weight"] for half in ("gate", "up"))
    fused = {"blk.1.ffn_gate_up_exps.weight": torch.cat([gate, up], dim=1)}
    down = {
        name: tensors[name] for name in tensors if name == "blk.1.ffn_down_exps.weight"
    }  # tells how wide halves are
    ranking = kappa_fast.rank(write(tmp_path / "m.gguf", fused | down), include="gate_up", progress=False)
    assert len(ranking) == 8
    for entry in ranking:
        (target,) = match(kappa_fast.Ranking([entry], (), ranking.metadata).select(num_tensors=1), model)
        assert target.name == "model.layers.1.mlp.experts.gate_up_proj"
        piece = target.parameter.detach()[target.indices[0]]
        expected = (gate if entry.part.endswith("gate") else up)[entry.index[0]]
        assert torch.equal(piece.T if family in TRANSPOSED else piece, expected)


def test_experts_that_the_model_keeps_one_by_one_are_found_by_their_number(tmp_path):
    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = torch.nn.Linear(32, 24, bias=False), torch.nn.Linear(32, 24, bias=False)
            self.down_proj = torch.nn.Linear(24, 32, bias=False)

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Module() for _ in range(2)])
    tensors = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp = torch.nn.Module()
        layer.mlp.experts = torch.nn.ModuleList([Expert() for _ in range(3)])
        for leaf in ("gate", "up", "down"):
            stack = [expert.get_parameter(f"{leaf}_proj.weight").detach() for expert in layer.mlp.experts]
            tensors[f"blk.{i}.ffn_{leaf}_exps.weight"] = torch.stack(stack)
    ranking = kappa_fast.rank(write(tmp_path / "m.gguf", tensors), progress=False)
    assert len(ranking) == 18
    for entry in ranking:
        (target,) = match(kappa_fast.Ranking([entry], (), ranking.metadata).select(num_tensors=1), model)
        layer, leaf = re.fullmatch(r"blk\.(\d)\.ffn_(\w+)_exps\.weight", entry.name).groups()
        assert target.name == f"model.layers.{layer}.mlp.experts.{entry.index[0]}.{leaf}_proj.weight"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what PEFT asks it
def test_wrapped_models_and_adapters_know_the_names_too(tmp_path):
    model = build("llama")
    selection = ranked(model, "llama", tmp_path).select(num_tensors=3)
    expected = {target.name for target in match(selection, model)}
    assert {plain_name(t.name) for t in match(selection, torch.nn.DataParallel(copy.deepcopy(model)))} == expected
    selection.to_json(tmp_path / "selection.json")
    reloaded = kappa_fast.Selection.from_json(tmp_path / "selection.json")
    assert {target.name for target in match(reloaded, model)} == expected
    peft = pytest.importorskip("peft")
    from kappa_fast.integrations.peft import lora_config

    with pytest.raises(OptionError, match=r"llama\.cpp's"):
        lora_config(selection)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora_config(selection, model=model, r=2))
    layers = {plain_name(n.partition(".lora_A")[0]) for n, _ in adapted.named_parameters() if ".lora_A" in n}
    assert layers == {name.removesuffix(".weight") for name in expected}


def test_a_model_in_a_model_is_found_without_its_prefix(tmp_path):
    inner = build("llama")
    outer = torch.nn.Module()
    outer.model = torch.nn.Module()
    outer.model.language_model = inner.model
    selection = ranked(inner, "llama", tmp_path).select(num_tensors=2)
    expected = {t.name.replace("model.", "model.language_model.", 1) for t in match(selection, inner)}
    assert {target.name for target in match(selection, outer)} == expected


# What leads nowhere


@pytest.mark.parametrize(
    "name", ["blk.7.attn_q.weight", "blk.0.attn_q_norm.weight", "mystery.weight", "blk.0.ffn_gate_exps.weight"]
)
def test_a_tensor_that_the_model_lacks_is_named(name, tmp_path):
    stack = "exps" in name
    tensors = {name: torch.randn(*(3,) * stack, 32, 32)}
    selection = kappa_fast.rank(write(tmp_path / "m.gguf", tensors), progress=False).select(num_tensors=1)
    with pytest.raises(OptionError, match=rf"the model lacks 1 of the 1 selected matrices: '{re.escape(name)}"):
        match(selection, build("llama"))


def test_another_shape_is_another_model(tmp_path):
    tensors = {"blk.0.ffn_up.weight": torch.randn(48, 32)}
    selection = kappa_fast.rank(write(tmp_path / "m.gguf", tensors), progress=False).select(num_tensors=1)
    with pytest.raises(OptionError, match=r"'blk.0.ffn_up.weight' is \(48, 32\) in the ranking, but 'model.layers.0"):
        match(selection, build("llama"))


def test_a_name_that_fits_two_parameters_is_none_of_either(tmp_path):
    model = build("llama")
    model.model.layers[0].mlp.gate_up_proj = torch.nn.Linear(32, 24)  # what Phi-3 calls its ffn_up
    tensors = {"blk.0.ffn_up.weight": torch.randn(24, 32)}
    selection = kappa_fast.rank(write(tmp_path / "m.gguf", tensors), progress=False).select(num_tensors=1)
    with pytest.raises(OptionError, match="the model lacks 1 of the 1"):
        match(selection, model)


def test_without_the_package_the_message_says_what_is_missing(tmp_path, monkeypatch):
    model = build("llama")
    selection = ranked(model, "llama", tmp_path).select(num_tensors=2)
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_names._tables.cache_clear()
    gguf_names._stems.cache_clear()
    with pytest.raises(MissingExtraError, match=r"names of a GGUF file .* pip install 'kappa_fast\[gguf\]'"):
        match(selection, model)


def test_programs_that_train_get_the_names_of_the_model(tmp_path):
    model = build("llama")
    selection = ranked(model, "llama", tmp_path).select(num_tensors=3)
    kappas = {target.name: target.entries[0].kappa for target in match(selection, model)}
    spectrum = json.loads(selection.to_spectrum(model=model))
    assert {name: 1 / row["snr"] for name, row in spectrum.items()} == pytest.approx(
        {name.removesuffix(".weight"): kappa for name, kappa in kappas.items()}
    )
    assert all(f"'^{name}$'" in selection.to_axolotl(model=model) for name in kappas)
    for kind in ("axolotl", "ms-swift", "spectrum"):
        with pytest.raises(OptionError, match=r"llama\.cpp's.* give the model that is to be trained as model="):
            selection.export(kind, tmp_path / "out")


def test_experts_for_esft_come_by_their_numbers(tmp_path):
    model = build("mixtral")
    selection = ranked(model, "mixtral", tmp_path, include="exps").select(num_tensors=3, unit="expert")
    found = json.loads(selection.to_esft(model=model))["experts"]
    expected = {}
    for target in match(selection, model):
        layer = re.search(r"layers\.(\d+)", target.name)[1]
        expected.setdefault(layer, set()).update(index[0] for index in target.indices)
    assert {layer: set(experts) for layer, experts in found.items() if experts} == expected
