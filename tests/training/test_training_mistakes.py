"""Training that would go wrong in silence is refused before it begins, with what to do instead."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from resumed import chosen, net, stepped
from trainers import IGNORED, KINDS, arguments, make, trainer_of

import kappa_fast
from kappa_fast import OptionError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from kappa_fast.integrations.transformers import KappaDriftCallback, KappaTuneCallback, optimizer_factory  # noqa: E402

pytestmark = pytest.mark.filterwarnings(*IGNORED)


def adapted(kind: str, **options):
    config = peft.LoraConfig(r=2, target_modules=r".*\.(v_proj|value)", **options)
    return peft.get_peft_model(make(kind), config)


HOW = {
    "apply": lambda model, selection, folder: selection.apply(model),
    "wrap": lambda model, selection, folder: kappa_fast.wrap(torch.optim.SGD, model, selection, lr=0.1),
    "factory": lambda model, selection, folder: trainer_of(
        "llama", folder, model, optimizer_cls_and_kwargs=optimizer_factory(selection, lr=1e-3)
    ).train(),
    "callback": lambda model, selection, folder: trainer_of(
        "llama", folder, model, callbacks=[KappaTuneCallback(top_p=0.3)]
    ),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_adapters_is_refused_with_both_ways_out(how, kind, tmp_path, monkeypatch):
    selection = kappa_fast.rank(make(kind), progress=False).select(top_p=0.3)
    model = adapted(kind)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    monkeypatch.setattr("kappa_fast.integrations.drift.ranked", None)  # found out before any work
    with pytest.raises(OptionError, match=r"has adapters of PEFT.*lora_config\(selection\).*merge_and_unload\(\)"):
        HOW[how](model, selection, tmp_path)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    HOW["apply"](model.merge_and_unload(), selection, tmp_path)  # the advice works


def test_adapters_that_transformers_adds_itself_are_adapters():
    model = make("llama")
    selection = kappa_fast.rank(model, progress=False).select(top_p=0.3)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(OptionError, match="has adapters of PEFT"):
        selection.apply(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_drift_of_a_model_with_adapters_is_that_of_what_it_computes(kind, tmp_path):
    model = adapted(kind)
    callback = KappaDriftCallback(rerank_every=2, keep_rankings=True)
    trainer = trainer_of(kind, tmp_path, model, steps=4, callbacks=[callback])
    trainer.train()
    assert list(callback.rankings) == [0, 2, 4]
    last = callback.history[-1]
    assert last["step"] == 4
    assert last["trained"]["largest"] > 0
    assert last["frozen"]["largest"] == 0
    with pytest.warns(UserWarning, match=r"ranked without them: adapters='merged'"):
        beside = kappa_fast.rank(model, progress=False)
    assert all(e.kappa == callback.ranking[e.key].kappa for e in beside)
    logged = [found for found in trainer.state.log_history if "kappa_trained" in found]
    assert [found["step"] for found in logged] == [0, 2, 4]
    assert logged[-1]["kappa_trained_change_largest"] == last["trained"]["largest"]
    assert "kappa_frozen" in logged[0]


@pytest.mark.parametrize("how", ["callback", "factory"])
def test_a_misspelt_or_missing_option_is_an_error_before_any_work(how):
    for wrong, message in [
        (dict(max_parms=0.2), "'max_parms' is no option of select.*'max_params'"),
        ({}, "select.. takes .*got none"),
        (dict(max_params=1.5), "max_params=1.5: give a count"),
        (dict(top_p=3), "top_p=3: give a fraction"),
        (dict(top_p=0.2, unit="layer"), "unit='layer' is unknown"),
        (dict(top_p=0.2, rank_options={"includ": "x"}), "rank_options has 'includ'"),
        (dict(top_p=0.2, rank_options={"include": "("}), "include"),
        (dict(top_p=0.2, rank_options={"rtol": 2}), "rtol=2"),
        (dict(top_p=0.2, rerank_every=True), "rerank_every=True"),
    ]:
        if how == "callback":
            with pytest.raises(OptionError, match=message):
                KappaTuneCallback(**wrong)
    if how == "factory":
        with pytest.raises(OptionError, match=r"no learning rate, .*AdamW .*0\.001.*give args=training_args, or lr="):
            optimizer_factory(lambda model: None)
        with pytest.raises(OptionError, match="no learning rate"):
            optimizer_factory(lambda model: None, torch.optim.Adagrad)


def test_the_factory_takes_what_the_arguments_of_the_trainer_say(tmp_path):
    model = make("llama")
    selection = kappa_fast.rank(model, progress=False).select(top_p=0.3).including(r"norm\.weight$")
    args = dict(learning_rate=3e-5, weight_decay=0.25, adam_beta2=0.95, adam_epsilon=1e-7)
    given = optimizer_factory(selection, torch.optim.AdamW, args=arguments(tmp_path, **args), fused=False)
    trainer = trainer_of("llama", tmp_path, model, steps=1, optimizer_cls_and_kwargs=given, **args)
    trainer.train()
    decaying, norms = trainer.optimizer.param_groups
    found = {key: decaying[key] for key in ("initial_lr", "weight_decay", "betas", "eps")}
    assert found == {"initial_lr": 3e-5, "weight_decay": 0.25, "betas": (0.9, 0.95), "eps": 1e-7}
    assert norms["weight_decay"] == 0
    expected = set(trainer.get_decay_parameter_names(model))
    assert set(decaying["param_names"]) <= expected
    assert expected.isdisjoint(norms["param_names"])
    assert norms["param_names"]
    ours = optimizer_factory(selection, torch.optim.SGD, args=arguments(tmp_path, **args), lr=0.5)[1]
    assert {key: ours[key] for key in ("lr", "weight_decay")} == {"lr": 0.5, "weight_decay": 0.25}
    assert "betas" not in ours


def test_groups_without_decay_move_as_in_an_optimizer_with_the_same_groups():
    model, twin = make("vit"), make("vit")
    selection = kappa_fast.rank(model, progress=False).select(top_p=0.5).including("bias$", "layernorm")
    made = kappa_fast.wrap(torch.optim.AdamW, model, selection, lr=1e-2, weight_decay=0.5, no_decay=True)
    names = [set(group["param_names"]) for group in made.param_groups]
    assert all("bias" in n or "layernorm" in n for n in names[1])
    assert not any("bias" in n for n in names[0])
    parameters = dict(twin.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names[0] | names[1])
    order = [[parameters[n] for n in group["param_names"]] for group in made.param_groups]
    plain = torch.optim.AdamW(
        [{"params": order[0]}, {"params": order[1], "weight_decay": 0.0}], lr=1e-2, weight_decay=0.5
    )
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for each, optimizer in ((model, made), (twin, plain)):
        for _ in range(2):
            each(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_only_norms_have_no_decay_either_and_patterns_that_cannot_be_are_named():
    model = make("llama")
    nothing = kappa_fast.Selection((), True, {}).including("norm")
    made = kappa_fast.wrap(torch.optim.AdamW, model, nothing, lr=1e-2, weight_decay=0.5, no_decay=True)
    assert [group["weight_decay"] for group in made.param_groups] == [0.0]
    kappa_fast.restore(model)
    with pytest.raises(OptionError, match=r"no_decay='\(': give True, False or regular expressions"):
        kappa_fast.wrap(torch.optim.AdamW, model, nothing, lr=1e-2, no_decay="(")
    given = kappa_fast.wrap(torch.optim.AdamW, model, nothing, lr=1e-2, weight_decay=0.5, no_decay="input_layernorm")
    assert [group["weight_decay"] for group in given.param_groups] == [0.5, 0.0]


def test_a_held_model_is_set_free_wherever_the_handle_is():
    model = make("llama")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    selection = kappa_fast.rank(model, progress=False).select(top_p=0.3)
    ways = (lambda m: kappa_fast.wrap(torch.optim.SGD, m, selection, lr=0.1), selection.apply)
    for first, second in itertools.product(ways, ways):
        first(model)
        with pytest.raises(OptionError, match=r"kappa_fast\.restore\(model\) undoes it"):
            second(model)
        kappa_fast.restore(model)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    compiled = torch.compile(model)
    selection.apply(compiled)
    with pytest.raises(OptionError, match=r"kappa_fast\.restore\(model\)"):
        selection.apply(model)  # what is inside of a model that is held
    kappa_fast.restore(model)
    selection.apply(model)
    kappa_fast.restore(compiled)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    kappa_fast.restore(model)  # nothing to do
    with pytest.raises(OptionError, match=r"restore\(\) takes the model, not a str"):
        kappa_fast.restore("model")
    for use in (selection.apply, lambda model: kappa_fast.wrap(torch.optim.SGD, model, selection, lr=1.0)):
        with pytest.raises(OptionError, match=r"expected the model, a torch\.nn\.Module, not a dict: give the model"):
            use({"weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_trainer_on_a_held_model_says_how_to_free_it(kind, tmp_path, monkeypatch):
    model = make(kind)
    trainer_of(kind, tmp_path, model, callbacks=[KappaTuneCallback(top_p=0.3)])
    with monkeypatch.context() as patched:
        patched.setattr("kappa_fast.integrations.drift.ranked", None)
        with pytest.raises(OptionError, match=r"kappa_fast\.restore\(model\)"):
            trainer_of(kind, tmp_path, model, callbacks=[KappaTuneCallback(top_p=0.3)])
    kappa_fast.restore(model)
    trainer_of(kind, tmp_path, model, callbacks=[KappaTuneCallback(top_p=0.3)])


def test_the_callback_says_in_one_line_what_trains(tmp_path, capsys):
    model = make("mixtral")
    callback = KappaTuneCallback(max_params=0.1)
    trainer_of("mixtral", tmp_path, model, callbacks=[callback])
    line = capsys.readouterr().out.strip()
    assert "\n" not in line
    trained = sum(t.numel for t in callback.handle.targets)
    every = sum(p.numel() for p in model.parameters())
    share = f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}"
    assert line.endswith(share)
    callback.handle.print_trainable_parameters()
    assert capsys.readouterr().out == share + "\n"


def test_states_carry_names_and_shapes_that_are_checked():
    model = net()
    saved = stepped(model, chosen(model, 0, 1))
    state = copy.deepcopy(saved.state_dict())
    assert state["param_groups"][0]["param_names"] == ["0.weight", "1.weight"]
    del state["selection"]  # as after a tool that keeps what torch knows
    saved.restore()
    other = kappa_fast.wrap(torch.optim.AdamW, model, chosen(model, 1, 2), lr=1e-2)
    with pytest.raises(OptionError, match=r"it has '0\.weight', which this one lacks"):
        other.load_state_dict(state)
    del state["param_groups"][0]["param_names"]
    other.load_state_dict(copy.deepcopy(state))  # nothing says what it belongs to, and the shapes agree
    state["state"][1]["exp_avg"] = torch.zeros(3, 4)
    with pytest.raises(OptionError, match=r"'exp_avg' for '2\.weight' is \(3, 4\), and the parameter \(20, 20\)"):
        other.load_state_dict(state)


def test_a_group_can_be_added_as_to_any_optimizer():
    model = net()
    made = kappa_fast.wrap(torch.optim.AdamW, model, chosen(model, 0, 1), lr=1e-2)
    made.add_param_group({"params": model[3].weight.requires_grad_(True), "lr": 0.5})
    assert made.param_groups[1]["param_names"] == ["3.weight"]
    before = model[3].weight.detach().clone()
    model(torch.randn(4, 20)).square().sum().backward()
    made.step()
    assert not torch.equal(before, model[3].weight)
