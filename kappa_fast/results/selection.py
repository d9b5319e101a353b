"""Selection: the matrices that a budget takes from a ranking, with patterns of parameters to add or leave out."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, RankingFileError
from ..io.patterns import Pattern, PatternError
from ..texts import printable
from . import consumers, serialize
from .budgets import BUDGETS, is_count
from .consistency import contradicted_budget, wrong_metadata
from .entries import TensorKappa
from .orders import Order

if TYPE_CHECKING:
    from torch import nn

    from .consumers import Handle


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Matrices to train, in the order of the ranking they were selected from.

    Two selections are equal if all their fields are, nan equal to nan.

    Attributes:
        entries: the selected matrices.
        boundary_certain: no interval straddles the cut, so exact kappas would select the same matrices. For max_kappa
            the cut is its value; for max_params it must also be certain which matrix was the first that did not fit.
            Scores other than kappa have no interval: then True only if the kappas are exactly known or all matrices
            are selected. False for a ranking that was interrupted.
        settings: the budgets and their values; per_group, unit, fill, include, exclude and order as they were given;
            how many units were taken within groups; the number of parameters of the model, the matrices that did not
            fit, and the source of the ranking.
        include: patterns of further parameters of the model that are trained, ranked or not.
        exclude: patterns of parameters that are not trained, even if they are entries or match ``include``.
    """

    entries: tuple[TensorKappa, ...]
    boundary_certain: bool
    settings: Mapping[str, Any]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A frozen dataclass can be filled in no other way.
        object.__setattr__(self, "entries", tuple(self.entries))
        object.__setattr__(self, "include", tuple(self.include))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        object.__setattr__(self, "settings", serialize.freeze(dict(self.settings), "settings"))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters that hold the selected matrices, each once, in order."""
        return tuple(dict.fromkeys(entry.name for entry in self.entries))

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the selected entries, in order."""
        return tuple(entry.key for entry in self.entries)

    @property
    def num_params(self) -> int:
        """The number of selected weights; 0 if unknown (entries from the reference implementation's file)."""
        return sum(entry.numel for entry in self.entries)

    @property
    def share(self) -> float:
        """The selected weights over all parameters of the model; nan where one of the two is unknown."""
        every: Any = self.settings.get("num_parameters")
        known = is_count(every) and all(entry.numel for entry in self.entries)
        return self.num_params / int(every) if known else math.nan

    @property
    def budgets(self) -> Mapping[str, int | float]:
        """The values of the budgets by their names; empty for a selection that select() did not make."""
        if "budget" in self.settings:
            return {str(self.settings["budget"]): self.settings.get("value", math.nan)}
        found: Any = self.settings.get("budgets")
        return dict(found) if isinstance(found, Mapping) else {}

    def describe(self) -> str:
        """The line of PEFT's ``print_trainable_parameters()``; parameters that patterns name are not counted."""
        every: Any = self.settings.get("num_parameters")
        some = f"trainable params: {self.num_params:,}"
        return f"{some} || all params: {every:,} || trainable%: {100 * self.share:.4f}" if self.share >= 0 else some

    def unfit(self) -> str:
        """A phrase about the matrices that came next and did not fit into a number of weights; "" if all fit."""
        found: Any = self.settings.get("unfit")
        if not isinstance(found, Mapping):
            return ""
        count, rest = found.get("count", 1), "" if self.settings.get("fill") else " (fill=True goes on to smaller ones)"
        more = f" and {count - 1:,} more" if isinstance(count, int) and count > 1 else ""
        return f"{found.get('first')} with {found.get('numel'):,} weights{more} did not fit{rest}"

    def took(self) -> str:
        """What budgets within each group came to, in words; "" if they were not within groups."""
        found: Any = self.settings.get("took")
        if not isinstance(found, Mapping):
            return ""
        units, every, groups = (int(found.get(name, 0)) for name in ("units", "of", "groups"))
        return f"{units:,} of {every:,} in {groups:,} groups: {100 * units / max(1, every):.1f}%"

    @property
    def kappa_range(self) -> tuple[float, float]:
        """The smallest and the largest kappa of the selection, (nan, nan) if none is known."""
        kappas = [entry.kappa for entry in self.entries if not math.isnan(entry.kappa)]
        return (min(kappas), max(kappas)) if kappas else (math.nan, math.nan)

    def including(self, *patterns: str) -> Selection:
        """The same selection plus every parameter of the model whose name matches (``re.search``).

        This adds parameters that are not ranked: embeddings of new tokens, the head, norms, biases. The patterns are
        kept in ``include`` and are matched when the selection is applied to a model.

        Raises:
            OptionError: a pattern is not a regular expression.
        """
        compiled(patterns)
        return replace(self, include=self.include + patterns)

    def excluding(self, *patterns: str) -> Selection:
        """The same selection without every parameter whose name matches (``re.search``).

        Entries whose key, name or alias matches are dropped now; the patterns are kept in ``exclude`` for the
        parameters of the model, and have precedence over ``include``.

        Raises:
            OptionError: a pattern is not a regular expression.
        """
        unwanted = compiled(patterns)
        kept = tuple(entry for entry in self.entries if not any(matches(pattern, entry) for pattern in unwanted))
        return replace(self, entries=kept, exclude=self.exclude + patterns)

    def apply(self, model: nn.Module) -> Handle:
        """Train only the selected parameters of ``model``, for trainers that make their own optimizer.

        Selected parameters get requires_grad=True, all others False, also norms and biases. If a parameter is selected
        in part (experts, halves of a fused projection), the rest keeps its values bit for bit with any optimizer: its
        gradients are zeroed as they arrive, and a copy of the parameter is kept during every ``step()`` of an optimizer
        that holds it, which takes that parameter's memory. ``wrap()`` needs no copies.

        Returns:
            A handle: ``handle.restore()``, or leaving ``with selection.apply(model):``, undoes everything.

        Raises:
            OptionError: the selection does not fit the model, or the model is sharded or wrapped in a way that does
                not allow it; the message says what to do instead.
        """
        return consumers.apply(self, model)

    def export(self, kind: str, path: str | os.PathLike[str] | None = None, *, model: nn.Module | None = None) -> str:
        """The selection in the format of another program; the text is also written to ``path`` if one is given.

        Args:
            kind: "axolotl" (unfrozen_parameters, YAML), "ms-swift" (arguments), "spectrum" (JSON), "esft" (JSON),
                "names" (one a line) or "regex" (one expression).
            model: the model whose names are used; needed if they differ from the ranking's, and for ``including``.

        Raises:
            OptionError: the format cannot express the selection; it names the ``unit`` that works.
            RankingFileError: the file cannot be written.
        """
        text = consumers.export(self, kind, model)
        if path is not None:
            serialize.write_text(path, text)
        return text

    def to_axolotl(self, path: str | os.PathLike[str] | None = None, *, model: nn.Module | None = None) -> str:
        """``export("axolotl")``: Axolotl's ``unfrozen_parameters``."""
        return self.export("axolotl", path, model=model)

    def to_ms_swift(self, path: str | os.PathLike[str] | None = None, *, model: nn.Module | None = None) -> str:
        """``export("ms-swift")``: arguments for ms-swift."""
        return self.export("ms-swift", path, model=model)

    def to_spectrum(self, path: str | os.PathLike[str] | None = None, *, model: nn.Module | None = None) -> str:
        """``export("spectrum")``: Spectrum's JSON."""
        return self.export("spectrum", path, model=model)

    def to_esft(self, path: str | os.PathLike[str] | None = None, *, model: nn.Module | None = None) -> str:
        """``export("esft")``: ESFT's expert configuration."""
        return self.export("esft", path, model=model)

    def to_names(self, path: str | os.PathLike[str] | None = None, *, model: nn.Module | None = None) -> str:
        """``export("names")``: names of parameters."""
        return self.export("names", path, model=model)

    def to_regex(self, path: str | os.PathLike[str] | None = None, *, model: nn.Module | None = None) -> str:
        """``export("regex")``: one regular expression."""
        return self.export("regex", path, model=model)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int | str | slice) -> TensorKappa | tuple[TensorKappa, ...]:
        """The entry at a position or with a key, or a tuple of entries for a slice.

        Raises:
            IndexError: no such position.  KeyError: no entry with this key is selected.
        """
        if not isinstance(index, str):
            return self.entries[index]
        found = next((entry for entry in self.entries if entry.key == index), None)
        if found is None:
            raise KeyError(f"no entry {index!r} in this selection; selection.keys lists those that there are")
        return found

    def __contains__(self, item: object) -> bool:
        """Whether this entry, or an entry with this key, parameter name or alias, is selected."""
        if not isinstance(item, str):
            return item in self.entries
        return any(item in (entry.key, entry.name, *entry.aliases) for entry in self.entries)

    def __or__(self, other: Selection) -> Selection:
        """The matrices that are in at least one of two selections from the same ranking, by their score, or by kappa
        where the two were selected by different scores.

        Raises:
            OptionError: they are of different rankings, or their patterns cannot be combined.
        """
        return consumers.union(self, other) if isinstance(other, Selection) else NotImplemented

    def __and__(self, other: Selection) -> Selection:
        """The matrices that are in both selections from the same ranking. Raises as for ``|``."""
        return consumers.intersection(self, other) if isinstance(other, Selection) else NotImplemented

    def __sub__(self, other: Selection) -> Selection:
        """The matrices of this selection that are not in another one from the same ranking. Raises as for ``|``."""
        return consumers.difference(self, other) if isinstance(other, Selection) else NotImplemented

    def __iter__(self) -> Iterator[TensorKappa]:
        return iter(self.entries)

    def __eq__(self, other: object) -> bool:
        return self.document() == other.document() if isinstance(other, Selection) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.entries, self.boundary_certain, serialize.thaw(self.settings), self.include, self.exclude)
        return Selection, fields

    def _repr_html_(self) -> str:
        return consumers.html_of_selection(self)

    def __repr__(self) -> str:
        weights = f"{self.num_params:,} weights" if all(entry.numel for entry in self.entries) else "sizes unknown"
        weights += f" ({100 * self.share:.4f}% of the model)" if self.share >= 0 else ""
        parts = [f"{len(self)} matrices of {len(self.names)} parameters", weights]
        if self.entries:
            low, high = self.kappa_range
            parts.append("kappa not computed" if math.isnan(low) else f"kappa {low:.4g} to {high:.4g}")
        parts += [f"{name}={value}" for name, value in self.budgets.items()]
        parts += [order] if (order := Order.in_words(self.settings)) else []
        parts += [self.took()] if self.took() else []
        parts += [self.unfit()] if self.unfit() else []
        parts += [f"including {', '.join(self.include)}"] if self.include else []
        parts += [f"excluding {', '.join(self.exclude)}"] if self.exclude else []
        parts.append("boundary certain" if self.boundary_certain else "boundary uncertain")
        return printable(f"Selection({'; '.join(parts)})")

    def to_json(self, path: str | os.PathLike[str], *, relative: bool = False) -> None:
        """Write the selection to a file, replacing it all at once.

        Args:
            path: where to write it.
            relative: write the path of the ranked weights relative to the folder of the file, for files that are
                shared; an absolute path may name people and machines.

        Raises:
            RankingFileError: the file cannot be written.
        """
        document = self.document()
        if relative:
            serialize.make_relative(document["settings"], path)
        serialize.write_document(path, document)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what ``to_json`` wrote.

        Raises:
            SourceNotFoundError: there is no such file.
            RankingFileError: the file is damaged, of another kind, or from a newer version.
        """
        file = Path(path)
        document = serialize.check_format(serialize.read_json(file), file, serialize.SELECTION_FORMAT)
        texts = ("a list of texts", serialize.read_texts)
        entries = tuple(serialize.decode_entries(document.get("entries"), file))
        try:
            selection = cls(
                entries=entries,
                boundary_certain=serialize.get_value(
                    document, "boundary_certain", file, "true or false", serialize.read_flag
                ),
                settings=serialize.get_object(document, "settings", file),
                include=serialize.get_value(document, "include", file, *texts),
                exclude=serialize.get_value(document, "exclude", file, *texts),
            )
        except OptionError as error:
            raise RankingFileError(f"{file}: {error}") from error
        if (strange := wrong_metadata(selection.settings)) is not None:
            raise RankingFileError(f"{file}: {strange}; write it again with to_json()")
        certain = selection.boundary_certain
        wrong = contradicted_budget(selection.entries, selection.settings, certain, BUDGETS)
        if wrong is not None:
            raise RankingFileError(f"{file} contradicts itself: {wrong}; write it again with to_json()")
        for pattern in (*selection.include, *selection.exclude):
            try:
                Pattern(pattern)
            except PatternError as error:
                raise RankingFileError(
                    f"{file}: the pattern {pattern[:100]!r} cannot be searched for ({error}): correct it, or write the "
                    "file again with to_json()"
                ) from error
        return selection

    def document(self) -> dict[str, Any]:
        """The document that ``to_json`` writes, as plain JSON."""
        return {
            "format": serialize.SELECTION_FORMAT,
            "version": serialize.VERSION,
            "settings": serialize.thaw(self.settings),
            "boundary_certain": self.boundary_certain,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "entries": [serialize.encode_entry(entry) for entry in self.entries],
        }


def compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """Raises OptionError for a pattern that is not a regular expression."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise OptionError(
                f"{pattern!r} is not a regular expression ({error}): re.escape(name) makes one"
            ) from error
    return compiled


def matches(pattern: re.Pattern[str], entry: TensorKappa) -> bool:
    """Whether the pattern is found in the key, the name or an alias."""
    return any(pattern.search(name) for name in (entry.key, entry.name, *entry.aliases))
