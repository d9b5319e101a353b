"""Difference: what training did to the weights of a model, matrix by matrix."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .._version import __version__
from ..errors import OptionError, missing_extra
from . import consumers, serialize
from .comparison import Unpaired
from .entries import Skipped

if TYPE_CHECKING:
    import pandas

    from .consumers import DifferenceTable

DIFFERENCE_FORMAT = "kappa_fast difference"


@dataclass(frozen=True)
class Update:
    """What training did to one matrix: W before, W' after, D = W' - W, all as stored, in float64.

    Attributes:
        key, key_after: the name of the matrix (and part) before and after.
        layer, group: as in TensorKappa.
        shape: rows and columns of W.
        dtype_before, dtype_after: the dtypes that are stored, or those into which quantized weights are dequantized.
        status: "unchanged" if all entries are equal, "non_finite" if W or W' holds a NaN or inf (then nothing else is
            known), else "changed".
        norm, norm_before: the Frobenius norms of D and of W; nan where not finite.
        spectral_norm: the largest singular value of D.
        k: how many leading singular directions were looked at: at most the smaller side.
        share_left, share_right, share: which part of ||D||_F^2 lies in the span of the k leading left singular vectors
            of W, in that of the right ones, and in both at once. None where nothing changed, for k = 0, and where W has
            no definite k leading directions.
        similarities: for each of the k leading left singular vectors of W', largest singular value first, the largest
            absolute cosine with any left singular vector of W. None where nothing changed and for k = 0.
        threshold: a similarity below which a singular vector counts as an intruder.
    """

    key: str
    key_after: str
    layer: int | None
    group: str
    shape: tuple[int, int]
    dtype_before: str
    dtype_after: str
    status: Literal["changed", "unchanged", "non_finite"]
    norm: float
    norm_before: float
    spectral_norm: float
    k: int
    share_left: float | None
    share_right: float | None
    share: float | None
    similarities: tuple[float, ...] | None
    threshold: float

    @property
    def relative(self) -> float:
        """||D||_F / ||W||_F: 0 where nothing changed, inf where W was all zeros."""
        if not self.norm:
            return 0.0
        return self.norm / self.norm_before if self.norm_before else math.inf

    @property
    def stable_rank(self) -> float | None:
        """||D||_F^2 / ||D||_2^2, from 1 to the smaller side; None where nothing changed or is not finite."""
        if self.status != "changed" or not 0 < self.spectral_norm < math.inf:
            return None
        return (self.norm / self.spectral_norm) ** 2

    @property
    def intruders(self) -> int | None:
        """How many of the k leading left singular vectors of W' are intruders: their similarity is below the threshold.

        0 where nothing changed; None where it was not asked for or the weights are not finite.
        """
        if self.status == "unchanged" and self.k:
            return 0
        if self.similarities is None:
            return None
        return sum(similarity < self.threshold for similarity in self.similarities)


@dataclass(frozen=True, eq=False, repr=False)
class Difference:
    """What training did to the weights of a model: an Update for every matrix that both sources have.

    Attributes:
        updates: one for each matrix, in the order of the first source.
        only_before, only_after: the matrices of one source only, with the reason where the other skipped them.
        refused: the matrices in both whose entries do not belong together, with the reason: another shape, transposed.
        skipped: the parameters that the first source left out, with the reason.
        caveats: sentences that say what beside training is part of the difference.
        names: of both sources.
        settings: the options.
    """

    updates: tuple[Update, ...]
    only_before: tuple[Unpaired, ...]
    only_after: tuple[Unpaired, ...]
    refused: tuple[Unpaired, ...]
    skipped: tuple[Skipped, ...]
    caveats: tuple[str, ...]
    names: tuple[str, str]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.updates)

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates)

    def __getitem__(self, key: str) -> Update:
        """The update of the matrix with this key in the first source.

        Raises:
            KeyError: there is none; the message says why where that is known.
        """
        for update in self.updates:
            if update.key == key:
                return update
        left_out = {item.key: item.reason for item in (*self.only_before, *self.refused)}
        left_out |= {item.name: item.reason for item in self.skipped if item.name not in left_out}
        raise KeyError(f"no update of {key!r}: {left_out.get(key) or 'update.key lists the keys there are'}")

    @property
    def changed(self) -> list[Update]:
        """The matrices that changed, by ``relative``, largest first."""
        found = [update for update in self.updates if update.status == "changed"]
        return sorted(found, key=lambda update: (-update.relative, update.key))

    @property
    def non_finite(self) -> list[Update]:
        """The matrices with a NaN or inf before or after."""
        return [update for update in self.updates if update.status == "non_finite"]

    @property
    def relative(self) -> float:
        """||D||_F / ||W||_F over all finite matrices together."""
        finite = [update for update in self.updates if update.status != "non_finite"]
        norm, before = math.hypot(*(u.norm for u in finite)), math.hypot(*(u.norm_before for u in finite))
        return 0.0 if not norm else norm / before if before else math.inf

    def __repr__(self) -> str:
        counts = [f"{len(self.changed)} of {len(self)} matrices changed"]
        counts += [f"{len(self.non_finite)} not finite"] if self.non_finite else []
        counts += [f"{len(self.refused)} refused"] if self.refused else []
        return f"Difference({', '.join([*counts, f'{len(self.only_before)} and {len(self.only_after)} in one only'])})"

    def __str__(self) -> str:
        return self.to_text()

    def table(self, limit: int | None = 10) -> DifferenceTable:
        """A table for ``rich`` with the ``limit`` largest relative changes (None: all).

        Raises:
            OptionError: ``limit`` is not a count.
        """
        return consumers.DifferenceTable(self, limit)

    def to_text(self, limit: int | None = 10, width: int = 100) -> str:
        """The table as plain text.

        Raises:
            OptionError: less than 60 columns, or ``limit`` is not a count.
        """
        return self.table(limit).to_text(width)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each matrix in both: the fields and properties of Update, with ``rows`` and ``columns`` for
        ``shape``, and without ``similarities``.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise missing_extra("pandas", "dataframe", "Difference.to_dataframe()") from error
        return consumers.frame_of_difference(self, pandas)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the difference to a file, replacing it all at once.

        Raises:
            RankingFileError: the file cannot be written.
        """
        serialize.write_document(path, self.document())

    def document(self) -> dict[str, Any]:
        """The difference as plain JSON."""
        document = {
            "format": DIFFERENCE_FORMAT,
            "version": serialize.VERSION,
            "kappa_fast": __version__,
            "names": list(self.names),
            "settings": self.settings,
            "caveats": list(self.caveats),
            "updates": [
                {**vars(u), "relative": u.relative, "stable_rank": u.stable_rank, "intruders": u.intruders}
                for u in self.updates
            ],
            "only_before": [vars(lone) for lone in self.only_before],
            "only_after": [vars(lone) for lone in self.only_after],
            "refused": [vars(lone) for lone in self.refused],
            "skipped": [serialize.encode_skipped(skipped) for skipped in self.skipped],
        }
        found: dict[str, Any] = serialize.thaw(serialize.freeze(document, "difference"))
        return found


def checked_directions(k: object, threshold: object) -> tuple[int, float]:
    """The options ``k`` and ``threshold`` of difference().

    Raises:
        OptionError: one of them is out of range.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 0:
        raise OptionError(f"k={k!r}: give how many leading singular directions to look at, 0 for none")
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not number or not 0 < threshold <= 1:  # type: ignore[operator]
        raise OptionError(f"threshold={threshold!r}: give a cosine above 0, up to 1")
    return k, float(threshold)  # type: ignore[arg-type]
