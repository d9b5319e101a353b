"""Random selections with the margins of another: as many units of each type, and as many in each layer.

A selection is a table of counts with a row for each type and a column for each layer. Two chosen units, of type s in
layer i and of type t in layer j, give way to units of type s in layer j and of type t in layer i: all sums of rows and
columns stay. Many such exchanges at random come to all selections that they can reach with equal probability, if an
exchange that is proposed more often than its opposite is refused at times (Hastings, Biometrika 57, 1970; for tables
Diaconis and Sturmfels, Ann. Stat. 26, 1998).
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from .units import Unit

# Exchanges that are tried: so many for each chosen unit, and at least. Where few of them can be made more are tried, as
# many as there are ordered pairs, several times over, until so many for each chosen unit are made.
EXCHANGES, LEAST_EXCHANGES = 100, 500
MADE, ROUNDS, MOST_EXCHANGES = 10, 8, 400_000
_WORD = 1 << 64

Place = tuple[Hashable, Hashable]  # the type and the layer


def redrawn(units: Sequence[Unit], chosen: Sequence[Unit], seed: int) -> list[Unit] | None:
    """Random ones of ``units``, as many of each type and in each layer as ``chosen`` has, of each size.

    Types are the group and the shapes of a unit. Sizes are numbers of weights, and each has margins of its own, so that
    every layer has as many weights as before.

    units: those that may be drawn, with all of ``chosen``.  Returns None if no exchange was found that can be made.
    """
    keys = {unit.key for unit in chosen}
    found: list[Unit] = []
    moved = False
    for size in sorted({unit.numel for unit in chosen}):
        table = _Table.of([unit for unit in units if unit.numel == size], keys)
        moved |= table.shuffle(_words(f"{seed} {size}"))
        found += table.chosen
    return found if moved else None


@dataclass
class _Table:
    """Units of one size by their places, and those that are chosen."""

    cells: dict[Place, list[Unit]]
    chosen: list[Unit]
    keys: set[str]

    @classmethod
    def of(cls, units: Sequence[Unit], keys: set[str]) -> _Table:
        cells: dict[Place, list[Unit]] = {}
        ordered = sorted(units, key=lambda unit: unit.key)
        for unit in ordered:
            cells.setdefault(_place(unit), []).append(unit)
        chosen = [unit for unit in ordered if unit.key in keys]
        return cls(cells, chosen, {unit.key for unit in chosen})

    def shuffle(self, words: Iterator[tuple[int, ...]]) -> bool:
        """Whether any exchange was made."""
        count = len(self.chosen)
        usual, most = max(LEAST_EXCHANGES, EXCHANGES * count), min(MOST_EXCHANGES, ROUNDS * count**2)
        made = sum(self._try(next(words)) for _ in range(usual))
        for _ in range(usual, most):
            if made >= MADE * count:
                break
            made += self._try(next(words))
        return made > 0

    def _try(self, word: tuple[int, ...]) -> bool:
        """One exchange of two chosen units, or of one for another in its place, if it can be made."""
        i, j = word[0] % len(self.chosen), word[1] % len(self.chosen)
        (s, u), (t, v) = _place(self.chosen[i]), _place(self.chosen[j])
        into = self.cells.get((s, v), []), self.cells.get((t, u), [])
        if not all(into):
            return False
        first, second = (cell[number % len(cell)] for cell, number in zip(into, word[2:4], strict=True))
        if first.key in self.keys or second.key in self.keys or (i != j and first.key == second.key):
            return False
        if i == j:
            second = first
        # A unit of a cell with n units is proposed with the probability of 1 / n.
        there, back = len(into[0]) * len(into[1]), len(self.cells[s, u]) * len(self.cells[t, v])
        if word[4] * back >= there * _WORD:
            return False
        self.keys -= {self.chosen[i].key, self.chosen[j].key}
        self.keys |= {first.key, second.key}
        self.chosen[i], self.chosen[j] = first, second
        return True


def _place(unit: Unit) -> Place:
    layers = tuple(sorted({-1 if entry.layer is None else entry.layer for entry in unit.members}))
    return (unit.group, tuple(entry.shape for entry in unit.members)), layers


def _words(seed: str) -> Iterator[tuple[int, ...]]:
    """Five random numbers of 64 bits at a time, the same on every machine and version of Python."""
    number = 0
    while True:
        digest = hashlib.sha512(f"{seed} {number}".encode()).digest()
        yield tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(5))
        number += 1
