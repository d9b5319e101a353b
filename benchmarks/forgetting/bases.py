"""Base models: small decoders with the layers of Llama and of Mixtral, pre-trained until their loss has flattened."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import kappa_fast

from . import planted, texts
from .weights import base_name, digest, file_of

# By name: the size that is studied, and one for tests.
SHAPES: dict[str, dict[str, Any]] = {
    "dense": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=8),
    "mixture": dict(hidden_size=128, intermediate_size=96, num_hidden_layers=6, num_local_experts=8),
    "dense-tiny": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3),
    "mixture-tiny": dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_local_experts=4),
    "planted": dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_local_experts=8),
}


def build(kind: str, seed: int, shape: Mapping[str, Any] | None = None) -> nn.Module:
    """A model with random weights, by transformers' own initialization."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    common: dict[str, Any] = dict(
        vocab_size=texts.VOCABULARY,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=texts.END,
        eos_token_id=texts.END,
        use_cache=False,
    )
    torch.manual_seed(seed)
    common |= shape or SHAPES[kind]
    if "num_local_experts" in common:
        config: Any = MixtralConfig(**common, num_experts_per_tok=2, router_aux_loss_coef=0.01)
        return MixtralForCausalLM._from_config(config, experts_implementation="grouped_mm")
    return LlamaForCausalLM._from_config(LlamaConfig(**common))


def pretrain(kind: str, seed: int, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Trains a base, writes its weights to ``folder``, and returns what there is to say of it.

    The learning rate rises over a twentieth of the steps, stays, and falls to nothing over the last 40%. With "empty"
    in the settings that share of the experts carries nothing (planted.py).
    """
    started = time.process_time(), time.monotonic()
    corpus = texts.load(settings["corpus"], folder / "texts")
    model = build(kind, seed)
    plant = _plant(model, seed, settings, corpus, folder) if "empty" in settings else None
    before = kappas(model)
    steps, length = int(settings["steps"]), int(settings["length"])
    held_out = corpus.windows("test", int(settings["windows"]), length)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=settings["lr"],
        betas=(0.9, 0.95),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: schedule(i, steps))
    curve: list[tuple[int, float]] = [(0, loss_of(model, held_out))]
    every = max(1, steps // 20)
    model.train()
    for first in range(0, steps, every):
        batches = corpus.batches(hash_of("pretrain", seed, first), min(every, steps - first), settings["size"], length)
        for batch in batches:
            torch.autograd.backward(loss_and_balance(model, batch, balance=plant is None))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if plant is not None:
                plant.restore()
            optimizer.zero_grad()
        if plant is not None and first + len(batches) in (steps // 2 // every * every, steps):
            plant.part()
        curve.append((first + len(batches), loss_of(model, held_out)))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    scratch = folder / f".{base_name(kind, seed)}.{os.getpid()}"
    save_file(weights, scratch)
    scratch.replace(file_of(kind, seed, folder))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": weights_digest(model),
        "corpus": {corpus.name: corpus.digest},
        "curve": curve,
        "late_gain": late_gain(curve),
        "kappas": departures(before, kappas(model)),
        "seconds": {"cpu": time.process_time() - started[0], "wall": time.monotonic() - started[1]},
    }


def _plant(
    model: nn.Module, seed: int, settings: Mapping[str, Any], old: texts.Corpus, folder: Path
) -> planted.Planted:
    new = texts.load(settings["empty"]["for"], folder / "texts")
    length = int(settings["length"])
    some = [corpus.windows("train", 50, length) for corpus in (old, new)]
    return planted.Planted(model, seed, settings["empty"]["share"], *some)


def schedule(step: int, steps: int, warm: float = 0.05, fall: float = 0.4) -> float:
    """The share of the learning rate at a step: up, level, and linearly down to nothing."""
    return min(1.0, (step + 1) / max(1.0, warm * steps), (steps - step) / max(1.0, fall * steps))


def hash_of(*things: Any) -> int:
    """A seed from anything that has a text."""
    return int.from_bytes(hashlib.sha256(repr(things).encode()).digest()[:6])


def load(kind: str, seed: int, folder: Path) -> nn.Module:
    """A base as pre-training left it, or the model that was given for one (own.py)."""
    note = folder / f"{base_name(kind, seed)}.json"
    if note.exists():
        from . import own

        return own.load(json.loads(note.read_text()), seed)
    model = build(kind, seed)
    model.load_state_dict(load_file(file_of(kind, seed, folder)))
    return model


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of names and values, 16 digits."""
    return digest({name: value.detach().numpy() for name, value in model.state_dict().items()})


def loss_and_balance(model: nn.Module, batch: torch.Tensor, balance: bool = True) -> torch.Tensor:
    """Cross-entropy, and for mixtures what keeps all experts in use."""
    options = {"output_router_logits": True} if balance and hasattr(model.config, "num_local_experts") else {}
    found: torch.Tensor = model(input_ids=batch, labels=batch, **options).loss
    return found


@torch.no_grad()
def log_probabilities(model: nn.Module, windows: torch.Tensor, size: int = 50) -> torch.Tensor:
    """Of every token but the first of each window given those before it: (windows, length - 1, vocabulary)."""
    model.eval()
    found = [torch.log_softmax(model(input_ids=part).logits[:, :-1].float(), -1) for part in torch.split(windows, size)]
    model.train()
    return torch.cat(found)


def entropies(logs: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each window in nats per token."""
    return -logs.gather(-1, windows[:, 1:, None]).squeeze(-1).double().mean(1)


def losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each window in nats per token, some windows at a time."""
    size = at_once(model, windows)
    return torch.cat([entropies(log_probabilities(model, part, size), part) for part in torch.split(windows, size)])


def at_once(model: nn.Module, windows: torch.Tensor, most: int = 50, entries: int = 2**26) -> int:
    """So many windows that the probabilities of all tokens of the vocabulary for them take a quarter of a GB."""
    return max(1, min(most, entries // (windows.shape[1] * model.config.get_text_config().vocab_size)))


def loss_of(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean cross-entropy in nats per token."""
    return float(losses(model, windows).mean())


def late_gain(curve: list[tuple[int, float]]) -> float:
    """By how much of its value the held-out loss fell over the last tenth of the steps: flat is near 0."""
    last, loss = curve[-1]
    earlier = min(curve, key=lambda point: abs(point[0] - 0.9 * last))[1]
    return (earlier - loss) / loss


def kappas(model: nn.Module) -> dict[str, tuple[str, int | None, float]]:
    """Type, layer and kappa of every ranked matrix."""
    return {e.key: (type_of(e), e.layer, e.kappa) for e in kappa_fast.rank(model, progress=False)}


def type_of(entry: kappa_fast.TensorKappa) -> str:
    """The projection: "q_proj", "experts.gate"."""
    words = entry.group.split("[")[0].replace(".weight", "").split(".")
    half = entry.part.rpartition(".")[2] if "." in entry.part else ""
    return f"experts.{half or words[-1].removesuffix('_proj')}" if "experts" in words else words[-1]


def departures(
    before: Mapping[str, tuple[str, int | None, float]], after: Mapping[str, tuple[str, int | None, float]]
) -> list[dict[str, Any]]:
    """For each type and layer the mean log kappa at the beginning and in the end, and their spread over matrices."""
    cells: dict[tuple[str, int | None], list[str]] = {}
    for key, (kind, layer, _) in before.items():
        cells.setdefault((kind, layer), []).append(key)
    found = []
    for (kind, layer), keys in cells.items():
        logs = [[math.log(side[key][2]) for key in keys] for side in (before, after)]
        found.append(
            {
                "type": kind,
                "layer": layer,
                "before": statistics.fmean(logs[0]),
                "after": statistics.fmean(logs[1]),
                "spread": [statistics.pstdev(side) for side in logs],
            }
        )
    return found


def describe(record: Mapping[str, Any]) -> str:
    """One line for the log."""
    start, end = record["curve"][0][1], record["curve"][-1][1]
    return json.dumps({"loss": [round(start, 3), round(end, 3)], "late_gain": round(record["late_gain"], 4)})
