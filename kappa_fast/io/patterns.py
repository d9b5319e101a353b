"""Regular expressions from untrusted files, searched in a limited time.

``re`` backtracks: on a name of 40 letters ``(a+)+z`` takes minutes, and a config may hold such a pattern for every
module. Patterns that backtrack little are searched with ``re``. For the others a set of positions, the bits of an
integer, is advanced through the pattern (K. Thompson, Regular expression search algorithm, CACM 11, 1968), and the
number of steps is limited.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from .limits import LONGEST_PATTERN

# Private modules of the standard library, with which ``re`` itself parses from Python 3.11 on.
_parser: Any = __import__("re._parser", fromlist=["parse"])
_compiler: Any = __import__("re._compiler", fromlist=["compile"])

MOST_STEPS = 20_000_000  # steps of all patterns in one list together; a step takes about 0.2 us
DEEPEST = 50  # nesting depth of the parts of a pattern
FEW_REPEATS = 16  # a repetition with at most this many rounds backtracks little

_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
Step = Callable[[int, "_Text"], int]  # maps a set of positions (a bit for each) to the positions behind a match


class PatternError(ValueError):
    """The text is not a regular expression, or is one that cannot be searched in a limited time."""


class Steps:
    """How many steps the patterns of one list may still take together."""

    def __init__(self) -> None:
        self.left = MOST_STEPS

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise PatternError("the patterns take more steps than the patterns of any real file")


class Pattern:
    """A regular expression, searched in a limited time."""

    def __init__(self, text: str, steps: Steps | None = None) -> None:
        """steps: the budget, shared with other patterns.

        Raises:
            PatternError: ``text`` is not a regular expression, is longer than LONGEST_PATTERN, or has a backreference.
        """
        self.text, self._steps = text, steps or Steps()
        self._plain, self._backtracking, self._step = _compiled(text)

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches at the beginning of the name, as ``re.match`` does.

        Raises:
            PatternError: the search takes more steps than are left.
        """
        if self._backtracking < 3:
            return self._plain.match(name) is not None
        return self._step(1, _Text(name, self._steps)) != 0

    def search(self, name: str) -> bool:
        """Return whether the pattern matches anywhere in the name, as ``re.search`` does.

        Raises:
            PatternError: the search takes more steps than are left.
        """
        if self._backtracking < 2:
            return self._plain.search(name) is not None
        return self._step((1 << len(name) + 1) - 1, _Text(name, self._steps)) != 0


def compile_pattern(text: str) -> Pattern | re.Pattern[str]:
    """Compile a pattern that the user has given, not a file: ``re`` searches what ``Pattern`` does not support."""
    try:
        return Pattern(text)
    except PatternError:
        return re.compile(text)


class _Text:
    """The text that is searched, and at which of its positions each kind of character is."""

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
def _compiled(text: str) -> tuple[re.Pattern[str], float, Step]:
    """Return the pattern compiled by ``re``, its measure of backtracking, and the pattern as a Step."""
    if len(text) > LONGEST_PATTERN:
        raise PatternError(f"it has {len(text)} characters, more than {LONGEST_PATTERN}")
    try:
        plain = re.compile(text)
        tree = _parser.parse(text)
        return plain, _backtracking(tree), _sequence(tree, tree.state, plain.flags, 0)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(str(error) or type(error).__name__) from error


def _backtracking(tree: Any) -> float:
    """Return how many repetitions may backtrack far; a part with only a few ways to match counts a quarter.

    A repetition of anything but single characters counts three: each round multiplies the ways to match.
    """
    found = 0.0
    for operation, value in tree:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = value
            several = most > 1 and any(str(part) not in _CHARACTERS for part, _ in inner)
            found += 3 if several else 1 if most - least > FEW_REPEATS else (most > least) / 4
            found += _backtracking(inner)
        elif name == "SUBPATTERN":
            found += _backtracking(value[3])
        elif name == "BRANCH":
            found += 1 / 4 + sum(map(_backtracking, value[1]))
        elif name in ("ASSERT", "ASSERT_NOT"):
            found += _backtracking(value[1])
    return found


def _sequence(tree: Any, state: Any, flags: int, depth: int) -> Step:
    if depth > DEEPEST:
        raise PatternError(f"its parts are nested more than {DEEPEST} deep")
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
    raise PatternError(f"it uses {name}, which can take unlimited time")


def _united(masks: Any) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found


def _repeated(least: int, most: int, inner: Step) -> Step:
    def step(at: int, text: _Text) -> int:
        longest = len(text.name) + 1  # more repetitions reach no new position
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
    """Return the Step of a look-ahead, or of a look-behind of a fixed length."""
    direction, tree = value
    shortest, longest = tree.getwidth()
    if direction < 0 and shortest != longest:
        raise PatternError("it has a look-behind of varying length")
    back = shortest if direction < 0 else 0

    def holds(i: int, text: _Text) -> bool:
        if i < back:
            return False
        end = inner(1 << i - back, text)
        return bool(end >> i & 1) if direction < 0 else end != 0

    def step(at: int, text: _Text) -> int:
        return sum(1 << i for i in range(len(text.name) + 1) if at >> i & 1 and holds(i, text) == wanted)

    return step
