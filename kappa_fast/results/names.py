"""Names of parameters: the layer, the group and the order that they imply, and the names without those of wrappers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from ..io.limits import MOST_DIGITS

_NUMBER = re.compile(r"(?<![^.])(?P<stem>(?:expert_)?)\d+(?![^.])")
_LAYER = re.compile(rf"(?<![^.])\d{{1,{MOST_DIGITS}}}(?![^.])")
_DIGITS = re.compile(r"([0-9]+)")
# The names that adapters put between a module and its weight.
_WRAPPED = re.compile(r"(?:\.token_adapter)?\.(?:base_layer|original_module)(?=\.|$)")
# Words that torch.compile, FSDP, activation checkpointing and Lightning put into names, and no model does.
_UNMISTAKABLE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# DDP puts this word before every name; a module of a model may have this name as well.
LEADING = ("module.",)


def base_name(name: str) -> str:
    """The name without the wrappers of PEFT."""
    return _WRAPPED.sub("", name)


def unwrapped(names: Collection[str], leading: Sequence[str] = LEADING) -> dict[str, str]:
    """For each name of a model, the name without the words that compile, DDP and FSDP add.

    The words of ``leading`` are removed only if all names begin with them.
    """
    short = {name: _UNMISTAKABLE.sub("", name) for name in names}
    while short and (lead := next((w for w in leading if all(s.startswith(w) for s in short.values())), None)):
        short = {name: s.removeprefix(lead) for name, s in short.items()}
    return short


@lru_cache(maxsize=1024)  # the experts of a fused tensor ask for one name again and again
def layer_of(name: str) -> int | None:
    """The first component of the name that is a number, unless it is the number of an expert."""
    for found in _LAYER.finditer(name):
        if not name[: found.start()].endswith("experts."):
            return int(found.group())
    return None


@lru_cache(maxsize=1024)
def group_of(name: str) -> str:
    """The name with its numbers as ``*``; digits inside a word (w1, conv2) stay."""
    return _NUMBER.sub(r"\g<stem>*", name)


def in_model_order(names: Iterable[str]) -> list[str]:
    """Sorted with numbers by value, so that layer 2 comes before layer 10."""

    def by_value(name: str) -> tuple[list[tuple[int, str]], str]:
        words = _DIGITS.split(name)  # every second word is a number of any length
        numbers = [word.lstrip("0") if i % 2 else "" for i, word in enumerate(words)]
        return [(len(n), n) if i % 2 else (-1, w) for i, (w, n) in enumerate(zip(words, numbers, strict=True))], name

    return sorted(names, key=by_value)


# Words that compile, DDP, FSDP, activation checkpointing and PEFT put before or between the words of a name.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))"
    r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|base_model\.model)\."
)


def plain_name(name: str) -> str:
    """The name without the words that compile, DDP, FSDP, activation checkpointing and PEFT add."""
    return base_name(_WRAPPERS.sub("", name))
