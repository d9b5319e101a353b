"""Ranking: the matrices of a model in ascending order of their condition numbers, as rank() returns them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..errors import OptionError, RankingFileError, missing_extra
from . import consumers, serialize
from .consistency import contradicted_score, with_called_score, wrong_metadata
from .entries import Skipped, Status, TensorKappa
from .orders import MatchName, OrderName
from .scores import Score, scored, text_of
from .selecting import select
from .selection import Selection
from .summary import By, Summary, summarize
from .units import UnitName

if TYPE_CHECKING:
    import pandas

    from .consumers import Comparison, RankingTable, Series

# Resolved entries come first, so that the first k entries of a ranking with top=k are the lowest k.
_STATUS_ORDER: dict[Status, int] = {"ok": 0, "scored": 0, "rank_deficient": 1, "bounded": 2, "non_finite": 3}
_STATUS_WORDS: dict[Status, str] = {
    "scored": "without kappa",
    "rank_deficient": "rank deficient",
    "bounded": "only bounded",
    "non_finite": "nan",
}


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Ranking(Sequence[TensorKappa]):
    """The matrices of a model, ascending score: an immutable sequence of TensorKappa.

    First the resolved entries by score, then the rank-deficient ones (kappa inf), then the "bounded" ones by their
    lower bound, then the non-finite ones. Ties are broken by key, so the order does not depend on the order of
    ``entries``.

    ``ranking[0]`` is an entry, ``ranking[:10]`` a tuple of entries (a part of a ranking has no metadata of its own),
    ``ranking["layers.0.mlp.experts.down_proj[3]"]`` the entry with that key, and ``key in ranking`` works too. Two
    rankings are equal if entries, skipped parameters and metadata are, nan equal to nan.

    Args:
        entries: the ranked matrices, in any order, with unique keys.
        skipped: the parameters that were not ranked, with reasons.
        metadata: plain JSON (text, numbers, bools, None, lists, dicts with text keys); it is copied and cannot be
            changed afterwards. nan and inf become the texts "nan" and "inf".

    Raises:
        OptionError: two entries share a key, a score or a lower bound that decides the order is nan, or the metadata
            is not plain JSON.
    """

    entries: tuple[TensorKappa, ...]
    skipped: tuple[Skipped, ...]
    metadata: Mapping[str, Any]
    _positions: dict[str, int]

    def __init__(
        self,
        entries: Iterable[TensorKappa],
        skipped: Iterable[Skipped] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        ordered = tuple(sorted(entries, key=_sort_key))
        positions = {entry.key: i for i, entry in enumerate(ordered)}
        if len(positions) < len(ordered):
            twice = next(entry.key for i, entry in enumerate(ordered) if positions[entry.key] != i)
            raise OptionError(f"two entries have the key {twice!r}: give each matrix its own name and part")
        # The fields of a frozen dataclass can only be set like this.
        object.__setattr__(self, "entries", ordered)
        object.__setattr__(self, "skipped", tuple(skipped))
        object.__setattr__(self, "metadata", serialize.freeze(dict(metadata or {}), "metadata"))
        object.__setattr__(self, "_positions", positions)

    @overload
    def __getitem__(self, index: int | str) -> TensorKappa: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TensorKappa, ...]: ...
    def __getitem__(self, index: int | str | slice) -> TensorKappa | tuple[TensorKappa, ...]:
        """The entry at a position or with a key, or a tuple of entries for a slice.

        Raises:
            IndexError: no such position.
            KeyError: no such key; if a parameter of that name was skipped, the message says why.
        """
        if not isinstance(index, str):
            return self.entries[index]
        if index in self._positions:
            return self.entries[self._positions[index]]
        reasons = [skipped.reason for skipped in self.skipped if skipped.name == index]
        why = f"it was skipped: {reasons[0]}" if reasons else "entry.key lists the keys there are"
        raise KeyError(f"no entry {index!r} in this ranking; {why}")

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[TensorKappa]:
        return iter(self.entries)

    def __contains__(self, item: object) -> bool:
        return item in self._positions if isinstance(item, str) else item in self.entries

    def __eq__(self, other: object) -> bool:
        return self.document() == other.document() if isinstance(other, Ranking) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Ranking, (self.entries, self.skipped, serialize.thaw(self.metadata))

    def __repr__(self) -> str:
        resolved = [entry.kappa for entry in self.entries if entry.status == "ok"]
        parts = [f"{len(self)} matrices"]
        if resolved:
            parts.append(f"kappa {min(resolved):.4g} to {max(resolved):.4g}")
        for status, words in _STATUS_WORDS.items():
            count = sum(entry.status == status for entry in self.entries)
            parts += [f"{count} {words}"] if count else []
        return f"Ranking({', '.join([*parts, f'{len(self.skipped)} skipped'])})"

    def __str__(self) -> str:
        return self.to_text(limit=40)

    def _repr_html_(self) -> str:
        return consumers.html_of_ranking(self)

    def select(
        self,
        *,
        num_tensors: int | None = None,
        top_p: float | None = None,
        max_kappa: float | None = None,
        max_params: float | None = None,
        per_group: bool = False,
        unit: UnitName = "matrix",
        fill: bool = False,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        order: OrderName = "lowest",
        seed: int | None = None,
        match: MatchName | Sequence[MatchName] = (),
    ) -> Selection:
        """The matrices to train: the lowest scores within one budget, or within each of several; or a control for them.

        With several budgets a unit is selected if each of them alone would select it.

        Args:
            num_tensors: how many units; all of them if there are fewer.
            top_p: a fraction of the units in (0, 1], rounded down but at least one.
            max_kappa: every unit whose kappa is at most this.
            max_params: how many weights, as a count (int) or as a fraction (float in (0, 1]) of all parameters of the
                model, ranked or not. Units are taken in score order up to the first that does not fit any more.
            per_group: apply the budget within each group (same layer type) on its own. max_params is shared out in
                proportion to the weights that each group has in the ranking; what whole matrices leave of the shares
                goes to the groups whose next matrix was nearest to fitting. top_p is rounded down in each group, and
                ``selection.took()`` says what it came to.
            unit: what is taken or left as a whole: "matrix" (an entry), "expert" (all matrices of one expert; those
                outside of experts on their own) or "parameter" (the stored tensor). The kappa and the score of a unit
                are the geometric means over its matrices.
            fill: with max_params, a unit that does not fit is passed over, and smaller ones after it are still taken.
            include, exclude: regular expressions (re.search) on keys, names and aliases, which choose the candidates.
                A share of max_params refers to all parameters of the model, one of top_p to the candidates.
            order: "lowest" scores first, "highest" first, or "random". The latter two are controls: whether the lowest
                are better than others shows only where others are trained too.
            seed: for random orders, 0 by default; the same seed draws the same units of the same model.
            match: "type", "layer" or both: draw as many units of each type (group), in each layer, and of each size as
                the lowest would take, so that only kappa differs. In a dense model, where a layer has one matrix of
                each type, both leave no choice: "margins" draws as many of each type and as many in each layer, of
                the same sizes, in other combinations. Without ``match`` a random order is cut by the budget.

        Rank-deficient units come last in every order and only num_tensors and top_p reach them. Units with a nan or
        inf in their weights are never selected. A unit with a matrix that was not resolved (``top``) is not selected
        either: where it could belong to the selection, the error says which ``top`` is needed.

        Raises:
            OptionError: no budget, a value out of range, nothing fits the budget, the ranking was not
                resolved far enough, or ``match`` leaves no other draw than the lowest.

        Warns:
            UserWarning: the ranking was interrupted, so matrices are missing; a matched draw is the lowest themselves.
        """
        return select(
            self.entries,
            self.metadata,
            budgets=dict(num_tensors=num_tensors, top_p=top_p, max_kappa=max_kappa, max_params=max_params),
            per_group=per_group,
            unit=unit,
            fill=fill,
            include=include,
            exclude=exclude,
            order=order,
            seed=seed,
            match=match,
        )

    def by(self, score: Score) -> Ranking:
        """The same matrices sorted by another score, from what is known of them: nothing is computed.

        Args:
            score: a name of docs/scores.md, with a minus in front for the highest first ("-flatness"), or a callable
                that gives an entry its score.

        Raises:
            OptionError: there is no such score, an entry does not have it, or the callable returned no number.
        """
        settings = {**serialize.mapping_of(self.metadata.get("settings")), "score": text_of(score)}
        entries = [scored(entry, score) for entry in self.entries]
        return Ranking(entries, self.skipped, {**self.metadata, "settings": settings})

    def filter(
        self,
        *,
        layers: int | Iterable[int] | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        groups: str | Sequence[str] | None = None,
    ) -> Ranking:
        """A ranking of some of the matrices, with the metadata of this one, so that shares refer to the whole model.

        Args:
            layers: a number or several, such as range(8).
            include, exclude: regular expressions (re.search) on keys, names and aliases.
            groups: groups (``entry.group``) to the letter, or regular expressions (re.search) on groups.

        Raises:
            OptionError: a pattern is not a regular expression, or layers are not numbers.
        """
        return consumers.filtered(self, layers, include, exclude, groups)

    def summary(self, by: By = "group", *, selection: Selection | None = None) -> Summary:
        """The ranking by group or by layer: count, median, lowest and highest kappa, weights, the part selected.

        Raises:
            OptionError: ``by`` is neither "group" nor "layer".
        """
        return summarize(self.entries, by, selection)

    def compare(self, other: Ranking, *, score: str = "kappa") -> Comparison:
        """The differences between this ranking and ``other``, such as after training or in another dtype.

        Matrices are the same if their keys are, up to the wrappers of compile, DDP, FSDP and PEFT, tied names, and the
        prefix of a base model that only one of the two has.

        Args:
            score: the rank correlation of which score is taken, a name of docs/scores.md, whatever the rankings are
                sorted by. All else is about kappa.

        Raises:
            OptionError: ``other`` is not a Ranking, the two have no matrix in common, or none that has the score.
        """
        return consumers.compare(self, other, score)

    def series(self, *others: Ranking, labels: Sequence[str] | None = None) -> Series:
        """Kappa over this ranking and the others, such as those of the checkpoints of a run, in their order.

        Matrices are paired as by ``compare``: an entry with the latest entry of the same matrix in the rankings before.

        Args:
            labels: a name for each ranking, this one's first; by default "1", "2", ...

        Raises:
            OptionError: there are no others, the number of labels is wrong, or no two rankings share a matrix.
        """
        return consumers.series([self, *others], labels)

    def to_json(self, path: str | os.PathLike[str], *, relative: bool = False) -> None:
        """Write the ranking to a file, replacing it all at once.

        The file holds the path of the weights that ``rank()`` got: an absolute path may name people and machines.

        Args:
            path: where to write it.
            relative: write the path of the source relative to the folder of the file, for files that are shared.

        Raises:
            RankingFileError: the file cannot be written.
        """
        document = self.document()
        if relative:
            serialize.make_relative(document["metadata"], path)
        serialize.write_document(path, document)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Ranking:
        """Read what ``to_json`` wrote, or the condition_numbers.json of the reference implementation.

        The latter has neither sizes nor errors: its entries get shape (0, 0), numel 0, the interval [1, inf] and the
        method "reference", and max_params cannot be used on them.

        Raises:
            SourceNotFoundError: there is no such file.
            RankingFileError: the file is damaged, of another kind, or from a newer version.
        """
        file = Path(path)
        raw = serialize.read_json(file)
        if serialize.is_reference(raw):
            metadata = {"source": {"kind": "reference"}, "settings": {"score": "kappa"}, "partial": False}
            return cls(serialize.decode_reference(raw, file), (), metadata)
        document = serialize.check_format(raw, file, serialize.RANKING_FORMAT)
        entries = serialize.decode_entries(document.get("entries"), file)
        skipped = serialize.decode_skipped(document.get("skipped"), file)
        metadata = serialize.get_object(document, "metadata", file)
        if (strange := wrong_metadata(metadata)) is not None:
            raise RankingFileError(f"{file}: {strange}; write it again with to_json()")
        metadata = with_called_score(entries, metadata)
        if (wrong := contradicted_score(entries, metadata)) is not None:
            raise RankingFileError(f"{file} contradicts itself: {wrong}; write it again with to_json()")
        try:
            return cls(entries, skipped, metadata)
        except OptionError as error:
            raise RankingFileError(f"{file}: {error}") from error

    def document(self) -> dict[str, Any]:
        """The document that ``to_json`` writes, as plain JSON."""
        return {
            "format": serialize.RANKING_FORMAT,
            "version": serialize.VERSION,
            "metadata": serialize.thaw(self.metadata),
            "skipped": [serialize.encode_skipped(skipped) for skipped in self.skipped],
            "entries": [serialize.encode_entry(entry) for entry in self.entries],
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per entry in order: ``key``, then the fields of TensorKappa as values that files of tables can hold.

        ``rows`` and ``columns`` stand for ``shape``, ``index`` and ``aliases`` are texts ("3, 0:64"; separated by
        spaces), and ``layer`` is a nullable integer, so parquet, feather, CSV, Excel and databases can hold the frame.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise missing_extra("pandas", "dataframe", "Ranking.to_dataframe()") from error
        return consumers.frame_of(self.entries, pandas)

    def to_html(
        self, path: str | os.PathLike[str], *, selection: Selection | None = None, show: str | None = None
    ) -> None:
        """Write a page that shows the ranking: one HTML file that needs no network, replaced all at once.

        It has a heat map of layers and types of matrices (experts unfold), the sorted curve with intervals and the cut
        of a budget chosen in the page, a histogram, a table to sort and search, and what was skipped. The same ranking
        gives the same bytes.

        Args:
            path: where to write it.
            selection: the selection that the page shows first; readers can try other budgets in the page.
            show: what colors, curve and histogram show first, a name of docs/scores.md; by default what the ranking is
                sorted by. Readers can choose another one in the page.

        Raises:
            OptionError: ``selection`` holds a matrix that is not in this ranking, or no matrix has what is to be shown.
            MissingExtraError: jinja2 is not installed.
            RankingFileError: the file cannot be written.
        """
        consumers.write_page(self, path, selection, show)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        ax: Any = None,
        selection: Selection | None = None,
        show: str | None = None,
    ) -> Any:
        """Draw the heat map of layers and types of matrices; returns the matplotlib Figure.

        It shows kappa, or the statistic by whose name the ranking is sorted, or ``show``.
        Several matrices of one type in one layer (experts) are shown by their geometric mean. If no matrix has the
        number of a layer in its name, the lowest matrices are shown as bars. The backend of matplotlib and its settings
        stay as they are.

        Args:
            path: a file for the figure; its name ends in .png, .svg or .pdf. The same ranking gives the same bytes with
                the same version of matplotlib.
            ax: axes to draw into, instead of a new figure.
            selection: cells with selected matrices are framed, and say how many are selected ("25/128") if not all.
            show: what is shown, a name of docs/scores.md, whatever the ranking is sorted by.

        Raises:
            OptionError: the name has another ending, or no matrix has what is to be shown.
            MissingExtraError: matplotlib is not installed.
            RankingFileError: the file cannot be written.
        """
        return consumers.plot(self, path, ax, selection, show)

    def table(self, limit: int | None = None) -> RankingTable:
        """A table for ``rich`` with the first ``limit`` entries (None: all), fitted to the width of the page.

        Raises:
            OptionError: ``limit`` is not a count.
        """
        return consumers.RankingTable(self, limit)

    def to_text(self, limit: int | None = None, width: int = 100) -> str:
        """The table as plain text, ``width`` columns wide. ``str(ranking)`` is the text with limit=40.

        Raises:
            OptionError: ``limit`` is not a count, or the width is too small for the table.
        """
        return self.table(limit).to_text(width)


def _sort_key(entry: TensorKappa) -> tuple[int, float, str]:
    if entry.status == "non_finite":
        return _STATUS_ORDER[entry.status], 0.0, entry.key
    what = "lower" if entry.status == "bounded" else "score"
    value = getattr(entry, what)
    if value != value:
        raise OptionError(
            f"the {what} of {entry.key} (shape {entry.shape}) is nan, which cannot be sorted: "
            "return a number from the score, or exclude the tensor"
        )
    return _STATUS_ORDER[entry.status], value, entry.key
