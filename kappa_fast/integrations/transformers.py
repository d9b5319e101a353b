"""An optimizer factory and a callback for transformers' Trainer and its subclasses, such as TRL's SFTTrainer."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import OptionError, missing_extra
from ..results.entries import TensorKappa
from ..results.selecting import check_budget
from ..results.selection import Selection
from ..texts import warn
from ..training.handle import Handle, refuse_occupied
from ..training.optimizer import wrap
from .drift import KappaDriftCallback
from .resuming import KEPT, check_optimizer, check_resumed, check_weights, find, keep, mark_of, names_of

try:
    from transformers.trainer_callback import ExportableState
except ImportError as missing:
    raise missing_extra("transformers", "transformers", "kappa_fast.integrations.transformers") from missing

__all__ = ["KappaDriftCallback", "KappaTuneCallback", "SelectedOptimizer", "optimizer_factory"]


class SelectedOptimizer:
    """The class that the Trainer makes and calls with the model and the arguments of ``optimizer_factory``."""

    def __call__(
        self,
        model: nn.Module,
        *,
        selection: Selection | Callable[[nn.Module], Selection],
        optimizer_cls: type[Optimizer],
        **options: Any,
    ) -> Optimizer:
        """See ``wrap``; ``selection`` may be a function that takes the model, for a model that is made later."""
        chosen = selection if isinstance(selection, Selection) else selection(model)
        return wrap(optimizer_cls, model, chosen, **options)


def optimizer_factory(
    selection: Selection | Callable[[nn.Module], Selection],
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    args: Any = None,
    no_decay: bool | Sequence[str] = True,
    **options: Any,
) -> tuple[type[SelectedOptimizer], dict[str, Any]]:
    """For ``Trainer(..., optimizer_cls_and_kwargs=optimizer_factory(selection, torch.optim.AdamW, args=args))``.

    The Trainer does not pass its learning rate, betas and weight decay to such an optimizer: give the TrainingArguments
    here too, or ``lr`` and the others. Schedules, clipping and checkpoints work, also with ``model_init``, accelerate,
    DDP and FSDP2.

    Args:
        selection: what to train, or a function that takes the model and returns it.
        optimizer_cls, options: as for ``kappa_fast.wrap``.
        args: the Trainer's TrainingArguments, which give the learning rate, weight decay, betas and epsilon unless
            ``optimizer_cls`` does not take them or ``options`` has them.
        no_decay: as for ``kappa_fast.wrap``: by default norms and biases have no weight decay, as in the Trainer.

    Raises:
        OptionError: neither ``lr`` nor ``args`` is given, so that the class's own default would be used.
    """
    known = inspect.signature(optimizer_cls).parameters
    if args is not None:
        betas = (args.adam_beta1, args.adam_beta2)
        taken = dict(lr=args.learning_rate, weight_decay=args.weight_decay, betas=betas, eps=args.adam_epsilon)
        # The TrainingArguments have the epsilon of Adam, which other optimizers must not get.
        taken = {name: value for name, value in taken.items() if name != "eps" or "betas" in known}
        options = {**{name: value for name, value in taken.items() if name in known}, **options}
    if "lr" in known and "lr" not in options:
        default = known["lr"].default
        raise OptionError(
            f"optimizer_factory() has no learning rate, so that {optimizer_cls.__name__} would train with its own "
            f"default ({default!r}) instead of that of the TrainingArguments: give args=training_args, or lr=5e-5"
        )
    chosen = {"selection": selection, "optimizer_cls": optimizer_cls, "no_decay": no_decay}
    return SelectedOptimizer, {**chosen, **options}


class KappaTuneCallback(KappaDriftCallback, ExportableState):  # type: ignore[misc, unused-ignore]
    """Ranks the model when the Trainer is made, and lets the Trainer train the selection only, with its own optimizer.

        Trainer(..., callbacks=[KappaTuneCallback(max_params=0.2, rerank_every=500)])

    It prints one line about the selection. With ``rerank_every`` it logs how kappa moves, see KappaDriftCallback.

    Args:
        rerank_every: steps after which the model is ranked again, to see how kappa drifts; None for never.
        reselect: select again each time, and let the optimizer continue with the new selection.
        rank_options: options of ``rank``, such as include, rtol or device.
        keep_rankings: keep every ranking in ``rankings``, by step.
        budget: options of ``Ranking.select``: num_tensors, top_p, max_kappa, max_params; per_group, unit.

    Every checkpoint of the Trainer keeps the selection, and a resumed run continues with it, so that the state of the
    optimizer is loaded for the same parameters. Checkpoints are searched in ``output_dir`` and at
    ``TrainingArguments(resume_from_checkpoint=...)``. The Trainer's state has the selection too, and is checked.

    Attributes:
        ranking, selection, handle: the first results; None before the Trainer is made.
        rankings, history: see KappaDriftCallback.

    Raises:
        OptionError: an option is misspelt or not valid, or there is no budget.  on_init_end: the model
            has adapters of PEFT, or has a selection already.  on_train_begin: the Trainer has made another model since;
            the resumed run had another selection or other options.

    Warns:
        UserWarning: on_train_begin: a run is resumed whose selection is not known.
    """

    def __init__(
        self,
        *,
        rerank_every: int | None = None,
        reselect: bool = False,
        rank_options: Mapping[str, Any] | None = None,
        keep_rankings: bool = False,
        **budget: Any,
    ) -> None:
        self._prepare(rerank_every, rank_options, keep_rankings)
        if reselect and rerank_every is None:
            raise OptionError("reselect=True selects again whenever the model is ranked again: give rerank_every")
        check_budget(budget)
        self._reselect, self._budget = reselect, budget
        self._given = {"rerank_every": rerank_every, "reselect": reselect, "keep_rankings": keep_rankings, **budget}
        self._args: Any = None
        self._training = False
        self._mark: str | None = None
        self._resumed: int | None = None
        self.selection: Selection | None = None
        self.handle: Handle | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Rank, select, and set requires_grad."""
        if model is None:
            raise OptionError("the Trainer has no model yet: use optimizer_factory(), which waits for it")
        refuse_occupied(model)
        self._model, self._args = model, args
        model.register_load_state_dict_post_hook(_Loaded(self))  # type: ignore[no-untyped-call]
        self._rank_first(model)
        assert self.ranking is not None
        self.selection = self.ranking.select(**self._budget)
        self.handle = self.selection.apply(model)
        _CALLBACKS[model] = weakref.ref(self)
        if state is None or state.is_world_process_zero:
            print(f"kappa_fast trains {describe(self.selection)}; {self.handle.describe()}")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **more: Any) -> None:
        """The model must be the one that was ranked, and a run that is resumed must have had this selection."""
        self._take_over_from(model)
        if self._model is None or self.handle is None or (model is not None and not _same(model, self._model)):
            raise OptionError(
                "the Trainer has made another model since the ranking (model_init does): give the Trainer "
                "optimizer_cls_and_kwargs=optimizer_factory(lambda model: kappa_fast.rank(model).select(...), ...)"
            )
        name, states = type(self).__name__, state.stateful_callbacks
        kept = states.get(name) if isinstance(states, dict) else None
        kept = kept.get("attributes", {}).get("kept") if isinstance(kept, dict) else None
        if state.global_step:
            if isinstance(kept, Mapping):
                check_resumed(kept, self.handle, self._deciding())
                check_weights(kept, self._model, self.handle.selection)
                self.history = [dict(found) for found in kept.get("history", ())]
            elif self._resumed != state.global_step:
                warn(
                    f"training goes on after step {state.global_step} of a run whose selection is not known (no {KEPT} "
                    "for it), so that the state of the optimizer may belong to other parameters: give the checkpoint "
                    "in TrainingArguments(resume_from_checkpoint=...) too, or begin with a new optimizer",
                )
            check_optimizer(more.get("optimizer"), self._model)
        if isinstance(states, dict):
            states.setdefault(name, self.state())  # the checkpoint was made without this callback
        self._training = True
        self._log_first(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Expect that weights which are loaded from now on may belong to a resumed run."""
        self._training = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the selection beside the optimizer's state."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        known = self._model is not None and self.selection is not None and state.is_world_process_zero
        if known and folder.is_dir():
            assert self.selection is not None
            keep(folder, self.selection, state.global_step, self._mark, self._start)

    def state(self) -> dict[str, Any]:
        """The trained names and the options that chose them, which the Trainer writes into trainer_state.json."""
        kept: dict[str, Any] = {"options": self._deciding(), "history": self.history}
        if self.handle is not None and self.selection is not None and self._model is not None:
            kept["names"] = names_of(self.handle)
            if self._training:  # a checkpoint is being made
                kept["mark"] = self._mark = mark_of(self._model, self.selection)
                kept["dtypes"] = sorted({str(target.parameter.dtype) for target in self.handle.targets})
        return {"args": _as_json(self._given), "attributes": {"kept": _as_json(kept)}}

    def _deciding(self) -> dict[str, Any]:
        """The options that decide the selection."""
        options = {key: value for key, value in self._options.items() if key not in _WITHOUT_EFFECT}
        found: dict[str, Any] = _as_json({**options, **self._budget, "reselect": self._reselect})
        return found

    def _take_over_from(self, model: nn.Module | None) -> None:
        """Take the results of the callback that this one replaces (restore_callback_states_from_checkpoint)."""
        found = _CALLBACKS.get(model) if self._model is None and model is not None else None
        before = found() if found is not None else None
        if before is not None:
            for name, value in vars(before).items():
                setattr(self, name, value)

    def weights_were_loaded(self) -> None:
        """Continue with the selection of a checkpoint if its weights were loaded, as when a run is resumed."""
        if self._training or self._model is None:
            return
        found = find(self._args, self._model)
        if found is None:
            return
        if self.handle is not None:
            self.handle.restore()
        self.selection, self._resumed = found.selection, found.step
        self._start = found.start or self._start
        self.handle = found.selection.apply(self._model)
        if getattr(self._args, "process_index", 0) == 0:
            print(f"kappa_fast continues with the selection of step {found.step}: {describe(found.selection)}")

    def _trained(self, entries: Iterable[TensorKappa]) -> Collection[str]:
        return set(self.selection.keys) if self.selection is not None else ()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Every so many steps, rank again."""
        if not self._is_due(state) or self._model is None or self.ranking is None:
            return
        now = self._rank_again(args, state, control, model)
        if self._reselect and self.handle is not None:
            self.handle.restore()
            self.selection = now.select(**self._budget)
            self.handle = self.selection.apply(self._model)
            chosen = {id(t.parameter) for t in self.handle.targets}
            _hand_over(
                getattr(optimizer, "optimizer", optimizer), [p for p in self._model.parameters() if id(p) in chosen]
            )


# Options of rank() that do not change the result.
_WITHOUT_EFFECT = ("progress", "device", "backend", "memory_budget", "cache")
_CALLBACKS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[KappaTuneCallback]] = weakref.WeakKeyDictionary()


def describe(selection: Selection) -> str:
    """One line about a selection."""
    low, high = selection.kappa_range
    budget = ", ".join(f"{name}={value}" for name, value in selection.budgets.items())
    found = f"{len(selection):,} matrices of {len(selection.names):,} parameters, kappa {low:.4g} to {high:.4g}"
    return ": ".join(filter(None, (budget, found))) + (f" ({selection.unfit()})" if selection.unfit() else "")


def _as_json(value: Any) -> Any:
    """The value after a round trip through JSON; an object that JSON cannot hold is given by its name."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return getattr(value, "__name__", str(value))


class _Loaded:
    """A hook after a state dict was loaded into the model; a copy of the model gets a hook that does nothing."""

    def __init__(self, callback: KappaTuneCallback | None = None) -> None:
        self._callback = callback

    def __call__(self, *_: Any) -> None:
        if self._callback is not None:
            self._callback.weights_were_loaded()

    def __reduce__(self) -> Any:
        return _Loaded, ()


def _same(one: nn.Module, other: nn.Module) -> bool:
    return any(module is other for module in one.modules()) or any(module is one for module in other.modules())


def _hand_over(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Give an optimizer other parameters: matrices in its first group, all others in its last one.

    ``parameters`` have the order of the model, as in a new optimizer, since state is saved by position.
    """
    if not isinstance(optimizer, Optimizer):
        raise OptionError("reselect=True needs the Trainer's optimizer, which it did not pass: leave reselect out")
    kept = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in kept]
    present = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter in parameters:
        if id(parameter) not in present:
            optimizer.param_groups[0 if parameter.ndim > 1 else -1]["params"].append(parameter)
    order = {id(p): position for position, p in enumerate(parameters)}
    for group in optimizer.param_groups:
        group["params"].sort(key=lambda p: order[id(p)])
    for held in list(optimizer.state):
        if id(held) not in kept:
            del optimizer.state[held]
