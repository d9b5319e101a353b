"""The files of rankings that commands get as arguments, with an error that says what else a file is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError, RankingFileError

if TYPE_CHECKING:
    from ..results.ranking import Ranking


def read_ranking(path: Path) -> Ranking:
    """The ranking in a file.

    Raises:
        OptionError: the file is a selection.  RankingFileError, SourceNotFoundError: see ``Ranking.from_json``.
    """
    from ..results import serialize
    from ..results.ranking import Ranking

    try:
        return Ranking.from_json(path)
    except RankingFileError:
        raw = serialize.read_json(path)
        if isinstance(raw, dict) and raw.get("format") == serialize.SELECTION_FORMAT:
            raise OptionError(f"{path} is a selection: give the ranking that it was selected from") from None
        raise
