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
    """One matrix over all rankings; ``entries`` has None where a ranking does not have it, its name is the first's."""

    key: str
    entries: tuple[TensorKappa | None, ...]

    @property
    def first(self) -> TensorKappa:
        """Its entry in the first ranking that has it."""
        return next(entry for entry in self.entries if entry is not None)

    @property
    def kappas(self) -> tuple[float, ...]:
        """What kappa is in each ranking, nan where it is not known."""
        return tuple(math.nan if entry is None else entry.kappa for entry in self.entries)

    @property
    def ratio(self) -> float:
        """The last known kappa over the first known one; nan with less than two."""
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
        """The matrices by how far kappa moved from the first to the last ranking that know it, most first."""

        def size(track: Track) -> float:
            ratio = track.ratio
            return -1.0 if math.isnan(ratio) else math.inf if ratio <= 0 else max(ratio, 1 / ratio)

        return sorted(self.tracks, key=lambda track: (-size(track), track.key))

    def table(self, limit: int | None = 20) -> SeriesTable:
        """What ``rich`` prints: the ``limit`` matrices that moved most (None: all), fitted to the page."""
        return consumers.SeriesTable(self, limit)

    def to_text(self, limit: int | None = 20, width: int = 100) -> str:
        """The same as plain text.

        Raises:
            OptionError: less than 60 columns, or ``limit`` is no count.
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
        """Lines of kappa over the rankings, one for each layer, a panel for each group, as a matplotlib Figure.

        Args:
            path: a file to write it to, PNG, SVG or PDF as its name ends.
            ax: axes to draw into; then ``group`` says which, by default the one whose kappa moved most.
            group: only this group.

        Raises:
            OptionError: the name ends in another way, there is no such group, or no kappa is finite.
            MissingExtraError: matplotlib is not installed.
            RankingFileError: the file cannot be written.
        """
        return consumers.plot_series(self, path, ax, group)


def series(rankings: Sequence[Ranking], labels: Sequence[str] | None = None) -> Series:
    """What ``Ranking.series`` promises.

    Raises:
        OptionError: fewer than two rankings, as many labels as rankings are not given, or they share no matrix.
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
        # Each with the latest entry that a matrix has had, so that one that is missing in between is found again.
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
