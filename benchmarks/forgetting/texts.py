"""Texts that come with Python, torch and Debian: what a base model learns, and what it is trained on afterwards.

A corpus is one sequence of tokens (bytes, and END between documents) for training, one for choosing and one for
testing. Whole documents go to one of the three, by the hash of their content, and none occurs twice.
"""

from __future__ import annotations

import ast
import gettext
import hashlib
import inspect
import json
import os
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

END = 256  # the token between two documents; the others are bytes
VOCABULARY = 257
LOCALES = Path("/usr/share/locale")
_PARTS = (("test", 20), ("validation", 12), ("train", 224))  # of 256 documents
_LARGEST = 10_000_000  # bytes of a corpus: more than any plan reads


@dataclass(frozen=True)
class Corpus:
    """Tokens of three parts; ``digest`` is that of all of them."""

    name: str
    parts: dict[str, torch.Tensor]
    digest: str

    def windows(self, part: str, count: int, length: int) -> torch.Tensor:
        """``count`` pieces of ``length`` tokens that do not overlap, spread over a part."""
        tokens = self.parts[part]
        available = len(tokens) // length
        if available < count:
            raise ValueError(f"{self.name} has {available} pieces of {length} tokens for {part}, and {count} are asked")
        places = torch.arange(count) * available // count
        return torch.stack([tokens[i * length : (i + 1) * length] for i in places.tolist()]).long()

    def batches(self, seed: int, steps: int, size: int, length: int) -> torch.Tensor:
        """Random pieces of the part for training, shape (steps, size, length); the same for the same arguments."""
        generator = torch.Generator().manual_seed(seed)
        tokens = self.parts["train"]
        starts = torch.randint(0, len(tokens) - length, (steps, size, 1), generator=generator)
        return tokens[starts + torch.arange(length)].long()


def digest_of(tokens: torch.Tensor) -> str:
    """SHA-256 of the values, 16 digits."""
    return hashlib.sha256(tokens.to(torch.int16).numpy().tobytes()).hexdigest()[:16]


def load(name: str, folder: Path) -> Corpus:
    """A corpus as it was when the study began: made once, then read from ``folder``."""
    file = folder / f"{name}.pt"
    if not file.exists():
        made = make(name)
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{name}.{os.getpid()}"
        torch.save(made.parts, scratch)
        scratch.replace(file)
    parts = torch.load(file)
    return Corpus(name, parts, _digest(parts))


def make(name: str) -> Corpus:
    """Reads the documents of this machine.

    Raises:
        ValueError: no such corpus.  FileNotFoundError: this machine has too little of it.
    """
    kind = name.partition("-")[0]
    found = {hashlib.sha256(text.encode()).digest(): text for text in documents(name)}
    shares: dict[str, list[int]] = {part: [] for part, _ in _PARTS}
    size = 0
    for key, text in sorted(found.items(), key=lambda item: item[0][::-1]):  # cut without regard to the parts
        if size < _LARGEST:
            tokens = [*text.encode(), END]
            shares[_part(key[0])] += tokens
            size += len(tokens)
    if size < 200_000:
        raise FileNotFoundError(f"{name}: this machine has {size:,} bytes of such text, too few. {_ADVICE[kind]}")
    parts = {part: torch.tensor(tokens, dtype=torch.int16) for part, tokens in shares.items()}
    return Corpus(name, parts, _digest(parts))


def documents(name: str) -> Iterable[str]:
    """The documents of a corpus, some of them several times.

    Raises:
        ValueError: no such corpus.
    """
    kind, _, argument = name.partition("-")
    if kind not in _SOURCES:
        raise ValueError(f"{name!r} is no corpus: there are {', '.join(_SOURCES)}")
    return _SOURCES[kind](argument)


def _part(lot: int) -> str:
    for part, share in _PARTS:
        if lot < share:
            return part
        lot -= share
    raise AssertionError("the shares are 256 together")


def _digest(parts: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(json.dumps({part: digest_of(parts[part]) for part, _ in _PARTS}).encode()).hexdigest()[:16]


def _docstrings(_: str) -> Iterator[str]:
    """English: the documentation of Python, of numpy and of torch."""
    import numpy

    standard = Path(sysconfig.get_path("stdlib"))
    yield from _topics(standard / "pydoc_data" / "topics.py")
    for root in (standard, Path(numpy.__file__).parent, Path(torch.__file__).parent):
        for file in sorted(root.rglob("*.py")):
            inside = file.relative_to(root).parts
            if {"site-packages", "test", "tests", "lib2to3"}.isdisjoint(inside):
                yield from docstrings_of(file)


def docstrings_of(file: Path) -> Iterator[str]:
    """Those of more than 60 characters; none where the file is no Python."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 60:
                yield text


def _topics(file: Path) -> Iterator[str]:
    if file.exists():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200:
                yield inspect.cleandoc(node.value)


def _catalogues(language: str) -> Iterator[str]:
    """What the programs of this machine say in another language."""
    for file in sorted((LOCALES / (language or "de") / "LC_MESSAGES").glob("*.mo")):
        try:
            with file.open("rb") as stream:
                catalogue = gettext.GNUTranslations(stream)
        except (OSError, UnicodeDecodeError, ValueError):
            continue  # a few are in other encodings than they say
        messages = [catalogue.gettext(key) for key in _keys(catalogue)]
        # Messages are short: some of a file make a document, so that neighbours stay together.
        long = [text for text in messages if len(text) > 20]
        yield from ("\n".join(long[i : i + 20]) for i in range(0, len(long), 20))


def _keys(catalogue: gettext.GNUTranslations) -> list[str]:
    return sorted(key for key in vars(catalogue)["_catalog"] if isinstance(key, str) and key)


def _headers(_: str) -> Iterator[str]:
    """C and C++: what Python and torch are built upon."""
    for root in (Path(sysconfig.get_path("include")), Path(torch.__file__).parent / "include"):
        for file in sorted(root.rglob("*.h")):
            try:
                text = file.read_text(encoding="utf-8").strip()
            except (UnicodeDecodeError, OSError):
                continue
            if 200 < len(text) < 60_000:
                yield text


def _made_up(argument: str) -> Iterator[str]:
    """Sentences over letters of one of two alphabets with a grammar of its own, for tests: nothing is read."""
    chance = random.Random(argument)
    letters = "abcdefghij" if argument != "b" else "ABCDEFGHIJ"
    follow = {letter: chance.sample(letters, 3) for letter in letters}
    for _ in range(3000):
        text = chance.choice(letters)
        while len(text) < 120:
            text += chance.choice(follow[text[-1]])
        yield text


_SOURCES: dict[str, Callable[[str], Iterable[str]]] = {
    "python": _docstrings,
    "catalogues": _catalogues,
    "headers": _headers,
    "made": _made_up,
}
_ADVICE = {
    "python": "It comes with Python itself.",
    "catalogues": "Slim images leave translations out: use a full Debian, or install git and gnupg-l10n.",
    "headers": "It comes with torch.",
    "made": "",
}
