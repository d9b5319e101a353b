"""What was selected goes with the state of the optimizer: a resumed run trains the same, or says what differs."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from families import build
from torch import nn
from trainers import IGNORED, examples, make

import kappa_fast
from kappa_fast import OptionError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def net() -> nn.Module:
    """Layers of one shape, so that torch cannot tell their states apart."""
    return nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in range(4)))


def chosen(model, *positions):
    return kappa_fast.rank(model, include=[rf"^{i}\." for i in positions], progress=False).select(top_p=1.0)


def stepped(model, selection, optimizer=torch.optim.AdamW):
    made = kappa_fast.wrap(optimizer, model, selection, lr=1e-2)
    model(torch.randn(4, 20)).square().sum().backward()
    made.step()
    return made


def test_the_state_of_an_optimizer_is_refused_by_one_of_another_selection_of_equal_shapes():
    model = net()
    saved = stepped(model, chosen(model, 0, 1))
    state = copy.deepcopy(saved.state_dict())
    saved.restore()
    other = kappa_fast.wrap(torch.optim.AdamW, model, chosen(model, 1, 2), lr=1e-2)
    with pytest.raises(OptionError, match=r"another selection of 2 .* it has '0\.weight', .* it lacks '2\.weight'"):
        other.load_state_dict(state)
    assert not other.state
    other.restore()
    same = kappa_fast.wrap(torch.optim.AdamW, model, chosen(model, 0, 1), lr=1e-2)
    same.load_state_dict(state)
    assert len(same.state) == 2


def test_the_state_of_other_experts_of_the_same_parameter_is_refused():
    model = build("mixtral")
    ranking = kappa_fast.rank(model, include=r"layers\.0\..*experts", progress=False)

    def of(*experts):
        entries = tuple(e for e in ranking if e.index[0] in experts)
        return kappa_fast.Selection(entries, True, {"unit": "expert"})

    saved = kappa_fast.wrap(torch.optim.SGD, model, of(0, 1), lr=0.1, momentum=0.9)
    state = saved.state_dict()
    saved.restore()
    other = kappa_fast.wrap(torch.optim.SGD, model, of(0, 2), lr=0.1, momentum=0.9)
    with pytest.raises(OptionError, match=r"it has other parts of .*experts"):
        other.load_state_dict(state)


def test_wrappers_around_the_model_do_not_make_it_another_selection():
    model = net()
    saved = stepped(model, chosen(model, 0, 3))
    state = copy.deepcopy(saved.state_dict())
    saved.restore()
    compiled = torch.compile(model)
    again = kappa_fast.wrap(torch.optim.AdamW, compiled, chosen(model, 0, 3), lr=1e-2)
    again.load_state_dict(state)
    assert len(again.state) == 2


def test_a_state_that_says_nothing_of_a_selection_is_loaded_as_ever():
    model = net()
    plain = torch.optim.AdamW([model[0].weight, model[1].weight], lr=1e-2)
    made = kappa_fast.wrap(torch.optim.AdamW, model, chosen(model, 0, 1), lr=1e-2)
    made.load_state_dict(plain.state_dict())


class Attention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention, self.top = nn.MultiheadAttention(32, 4, batch_first=True, **options), nn.Linear(32, 20)

    def forward(self, x):
        return self.top(self.attention(x, x, x)[0])


@pytest.mark.parametrize("options", [{}, {"kdim": 32, "vdim": 32}], ids=["fused", "apart"])
@pytest.mark.parametrize("kind", ["module", "state dict", "model="])
def test_no_adapter_is_put_where_a_weight_is_read_without_a_call(kind, options):
    from kappa_fast.integrations.peft import lora_config

    model = Attention(**options)
    source = model.state_dict() if kind == "state dict" else model
    selection = kappa_fast.rank(source, include="out_proj|top", progress=False).select(top_p=1.0)
    given = {"model": model} if kind == "model=" else {}
    with pytest.raises(OptionError, match=r"reads the weight of 'attention\.out_proj' and never calls") as error:
        lora_config(selection, r=4, **given)
    advised = re.search(r"excluding\('(.*?)'\)", str(error.value))[1].replace("\\\\", "\\")
    config = lora_config(selection.excluding(advised), r=4, **given)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).train()
    adapted(torch.randn(2, 5, 32)).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    trained = kappa_fast.wrap(torch.optim.SGD, model, selection, lr=0.1)  # the other way out
    model(torch.randn(2, 5, 32)).sum().backward()
    assert all(t.parameter.grad is not None for t in trained.targets)


def test_layers_of_transformers_that_are_not_called_are_known_by_the_type_of_the_model():
    from kappa_fast.sources.names import is_read_directly

    wav = "wavlm.encoder.layers.0.attention.q_proj.weight"
    assert is_read_directly(wav, {wav}, ("wavlm",))
    assert not is_read_directly(wav, {wav}, ("wav2vec2",))
    assert is_read_directly("backbone.layers.0.mixer.dt_proj.weight", (), ("mamba",))
    assert not is_read_directly("model.layers.0.self_attn.out_proj.weight", (), ("clip",))


def trainer(folder, steps, given=None, kind="llama", model=None, **options):
    from transformers import Trainer, TrainingArguments

    from kappa_fast.integrations.transformers import KappaTuneCallback

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=steps,
        save_steps=3,
        use_cpu=True,
        learning_rate=5e-2,
        logging_steps=100,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    chosen = {"reselect": True, "rerank_every": 1, **(given or {})}
    if "num_tensors" not in chosen:
        chosen.setdefault("max_params", 0.2)
    callback = KappaTuneCallback(**chosen)
    return Trainer(
        model=model or make(kind), args=arguments, train_dataset=examples(kind), callbacks=[callback]
    ), callback


def moments_of(trainer):
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    states = {name: optimizer.state.get(p, {}) for name, p in trainer.model.named_parameters()}
    return {name: state["exp_avg"].clone() for name, state in states.items() if "exp_avg" in state}


RESUMING = pytest.mark.filterwarnings(*IGNORED)


@RESUMING
def test_a_resumed_run_goes_on_with_what_was_selected_and_with_its_state(tmp_path):
    first, before = trainer(tmp_path, 3)
    first.train()
    kept = json.loads((tmp_path / "checkpoint-3" / "kappa_selection.json").read_text())
    assert kept["step"] == 3
    moments = moments_of(first)
    assert moments
    second, after = trainer(tmp_path, 4)
    assert after.selection.names != before.selection.names  # reselect has moved on from where it began
    selected, names, found = before.selection.names, [], {}

    class Looks(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            names.extend(after.selection.names)
            found.update(moments_of(second))

    second.add_callback(Looks())
    second.train(resume_from_checkpoint=True)
    assert tuple(names) == selected
    assert found.keys() == moments.keys()
    assert all(torch.equal(found[name], moments[name]) for name in moments)


@RESUMING
def test_a_resumed_run_whose_selection_is_not_known_warns_with_the_way_out(tmp_path):
    first, _ = trainer(tmp_path / "a", 3)
    first.train()
    there = str(tmp_path / "a" / "checkpoint-3")
    second, after = trainer(tmp_path / "b", 3, resume_from_checkpoint=there)
    second.train(resume_from_checkpoint=there)
    assert after._resumed == 3
    (tmp_path / "a" / "checkpoint-3" / "kappa_selection.json").unlink()
    (tmp_path / "a" / "checkpoint-3" / "optimizer.pt").unlink()
    third, _ = trainer(tmp_path / "c", 3)
    with pytest.raises(OptionError, match=r"belongs to another selection"):  # the Trainer's own state knows it too
        third.train(resume_from_checkpoint=there)
    file = tmp_path / "a" / "checkpoint-3" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["KappaTuneCallback"]
    file.write_text(json.dumps(state))
    fourth, after = trainer(tmp_path / "d", 4, save_strategy="steps")
    with pytest.warns(UserWarning, match=r"whose selection is not known .*resume_from_checkpoint"):
        fourth.train(resume_from_checkpoint=there)
    assert after.selection is not None


@RESUMING
@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_a_run_that_is_resumed_after_a_reselection_ends_as_a_straight_run(kind, tmp_path):
    given = dict(num_tensors=4, rerank_every=2)
    straight, whole = trainer(tmp_path / "a", 5, given, kind, lr_scheduler_type="constant")
    straight.train()
    first, before = trainer(tmp_path / "b", 3, given, kind, lr_scheduler_type="constant")
    first.train()
    at_first = kappa_fast.rank(make(kind), progress=False).select(num_tensors=4).names
    loaded = type(first.model).from_pretrained(tmp_path / "b" / "checkpoint-3") if kind == "vit" else None
    second, after = trainer(tmp_path / "b", 5, given, kind, loaded, lr_scheduler_type="constant")
    second.train(resume_from_checkpoint=True)
    assert before.selection.names != at_first  # else nothing is shown
    assert after.selection == whole.selection
    assert after.history == whole.history
    for (name, ours), theirs in zip(second.model.named_parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@RESUMING
@pytest.mark.parametrize("kind", ["vit", "mixtral"])  # whose names on disk are not those of the model
def test_a_run_whose_weights_the_trainer_does_not_load_back_is_not_resumed(kind, tmp_path):
    given = dict(num_tensors=4, rank_options={"include": "fc1|fc2|experts"}, reselect=False)
    trainer(tmp_path, 3, given, kind)[0].train()
    second, _ = trainer(tmp_path, 4, given, kind)
    with pytest.raises(OptionError, match=r"has not loaded the weights of the checkpoint.*from_pretrained"):
        second.train(resume_from_checkpoint=True)


@RESUMING
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(max_params=0.3), "max_params was 0.2 and is 0.3"),
        (dict(rank_options={"include": "proj"}), "include was None and is 'proj'"),
        (dict(unit="parameter"), "unit was None and is 'parameter'"),
    ],
)
def test_a_run_with_other_options_is_not_resumed(changed, words, tmp_path):
    trainer(tmp_path, 3)[0].train()
    second, _ = trainer(tmp_path, 4, changed)
    with pytest.raises(OptionError, match=rf"begun with other options of KappaTuneCallback: {words}\. Give the same"):
        second.train(resume_from_checkpoint=True)


@RESUMING
def test_a_checkpoint_of_another_selection_is_refused_also_where_nothing_but_its_shapes_tell(tmp_path):
    one, two = (dict(num_tensors=2, rank_options={"include": word}) for word in ("up_proj", "k_proj"))
    for given in (one, two):
        given |= {"reselect": False, "rerank_every": None}
    trainer(tmp_path / "a", 3, one)[0].train()
    there = tmp_path / "a" / "checkpoint-3"
    (there / "kappa_selection.json").unlink()
    state = json.loads((there / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["KappaTuneCallback"]
    (there / "trainer_state.json").write_text(json.dumps(state))
    second, _ = trainer(tmp_path / "b", 4, two)
    with (
        pytest.warns(UserWarning, match="selection is not known"),
        pytest.raises(OptionError, match=r"'exp_avg' for 'model.*k_proj\.weight' is \(24, 32\), and the parameter"),
    ):
        second.train(resume_from_checkpoint=str(there))


@RESUMING
def test_callbacks_that_the_trainer_makes_anew_from_a_checkpoint_go_on(tmp_path):
    given = dict(num_tensors=3, rank_options={"score": by_size})
    trainer(tmp_path, 3, given)[0].train()
    second, _ = trainer(tmp_path, 4, given, restore_callback_states_from_checkpoint=True)
    second.train(resume_from_checkpoint=True)
    (made,) = [c for c in second.callback_handler.callbacks if type(c).__name__ == "KappaTuneCallback"]
    assert [found["step"] for found in made.history] == [1, 2, 3, 4]


def by_size(entry):
    return float(entry.numel)
