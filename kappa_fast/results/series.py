"""Series: kappa of the same matrices over several rankings, such as the checkpoints of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, missing_extra
from . import consumers, serialize
from .entries import TensorKappa
from .pairing import pair
from .ranking import Ranking

if TYPE_CHECKING:
    import pandas

    from .consumers import SeriesTable
SERIES_FORMAT = "kappa_fast series"


@dataclass(frozen=True)
class Track:
    """One matrix over all rankings; ``entries`` has None for a ranking without the matrix."""

    key: str
    entries: tuple[TensorKappa | None, ...]

    @property
    def first(self) -> TensorKappa:
        """The entry of the first ranking that has the matrix."""
        return next(entry for entry in self.entries if entry is not None)

    @property
    def kappas(self) -> tuple[float, ...]:
        """Kappa in each ranking, nan where it is not known."""
        return tuple(math.nan if entry is None else entry.kappa for entry in self.entries)

    @property
    def ratio(self) -> float:
        """The last known kappa over the first known one; nan if fewer than two are known."""
        known = [kappa for kappa in self.kappas if not math.isnan(kappa)]
        if len(known) < 2 or not known[0]:
            return math.nan
        return 1.0 if known[0] == known[-1] else known[-1] / known[0]


@dataclass(frozen=True, eq=False, repr=False)
class Series:
    """kappa over several rankings of one model.

    Attributes:
        labels: a name for each ranking, such as those of the checkpoints.
        tracks: the matrices that at least two rankings have, in the order of the first ranking.
    """

    labels: tuple[str, ...]
    tracks: tuple[Track, ...]

    def __len__(self) -> int:
        return len(self.tracks)

    def __iter__(self) -> Iterator[Track]:
        return iter(self.tracks)

    def __getitem__(self, key: str) -> Track:
        found = next((track for track in self.tracks if track.key == key), None)
        if found is None:
            raise KeyError(f"no matrix {key!r} in this series")
        return found

    def __repr__(self) -> str:
        return f"Series({len(self)} matrices over {len(self.labels)} rankings: {', '.join(self.labels)})"

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return consumers.html_of_series(self)

    def moved(self) -> list[Track]:
        """The matrices by the factor between their first and last known kappa, the largest first."""

        def size(track: Track) -> float:
            ratio = track.ratio
            return -1.0 if math.isnan(ratio) else math.inf if ratio <= 0 else max(ratio, 1 / ratio)

        return sorted(self.tracks, key=lambda track: (-size(track), track.key))

    def table(self, limit: int | None = 20) -> SeriesTable:
        """A table for ``rich`` with the ``limit`` matrices that moved most (None: all), fitted to the page."""
        return consumers.SeriesTable(self, limit)

    def to_text(self, limit: int | None = 20, width: int = 100) -> str:
        """The same as plain text.

        Raises:
            OptionError: less than 60 columns, or ``limit`` is not a count.
        """
        return self.table(limit).to_text(width)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each matrix and ranking: label, position, key, layer, group, kappa, lower, upper, status.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise missing_extra("pandas", "dataframe", "Series.to_dataframe()") from error
        return pandas.DataFrame(list(consumers.rows_of_series(self))).astype({"layer": "Int64"})

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the series to a file, replacing it all at once.

        Raises:
            RankingFileError: the file cannot be written.
        """
        serialize.write_document(path, self.document())

    def document(self) -> dict[str, Any]:
        """The series as plain JSON."""
        names = ("kappa", "lower", "upper", "status")
        tracks = [
            {
                "key": track.key,
                "ratio": track.ratio,
                "values": [None if e is None else {name: getattr(e, name) for name in names} for e in track.entries],
            }
            for track in self.tracks
        ]
        found: Mapping[str, Any] = serialize.freeze(
            {"format": SERIES_FORMAT, "version": serialize.VERSION, "labels": list(self.labels), "tracks": tracks},
            "series",
        )
        return dict(serialize.thaw(found))

    def plot(self, path: str | os.PathLike[str] | None = None, *, ax: Any = None, group: str | None = None) -> Any:
        """Draw kappa over the rankings, a line for each layer, a panel for each group; returns the matplotlib Figure.

        Args:
            path: a file for the figure; its name ends in .png, .svg or .pdf.
            ax: axes to draw one group into: ``group``, by default the group whose kappa moved most.
            group: draw only this group.

        Raises:
            OptionError: the name has another ending, there is no such group, or no kappa is finite.
            MissingExtraError: matplotlib is not installed.
            RankingFileError: the file cannot be written.
        """
        return consumers.plot_series(self, path, ax, group)


def series(rankings: Sequence[Ranking], labels: Sequence[str] | None = None) -> Series:
    """See ``Ranking.series``.

    Raises:
        OptionError: there are fewer than two rankings, the number of labels is wrong, or no two share a matrix.
    """
    rankings = list(rankings)
    wrong = next((r for r in rankings if not isinstance(r, Ranking)), None)
    if len(rankings) < 2 or wrong is not None:
        what = f"got a {type(wrong).__name__}" if wrong is not None else f"got {len(rankings)}"
        raise OptionError(f"a series takes two or more rankings, and {what}: Ranking.from_json(path) reads one")
    names = [str(i) for i in range(1, len(rankings) + 1)] if labels is None else [str(label) for label in labels]
    if len(names) != len(rankings) or len(set(names)) < len(names):
        raise OptionError(f"labels={names}: give {len(rankings)} labels, each another one")
    rows: list[list[TensorKappa | None]] = []
    for position, ranking in enumerate(rankings):
        # A ranking is paired with the latest entries, so that a matrix that one ranking lacks is found again later.
        latest = [next(e for e in reversed(row) if e is not None) for row in rows]
        pairs = dict((j, i) for i, j in pair(latest, ranking.entries))
        for row in rows:
            row.append(None)
        for j, entry in enumerate(ranking.entries):
            if j in pairs:
                rows[pairs[j]][-1] = entry
            else:
                rows.append([*([None] * position), entry])
    tracks = [Track(next(e for e in row if e is not None).key, tuple(row)) for row in rows]
    shared = tuple(track for track in tracks if sum(entry is not None for entry in track.entries) > 1)
    if not shared:
        raise OptionError("the rankings have no matrix in common: give rankings of one model, with the same names")
    return Series(tuple(names), shared)
