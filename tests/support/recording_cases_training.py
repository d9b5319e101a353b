"""Cases of a recording: what selections do to models and optimizers."""

from __future__ import annotations

import contextlib
import io
import itertools
from functools import partial
from typing import Any, cast

import torch
from recording_cases_results import ranked
from recording_plain import Text
from recording_sources import Cases, Model, Stored, loss_of, model, seeded
from torch import nn

import kappa_fast
from kappa_fast import Selection

STEPS = 3
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
    "Muon": (torch.optim.Muon, {"lr": 1e-2}),
}
SELECTED: dict[str, dict[str, Any]] = {
    "a share": {"max_params": 0.3},
    "whole parameters": {"max_params": 0.6, "unit": "parameter"},
    "experts": {"num_tensors": 3, "unit": "expert", "include": "experts"},
    "halves": {"num_tensors": 3, "include": r"gate_up_proj"},
}


def cases(stored: Stored) -> Cases:
    for (name, (kind, options)), (which, budget) in itertools.product(OPTIMIZERS.items(), SELECTED.items()):
        yield f"wrap, {name}, {which}", partial(_wrapped, kind, budget, options)
    share = SELECTED["a share"]
    undecayed = {"lr": 1e-2, "no_decay": True}
    yield "wrap, no decay", partial(_wrapped, torch.optim.AdamW, share, undecayed, ("norm", "bias"))
    yield "wrap, including", partial(_wrapped, torch.optim.SGD, share, {"lr": 0.1}, ("norm", "lm_head"))
    yield "wrap, resumed", _resumed
    for which, budget in SELECTED.items():
        yield f"apply, {which}", partial(_applied, budget)
    yield "apply, restored", _restored
    yield from _refused()
    yield from _reference(stored)
    yield from _callbacks(stored)


def _selected(made: nn.Module, budget: dict[str, Any], including: tuple[str, ...] = ()) -> Selection:
    return kappa_fast.rank(made, progress=False).select(**budget).including(*including)


def _weights(made: nn.Module) -> dict[str, Any]:
    return {name: [parameter.requires_grad, parameter] for name, parameter in made.named_parameters()}


def _train(made: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS)) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(made, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _wrapped(
    kind: type[torch.optim.Optimizer], budget: dict[str, Any], options: dict[str, Any], including: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Losses, weights and the state after some steps."""
    made = model()
    optimizer: Any = kappa_fast.wrap(kind, made, _selected(made, budget, including), **options)
    losses = _train(made, optimizer)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = optimizer.state_dict()
    return {
        "losses": losses,
        "weights": _weights(made),
        "groups": groups,
        "state": state["state"],
        "keys": sorted(state),
        "selection": state.get("selection"),
        "class": type(optimizer).__name__,
    }


def _resumed() -> dict[str, Any]:
    """Two steps, a state dict, and one step more with another optimizer."""
    made = model()
    kind, options = OPTIMIZERS["AdamW"]
    selection = _selected(made, SELECTED["halves"])
    first: Any = kappa_fast.wrap(kind, made, selection, **options)
    _train(made, first, range(2))
    saved = first.state_dict()
    first.restore()
    second: Any = kappa_fast.wrap(kind, made, selection, **options)
    second.load_state_dict(saved)
    return {"losses": _train(made, second, range(2, 3)), "weights": _weights(made)}


def _applied(budget: dict[str, Any]) -> dict[str, Any]:
    made = model()
    with _selected(made, budget).apply(made) as handle:
        trained = [p for p in made.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1)
        found: dict[str, Any] = {"losses": _train(made, optimizer), "weights": _weights(made)}
        found |= {"trainable": handle.trainable, "words": Text(handle.describe())}
    return found | {"after": {name: parameter.requires_grad for name, parameter in made.named_parameters()}}


def _restored() -> list[Any]:
    made = model()
    made.conv.weight.requires_grad_(False)
    found = [_flags(made)]
    _selected(made, SELECTED["a share"]).apply(made)
    found.append(_flags(made))
    kappa_fast.restore(made)
    return [*found, _flags(made)]


def _flags(made: nn.Module) -> list[str]:
    return [name for name, parameter in made.named_parameters() if parameter.requires_grad]


def _refused() -> Cases:
    """What does not fit each other."""
    other, share, wrap = ranked().select(num_tensors=2), SELECTED["a share"], cast(Any, kappa_fast.wrap)
    yield "apply to another model", lambda: other.apply(model())
    yield "wrap another model", lambda: kappa_fast.wrap(torch.optim.SGD, model(), other, lr=0.1)
    yield "wrap twice", _twice
    yield "wrap with LBFGS", lambda: _wrapped(torch.optim.LBFGS, SELECTED["halves"], {})
    yield "wrap what is no optimizer", lambda: wrap(nn.Linear, model(), _selected(model(), share))
    yield "wrap without a learning rate", lambda: _wrapped(torch.optim.Adafactor, share, {"lr": -1})
    yield "wrap, patterns of nothing", lambda: _wrapped(torch.optim.SGD, share, {"lr": 0.1}, ("nowhere",))
    yield "a state of another selection", _other_state


def _twice() -> None:
    made = model()
    selection = _selected(made, SELECTED["a share"])
    kappa_fast.wrap(torch.optim.SGD, made, selection, lr=0.1)
    kappa_fast.wrap(torch.optim.SGD, made, selection, lr=0.1)


def _other_state() -> None:
    one, two = model(), model()
    first: Any = kappa_fast.wrap(torch.optim.SGD, one, _selected(one, SELECTED["a share"]), lr=0.1)
    second: Any = kappa_fast.wrap(torch.optim.SGD, two, _selected(two, SELECTED["halves"]), lr=0.1)
    second.load_state_dict(first.state_dict())


def _reference(stored: Stored) -> Cases:
    """The reference implementation's own names."""
    file = stored.place.folder / "reference.json"

    def optimizer(**options: Any) -> dict[str, Any]:
        made = model()
        make = cast(Any, kappa_fast.SelectiveFineTuningOptimizer)
        found = make(made, torch.optim.SGD, {"lr": 0.1}, str(file), **options)
        losses = _train(made, found)
        return {
            "losses": losses,
            "numbers": found.condition_numbers,
            "names": found.trainable_param_names,
            "weights": _weights(made),
        }

    yield "reference, analyzed", partial(optimizer, num_tensors_to_finetune=3)
    yield "reference, read again", partial(optimizer, num_tensors_to_finetune=6)
    yield (
        "reference, a limit",
        partial(optimizer, num_tensors_to_finetune=2, recompute=True, max_dim_size_to_analyze=40),
    )
    yield "reference, nothing", partial(optimizer, num_tensors_to_finetune=0)
    yield "reference, LoRA", _adapted


def _adapted() -> list[str]:
    config = kappa_fast.get_kappa_lora_config(model(), num_modules_to_adapt=3, task_type=None)
    return sorted(config.target_modules or ())


class _Trained(Model):
    """As the Trainer calls it."""

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        logits = torch.stack([super(_Trained, self).forward(row) for row in tokens])
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten())}


def _callbacks(stored: Stored) -> Cases:
    """Of transformers' Trainer, which trains a few steps with each."""
    from kappa_fast.integrations.transformers import KappaDriftCallback, KappaTuneCallback, optimizer_factory

    def tuned(**options: Any) -> dict[str, Any]:
        return _by_trainer(stored, KappaTuneCallback(**options))

    seldom: dict[str, Any] = {"rerank_every": 2, "keep_rankings": True}
    yield "callback", partial(tuned, max_params=0.3)
    yield "callback, selecting anew", partial(tuned, max_params=0.3, reselect=True, **seldom)
    yield "callback with options", partial(tuned, num_tensors=3, unit="parameter", rank_options={"rtol": 1e-3})
    yield "callback of drift", lambda: _by_trainer(stored, KappaDriftCallback(**seldom))
    yield "callback, a misspelt option", lambda: KappaTuneCallback(max_parms=0.3)
    for options in ({"rtol": 3}, {"tops": 3}, {"top": 0}, {"fused": "both"}):
        yield f"callback, {options} for rank", partial(KappaTuneCallback, max_params=0.3, rank_options=options)
        yield (
            f"callback of drift, {options} for rank",
            partial(KappaDriftCallback, rerank_every=1, rank_options=options),
        )
    yield "callback, no budget", lambda: KappaTuneCallback()
    yield "callback, no model", lambda: KappaTuneCallback(max_params=0.3).on_init_end(None, None, None)
    some = ranked().select(num_tensors=1)
    yield "factory without a learning rate", lambda: optimizer_factory(some, torch.optim.SGD)
    yield "factory", lambda: optimizer_factory(some, torch.optim.SGD, lr=0.1)[1]["lr"]


def _by_trainer(stored: Stored, callback: Any) -> dict[str, Any]:
    """Four steps of the Trainer: what was selected, how kappa moved, and the weights in the end."""
    import transformers

    torch.manual_seed(11)
    made = _Trained().eval()
    batches = [{"tokens": torch.randint(0, 64, (8,), generator=seeded(i))} for i in range(8)]
    options = transformers.TrainingArguments(
        output_dir=str(stored.new("trainer")),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=100,
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer = transformers.Trainer(model=made, args=options, train_dataset=batches, callbacks=[callback])
        trainer.train()
    kappas = [{k: v for k, v in said.items() if "kappa" in k} for said in trainer.state.log_history]
    found = {"weights": _weights(made), "history": callback.history, "log": kappas, "rankings": callback.rankings}
    chosen = getattr(callback, "selection", None)
    words = [line for line in printed.getvalue().splitlines() if line.startswith("kappa_fast")]
    return found | {"selection": chosen, "words": [Text(line) for line in words]}
