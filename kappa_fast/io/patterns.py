"""Regular expressions from files, searched in a time that no pattern can make long.

``re`` backtracks: on a name of 40 letters ``(a+)+z`` takes minutes, and a config may hold such a pattern for every
module. Patterns that cannot backtrack far are left to ``re``. For the others all positions that a part of the pattern
can end at are kept at once, as the bits of an integer (K. Thompson, Regular expression search algorithm, CACM 11,
1968), and the number of steps is limited.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from .limits import LONGEST_PATTERN

# Private modules of the standard library: what ``re`` itself parses with, from Python 3.11 on.
_parser: Any = __import__("re._parser", fromlist=["parse"])
_compiler: Any = __import__("re._compiler", fromlist=["compile"])

MOST_STEPS = 20_000_000  # of all patterns of one list together; a step takes about 0.2 us
DEEPEST = 50  # parts inside of parts
FAR = 16  # a repetition of up to so many backtracks little

_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
Step = Callable[[int, "_Text"], int]  # from positions to positions, each a bit


class PatternError(ValueError):
    """It is no regular expression, or one that cannot be searched in a limited time."""


class Steps:
    """What a search may still take; shared by the patterns of one list."""

    def __init__(self) -> None:
        self.left = MOST_STEPS

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise PatternError("the patterns take more steps than those of any real file")


class Pattern:
    """A regular expression, searched in a limited time."""

    def __init__(self, text: str, steps: Steps | None = None) -> None:
        """steps: shared with other patterns.

        Raises:
            PatternError: it is no expression, longer than any in a real file, or refers back to what it has found.
        """
        self.text, self._steps = text, steps or Steps()
        self._plain, self._far, self._step = _understood(text)

    def matches(self, name: str) -> bool:
        """Whether the name begins with it, as by ``re.match``.

        Raises:
            PatternError: that takes too long.
        """
        if self._far < 3:
            return self._plain.match(name) is not None
        return self._step(1, _Text(name, self._steps)) != 0

    def search(self, name: str) -> bool:
        """Whether it is somewhere in the name, as by ``re.search``.

        Raises:
            PatternError: that takes too long.
        """
        if self._far < 2:
            return self._plain.search(name) is not None
        return self._step((1 << len(name) + 1) - 1, _Text(name, self._steps)) != 0


def searched(text: str) -> Pattern | re.Pattern[str]:
    """The pattern, in a limited time if it can be; what only ``re`` can search has come from the user, from no file."""
    try:
        return Pattern(text)
    except PatternError:
        return re.compile(text)


class _Text:
    """A name, and at which of its positions each kind of character stands."""

    def __init__(self, name: str, steps: Steps) -> None:
        self.name, self.steps = name, steps
        self._places: dict[int, int] = {}

    def places(self, character: re.Pattern[str]) -> int:
        found = self._places.get(id(character))
        if found is None:
            found = sum(1 << i for i, c in enumerate(self.name) if character.match(c))
            self._places[id(character)] = found
        return found


@cache
def _understood(text: str) -> tuple[re.Pattern[str], float, Step]:
    """The pattern as ``re`` has it, how many parts of it backtrack far, and its steps."""
    if len(text) > LONGEST_PATTERN:
        raise PatternError(f"it has {len(text)} characters, more than {LONGEST_PATTERN}")
    try:
        plain = re.compile(text)
        tree = _parser.parse(text)
        return plain, _far(tree), _sequence(tree, tree.state, plain.flags, 0)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(str(error) or type(error).__name__) from error


def _far(tree: Any) -> float:
    """How many repetitions may backtrack far; what has a few ways to match is a quarter of one.

    A repetition of anything but a single run of characters counts as three: the ways multiply with each round.
    """
    found = 0.0
    for operation, value in tree:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = value
            several = most > 1 and any(str(part) not in _CHARACTERS for part, _ in inner)
            found += 3 if several else 1 if most - least > FAR else (most > least) / 4
            found += _far(inner)
        elif name == "SUBPATTERN":
            found += _far(value[3])
        elif name == "BRANCH":
            found += 1 / 4 + sum(map(_far, value[1]))
        elif name in ("ASSERT", "ASSERT_NOT"):
            found += _far(value[1])
    return found


def _sequence(tree: Any, state: Any, flags: int, depth: int) -> Step:
    if depth > DEEPEST:
        raise PatternError(f"it has more than {DEEPEST} parts inside of parts")
    steps = [_step(operation, value, state, flags, depth + 1) for operation, value in tree]

    def step(at: int, text: _Text) -> int:
        for each in steps:
            if not at:
                return 0
            text.steps.take()
            at = each(at, text)
        return at

    return step


def _step(operation: Any, value: Any, state: Any, flags: int, depth: int) -> Step:
    name = str(operation)
    if name in _CHARACTERS:
        character = _compiler.compile(_parser.SubPattern(state, [(operation, value)]), flags & ~re.DEBUG)
        return lambda at, text: (at & text.places(character)) << 1
    if name == "SUBPATTERN":
        _, added, removed, inner = value
        return _sequence(inner, state, (flags | added) & ~removed, depth)
    if name == "BRANCH":
        parts = [_sequence(part, state, flags, depth) for part in value[1]]
        return lambda at, text: _united(part(at, text) for part in parts)
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, inner = value
        return _repeated(least, most, _sequence(inner, state, flags, depth))
    if name == "AT":
        place = _compiler.compile(_parser.SubPattern(state, [(operation, value)]), flags & ~re.DEBUG)
        return lambda at, text: (
            at & sum(1 << i for i in range(len(text.name) + 1) if at >> i & 1 and place.match(text.name, i))
        )
    if name in ("ASSERT", "ASSERT_NOT"):
        return _asserted(name == "ASSERT", value, _sequence(value[1], state, flags, depth))
    raise PatternError(f"it uses {name}, which takes time without limit")


def _united(masks: Any) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found


def _repeated(least: int, most: int, inner: Step) -> Step:
    def step(at: int, text: _Text) -> int:
        longest = len(text.name) + 1  # more repetitions than that reach nothing new
        for _ in range(min(least, longest)):
            text.steps.take()
            at = inner(at, text)
        found = new = at
        for _ in range(min(most - least, longest)):
            if not new:
                break
            text.steps.take()
            new = inner(new, text) & ~found
            found |= new
        return found

    return step


def _asserted(wanted: bool, value: Any, inner: Step) -> Step:
    """Look-ahead, and look-behind of a fixed length."""
    direction, tree = value
    shortest, longest = tree.getwidth()
    if direction < 0 and shortest != longest:
        raise PatternError("it looks behind over a varying length")
    back = shortest if direction < 0 else 0

    def holds(i: int, text: _Text) -> bool:
        if i < back:
            return False
        end = inner(1 << i - back, text)
        return bool(end >> i & 1) if direction < 0 else end != 0

    def step(at: int, text: _Text) -> int:
        return sum(1 << i for i in range(len(text.name) + 1) if at >> i & 1 and holds(i, text) == wanted)

    return step
