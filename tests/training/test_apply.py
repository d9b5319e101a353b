"""selection.apply(): flags and guards for any optimizer, all of it taken back in the end."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import pickle
import sys
import weakref

import pytest
import torch
from families import batch, build
from wrapping import assert_only_the_selected_moved, selection_of, snapshot

import kappa_fast
from kappa_fast import OptionError, Selection
from kappa_fast.integrations.peft import lora_config
from kappa_fast.matching.names import match
from kappa_fast.training.masks import frozen_mask


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def train(model, optimizer, steps=5):
    for step in range(steps):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "phi3"])
def test_an_ordinary_optimizer_moves_the_selected_weights_alone(family):
    model = build(family)
    selection, before = selection_of(model), snapshot(model)
    with selection.apply(model) as handle:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == len(handle.targets)
        train(model, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1))
        assert_only_the_selected_moved(model, selection, before)
    assert all(flags(model).values())


def test_without_the_guards_weight_decay_would_move_the_rest():
    model = build("mixtral")
    selection, before = selection_of(model), snapshot(model)
    handle = selection.apply(model)
    for remover in handle._removers:
        remover.remove()
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1))
    with pytest.raises(AssertionError, match="moved where it is frozen"):
        assert_only_the_selected_moved(model, selection, before)
    handle.restore()


def test_after_restore_nothing_is_left():
    model = build("mixtral")
    model.lm_head.weight.requires_grad_(False)
    before = flags(model)
    handle = selection_of(model).apply(model)
    assert flags(model) != before
    handle.restore()
    handle.restore()
    assert flags(model) == before
    assert not model._forward_pre_hooks
    values = snapshot(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(model, optimizer, 1)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, values[n])]
    assert "model.layers.0.mlp.experts.gate_up_proj" in moved
    partial = next(t for t in handle.targets if not t.whole)
    frozen = frozen_mask(partial).expand_as(partial.parameter)
    assert not torch.equal(partial.parameter[frozen], values[partial.name][frozen])


def test_an_error_inside_the_block_brings_everything_back_too():
    model = build("mixtral")
    with pytest.raises(ZeroDivisionError), selection_of(model).apply(model):
        raise ZeroDivisionError
    assert all(flags(model).values())


def test_other_models_and_their_optimizers_are_none_of_its_business():
    model, other = build("mixtral"), build("mixtral")
    selection_of(model).apply(model)
    before = snapshot(other)
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2), 1)
    assert all(not torch.equal(p, before[n]) for n, p in other.named_parameters() if p.grad is not None)


def test_including_and_excluding_reach_any_parameter():
    model = build("mixtral")
    selection = selection_of(model).including(r"norm\.weight$", "embed_tokens").excluding(r"layers\.1\.")
    selection.apply(model)
    on = {name for name, flag in flags(model).items() if flag}
    assert {"model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} <= on
    assert not any("layers.1." in name for name in on)


def test_nothing_selected_freezes_everything():
    model = build("llama")
    with Selection((), True, {}).apply(model) as handle:
        assert handle.targets == ()
        assert not any(flags(model).values())


def test_a_tied_embedding_trains_under_all_its_names():
    model = build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ranking = kappa_fast.rank(model, embeddings=True, progress=False)
    entry = next(e for e in ranking if "lm_head.weight" in (e.name, *e.aliases))
    for names in ((entry.name, entry.aliases), ("lm_head.weight", ()), ("model.embed_tokens.weight", ())):
        chosen = Selection((type(entry)(**{**vars(entry), "name": names[0], "aliases": names[1]}),), True, {})
        (target,) = match(chosen, model)
        assert target.parameter is model.lm_head.weight
        with chosen.apply(model):
            assert model.lm_head.weight.requires_grad


def test_an_expert_with_its_whole_sibling():
    model = build("mixtral")
    ranking = kappa_fast.rank(model, include=r"layers\.0\.mlp\.experts", progress=False)
    wanted = [e for e in ranking if "gate_up" in e.name or e.part == "[2]"]
    targets = {t.name.rpartition(".")[2]: t for t in match(Selection(tuple(wanted), True, {}), model)}
    assert targets["gate_up_proj"].whole
    assert targets["down_proj"].indices == ((2,),)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_codes_cannot_train_and_the_error_says_what_can(dtype):
    model = torch.nn.Linear(20, 20)
    selection = kappa_fast.rank(model, progress=False).select(num_tensors=1)
    shape = (20, 20) if dtype.is_floating_point else (200, 1)  # two codes in a byte have another shape than the weight
    model.weight = torch.nn.Parameter(torch.zeros(shape).to(dtype), requires_grad=False)
    message = rf"'weight' is stored as {dtype}, which cannot be trained: train adapters .*peft\.lora_config"
    with pytest.raises(OptionError, match=message):
        selection.apply(model)
    with pytest.raises(OptionError, match=message):
        kappa_fast.wrap(torch.optim.AdamW, model, selection, lr=1e-3)


def test_a_model_that_keeps_codes_in_buffers_is_told_from_another_model():
    model = torch.nn.ModuleDict({"a": torch.nn.Module(), "b": torch.nn.Linear(3, 3)})
    model["a"].register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    entry = kappa_fast.rank({"a.weight": torch.randn(32, 32)}, progress=False)[0]
    selection = Selection((dataclasses.replace(entry, aliases=("a.qweight",), quantization="gptq 4 bits"),), True, {})
    with pytest.raises(OptionError, match=r"the model holds 'a\.qweight' in place of the weight: it is quantized"):
        selection.apply(model)
    assert lora_config(selection, r=2).target_modules == "a"


def test_integers_cannot_train():
    model = torch.nn.Linear(20, 20)
    ranking = kappa_fast.rank(model, progress=False)
    model.weight = torch.nn.Parameter(torch.zeros(20, 20, dtype=torch.int8), requires_grad=False)
    with pytest.raises(OptionError, match=r"'weight' is stored as torch\.int8, which cannot be trained"):
        ranking.select(top_p=1.0).apply(model)


def test_what_zero_has_partitioned_is_refused():
    model = build("llama")
    selection = selection_of(model)
    model.model.norm.weight.ds_id = 3
    with pytest.raises(OptionError, match=r"'model\.norm\.weight' is partitioned by DeepSpeed ZeRO"):
        selection.apply(model)


def test_what_fsdp1_has_flattened_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(20, 20))
    selection = kappa_fast.rank(model, progress=False).select(top_p=1.0)
    model.register_parameter("_flat_param", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(OptionError, match="use_orig_params=True, or use FSDP2"):
        selection.apply(model)


@pytest.mark.filterwarnings("ignore:.*sparse.*")
def test_sparse_gradients_of_a_part_are_refused():
    model = torch.nn.Sequential(torch.nn.Embedding(20, 20, sparse=True))
    entry = kappa_fast.rank(model, embeddings=True, progress=False)[0]
    half = type(entry)(**{**vars(entry), "part": "[:10]", "index": (slice(0, 10),), "shape": (10, 20), "numel": 200})
    Selection((half,), True, {}).apply(model)
    with pytest.raises(OptionError, match="which sparse gradients do not allow"):
        model(torch.tensor([1, 15])).sum().backward()


def test_masks_are_small_and_true_where_nothing_is_selected():
    model = build("gpt_oss")
    for target in match(selection_of(model), model):
        if target.whole:
            continue
        mask = frozen_mask(target)
        assert mask.numel() <= math.prod(target.parameter.shape[::2])
        full = mask.expand_as(target.parameter)
        assert int((~full).sum()) == target.numel
        assert all(not full[index].any() for index in target.indices)


def test_a_closure_that_fills_the_gradients_inside_the_step_moves_no_frozen_weight():
    model = build("mixtral")
    selection, before = selection_of(model), snapshot(model)
    with selection.apply(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)

        def closure():
            optimizer.zero_grad()
            loss = model(**batch()).loss
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.step(closure=closure)
    assert_only_the_selected_moved(model, selection, before)


@pytest.mark.parametrize("how", ["apply", "wrap"])
def test_a_model_that_nobody_holds_goes_with_its_hooks(how):
    gc.collect()
    hooks = sys.modules[torch.optim.Optimizer.__module__]._global_optimizer_pre_hooks
    count = len(hooks)
    model = build("mixtral")
    selection = selection_of(model)
    made = selection.apply(model) if how == "apply" else kappa_fast.wrap(torch.optim.SGD, model, selection, lr=0.1)
    assert len(hooks) == count + (how == "apply")
    gone = weakref.ref(model)
    del model, made
    gc.collect()
    assert gone() is None
    assert len(hooks) == count


def test_the_guards_stay_where_nobody_keeps_the_handle():
    model = build("mixtral")
    selection, before = selection_of(model), snapshot(model)
    selection.apply(model)
    gc.collect()
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1))
    assert_only_the_selected_moved(model, selection, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_a_model_like_any_other(duplicate):
    model = build("mixtral")
    handle = selection_of(model).apply(model)
    twin = duplicate(model)
    twin(**batch()).loss.backward()
    partial = next(t for t in handle.targets if not t.whole)
    frozen = frozen_mask(partial).expand_as(partial.parameter)
    assert twin.get_parameter(partial.name).grad[frozen].any()
    model(**batch()).loss.backward()
    assert not partial.parameter.grad[frozen].any()


def test_a_compiled_model_keeps_its_guards():
    model = build("phi3")
    selection, before = selection_of(model), snapshot(model)
    selection.apply(model)
    compiled = torch.compile(model, backend="eager")
    train(
        compiled, torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1), 2
    )
    assert_only_the_selected_moved(model, selection, before)


def test_two_selections_at_once_are_refused_and_one_after_the_other_are_not():
    model = build("mixtral")
    selection = selection_of(model)
    handle = selection.apply(model)
    for again in (lambda: selection.apply(model), lambda: kappa_fast.wrap(torch.optim.SGD, model, selection, lr=0.1)):
        with pytest.raises(OptionError, match="this model has a selection already"):
            again()
    handle.restore()
    optimizer = kappa_fast.wrap(torch.optim.SGD, model, selection, lr=0.1)
    assert optimizer.selection is selection
    optimizer.restore()
    selection.apply(model).restore()


def test_a_parameter_that_was_flattened_later_is_refused():
    model = build("mixtral")
    handle = selection_of(model).apply(model)
    partial = next(t for t in handle.targets if not t.whole)
    owner, _, leaf = partial.name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(partial.parameter.detach().flatten()))
    with pytest.raises(OptionError, match="is selected, and its shape has changed to"):
        model(**batch())
    other = torch.nn.Linear(3, 3)  # whose optimizer is none of its business
    other(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()


def test_what_zero_links_later_is_refused():
    model = build("mixtral")
    handle = selection_of(model).apply(model)
    next(t for t in handle.targets if not t.whole).parameter._hp_mapping = object()
    with pytest.raises(OptionError, match="is partitioned by DeepSpeed ZeRO"):
        model(**batch())


def test_a_model_from_inference_mode_is_refused_and_stays_as_it_was():
    with torch.inference_mode():
        model = build("llama")
    before = flags(model)
    selection = selection_of(build("llama"))
    with pytest.raises(OptionError, match="was made in inference mode and cannot train"):
        selection.apply(model)
    assert flags(model) == before
