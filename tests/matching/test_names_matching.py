"""Names of a ranking find the parameters of the model, whatever lies between, or a clear error says what differs."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from families import FAMILIES, MOE, build
from hypothesis import given
from hypothesis import strategies as st
from matched import everything, on_disk

import kappa_fast
from kappa_fast import MissingExtraError, OptionError, Selection
from kappa_fast.matching.names import match
from kappa_fast.matching.pieces import box_of, disjoint, index_of
from kappa_fast.results.names import plain_name


def some(ranking, *keys):
    return Selection(tuple(e for e in ranking if e.key in keys), True, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_model_finds_itself(family):
    model = build(family)
    ranking = kappa_fast.rank(model, progress=False)
    for entry in ranking:
        (target,) = match(some(ranking, entry.key), model)
        piece = model.get_parameter(target.name).detach()[target.indices[0]]
        assert target.name == entry.name
        assert target.numel == entry.numel
        assert torch.equal(piece, model.get_parameter(entry.name).detach()[entry.index])
    assert all(target.whole for target in match(everything(ranking), model))


class Wrapper(torch.nn.Module):
    def __init__(self, inner, name):
        super().__init__()
        setattr(self, name, inner)


@pytest.mark.parametrize(
    "words", [("module",), ("_orig_mod",), ("module", "_fsdp_wrapped_module"), ("base_model.model",)]
)
def test_wrappers_change_nothing_in_either_direction(words):
    model = build("llama")
    wrapped = model
    for word in reversed(".".join(words).split(".")):
        wrapped = Wrapper(wrapped, word)
    ranking, outer = kappa_fast.rank(model, progress=False), kappa_fast.rank(wrapped, progress=False)
    found = match(everything(ranking), wrapped)
    assert [plain_name(t.name) for t in found] == [t.name for t in match(everything(outer), model)]
    assert len(found) == len(ranking)


def test_a_compiled_and_checkpointed_layer_is_found():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build("llama")
    ranking = kappa_fast.rank(model, progress=False)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    assert len(match(everything(ranking), model)) == len(ranking)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft itself
def test_under_peft_the_base_weights_are_found():
    peft = pytest.importorskip("peft")
    model = build("llama")
    ranking = kappa_fast.rank(model, progress=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    found = match(everything(ranking).including("lm_head"), adapted)
    assert len([t for t in found if t.entries]) == len(ranking)
    assert any(".q_proj.base_layer.weight" in t.name for t in found)


def test_a_ranking_of_the_base_model_serves_the_model_with_a_head_and_back():
    model = build("llama")
    base = kappa_fast.rank(model.model, progress=False)
    assert base[0].name.startswith("layers.")
    assert len(match(everything(base), model)) == len(base)
    whole = kappa_fast.rank(model, progress=False)
    assert len(match(everything(whole), model.model)) == len(whole)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"])
def test_names_on_disk_find_the_experts_in_memory_bit_for_bit(family, tmp_path):
    model = build(family)
    tensors = on_disk(model, family, tmp_path)
    ranking = kappa_fast.rank(tmp_path, progress=False)
    experts = [e for e in ranking if "experts." in e.name and "shared" not in e.name]
    assert len(experts) == 2 * 4 * 3
    for entry in experts:
        (target,) = match(some(ranking, entry.key), model)
        assert not target.whole
        assert torch.equal(target.parameter.detach()[target.indices[0]], tensors[entry.name])
    assert all(target.whole for target in match(everything(ranking), model))


def test_names_on_disk_find_parameters_below_wrappers_and_are_indexed_as_those(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build("mixtral")
    on_disk(model, "mixtral", tmp_path)
    ranking = kappa_fast.rank(tmp_path, include=r"layers\.0\..*experts\.3\.w2", progress=False)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    (target,) = match(everything(ranking), model)
    assert "_checkpoint_wrapped_module" in target.name
    assert target.indices == ((3,),)
    assert [entry.index for entry in target.entries] == [(3,)]
    optimizer = kappa_fast.wrap(torch.optim.Muon, model, everything(ranking))
    assert optimizer._cuts == {0: ((3,),)}


def test_a_name_that_fits_two_parameters_is_not_guessed():
    model = torch.nn.ModuleDict({"module": torch.nn.Linear(20, 20), "_orig_mod": torch.nn.Linear(20, 20)})
    plain = kappa_fast.rank(torch.nn.Linear(20, 20), progress=False)
    with pytest.raises(OptionError, match="the model lacks 1 of the 1"):
        match(everything(plain), model)
    exact = kappa_fast.rank(model, include="^module", progress=False)
    assert [target.name for target in match(everything(exact), model)] == ["module.weight"]


def test_what_transformers_saves_is_found_again(tmp_path):
    for family in MOE:
        model = build(family)
        model.save_pretrained(tmp_path / family)
        ranking = kappa_fast.rank(tmp_path / family, progress=False)
        assert all(target.whole for target in match(everything(ranking), model)), family


def test_names_on_disk_need_transformers(tmp_path, monkeypatch):
    model = build("mixtral")
    on_disk(model, "mixtral", tmp_path)
    ranking = kappa_fast.rank(tmp_path, progress=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kappa_fast\[transformers\]'"):
        match(everything(ranking), model)


def test_a_ranking_of_another_model_is_refused_with_the_first_differences():
    ranking = kappa_fast.rank(build("bert"), progress=False)
    with pytest.raises(OptionError) as failure:
        match(everything(ranking), build("llama"))
    text = str(failure.value)
    assert text.startswith(f"the model lacks {len(ranking)} of the {len(ranking)} selected matrices: 'bert.encoder.")
    assert f"and {len(ranking) - 3} more" in text
    assert "The model has 'model.embed_tokens.weight'" in text
    assert "was the ranking made from another model?" in text


def test_a_name_that_is_nearly_there_is_shown():
    ranking = kappa_fast.rank(build("llama", num_hidden_layers=3), progress=False)
    with pytest.raises(OptionError, match=r"lacks 7 of the 21 .*\(the model has 'model\.layers\.\d\."):
        match(everything(ranking), build("llama"))


def test_a_module_that_is_none_of_transformers_is_named_as_such():
    ranking = kappa_fast.rank({"a.weight": torch.randn(20, 30)}, progress=False)
    with pytest.raises(OptionError, match="the model is not a transformers model"):
        match(everything(ranking), torch.nn.Sequential(torch.nn.Linear(20, 30)))


def test_another_shape_is_refused_with_both():
    ranking = kappa_fast.rank(build("llama", intermediate_size=40), progress=False)
    with pytest.raises(OptionError) as failure:
        match(everything(ranking), build("llama"))
    assert "the shapes of 6 matrices differ" in str(failure.value)
    assert "is (40, 32) in the ranking, but 'model.layers." in str(failure.value)
    assert "; and 3 more" in str(failure.value)


def test_an_expert_that_the_model_does_not_have_is_refused():
    ranking = kappa_fast.rank(build("mixtral", num_local_experts=6), include="down_proj", progress=False)
    fifth = next(e for e in ranking if e.part == "[5]")
    with pytest.raises(OptionError, match="the shapes of 1 matrices differ"):
        match(Selection((fifth,), True, {}), build("mixtral"))


def test_a_pattern_that_brings_nothing_in_is_refused_and_one_that_leaves_nothing_out_is_not():
    model = build("llama")
    selection = everything(kappa_fast.rank(model, progress=False))
    with pytest.raises(OptionError, match=r"including\('nrom'\) matches no parameter of the model"):
        match(selection.including("nrom"), model)
    assert len(match(selection.excluding("nrom"), model)) == len(selection)


def test_the_halves_of_an_expert_and_the_stored_tensor_are_one_piece():
    model = build("mixtral")
    split = kappa_fast.rank(model, include=r"layers\.0\.mlp\.experts\.gate_up", progress=False)
    stored = kappa_fast.rank(model, include=r"layers\.0\.mlp\.experts\.gate_up", fused="stored", progress=False)
    both = [e for e in (*split, *stored) if e.part.startswith("[1]")]
    (target,) = match(Selection(tuple(both), True, {}), model)
    assert target.indices == ((1,),)
    assert target.numel == 2 * 24 * 32


def test_pieces_that_overlap_in_part_are_refused():
    model = torch.nn.Linear(30, 20)
    entry = kappa_fast.rank(model, progress=False)[0]
    parts = [
        dataclasses.replace(entry, part=str(i), index=(slice(i, i + 12),), shape=(12, 30), numel=360) for i in (0, 6)
    ]
    with pytest.raises(OptionError, match="overlap, and neither contains the other"):
        match(Selection(tuple(parts), True, {}), model)


@st.composite
def indices(draw):
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    parts = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        if draw(st.booleans()):
            parts.append(draw(st.integers(0, size - 1)))
        else:
            start = draw(st.integers(0, size - 1))
            parts.append(slice(start, draw(st.integers(start + 1, size)), draw(st.sampled_from([None, 1, 2]))))
    return tuple(parts), tuple(shape)


@given(indices())
def test_a_box_is_what_the_index_gives_and_leads_back_to_it(case):
    index, shape = case
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    box = box_of(index, shape)
    assert box.shape == tensor[index].shape
    assert box.numel == tensor[index].numel()
    assert torch.equal(tensor[index_of(box, shape)].flatten(), tensor[index].flatten())


@given(st.data())
def test_disjoint_boxes_cover_what_all_cover(data):
    shape = (4, 6, 3)
    chosen = data.draw(
        st.lists(
            st.sampled_from(
                [(), (1,), (2,), (1, slice(0, 3)), (1, slice(3, 6)), (2, slice(0, 6, 2)), (2, slice(1, 6, 2)), (3, 0)]
            ),
            max_size=6,
        )
    )
    counts = torch.zeros(shape, dtype=torch.int)
    for box in disjoint([box_of(index, shape) for index in chosen]):
        counts[index_of(box, shape)] += 1
    wanted = torch.zeros(shape, dtype=torch.bool)
    for index in chosen:
        wanted[index] = True
    assert int(counts.max()) <= 1
    assert torch.equal(counts.bool(), wanted)


def test_an_index_beyond_the_shape_is_an_error():
    for index in ((4,), (slice(0, 9),), (0, 0, 0)):
        with pytest.raises(IndexError):
            box_of(index, (4, 5))
