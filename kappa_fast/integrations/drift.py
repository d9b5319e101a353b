"""A callback for transformers' Trainer that ranks the model every few steps and logs how kappa moves."""

from __future__ import annotations

import inspect
import logging
import math
import statistics
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from ..errors import OptionError, missing_extra
from ..options import Options
from ..pipeline import rank
from ..results.entries import TensorKappa
from ..results.ranking import Ranking
from ..sources.adapters import adapted_in
from ..sources.flattened import names_within
from ..sources.unsharded import is_sharded

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler
except ImportError as missing:
    raise missing_extra("transformers", "transformers", "kappa_fast.integrations.transformers") from missing

log = logging.getLogger("kappa_fast")

KINDS = ("trained", "frozen")


class KappaDriftCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ranks the model before training and every ``rerank_every`` steps, and logs how kappa moves in the Trainer's log.

    The callback neither trains nor freezes anything, so it fits any training: of all weights, of LoRA and other
    adapters of PEFT (whose effect is measured, ``adapters="merged"``), or of a selection.

        Trainer(..., callbacks=[KappaDriftCallback(rerank_every=500)])

    ``state.log_history``, and so Weights & Biases, TensorBoard and the like, get ``kappa_trained`` and ``kappa_frozen``
    (medians over the matrices), and after the first ranking ``kappa_trained_change``, ``kappa_trained_change_largest``
    and the same for frozen ones: the median and the largest relative change since the beginning (0.1 is 10%).

    Args:
        rerank_every: steps after which the model is ranked again.
        rank_options: for ``rank``, such as include, rtol or device.
        keep_rankings: keep every ranking in ``rankings``.

    Attributes:
        ranking: the first ranking; None before.
        rankings: by step, all rankings, where they are kept.
        history: a dict for each ranking after the first: step, and for "trained" and "frozen" matrices the median and
            the largest relative change of kappa since the beginning.

    Raises:
        OptionError: an option is not valid.  on_init_end: the Trainer has no model yet.
        ShardedError: the model is sharded in a way that is not understood.
    """

    def __init__(
        self,
        *,
        rerank_every: int,
        rank_options: Mapping[str, Any] | None = None,
        keep_rankings: bool = False,
    ) -> None:
        self._prepare(rerank_every, rank_options, keep_rankings)

    def _prepare(self, every: int | None, options: Mapping[str, Any] | None, keep: bool) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise OptionError(f"rerank_every={every!r}: give a number of steps from 1 on, or None")
        check_rank_options(options or {})
        self._every, self._keep = every, keep
        self._options = {"progress": False, **(options or {})}
        self._model: nn.Module | None = None
        self._start: dict[str, float] = {}  # kappa by key, when training began
        self._begun = False
        self.ranking: Ranking | None = None
        self.rankings: dict[int, Ranking] = {}
        self.history: list[dict[str, Any]] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Rank for the first time."""
        if model is None:
            raise OptionError("the Trainer has no model yet: give it the model, not model_init")
        self._model = model
        self._rank_first(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Write the first figures into the log."""
        self._log_first(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Every so many steps, rank again."""
        if self._is_due(state):
            self._rank_again(args, state, control, model)

    def _is_due(self, state: Any) -> bool:
        return self._every is not None and state.global_step % self._every == 0 and self._model is not None

    def _trained(self, entries: Iterable[TensorKappa]) -> Collection[str]:
        """The keys of matrices that train, or whose adapters train."""
        assert self._model is not None
        named = ((name, p) for name, p in self._model.named_parameters() if p.requires_grad)
        owners = {_module_name(one.rpartition(".")[0]) for name, p in named for one in names_within(name, p)}
        return {entry.key for entry in entries if _module_name(entry.name.rpartition(".")[0]) in owners}

    def _rank_first(self, model: nn.Module) -> None:
        self.ranking = ranked(model, self._options)
        self._start = {entry.key: entry.kappa for entry in self.ranking}
        if self._keep:
            self.rankings[0] = self.ranking

    def _log_first(self, args: Any, state: Any, control: Any) -> None:
        if self.ranking is not None and self._every is not None and not self._begun and not state.global_step:
            write_log(args, state, control, _medians(self.ranking, self._trained(self.ranking)))
        self._begun = True

    def _rank_again(self, args: Any, state: Any, control: Any, model: nn.Module | None) -> Ranking:
        """model: what the Trainer has made of the model by now: FSDP1 keeps in a wrapper where the weights are."""
        assert self._model is not None
        wrapped = model is not None and any(module is self._model for module in model.modules())
        now = ranked(model if wrapped and model is not None else self._model, self._options)
        trained = self._trained(now)
        drift = {"step": state.global_step, **_drift(self._start, now, trained)}
        self.history.append(drift)
        if self._keep:
            self.rankings[state.global_step] = now
        log.info("kappa after %(step)d steps: trained %(trained)s, frozen %(frozen)s", drift)
        figures = _medians(now, trained)
        for kind in KINDS:
            figures |= {f"kappa_{kind}_change": drift[kind]["median"]}
            figures |= {f"kappa_{kind}_change_largest": drift[kind]["largest"]}
        write_log(args, state, control, figures)
        return now


def check_rank_options(options: Mapping[str, Any]) -> None:
    """Raises OptionError if these are not valid options of rank(), before any work is done."""
    known = [name for name in inspect.signature(rank).parameters if name not in ("source", "process_group")]
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise OptionError(f"rank_options has {unknown!r}, which rank() does not take: it takes {', '.join(known)}")
    Options(**{f.name: options[f.name] for f in fields(Options) if f.init and f.name in options})


def ranked(model: nn.Module, options: Mapping[str, Any]) -> Ranking:
    """rank() for a model of the Trainer; weights with adapters are ranked as the merged weights.

    A sharded model is ranked by all processes together: the Trainer calls its callbacks on each of them.

    Raises:
        ShardedError: the model is sharded in a way, or in a state, that is not understood.
    """
    merged = {"adapters": "merged"} if adapted_in(model) is not None else {}
    together: dict[str, Any] = {}
    if is_sharded(model):
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            together = {"process_group": distributed.group.WORLD}
    return rank(model, **{**merged, **options, **together})


def write_log(args: Any, state: Any, control: Any, figures: Mapping[str, float]) -> None:
    """Write figures as Trainer.log does: into log_history, and to every callback that reports."""
    finite = {key: value for key, value in figures.items() if math.isfinite(value)}
    if not finite:
        return
    if state.epoch is not None:
        finite["epoch"] = state.epoch
    state.log_history.append({**finite, "step": state.global_step})
    handler = _handler()
    if handler is not None:
        due = control.should_log  # on_log resets this flag
        handler.on_log(args, state, control, finite)
        control.should_log = due


def _handler() -> Any:
    """The CallbackHandler on the call stack, since the Trainer does not pass it to callbacks."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, CallbackHandler):
            return found
        frame = frame.f_back
    return None


def _module_name(name: str) -> str:
    """The name of the module of a parameter; modules that PEFT puts into a layer count as the layer."""
    from ..results.names import plain_name

    words = plain_name(f"{name}.weight").split(".")[:-1]
    inner = next(
        (i for i, word in enumerate(words) if word.startswith(("lora_", "base_layer", "modules_to_save"))), None
    )
    return ".".join(words[:inner])


def _medians(ranking: Ranking, trained: Collection[str]) -> dict[str, float]:
    kappas: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for entry in ranking:
        if math.isfinite(entry.kappa):
            kappas["trained" if entry.key in trained else "frozen"].append(entry.kappa)
    return {f"kappa_{kind}": statistics.median(found) for kind, found in kappas.items() if found}


def _drift(start: Mapping[str, float], now: Ranking, trained: Collection[str]) -> dict[str, dict[str, float]]:
    """The relative changes of kappa of trained and of frozen matrices."""
    changes: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for entry in now:
        first = start.get(entry.key, math.nan)
        if math.isfinite(first) and math.isfinite(entry.kappa):
            changes["trained" if entry.key in trained else "frozen"].append(abs(entry.kappa / first - 1))
    return {
        kind: {"median": statistics.median(found), "largest": max(found)} if found else {"median": 0.0, "largest": 0.0}
        for kind, found in changes.items()
    }
