"""The same question for a model of one's own: a causal language model, texts to learn, texts to keep, a time budget.

``study()`` looks at the model and the texts, times one run, plans what the budget carries (own_plan.py), says what that
can tell, runs it with the journal of all studies, and writes the page (own_report.py). Called again, it goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import bases, texts
from .weights import base_name

KIND, KEEP = "own", "keep"
PIECE = 2000  # characters of a document, about: what is held out are whole documents
WINDOWS, VALIDATION = 200, 56
LEAST = 50  # held-out pieces, below which losses are too uncertain to compare
LEAST_VALIDATION = 10
PARTS = (("test", 0.25), ("validation", 0.15), ("train", 0.6))  # of the tokens of a text to learn
ALL_TEST = (("test", 1.0), ("validation", 0.0), ("train", 0.0))  # of a text to keep


class OwnError(ValueError):
    """What this model, these texts or this budget cannot be asked, with what to do instead."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        model: a folder, or a name on the hub, of a causal language model with its tokenizer.
        learn: files or folders by the name of the task.
        keep: files or folders of text whose loss is not to rise.
        share: of the weights, that each selection trains; of the experts where there are some.
        steps: of the longest schedule; a quarter and a half of it are measured too.
        length: tokens of a piece.  size: pieces of a batch.
        rates: learning rates, of which each method has its own best.
        draws: at most so many random selections.
        device: where runs compute.
    """

    model: str
    learn: Mapping[str, Sequence[str]]
    keep: Sequence[str]
    share: float = 0.2
    steps: int = 120
    length: int = 128
    size: int = 8
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    draws: int = 99
    device: str = "cpu"


def study(
    question: Question,
    budget: float,
    folder: Path,
    workers: int = 2,
    say: Callable[[str], None] = print,
    only_plan: bool = False,
) -> Path | None:
    """Plans, runs and writes the page; returns it, or None with ``only_plan``.

    Args:
        budget: seconds of the clock for all runs.
        folder: of corpora, journal, plan and page; the same call again goes on there.

    Raises:
        OwnError: what is asked cannot be answered, or ``folder`` holds another question.
    """
    from . import own_plan, own_report
    from .plan import Plan
    from .study import go_on

    settings = prepare(question, folder)
    file = folder / "plan.json"
    if file.exists():
        say(f"the plan of {file} is kept, whatever the budget is now; another folder makes another")
    else:
        made = own_plan.make(question, settings, budget, folder, workers, say)
        file.write_text(json.dumps(made.as_json(), indent=1) + "\n")
        (folder / "beforehand.txt").write_text(made.words + "\n")
    say((folder / "beforehand.txt").read_text().rstrip())
    if only_plan:
        return None
    plan = Plan.read(file)
    started = time.monotonic()
    missing = go_on(plan, folder, workers, say)
    say(f"{missing} results are missing; this took {(time.monotonic() - started) / 60:.1f} minutes")
    page = own_report.write(plan, question, folder, folder / "report")
    say(page.read_text().split("\n\n")[1])
    return page


def prepare(question: Question, folder: Path) -> dict[str, Any]:
    """The corpora in ``folder``, and the settings of runs on them.

    Raises:
        OwnError: no tokenizer, no causal language model, texts that are too short, or another question in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, config = _opened(question.model)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and question.length > limit:
        raise OwnError(f"{question.model} reads at most {limit} tokens: give --length {limit} or less")
    if question.steps < 8:
        raise OwnError(f"{question.steps} steps are too few for three schedules: give at least 8")
    found = {name: documents(files) for name, files in {KEEP: question.keep, **question.learn}.items()}
    asked = _as_asked(question, {name: _digest(each) for name, each in found.items()})
    _refuse_another(asked, folder)
    windows, validation = WINDOWS, VALIDATION
    corpora: dict[str, dict[str, torch.Tensor]] = {}
    for name, each in found.items():
        parts = corpora[name] = _parts(tokenizer, each, ALL_TEST if name == KEEP else PARTS)
        _check_tokens(parts, config, question.model)
        used = ("test",) if name == KEEP else ("test", "validation", "train")
        pieces = {part: len(parts[part]) // question.length for part in used}
        _check_pieces(name, pieces, question)
        windows = min(windows, pieces["test"])
        validation = min(validation, pieces.get("validation", validation))
    (folder / "texts").mkdir(exist_ok=True)
    for name, parts in corpora.items():
        torch.save(parts, folder / "texts" / f"{name}.pt")
    (folder / "question.json").write_text(json.dumps(asked, indent=1) + "\n")
    return {
        "corpus": KEEP,
        "budgets": [question.steps // 4, question.steps // 2, question.steps],
        "warm": max(1, question.steps // 20),
        "size": question.size,
        "length": question.length,
        "windows": windows,
        "validation": validation,
        **({} if question.device == "cpu" else {"device": question.device}),
    }


def _opened(model: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise OwnError(f"{model} is no model of transformers: {_first_line(error)}") from error
    kinds = getattr(config, "architectures", None) or []
    if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        named = ", ".join(kinds) or "no architecture"
        raise OwnError(f"{model} is no causal language model: its config names {named}. Losses of texts need one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise OwnError(
            f"{model} has no tokenizer, which turns texts into what it reads: save the right one there with "
            f"tokenizer.save_pretrained ({_first_line(error)})"
        ) from error
    return tokenizer, config.get_text_config()  # of models with other parts, that of the text


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def documents(files: Iterable[str]) -> list[str]:
    """Texts of files and folders, in pieces of about PIECE characters that end where paragraphs do, each once.

    A line of a .jsonl file is one text, under "text".

    Raises:
        OwnError: a file is missing, holds no UTF-8, or no text.
    """
    found: dict[str, None] = {}
    for file in _files(files):
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OwnError(f"{file} cannot be read as text in UTF-8: {error}") from error
        if file.suffix == ".jsonl":
            for number, line in enumerate(content.splitlines(), 1):
                if line.strip():
                    found[_text_of(file, number, line)] = None
        else:
            found |= dict.fromkeys(_cut(content))
    return [text for text in found if text.strip()]


def _text_of(file: Path, number: int, line: str) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise OwnError(f'{file}, line {number}: no JSON object with "text"') from error


def _files(names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        path = Path(name)
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        elif path.exists():
            yield path
        else:
            raise OwnError(f"there is no file {name}")


def _cut(content: str) -> Iterator[str]:
    piece = ""
    for paragraph in re.split(r"\n\s*\n", content):
        for start in range(0, max(1, len(paragraph)), PIECE):  # a line without end is cut anywhere
            piece += ("\n\n" if piece else "") + paragraph[start : start + PIECE]
            if len(piece) >= PIECE:
                yield piece
                piece = ""
    if piece:
        yield piece


def _digest(found: list[str]) -> str:
    return hashlib.sha256("\0".join(found).encode()).hexdigest()[:16]


def _as_asked(question: Question, digests: Mapping[str, str]) -> dict[str, Any]:
    """The question as JSON has it, with digests in place of files."""
    said = {name: value for name, value in vars(question).items() if name not in ("learn", "keep")}
    asked: dict[str, Any] = json.loads(json.dumps(said | {"texts": digests}))
    return asked


def _refuse_another(asked: Mapping[str, Any], folder: Path) -> None:
    """Raises OwnError where something else was asked in this folder."""
    file = folder / "question.json"
    before = json.loads(file.read_text()) if file.exists() else asked
    other = next((name for name in asked if before.get(name) != asked[name]), None)
    if other is not None:
        raise OwnError(
            f"{folder} holds another study ({other} was {before.get(other)!r} and is {asked[other]!r}): "
            "ask the same again to go on, or give another folder"
        )


def _parts(tokenizer: Any, found: list[str], shares: Iterable[tuple[str, float]]) -> dict[str, torch.Tensor]:
    """Tokens of whole documents, put into the parts in an order that is that of their hashes."""
    end = tokenizer.eos_token_id
    coded = []
    for text in sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        coded.append([*tokens, *([] if end is None else [end])])
    total, done, first = sum(map(len, coded)), 0, 0
    parts: dict[str, torch.Tensor] = {}
    reach = 0.0
    for name, share in shares:
        reach += share
        last = first
        while last < len(coded) and done + len(coded[last]) / 2 <= reach * total:
            done += len(coded[last])
            last += 1
        parts[name] = torch.tensor([t for tokens in coded[first:last] for t in tokens], dtype=torch.int32)
        first = last
    return parts


def _check_tokens(parts: Mapping[str, torch.Tensor], config: Any, model: str) -> None:
    most = max((int(tokens.max()) for tokens in parts.values() if len(tokens)), default=0)
    if most >= config.vocab_size:
        raise OwnError(
            f"the tokenizer of {model} makes a token {most}, and the model knows {config.vocab_size}: "
            "this tokenizer belongs to another model"
        )


def _check_pieces(name: str, pieces: Mapping[str, int], question: Question) -> None:
    least = {"test": LEAST, "validation": LEAST_VALIDATION, "train": LEAST}
    short = next((part for part, count in pieces.items() if count < least[part]), None)
    if short is not None:
        what = "to keep" if name == KEEP else f"to learn ({name})"
        raise OwnError(
            f"the texts {what} are too short: they have {pieces[short]} pieces of {question.length} tokens for "
            f"{short}, and {least[short]} are the least. Give more text, or a smaller --length"
        )


def load(kept: Mapping[str, Any], seed: int) -> nn.Module:
    """The model of a question, in float32, ready for a run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.manual_seed(seed)  # of dropout, where the model has some
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = AutoModelForCausalLM.from_pretrained(kept["model"], dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    return model


def base(
    job: Mapping[str, Any], settings: Mapping[str, Any], training: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """What there is to say of the model before it is trained; its place is noted where ``bases.load`` looks."""
    started = time.process_time(), time.monotonic()
    model = load(settings, job["base"])
    kept = texts.load(training["corpus"], folder / "texts")
    windows = kept.windows("test", int(training["windows"]), int(training["length"]))
    loss = bases.loss_of(model, windows)
    kappas = bases.kappas(model)
    note = folder / f".{base_name(job['kind'], job['base'])}.{os.getpid()}"
    note.write_text(json.dumps({"model": settings["model"]}) + "\n")
    note.replace(folder / f"{base_name(job['kind'], job['base'])}.json")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": bases.weights_digest(model),
        "corpus": {kept.name: kept.digest},
        "curve": [[0, loss]],
        "late_gain": 0.0,
        "kappas": bases.departures(kappas, kappas),
        "seconds": {"cpu": time.process_time() - started[0], "wall": time.monotonic() - started[1]},
    }
