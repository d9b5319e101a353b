"""What the name of a parameter tells of its place: layer, group, order, and the name without its wrappers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from ..io.limits import MOST_DIGITS

_NUMBER = re.compile(r"(?<![^.])(?P<stem>(?:expert_)?)\d+(?![^.])")
_LAYER = re.compile(rf"(?<![^.])\d{{1,{MOST_DIGITS}}}(?![^.])")
_DIGITS = re.compile(r"([0-9]+)")
# Wrappers that put themselves between a module and its weight; the weight keeps the name it has without them.
_WRAPPED = re.compile(r"(?:\.token_adapter)?\.(?:base_layer|original_module)(?=\.|$)")
# What torch.compile, FSDP, activation checkpointing and Lightning put into names, where nobody else would, ...
_UNMISTAKABLE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# ... and what DDP puts before every name: a module of a model may be called so as well.
LEADING = ("module.",)


def base_name(name: str) -> str:
    """The name without the wrappers of PEFT."""
    return _WRAPPED.sub("", name)


def unwrapped(names: Collection[str], leading: Sequence[str] = LEADING) -> dict[str, str]:
    """By each of the names of a model, the name without what compile, DDP and FSDP put around the model.

    What is ``leading`` is taken off only where all names begin with it.
    """
    short = {name: _UNMISTAKABLE.sub("", name) for name in names}
    while short and (lead := next((w for w in leading if all(s.startswith(w) for s in short.values())), None)):
        short = {name: s.removeprefix(lead) for name, s in short.items()}
    return short


def layer_of(name: str) -> int | None:
    """The first number among the components of the name that does not count experts."""
    for found in _LAYER.finditer(name):
        if not name[: found.start()].endswith("experts."):
            return int(found.group())
    return None


def group_of(name: str) -> str:
    """The name with its numbers as ``*``; digits inside a word (w1, conv2) stay."""
    return _NUMBER.sub(r"\g<stem>*", name)


def in_model_order(names: Iterable[str]) -> list[str]:
    """Sorted with numbers by value, so that layer 2 comes before layer 10."""

    def by_value(name: str) -> tuple[list[tuple[int, str]], str]:
        words = _DIGITS.split(name)  # every second one is a number, of any length
        numbers = [word.lstrip("0") if i % 2 else "" for i, word in enumerate(words)]
        return [(len(n), n) if i % 2 else (-1, w) for i, (w, n) in enumerate(zip(words, numbers, strict=True))], name

    return sorted(names, key=by_value)


# What wrappers put before or between the words of a name: compile, DDP, FSDP, activation checkpointing, PEFT.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))"
    r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|base_model\.model)\."
)


def plain_name(name: str) -> str:
    """The name without what compile, DDP, FSDP, activation checkpointing and PEFT put around it."""
    return base_name(_WRAPPERS.sub("", name))
