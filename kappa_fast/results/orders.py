"""Orders of a selection: the lowest scores first, and its controls, the highest first and random draws."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..errors import OptionError
from .budgets import is_count
from .margins import redrawn
from .units import Unit

OrderName = Literal["lowest", "highest", "random"]
MatchName = Literal["type", "layer", "margins"]


@dataclass(frozen=True)
class Order:
    """Which end of the ranking a budget begins at; for random ones the seed, and what they match of the lowest."""

    name: OrderName = "lowest"
    seed: int = 0
    match: tuple[MatchName, ...] = ()

    @classmethod
    def of(cls, order: Any, seed: Any, match: Any, budgets: Mapping[str, Any]) -> Order:
        """The options of ``Ranking.select``, checked.

        Raises:
            OptionError: one of them is none, or they do not go together.
        """
        if order not in get_args(OrderName):
            raise OptionError(f"order={order!r} is unknown: use one of {', '.join(map(repr, get_args(OrderName)))}")
        if seed is not None and not (is_count(seed) or (seed == 0 and not isinstance(seed, bool | float))):
            raise OptionError(f"seed={seed!r}: give an int from 0 on")
        listed = (match,) if isinstance(match, str) else tuple(match or ())
        unknown = next((name for name in listed if name not in get_args(MatchName)), None)
        if unknown is not None or ("margins" in listed and len(set(listed)) > 1):
            raise OptionError(f"match={match!r}: give 'type', 'layer' or both, or 'margins'")
        if order != "random" and (seed is not None or listed):
            given = "seed" if seed is not None else "match"
            raise OptionError(f"{given}= is for random draws: give order='random', or leave it out")
        if order != "lowest" and not listed and budgets.get("max_kappa") is not None:
            raise OptionError(
                f"max_kappa says which matrices, not how many, so order={order!r} cannot go by it: give num_tensors, "
                "top_p or max_params, or order='random' with match='type' or match='margins', which draw as many"
            )
        return cls(order, int(seed or 0), tuple(name for name in get_args(MatchName) if name in listed))

    @staticmethod
    def in_words(settings: Mapping[str, Any]) -> str:
        """What ``settings`` say, as options; "" for the usual order."""
        match = settings.get("match", ())
        listed = [f"{name}={settings[name]}" for name in ("order", "seed") if name in settings]
        return ", ".join([*listed, *([f"match={' and '.join(map(str, match))}"] if match else [])])

    @property
    def settings(self) -> dict[str, Any]:
        """What a selection says of its order; nothing where it is the usual one."""
        if self.name == "lowest":
            return {}
        if self.name == "highest":
            return {"order": "highest"}
        return {"order": "random", "seed": self.seed} | ({"match": list(self.match)} if self.match else {})

    def arranged(self, units: Sequence[Unit]) -> list[Unit]:
        """The units with scores that put those first that a budget is to take first."""
        if self.name == "lowest" or self.match:
            return list(units)
        if self.name == "highest":
            return [replace(u, score=-u.score, score_lower=-u.score_upper, score_upper=-u.score_lower) for u in units]
        self._check_resolved(units)
        places = {unit.key: float(i) for i, unit in enumerate(sorted(units, key=self._lot))}
        return [replace(u, score=places[u.key], score_lower=places[u.key], score_upper=places[u.key]) for u in units]

    def drawn(self, units: Sequence[Unit], chosen: Sequence[Unit]) -> list[Unit]:
        """As many random units of each type, layer and size as ``chosen`` has, from all of full rank.

        Raises:
            OptionError: some units were not resolved, or there is only one way to draw.
        """
        self._check_resolved(units)
        taken = {unit.key for unit in chosen}
        whole = [unit for unit in units if unit.status in ("ok", "scored") or unit.key in taken]
        found = redrawn(whole, chosen, self.seed) if "margins" in self.match else self._in_cells(whole, taken)
        if found is None:
            given = self.match[0] if len(self.match) == 1 else self.match
            raise OptionError(f"match={given!r} {self._no_choice()}")
        return found

    def _no_choice(self) -> str:
        if "margins" in self.match:
            return (
                "found no two matrices of the lowest that could give way to others, so it draws the lowest themselves, "
                "which is no control: give another budget, or match='type', which keeps the types and not the layers"
            )
        advice = "give a smaller budget, or another unit"
        if len(self.match) > 1:
            advice = "give match='margins', which keeps how many are of each type and in each layer, or match='type'"
        return f"leaves one way to draw, the lowest themselves, which is no control: {advice}"

    def _in_cells(self, units: Sequence[Unit], taken: set[str]) -> list[Unit] | None:
        """Random ones within each cell of what is matched; None if no cell leaves a choice."""
        cells: dict[tuple[Any, ...], list[Unit]] = {}
        for unit in units:
            cells.setdefault(self._cell(unit), []).append(unit)
        found: list[Unit] = []
        choice = False
        for members in cells.values():
            count = sum(unit.key in taken for unit in members)
            choice = choice or 0 < count < len(members)
            found += sorted(members, key=self._lot)[:count]
        return found if choice else None

    def _cell(self, unit: Unit) -> tuple[Any, ...]:
        layers = tuple(sorted({-1 if entry.layer is None else entry.layer for entry in unit.members}))
        return (
            unit.numel,
            tuple(entry.shape for entry in unit.members),
            unit.group if "type" in self.match else "",
            layers if "layer" in self.match else (),
        )

    def _lot(self, unit: Unit) -> tuple[bytes, str]:
        # By the seed and the key alone: neither the order of entries nor what else there is changes a lot.
        return hashlib.sha256(f"{self.seed} {unit.key}".encode()).digest(), unit.key

    def _check_resolved(self, units: Sequence[Unit]) -> None:
        unresolved = next((unit for unit in units if unit.status == "bounded"), None)
        if unresolved is not None:
            raise OptionError(
                f"order='random' draws from all matrices, and {unresolved.key} was not resolved: rank again without top"
            )
