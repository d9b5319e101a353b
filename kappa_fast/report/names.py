"""Shortened names for narrow columns, which keep the words that distinguish the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..texts import printable

GONE = "…"
_MOST_COMPARED = 200  # rows; each is compared with all others


def shorten_names(names: Sequence[str], width: int) -> list[str]:
    """Each name in at most ``width`` characters, ``printable``.

    Words between dots are replaced by "…": first the words that most rows share, numbers last, and if possible no word
    without which another name would contain the shortened one: "…2.…experts.58.up_proj".
    """
    names = [printable(name) for name in names]
    if max(map(len, names), default=0) <= width:
        return names
    words = [name.split(".") for name in names]
    shared: Counter[str] = Counter(word for some in words for word in set(some))
    ends = {some[-1] for some in words}
    implied = ends.pop() if len(ends) == 1 and len(words) > 1 else ""
    others = words if len(words) <= _MOST_COMPARED else []
    return [_shorten(name, some, shared, implied, others, width) for name, some in zip(names, words, strict=True)]


def _shorten(
    name: str, words: list[str], shared: Counter[str], implied: str, others: list[list[str]], width: int
) -> str:
    if len(name) <= width:
        return name
    # A word that most rows have distinguishes least; numbers distinguish most.
    order = sorted(range(len(words)), key=lambda i: (_is_number(words[i]), -shared[words[i]], i))
    if implied:
        order = [len(words) - 1, *(i for i in order if i != len(words) - 1)]
    gone: list[int] = []

    def text() -> str:
        return _joined(words, set(gone), implied)

    while len(text()) > width and len(gone) + 1 < len(words):
        left = [i for i in order if i not in gone]
        # Among words that equally many rows have, prefer one without which no other name contains the shortened one.
        equal = [i for i in left if shared[words[i]] == shared[words[left[0]]] and not _is_number(words[i])]
        telling = [i for i in equal if not _is_found(words, {*gone, i}, others)] if len(equal) > 1 else []
        gone.append((telling or left)[0])
    for position in reversed(gone[:]):
        gone.remove(position)
        if len(text()) > width:
            gone.append(position)
    return cut_middle(text(), width)


def _is_found(words: list[str], gone: set[int], others: list[list[str]]) -> bool:
    """Whether another row has all remaining words in the same order."""
    kept = [word for i, word in enumerate(words) if i not in gone]
    for other in others:
        if other is not words and other != words:
            rest = iter(other)
            if all(word in rest for word in kept):
                return True
    return False


def _joined(words: list[str], gone: set[int], implied: str) -> str:
    """The words with "…" for the removed ones; ``implied``, a last word that all rows share, leaves no trace."""
    parts: list[str] = []
    if implied and len(words) - 1 in gone and words[-1] == implied:
        words, gone = words[:-1], gone - {len(words) - 1}
    for position, word in enumerate(words):
        if position in gone:
            if not parts or parts[-1] != GONE:
                parts.append(GONE)
        else:
            parts.append(word + ("." if position + 1 < len(words) and position + 1 not in gone else ""))
            if position + 1 in gone:
                parts[-1] += "."
    return "".join(parts)


def _is_number(word: str) -> bool:
    return word[:1].isdigit() or "[" in word


def cut_middle(text: str, width: int) -> str:
    """The text with "…" in place of its middle; the end keeps more characters than the beginning."""
    if len(text) <= width:
        return text
    tail = (2 * (width - 1) + 2) // 3
    return f"{text[: width - 1 - tail]}{GONE}{text[len(text) - tail :]}"
