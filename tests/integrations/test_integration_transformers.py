"""Real trainers train the selection, resume where they stopped, and leave the rest bit for bit."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from families import FAMILIES, batch, build
from wrapping import assert_only_the_selected_moved, selection_of, snapshot

import kappa_fast
from kappa_fast import MissingExtraError, OptionError

transformers = pytest.importorskip("transformers")
from kappa_fast.integrations.transformers import KappaTuneCallback, optimizer_factory  # noqa: E402

ADAMW = dict(lr=1e-2, weight_decay=0.1)


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {key: value[0] for key, value in batch(i, rows=1).items()}


def arguments(folder, **options):
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1, **options}
    return transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=2, save_steps=2, **options
    )


def trainer_for(model, folder, trainer=transformers.Trainer, options=None, **more):
    return trainer(model=model, args=arguments(folder, **(options or {})), train_dataset=Tokens(), **more)


OTHERS = [family for family in FAMILIES if family != "mixtral"]
PAIRS = ["llama", "mixtral", "gpt_oss"]


@pytest.mark.parametrize(
    "family", [*PAIRS, *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in PAIRS)]
)
@pytest.mark.parametrize("how", ["factory", "callback"])
def test_the_trainer_trains_the_selection_alone(family, how, tmp_path):
    model = build(family)
    selection, before = selection_of(model), snapshot(model)
    if how == "factory":
        found = optimizer_factory(selection, torch.optim.AdamW, **ADAMW)
        trainer = trainer_for(model, tmp_path, optimizer_cls_and_kwargs=found)
    else:
        callback = KappaTuneCallback(top_p=0.3)
        trainer = trainer_for(model, tmp_path, callbacks=[callback])
        selection = callback.selection
    trainer.train()
    assert_only_the_selected_moved(model, selection, before, all_moved=how == "factory")
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", ["gpt_oss", "phi3"])  # Mixtral's experts the Trainer itself does not load back
def test_resuming_from_a_checkpoint_gives_the_same_weights(family, tmp_path):
    straight = build(family)
    selection = selection_of(straight)
    found = optimizer_factory(selection, torch.optim.AdamW, **ADAMW)
    trainer_for(straight, tmp_path / "a", optimizer_cls_and_kwargs=found).train()
    resumed = build(family)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    trainer_for(resumed, tmp_path / "b", optimizer_cls_and_kwargs=found).train(resume_from_checkpoint=str(checkpoint))
    for (name, ours), theirs in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_factory_waits_for_a_model_that_is_made_later(tmp_path):
    models = []

    def model_init():
        models.append(build("mixtral"))
        return models[-1]

    found = optimizer_factory(selection_of, torch.optim.SGD, lr=0.1)
    trainer = trainer_for(None, tmp_path, model_init=model_init, optimizer_cls_and_kwargs=found)
    trainer.train()
    assert_only_the_selected_moved(models[-1], selection_of(build("mixtral")), snapshot(build("mixtral")))


def test_the_callback_points_to_the_factory_when_the_model_is_made_later(tmp_path):
    callback = KappaTuneCallback(num_tensors=2)
    trainer = trainer_for(None, tmp_path, model_init=lambda: build("llama"), callbacks=[callback])
    with pytest.raises(OptionError, match=r"another model since the ranking \(model_init does\).*optimizer_factory"):
        trainer.train()
    with pytest.raises(OptionError, match="the Trainer has no model yet"):
        KappaTuneCallback(num_tensors=2).on_init_end(None, None, None, None)


def test_the_callback_says_what_it_selected_and_how_kappa_drifts(tmp_path, caplog, capsys):
    model = build("llama")
    callback = KappaTuneCallback(num_tensors=3, rerank_every=2)
    with caplog.at_level(logging.INFO, "kappa_fast"):
        trainer_for(model, tmp_path, callbacks=[callback]).train()
    assert capsys.readouterr().out.startswith("kappa_fast trains num_tensors=3: 3 matrices of 3 parameters, ")
    assert [found["step"] for found in callback.history] == [2, 4]
    assert callback.history[-1]["trained"]["largest"] > 0
    assert callback.history[-1]["frozen"]["largest"] == 0
    assert [m for m in caplog.messages if m.startswith("kappa after 4 steps: trained {'median': ")]


def test_reselecting_goes_on_with_other_parameters(tmp_path, monkeypatch):
    model = build("llama")
    before = snapshot(model)
    callback = KappaTuneCallback(num_tensors=2, rerank_every=2, reselect=True)
    trainer = trainer_for(model, tmp_path, callbacks=[callback])
    first, ranked = callback.selection, callback.ranking
    others = ranked.select(num_tensors=4)
    last = type(first)(others.entries[2:], True, {})
    monkeypatch.setattr(type(ranked), "select", lambda self, **_: last)
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(first.names) | set(last.names)
    assert callback.selection is last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rerank_every=0), "rerank_every=0: give a number of steps"),
        (dict(reselect=True), "give rerank_every"),
    ],
)
def test_options_that_cannot_work_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        KappaTuneCallback(num_tensors=1, **options)


@pytest.mark.parametrize("family", ["mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_accelerate_prepares_model_optimizer_and_scheduler(family):
    accelerate = pytest.importorskip("accelerate")
    model = build(family)
    selection, before = selection_of(model), snapshot(model)
    optimizer = kappa_fast.wrap(torch.optim.AdamW, model, selection, **ADAMW)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, ready, schedule = accelerator.prepare(model, optimizer, scheduler)
    for step in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch(step)).loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            ready.step()
            schedule.step()
            ready.zero_grad()
    assert_only_the_selected_moved(model, selection, before)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.25)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # by trl itself
@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS if f != "bert")]
)
@pytest.mark.parametrize("how", ["factory", "callback"])
def test_sft_trainer_trains_the_selection_alone(how, family, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = build(family)
    selection, before = selection_of(model), snapshot(model)
    rows = [{"input_ids": batch(i, rows=1)["input_ids"][0].tolist()} for i in range(8)]
    config = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=3, bf16=False, max_length=8
    )
    callback = KappaTuneCallback(top_p=0.3)
    more = (
        {"optimizer_cls_and_kwargs": optimizer_factory(selection, torch.optim.AdamW, **ADAMW)}
        if how == "factory"
        else {"callbacks": [callback]}
    )
    tokenizer = _tokenizer()
    trl.SFTTrainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, **more
    ).train()
    chosen = selection if how == "factory" else callback.selection
    assert_only_the_selected_moved(model, chosen, before, all_moved=False)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def _tokenizer():
    """Words for the numbers 0 to 63."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="0", eos_token="2")


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("transformers", "drift"):
        monkeypatch.delitem(sys.modules, f"kappa_fast.integrations.{name}")
    with pytest.raises(MissingExtraError, match=r"pip install 'kappa_fast\[transformers\]'"):
        import kappa_fast.integrations.transformers  # noqa: F401
