"""The published runs of KappaTune, with the controls that they lack: settings as data, for people with a GPU.

    python -m benchmarks.forgetting.published                               lists them
    python -m benchmarks.forgetting.published NAME --folder DIR             runs what is left of one
    python -m benchmarks.forgetting.published NAME --folder DIR --report    the table of what is there

published/NAME.json has the model and the data by name, the settings, and what was published. What is trained besides:
the highest kappa, random selections of the same types, first and last layers, with as many trainable parameters, and
every method with several seeds. ``"file"`` in place of ``"dataset"`` reads rows from a .jsonl file.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import published_methods as methods
from .journal import Journal
from .report import number, table

CONFIGS = Path(__file__).parent / "published"
Rows = list[torch.Tensor]


def jobs(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every method, draw and seed; a method that trains nothing once."""
    settings = {name: config[name] for name in ("model", "quantization", "learn", "keep", "training")}
    for name, method in config["methods"].items():
        seeds = [0] if method.get("train") == "none" else config["seeds"]
        for draw in range(method.get("draws", 1)):
            for seed in seeds:
                told = {"recipe": method, "draw": draw, "seed": seed}
                yield {"id": methods.digest([settings, told]), "what": "run", "method": name, **told}


def run(config: Mapping[str, Any], folder: Path, only: list[str] | None = None) -> int:
    """Does what the journal in ``folder`` lacks, one after the other, and returns how many results are missing."""
    journal = Journal(folder / "journal.jsonl")
    with journal.locked():
        done = journal.records()
        for job in jobs(config):
            if job["id"] in done or (only and job["method"] not in only):
                continue
            found = one(config, job)
            journal.add({**job, **found})
            print(job["method"], job["draw"], job["seed"], json.dumps(found["perplexity"]), flush=True)
    return len([job for job in jobs(config) if job["id"] not in journal.records()])


def one(config: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """A run: perplexities as they were published, and mean losses of all texts in nats per token."""
    started = time.monotonic()
    training = dict(config["training"]) | ({"epochs": job["recipe"]["epochs"]} if "epochs" in job["recipe"] else {})
    tokenizer, model = methods.opened(config["model"], config["quantization"])
    torch.manual_seed(job["seed"])
    prepared, said = methods.prepare(model, config, job, training)
    learn, test = split(config["learn"], tokenizer)
    keep = coded(rows_of(config["keep"]), config["keep"], tokenizer)
    pad = tokenizer.pad_token_id
    curve: list[float] = []
    if prepared is not None:
        model = prepared.model
        curve = train(prepared, learn, training, job["seed"], pad)
    sets = {"train": learn, "test": test, "keep": keep}
    return {
        "status": "ok",
        "said": said,
        "steps": len(curve),
        "curve": [float(f"{loss:.6g}") for loss in curve],
        "perplexity": {name: perplexity(model, some, pad) for name, some in sets.items()},
        "loss": {name: loss_of(model, some, pad) for name, some in sets.items()},
        "seconds": time.monotonic() - started,
    }


def rows_of(spec: Mapping[str, Any], split_name: str | None = None) -> list[Mapping[str, Any]]:
    """The rows of a data set of the hub, or of a file.

    Raises:
        ImportError: datasets is not installed.
    """
    if "file" in spec:
        return [json.loads(line) for line in Path(spec["file"]).read_text().splitlines() if line.strip()]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{spec['dataset'][0]} is read with the package datasets: pip install datasets") from error
    return list(load_dataset(*spec["dataset"], split=split_name or spec["split"]))


def coded(rows: list[Mapping[str, Any]], spec: Mapping[str, Any], tokenizer: Any) -> Rows:
    """Each row as a text, padded to one length as in the published scripts."""
    found = []
    for row in rows:
        words = {
            name: spec["words"][name][str(value)] if name in spec.get("words", {}) else value
            for name, value in row.items()
        }
        text = spec["format"].format(**words)
        if len(text.strip()) > spec.get("shortest", 0):
            ids = tokenizer(text, padding="max_length", truncation=True, max_length=spec["length"])["input_ids"]
            found.append(torch.tensor(ids))
    return found


def split(spec: Mapping[str, Any], tokenizer: Any) -> tuple[Rows, Rows]:
    """For training and for testing: the same for all methods and seeds."""
    rows = rows_of(spec)
    if isinstance(spec["test"], str):
        return coded(rows, spec, tokenizer), coded(rows_of(spec, spec["test"]), spec, tokenizer)
    random.Random(0).shuffle(rows)
    count = max(1, round(len(rows) * spec["test"]))
    return coded(rows[count:], spec, tokenizer), coded(rows[:count], spec, tokenizer)


def labels_of(batch: torch.Tensor, pad: int, all_of_it: bool = False) -> torch.Tensor:
    """What is predicted: all tokens but padding, as DataCollatorForLanguageModeling has it, or all."""
    return batch if all_of_it else batch.masked_fill(batch == pad, -100)


def train(prepared: methods.Prepared, rows: Rows, training: Mapping[str, Any], seed: int, pad: int) -> list[float]:
    """Steps as transformers' Trainer takes them, or as the reference's loop does; the loss of each."""
    batch, together, epochs = training["batch"], training["accumulate"], training["epochs"]
    parts = math.ceil(len(rows) / batch)
    total = math.ceil(parts / together) * epochs
    model, optimizer = prepared.model, prepared.optimizer
    shuffled = random.Random(seed)
    device = next(model.parameters()).device
    curve: list[float] = []
    model.train()
    for _ in range(epochs):
        order = shuffled.sample(range(len(rows)), len(rows))
        batches = [torch.stack([rows[i] for i in order[at : at + batch]]) for at in range(0, len(order), batch)]
        for at in range(0, len(batches), together):
            some = [piece.to(device) for piece in batches[at : at + together]]
            labels = [labels_of(piece, pad, training["labels"] == "all") for piece in some]
            tokens = sum(int((label[:, 1:] != -100).sum()) for label in labels)
            share = 1 - len(curve) / total if training["schedule"] == "linear" else 1.0
            for group in optimizer.param_groups:
                group["lr"] = training["lr"] * share
            loss = 0.0
            for piece, label in zip(some, labels, strict=True):
                part = _loss(model, piece, label, pad) / tokens
                torch.autograd.backward(part)
                loss += float(part.detach())
            if training["clip"] is not None:
                nn.utils.clip_grad_norm_(prepared.trained, training["clip"])
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss)
    return curve


def _loss(model: nn.Module, batch: torch.Tensor, labels: torch.Tensor, pad: int) -> torch.Tensor:
    """Summed over tokens."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
        logits = model(input_ids=batch, attention_mask=_mask(batch, pad)).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def _mask(batch: torch.Tensor, pad: int) -> torch.Tensor:
    """Padding is at the end or at the beginning; the token may stand for the end of a text inside."""
    real = batch != pad
    inside = real.flip(1).cumsum(1).flip(1).bool() & real.cumsum(1).bool()
    return inside.long()


@torch.no_grad()
def perplexity(model: nn.Module, rows: Rows, pad: int, batch: int = 2, most: int = 41) -> float:
    """The exponential of the mean over the first ``most`` batches of ``batch``, as published scripts take it."""
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for at in range(0, min(len(rows), batch * most), batch):
        piece = torch.stack(rows[at : at + batch]).to(device)
        labels = labels_of(piece, pad)
        count = int((labels[:, 1:] != -100).sum())
        losses.append(float(_loss(model, piece, labels, pad)) / max(1, count))
    model.train()
    return math.exp(statistics.fmean(losses))


@torch.no_grad()
def loss_of(model: nn.Module, rows: Rows, pad: int, batch: int = 8) -> float:
    """Nats per token over all rows: each token counts once."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for at in range(0, len(rows), batch):
        piece = torch.stack(rows[at : at + batch]).to(device)
        labels = labels_of(piece, pad)
        total += float(_loss(model, piece, labels, pad))
        count += int((labels[:, 1:] != -100).sum())
    model.train()
    return total / max(1, count)


def report(config: Mapping[str, Any], folder: Path) -> str:
    """A row for each method: means over seeds and draws, their range, and what was published."""
    records = Journal(folder / "journal.jsonl").records()
    members: dict[str, list[Mapping[str, Any]]] = {}
    for job in jobs(config):
        if job["id"] in records:
            members.setdefault(job["method"], []).append(records[job["id"]])
    lines = []
    for name in config["methods"]:
        if name not in members:
            continue
        line = [name, str(len(members[name])), f"{members[name][0]['said']['trained']:,}"]
        for part in ("train", "test", "keep"):
            values = [record["perplexity"][part] for record in members[name]]
            span = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            line.append(number(statistics.fmean(values)) + span)
        line.append(number(statistics.fmean(record["loss"]["keep"] for record in members[name]), 4))
        known = config["published"].get(name)
        lines.append([*line, " / ".join(f"{known[p]:g}" for p in ("train", "test", "keep")) if known else "-"])
    head = ["method", "runs", "trained", "perplexity, train", "test", "keep", "loss, keep", "published"]
    notes = "".join(f"\n- {note}" for note in config["notes"])
    return f"# {config['name']}\n\n{table(head, lines)}\n\n{config['source']}{notes}\n"


def read(name: str) -> dict[str, Any]:
    """A config by its name or its file."""
    file = CONFIGS / f"{name}.json"
    config: dict[str, Any] = json.loads((file if file.exists() else Path(name)).read_text())
    return config


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.forgetting.published", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", help="of a config, or its file")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--methods", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--epochs", type=int, help="in place of those of the config, for methods without their own")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.name is None:
        for file in sorted(CONFIGS.glob("*.json")):
            config = read(file.stem)
            print(f"{config['name']:<26}{config['model']}, {len(list(jobs(config)))} runs; {config['source']}")
        return
    try:
        config = read(given.name)
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
        parser.error(f"{given.name!r} is no config and no file of one: give one of {names}")
    if given.epochs is not None:
        config["training"]["epochs"] = given.epochs
    if given.folder is None:
        parser.error("--folder is missing")
    if not given.report:
        print(f"{run(config, given.folder, given.methods)} results are missing")
    print(report(config, given.folder))


if __name__ == "__main__":
    main()
