"""The files of rankings that commands get as arguments, with an error that says what else a file is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError, RankingFileError

if TYPE_CHECKING:
    from ..results.ranking import Ranking


def read_ranking(path: Path, score: str | None = None) -> Ranking:
    """The ranking in a file, sorted by ``score`` if one is given.

    Raises:
        OptionError: the file is a selection, or does not have that score.
        RankingFileError, SourceNotFoundError: see ``Ranking.from_json``.
    """
    from ..results import serialize
    from ..results.ranking import Ranking

    try:
        ranking = Ranking.from_json(path)
    except RankingFileError:
        raw = serialize.read_json(path)
        if isinstance(raw, dict) and raw.get("format") == serialize.SELECTION_FORMAT:
            raise OptionError(f"{path} is a selection: give the ranking that it was selected from") from None
        raise
    return ranking if score is None else ranking.by(score)
