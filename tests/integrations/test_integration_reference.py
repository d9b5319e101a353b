"""Code written for the reference implementation works, and its optimizer is one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import batch, build

import kappa_fast
from kappa_fast import OptionError, SelectiveFineTuningOptimizer, get_kappa_lora_config, get_kappatune_lora_model


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The default file of condition numbers lies in the working directory."""
    monkeypatch.chdir(tmp_path)


def make(model, **options):
    options = {"num_tensors_to_finetune": 5, **options}
    return SelectiveFineTuningOptimizer(model, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, **options)


def test_a_training_loop_of_the_original_runs(tmp_path):
    model = build("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer_wrapper = SelectiveFineTuningOptimizer(
        model=model,
        base_optimizer_cls=torch.optim.AdamW,
        optimizer_args={"lr": 5e-3},
        condition_file="condition_numbers.json",
        num_tensors_to_finetune=4,
        recompute=True,
    )
    losses = []
    for _ in range(5):
        optimizer_wrapper.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer_wrapper.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == optimizer_wrapper.trainable_param_names
    assert len(moved) == 4
    numbers = json.loads((tmp_path / "condition_numbers.json").read_text())
    assert numbers == optimizer_wrapper.condition_numbers
    assert set(numbers) == {n for n, p in model.named_parameters() if p.ndim >= 2}
    assert moved == set(sorted(numbers, key=numbers.get)[:4])
    state = optimizer_wrapper.state_dict()
    optimizer_wrapper.load_state_dict(state)


def test_the_choice_is_that_of_exact_values():
    model = build("bert")
    optimizer = make(model, num_tensors_to_finetune=7)
    exact = {
        n: float(s[0] / s[-1])
        for n, p in model.named_parameters()
        if p.ndim == 2
        for s in [torch.linalg.svdvals(p.detach().double())]
    }
    assert optimizer.trainable_param_names == set(sorted(exact, key=exact.get)[:7])


def test_it_is_an_optimizer_of_both_classes_with_everything_that_schedulers_and_scalers_need():
    model = build("llama")
    optimizer = make(model)
    assert isinstance(optimizer, SelectiveFineTuningOptimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.optimizer is optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(**batch()).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)
    assert len(optimizer.state) == 5
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters() if p.requires_grad)
    assert isinstance(copy.deepcopy(optimizer), torch.optim.AdamW)


def test_accelerate_prepares_it_with_a_scheduler():
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    prepared, ready, schedule = accelerate.Accelerator(cpu=True).prepare(model, optimizer, scheduler)
    prepared(**batch()).loss.backward()
    ready.step()
    schedule.step()
    assert ready.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bfloat16_and_fused_experts_are_ranked_and_train(family):
    model = build(family).to(torch.bfloat16)
    optimizer = make(model, num_tensors_to_finetune=8)
    assert any("experts" in name for name in optimizer.condition_numbers)
    model(**batch()).loss.backward()
    optimizer.step()


def test_the_file_is_used_the_second_time(monkeypatch):
    first = make(build("llama"))
    monkeypatch.setattr("kappa_fast.integrations.reference.analyze", lambda *_: pytest.fail("analyzed again"))
    second = make(build("llama"))
    assert second.trainable_param_names == first.trainable_param_names


def test_a_file_of_another_model_is_refused(tmp_path):
    make(build("bert"))
    model = build("llama")
    with pytest.raises(OptionError, match=r"condition_numbers\.json belongs to another model \('bert\."):
        make(model)
    assert all(p.requires_grad for p in model.parameters())
    assert make(model, recompute=True).trainable_param_names


def test_a_damaged_file_is_made_anew(tmp_path, caplog):
    (tmp_path / "condition_numbers.json").write_text("{")
    make(build("llama"))
    assert "cannot be read" in caplog.text
    assert json.loads((tmp_path / "condition_numbers.json").read_text())


def test_large_sides_are_left_out():
    optimizer = make(build("llama"), max_dim_size_to_analyze=32)
    assert "model.embed_tokens.weight" not in optimizer.condition_numbers
    with pytest.raises(OptionError, match="no parameter with two or more dimensions within the limit"):
        make(build("llama"), max_dim_size_to_analyze=3, recompute=True)


def test_selecting_nothing_is_refused():
    with pytest.raises(OptionError, match="num_tensors_to_finetune=0 selects nothing"):
        make(build("llama"), num_tensors_to_finetune=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_goes_to_the_modules_with_the_lowest_numbers(tmp_path):
    pytest.importorskip("peft")
    model = build("llama")
    numbers = make(build("llama")).condition_numbers
    config = get_kappa_lora_config(model, num_modules_to_adapt=3, lora_rank=2)
    lowest = sorted(numbers, key=numbers.get)[:3]
    assert config.target_modules == {name.removesuffix(".weight") for name in lowest}
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (2, 32, 0.05, "CAUSAL_LM")
    lora = get_kappatune_lora_model(model, 3, lora_rank=2)
    lora(**batch()).loss.backward()
    assert sum("lora_A" in n or "embedding_A" in n for n, _ in lora.named_parameters()) == 3
    assert get_kappa_lora_config(model, target_modules=["q_proj"]).target_modules == {"q_proj"}


def test_a_model_without_adaptable_modules_is_refused():
    pytest.importorskip("peft")
    model = torch.nn.Module()
    model.matrix = torch.nn.Parameter(torch.randn(20, 30))
    with pytest.raises(OptionError, match="no module that LoRA can adapt"):
        get_kappa_lora_config(model)


def test_the_names_are_at_the_top_level():
    assert kappa_fast.SelectiveFineTuningOptimizer is SelectiveFineTuningOptimizer
