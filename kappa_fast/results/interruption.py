"""Interrupted: Ctrl-C during rank() raises this exception, which holds the finished part of the ranking."""

from __future__ import annotations

from ..texts import cleaned
from .ranking import Ranking


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during rank(). ``partial`` is the Ranking of the matrices that were finished before.

    ``resumable``: all of these are in the cache, and the same call continues from there.
    """

    def __init__(self, message: str, partial: Ranking, *, resumable: bool = False) -> None:
        super().__init__(cleaned(message))
        self.partial, self.resumable = partial, resumable
