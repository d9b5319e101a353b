"""One run: a base, a task, a method, a learning rate. What it returns is one line of the journal."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import bases, methods, texts
from .weights import base_name

DIVERGED = 2.0  # nats per token above the base, or not a number


def fine_tune(job: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Trains one method on one task, and measures both texts at the end of each budget of steps.

    The learning rate rises over ``warm`` steps and stays; at 80% of each budget a branch falls to nothing over the
    remaining 20% and is measured at its end. Then the weights and the optimizer's state are put back, and the level
    part goes on. So every endpoint is that of a whole schedule, and the long ones need not repeat the short.
    """
    started = time.process_time(), time.monotonic()
    device = torch.device(settings.get("device", "cpu"))
    model = bases.load(job["kind"], job["base"], folder).to(device)
    task = texts.load(job["task"], folder / "texts")
    old = texts.load(settings["corpus"], folder / "texts")
    measure = _Measure(model, old, task, settings, _file(job, folder))
    draw = bases.hash_of("draw", job["base"], job["draw"]) % 2**31
    prepared = methods.prepare(model, job["recipe"], job["fraction"], draw, job["lr"])
    budgets = sorted(int(steps) for steps in settings["budgets"])
    seed = bases.hash_of("batches", job["base"], job["seed"], job["task"])
    batches = task.batches(seed, budgets[-1], settings["size"], settings["length"])
    said: dict[str, Any] = {
        "status": "ok",
        "selected": prepared.said,
        "batches": texts.digest_of(batches.flatten()),
        "corpora": {old.name: old.digest, task.name: task.digest},
        "start": measure.base,
    }
    batches = batches.to(device)
    trainer = Trainer(prepared, job["lr"], int(settings["warm"]))
    endpoints = trainer.through(batches, budgets, measure, measure.base["validation"] + DIVERGED)
    if len(endpoints) < len(budgets):
        said["status"] = "diverged"
    return said | {
        "endpoints": endpoints,
        "curve": [float(f"{loss:.6g}") for loss in trainer.curve],
        "seconds": {"cpu": time.process_time() - started[0], "wall": time.monotonic() - started[1]},
    }


def _branch(steps: int) -> int:
    return max(1, steps // 5)


def _level(steps: int) -> int:
    return steps - _branch(steps)


class Trainer:
    """Steps on batches in their order. A branch sees those that the level part would see next."""

    def __init__(self, prepared: methods.Prepared, lr: float, warm: int) -> None:
        self.prepared, self.lr, self.warm = prepared, lr, warm
        self.done = 0
        self.curve: list[float] = []

    def through(
        self, batches: Any, budgets: list[int], measure: Callable[[nn.Module], dict[str, float]], worst: float
    ) -> dict[str, dict[str, float]]:
        """What is measured at the end of each budget, up to the first that has diverged."""
        endpoints: dict[str, dict[str, float]] = {}
        for steps in budgets:
            self.level(batches, _level(steps))
            kept = self.keep()
            self.fall(batches, _branch(steps))
            found = measure(self.prepared.model)
            if not math.isfinite(found["new"]) or found["validation"] > worst:
                break
            endpoints[str(steps)] = found
            self.put_back(kept)
        return endpoints

    def level(self, batches: Any, until: int) -> None:
        while self.done < until:
            self._step(batches[self.done], min(1.0, (self.done + 1) / self.warm))

    def fall(self, batches: Any, steps: int) -> None:
        for i in range(steps):
            self._step(batches[self.done], (steps - i) / (steps + 1))

    def _step(self, batch: Any, share: float) -> None:
        prepared = self.prepared
        prepared.model.train()
        self.set_rate(share)
        loss = self.loss(batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(list(prepared.trained.values()), 1.0)
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
        self.curve.append(float(loss.detach()))
        self.done += 1

    def set_rate(self, share: float) -> None:
        for group in self.prepared.optimizer.param_groups:
            group["lr"] = self.lr * share

    def loss(self, batch: Any) -> torch.Tensor:
        found: torch.Tensor = self.prepared.model(input_ids=batch, labels=batch).loss
        return found

    def keep(self) -> tuple[int, dict[str, torch.Tensor], Any]:
        weights = {name: p.detach().clone() for name, p in self.prepared.trained.items()}
        return self.done, weights, copy.deepcopy(self.prepared.optimizer.state_dict())

    @torch.no_grad()
    def put_back(self, kept: tuple[int, dict[str, torch.Tensor], Any]) -> None:
        self.done, weights, state = kept
        for name, parameter in self.prepared.trained.items():
            parameter.copy_(weights[name])
        self.prepared.optimizer.load_state_dict(state)


class _Measure:
    """Losses on both texts, their rise over the base, and KL from the base on the new text; in nats per token."""

    def __init__(
        self, model: nn.Module, old: texts.Corpus, task: texts.Corpus, settings: Mapping[str, Any], file: Path
    ) -> None:
        count, length = int(settings["windows"]), int(settings["length"])
        device = torch.device(settings.get("device", "cpu"))
        self.old = old.windows("test", count, length).to(device)
        self.new = task.windows("test", count, length).to(device)
        self.validation = task.windows("validation", int(settings["validation"]), length).to(device)
        # KL needs all probabilities of the base: for large vocabularies of some windows only.
        some = bases.at_once(model, self.new, most=count)
        self.compared = self.new[torch.arange(some) * count // some]
        self.logs, self.base = self._reference(model, file)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        logs, new = self._new(model)
        old = bases.losses(model, self.old)
        kl = (self.logs.exp() * (self.logs - logs)).sum(-1)
        return {
            "old": float(old.mean()),
            "forgotten": float(old.mean()) - self.base["old"],
            "new": float(new.mean()),
            "validation": bases.loss_of(model, self.validation),
            "kl": float(kl.double().mean()),
        }

    def _new(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities for the windows whose KL is taken, and the losses of all windows of the new text."""
        size = bases.at_once(model, self.new)
        logs = bases.log_probabilities(model, self.compared, size)
        if len(self.compared) == len(self.new):
            return logs, bases.entropies(logs, self.new)
        return logs, bases.losses(model, self.new)

    def _reference(self, model: nn.Module, file: Path) -> tuple[torch.Tensor, dict[str, float]]:
        """What the base says, computed by the first run that needs it."""
        if file.exists():
            kept = torch.load(file, map_location=self.new.device)
            return kept["logs"], kept["base"]
        logs, new = self._new(model)
        found = {
            "old": bases.loss_of(model, self.old),
            "new": float(new.mean()),
            "validation": bases.loss_of(model, self.validation),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        torch.save({"logs": logs, "base": found}, scratch)
        scratch.replace(file)
        return logs, found


def _file(job: Mapping[str, Any], folder: Path) -> Path:
    return folder / "references" / f"{base_name(job['kind'], job['base'])}-{job['task']}.pt"
