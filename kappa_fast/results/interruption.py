"""Interrupted: Ctrl-C during rank() raises this exception, which holds the finished part of the ranking."""

from __future__ import annotations

from ..texts import cleaned
from .ranking import Ranking


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during rank(). ``partial`` is the Ranking of the matrices that were finished before, of ``total``.

    ``resumable``: all of these are in the cache, and the same call continues from there.
    """

    def __init__(self, message: str, partial: Ranking, *, total: int | None = None, resumable: bool = False) -> None:
        super().__init__(cleaned(message))
        self.partial, self.resumable = partial, resumable
        self.total = len(partial) if total is None else total

    @property
    def state(self) -> str:
        """How much is finished, in words."""
        return f"{len(self.partial)} of {self.total} matrices are done"
