"""What wrappers and heads put before names does not matter: neither to selections nor to conversions and exports."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from families import SMALL, build
from safetensors.torch import load_file, save_file
from test_checkpoint_names import with_config
from test_names_matching import everything, on_disk
from torch import nn

import kappa_fast
from kappa_fast import OptionError
from kappa_fast.matching.names import match

WRAPPED = ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module.", "_forward_module."]
WRAPPED += ["base_model.model."]
HELD = ["model.", "network.", "net.inner."]  # modules that hold the model: Lightning's, and anybody's


def saved(model, folder, prefix, family="llama"):
    """A checkpoint with a prefix before every name."""
    tensors = on_disk(model, family, folder)
    save_file({prefix + name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with_config(model, folder)
    return folder


@pytest.mark.parametrize("prefix", WRAPPED + HELD)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_checkpoint_with_a_prefix_has_the_entries_of_the_model(family, prefix, tmp_path):
    model = build(family)
    plain = {e.key: e.kappa for e in kappa_fast.rank(model, progress=False)}
    ranking = kappa_fast.rank(saved(model, tmp_path, prefix, family), progress=False)
    assert {e.key: e.kappa for e in ranking} == plain
    selection = everything(ranking)
    assert len(match(selection, model)) == len(selection.names)
    names = set(dict(model.named_parameters()))
    assert set(ranking.select(top_p=1.0, unit="parameter").to_names().split()) <= names


def test_a_model_whose_own_prefix_is_not_model_is_found_inside_of_one(tmp_path):
    model = build("bert")
    names = set(dict(model.named_parameters()))
    save_file({f"model.{n}": p.detach().clone() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    with_config(model, tmp_path)
    ranking = kappa_fast.rank(tmp_path, progress=False)
    assert {e.name for e in ranking} <= names
    assert set(ranking.select(top_p=1.0).to_names().split()) <= names


@pytest.mark.parametrize("prefix", [*WRAPPED, *HELD])
def test_without_a_config_selections_still_find_the_model(prefix, tmp_path):
    model = build("llama")
    ranking = kappa_fast.rank(saved(model, tmp_path, prefix) / "model.safetensors", progress=False)
    (tmp_path / "config.json").unlink()
    bare = kappa_fast.rank(tmp_path, progress=False)
    assert len(ranking) == len(bare)
    for found in (ranking, bare):
        assert all(target.whole for target in match(everything(found), model))
        assert len(match(everything(found), model.model)) == len(found)


def test_names_inside_of_which_a_layer_was_wrapped_are_plain(tmp_path):
    tensors = {
        f"layers.{i}.{word}.{part}.weight": torch.randn(20, 24)
        for i, word in enumerate(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))
        for part in ("q_proj", "o_proj")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    for source in (tensors, tmp_path):
        ranking = kappa_fast.rank(source, progress=False)
        assert {e.name for e in ranking} == {f"layers.{i}.{p}.weight" for i in range(3) for p in ("q_proj", "o_proj")}
        assert {a for e in ranking for a in e.aliases} == set(tensors)
        assert len(kappa_fast.rank(source, include="_orig_mod", progress=False)) == 2


def test_a_module_that_is_really_called_module_keeps_its_name():
    tensors = {"module.a.weight": torch.randn(20, 24), "head.weight": torch.randn(20, 24)}
    assert {e.name for e in kappa_fast.rank(tensors, progress=False)} == set(tensors)
    model = nn.ModuleDict({"module": nn.Linear(24, 20)})
    ranking = kappa_fast.rank(model, progress=False)
    assert ranking.select(num_tensors=1).to_names() == "module.weight\n"


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # what torch.compile imports
def test_exports_of_a_wrapped_model_have_the_names_of_the_plain_one():
    model = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 20))
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        selection = kappa_fast.rank(wrapped, progress=False).select(top_p=1.0)
        if type(wrapped).__name__ != "OptimizedModule" or "module." not in selection.names[0]:
            assert set(selection.to_names().split()) == {"0.weight", "1.weight"}
        assert len(match(selection, model)) == 2


def headed(folder, inner, architecture):
    """Saved without a head, or with one, though config.json says otherwise."""
    inner.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [architecture]}))


def small(name, **options):
    import transformers

    return getattr(transformers, name + "Config")(**{**SMALL, **options})


BARE = [
    ("Qwen3Model", "Qwen3ForCausalLM", lambda: small("Qwen3", head_dim=16)),
    ("LlamaModel", "LlamaForSequenceClassification", lambda: small("Llama")),
    ("BertModel", "BertForMaskedLM", lambda: small("Bert")),
    ("DistilBertModel", "DistilBertForMaskedLM", lambda: small("DistilBert", dim=32, hidden_dim=48, n_heads=2)),
    ("GPT2Model", "GPT2LMHeadModel", lambda: small("GPT2", n_embd=32, n_layer=1, n_head=2)),
    ("MixtralModel", "MixtralForCausalLM", lambda: small("Mixtral", num_local_experts=2)),
    ("LlamaForCausalLM", "LlamaModel", lambda: small("Llama")),
    ("BertForMaskedLM", "BertModel", lambda: small("Bert")),
]


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize(("has", "says", "config"), BARE, ids=[f"{has} as {says}" for has, says, _ in BARE])
def test_names_are_those_of_the_architecture_in_the_config_with_or_without_a_head(has, says, config, tmp_path):
    import transformers

    headed(tmp_path, getattr(transformers, has)(config()), says)
    ranking = kappa_fast.rank(tmp_path, progress=False)
    model = getattr(transformers, says)(config())
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    layers = [e for e in ranking if e.layer is not None]
    assert layers
    assert {e.name for e in layers} <= names
    selection = ranking.select(num_tensors=3, unit="parameter")
    assert any(re.search(selection.to_regex().strip(), name) for name in names)


def test_an_export_that_would_train_nothing_is_an_error_and_one_that_would_train_less_warns(tmp_path):
    model = build("llama")
    saved(model, tmp_path, "")
    tensors = load_file(tmp_path / "model.safetensors")
    strange = {f"tower.{i}.own": torch.randn(20, 24) for i in range(2)}
    save_file({**tensors, **strange}, tmp_path / "model.safetensors")
    ranking = kappa_fast.rank(tmp_path, progress=False)
    towers = kappa_fast.Selection(tuple(e for e in ranking if "tower" in e.name), True, everything_of(ranking))
    for kind in ("axolotl", "ms-swift", "spectrum", "names", "regex"):
        with pytest.raises(OptionError, match=r"LlamaForCausalLM, which config\.json names, has no parameter 'tower\."):
            towers.export(kind)
    whole = kappa_fast.Selection(tuple(ranking), True, everything_of(ranking))
    with pytest.warns(UserWarning, match="for 2 of the 16 names: these will not train"):
        whole.to_names()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole.excluding("tower").to_names()


def everything_of(ranking):
    return {"source": ranking.metadata["source"], "unit": "matrix"}


def test_what_a_computed_weight_is_made_of_is_exported_with_the_model_and_only_so():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(24, 20)))
    selection = kappa_fast.rank(model, progress=False).select(num_tensors=1)
    with pytest.raises(OptionError, match=r"computes a selected weight from '0\.parametrizations\.weight\.original0'"):
        selection.to_names()
    assert selection.to_names(model=model).split() == [n for n, p in model.named_parameters() if p.ndim > 1]


def test_the_advice_of_an_export_to_esft_leads_out():
    tensors = {}
    for layer in (1, 2):
        for expert in ("experts.0", "experts.1", "shared_experts"):
            for part, shape in (("gate_proj", (20, 24)), ("up_proj", (20, 24)), ("down_proj", (24, 20))):
                tensors[f"model.layers.{layer}.mlp.{expert}.{part}.weight"] = torch.randn(shape)
    selection = kappa_fast.rank(tensors, include="experts", progress=False).select(num_tensors=6, unit="expert")
    with pytest.raises(OptionError, match="is not in one: rank with include=") as error:
        selection.to_esft()
    advised = re.search(r"include=r'(.*?)'", str(error.value))[1]
    selection = kappa_fast.rank(tensors, include=advised, progress=False).select(num_tensors=2, unit="expert")
    with pytest.warns(UserWarning, match="ESFT needs every layer"):
        assert len(json.loads(selection.to_esft())["experts"]) in (2, 3)
