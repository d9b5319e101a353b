"""Interrupted: what Ctrl-C during rank() raises, with what was finished until then."""

from __future__ import annotations

from ..texts import cleaned
from .ranking import Ranking


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during rank(). ``partial`` is the Ranking of what was finished until then, of ``total`` matrices.

    ``resumable`` says that all of it is in the cache: the same call goes on from there.
    """

    def __init__(self, message: str, partial: Ranking, *, total: int | None = None, resumable: bool = False) -> None:
        super().__init__(cleaned(message))
        self.partial, self.resumable = partial, resumable
        self.total = len(partial) if total is None else total

    @property
    def state(self) -> str:
        """How much is finished, in words."""
        return f"{len(self.partial)} of {self.total} matrices are done"
