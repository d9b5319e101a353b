"""transformers' Trainer (and what derives from it, such as TRL's SFTTrainer): an optimizer factory and a callback."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import OptionError, missing_extra
from ..optimizer import wrap
from ..pipeline import rank
from ..ranking import Ranking
from ..selection import Selection
from ..serialize import write_text
from ..training.handle import Handle
from ..training.masks import is_sharded
from .names import match

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise missing_extra("transformers", "transformers", "kappa_fast.integrations.transformers") from missing

log = logging.getLogger("kappa_fast")

KEPT = "kappa_selection.json"  # in a checkpoint of the Trainer: what was selected, and a mark of the weights


class SelectedOptimizer:
    """What the Trainer makes and calls with the model; ``optimizer_factory`` gives it with its arguments."""

    def __call__(
        self,
        model: nn.Module,
        *,
        selection: Selection | Callable[[nn.Module], Selection],
        optimizer_cls: type[Optimizer],
        **options: Any,
    ) -> Optimizer:
        """See ``wrap``; ``selection`` may be a function of the model, for a model that is made later."""
        chosen = selection if isinstance(selection, Selection) else selection(model)
        return wrap(optimizer_cls, model, chosen, **options)


def optimizer_factory(
    selection: Selection | Callable[[nn.Module], Selection],
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> tuple[type[SelectedOptimizer], dict[str, Any]]:
    """For ``Trainer(..., optimizer_cls_and_kwargs=optimizer_factory(selection, torch.optim.AdamW, lr=5e-5))``.

    The Trainer's own learning rate, betas and weight decay do not reach an optimizer that is given like this: give them
    here. Its schedules, clipping and checkpoints do. Works with ``model_init``, with accelerate, DDP and FSDP2.

    Args:
        selection: what to train, or a function that takes the model and returns it.
        optimizer_cls, options: as for ``kappa_fast.wrap``.
    """
    return SelectedOptimizer, {"selection": selection, "optimizer_cls": optimizer_cls, **options}


class KappaTuneCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ranks the model when the Trainer is made, and lets it train the selection alone, with the Trainer's optimizer.

        Trainer(..., callbacks=[KappaTuneCallback(max_params=0.2, rerank_every=500)])

    Args:
        rerank_every: steps after which the model is ranked again, to see how kappa drifts; None for never.
        reselect: select anew each time, and let the optimizer go on with that.
        rank_options: for ``rank``, such as include, rtol or device.
        budget: for ``Ranking.select``: one of num_tensors, top_p, max_kappa, max_params; per_group, unit.

    Every checkpoint of the Trainer keeps what was selected, and a run that is resumed goes on with that, so that the
    state of the optimizer meets the parameters that it belongs to. Checkpoints are looked for in ``output_dir`` and at
    ``TrainingArguments(resume_from_checkpoint=...)``.

    Attributes:
        ranking, selection, handle: what was found and done; None before.
        history: a dict for each ranking after the first: step, and for "trained" and "frozen" matrices the median and
            the largest relative change of kappa since the beginning (0.1 is 10%, up or down).

    Raises:
        OptionError: on_init_end: the model is sharded.  on_train_begin: the Trainer has made another model since.

    Warns:
        UserWarning: on_train_begin: a run is resumed, and nothing says what was selected in it.
    """

    def __init__(
        self,
        *,
        rerank_every: int | None = None,
        reselect: bool = False,
        rank_options: Mapping[str, Any] | None = None,
        **budget: Any,
    ) -> None:
        if rerank_every is not None and rerank_every < 1:
            raise OptionError(f"rerank_every={rerank_every}: give a number of steps from 1 on, or None")
        if reselect and rerank_every is None:
            raise OptionError("reselect=True selects anew whenever the model is ranked again: give rerank_every")
        self._every, self._reselect = rerank_every, reselect
        self._options, self._budget = {"progress": False, **(rank_options or {})}, budget
        self._model: nn.Module | None = None
        self._args: Any = None
        self._training, self._resumed = False, None
        self.ranking: Ranking | None = None
        self.selection: Selection | None = None
        self.handle: Handle | None = None
        self.history: list[dict[str, Any]] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Rank, select, and set requires_grad."""
        if model is None:
            raise OptionError("the Trainer has no model yet: use optimizer_factory(), which waits for it")
        self._model, self._args = model, args
        model.register_load_state_dict_post_hook(_Loaded(self))  # type: ignore[no-untyped-call]
        self.ranking = _ranked(model, self._options)
        self.selection = self.ranking.select(**self._budget)
        self.handle = self.selection.apply(model)
        low, high = self.selection.kappa_range
        budget = ", ".join(f"{key}={value}" for key, value in self._budget.items())
        total = sum(p.numel() for p in model.parameters())
        log.info(
            "%s: %d matrices of %d parameters, %s of %s weights (%.1f%%), kappa %.4g to %.4g",
            budget,
            len(self.selection),
            len(self.selection.names),
            f"{self.selection.num_params:,}",
            f"{total:,}",
            100 * self.selection.num_params / max(1, total),
            low,
            high,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """The model must be the one that was ranked."""
        if self._model is None or (model is not None and not _same(model, self._model)):
            raise OptionError(
                "the Trainer has made another model since it was ranked (model_init does): give it "
                "optimizer_cls_and_kwargs=optimizer_factory(lambda model: kappa_fast.rank(model).select(...), ...)"
            )
        if state.global_step and self._resumed != state.global_step:
            warnings.warn(
                f"training goes on after step {state.global_step} of a run whose selection is not known (no {KEPT} for "
                "it), so that the state of the optimizer may belong to other parameters: give the checkpoint in "
                "TrainingArguments(resume_from_checkpoint=...) too, or begin with a new optimizer",
                stacklevel=2,
            )
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Weights that are loaded from now on may belong to a run that is resumed."""
        self._training = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep what was selected beside the optimizer's state."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if self.selection is None or self.handle is None or not state.is_world_process_zero or not folder.is_dir():
            return
        self.selection.to_json(folder / KEPT)
        document = json.loads((folder / KEPT).read_text())
        document |= {"step": state.global_step, "mark": _mark(self._model, self.selection)}
        write_text(folder / KEPT, json.dumps(document))

    def weights_were_loaded(self) -> None:
        """If they are those of a checkpoint, as when a run is resumed, go on with what was selected there."""
        if self._training or self._model is None:
            return
        given = getattr(self._args, "resume_from_checkpoint", None)
        folders = [Path(given)] if isinstance(given, str) else []
        folders += Path(self._args.output_dir).glob("checkpoint-*")
        for file in (folder / KEPT for folder in folders):
            try:
                document, kept = json.loads(file.read_text()), Selection.from_json(file)
            except (OSError, ValueError):
                continue
            if document.get("mark") != _mark(self._model, kept):
                continue
            if self.handle is not None:
                self.handle.restore()
            self.selection, self._resumed = kept, document.get("step")
            self.handle = kept.apply(self._model)
            return

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Every so many steps, rank again."""
        if self._every is None or state.global_step % self._every or self._model is None or self.ranking is None:
            return
        now = _ranked(self._model, self._options)
        drift = {"step": state.global_step, **_drift(self.ranking, now, self.selection)}
        self.history.append(drift)
        log.info("kappa after %(step)d steps: trained %(trained)s, frozen %(frozen)s", drift)
        if self._reselect and self.handle is not None:
            self.handle.restore()
            self.selection = now.select(**self._budget)
            self.handle = self.selection.apply(self._model)
            chosen = {id(t.parameter) for t in self.handle.targets}
            _hand_over(
                getattr(optimizer, "optimizer", optimizer), [p for p in self._model.parameters() if id(p) in chosen]
            )


class _Loaded:
    """Called after a state dict was loaded into the model; a copy of the model gets one that does nothing."""

    def __init__(self, callback: KappaTuneCallback | None = None) -> None:
        self._callback = callback

    def __call__(self, *_: Any) -> None:
        if self._callback is not None:
            self._callback.weights_were_loaded()

    def __reduce__(self) -> Any:
        return _Loaded, ()


def _mark(model: nn.Module | None, selection: Selection) -> str | None:
    """Tells the weights of one checkpoint from those of another, by what the selection trains; None without a model."""
    if model is None:
        return None
    try:
        targets = match(selection, model)
    except OptionError:
        return None
    found = hashlib.sha256()
    for target in targets:
        found.update(target.parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _ranked(model: nn.Module, options: Mapping[str, Any]) -> Ranking:
    sharded = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
    if sharded is not None:
        raise OptionError(
            f"{sharded!r} is sharded, and sharded models cannot be ranked yet: rank the checkpoint, and give the "
            "selection to optimizer_factory()"
        )
    return rank(model, **options)


def _same(one: nn.Module, other: nn.Module) -> bool:
    return any(module is other for module in one.modules()) or any(module is one for module in other.modules())


def _drift(before: Ranking, now: Ranking, selection: Selection | None) -> dict[str, dict[str, float]]:
    """The relative change of kappa of what is trained and of what is not."""
    chosen = set(selection.keys) if selection is not None else set()
    start = {entry.key: entry.kappa for entry in before}
    changes: dict[str, list[float]] = {"trained": [], "frozen": []}
    for entry in now:
        first = start.get(entry.key, math.nan)
        if math.isfinite(first) and math.isfinite(entry.kappa):
            changes["trained" if entry.key in chosen else "frozen"].append(abs(entry.kappa / first - 1))
    return {
        kind: {"median": statistics.median(found), "largest": max(found)} if found else {"median": 0.0, "largest": 0.0}
        for kind, found in changes.items()
    }


def _hand_over(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Let an optimizer go on with other parameters: matrices in its first group, the rest in its last.

    ``parameters`` are in the order of the model, as in an optimizer that is made anew: state is saved by position.
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
