"""plan(): what rank() would do with a source, and what that takes, from names, shapes and dtypes alone."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .._version import __version__
from ..errors import OptionError, SourceError
from ..execution.cost import operations
from ..execution.executor import Executor, usable_device
from ..execution.waves import parse_bytes
from ..machine.torch_state import undisturbed
from ..matching.checkpoint_names import places_of
from ..options import Options
from ..results import consumers, serialize
from ..results.entries import Skipped
from ..results.scores import Score
from ..sources import open_source
from ..sources.base import Matrix, Source
from .calibration import counted
from .devices import Floor, device_model, floor_of
from .disk import Reading, measure_reading
from .division import Division, divide
from .prediction import Prediction, Work, item_of, predict

if TYPE_CHECKING:
    from ..results.consumers import PlanTable

MOST_RANKS = 1 << 16
PLAN_FORMAT = "kappa_fast plan"
Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class PlannedGroup:
    """Matrices with the same name but for numbers, the same shape and dtype.

    numel: weights of all of them.  operations: multiply-adds of Gram matrices and Cholesky factors.  nbytes: as stored.
    """

    group: str
    shape: tuple[int, int]
    dtype: str
    count: int
    numel: int
    operations: float
    nbytes: int


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What rank() would do with a source. No weight has been looked at.

    Attributes:
        groups: what would be ranked, by operations, most first.
        skipped: what would not, and why.
        num_parameters: weights of the model, ranked or not.
        waves: how many waves the matrices are worked on in.
        peak: bytes that the largest wave may take beside the weights that are there; ``budget`` is what a wave may
            take, exceeded only by a single matrix that needs more.
        devices, backend, threads: where, by what, and with how many threads.
        to_read: bytes to read from a checkpoint; 0 for weights in memory. Of quantized weights at most, not exactly.
        to_download: bytes to download before, of a model of the hub; 0 if it is here.
        prediction: of the time, None if it was not to be measured.
        reading: of a checkpoint's files; None for weights in memory, if it was not to be measured, or if the files are
            still to be downloaded.
        floor: for the device that was named; a model, not a measurement.
        division: among the ranks of a process group; None if none were asked for.
        settings: as Ranking.metadata["settings"] has them.
        source: as Ranking.metadata["source"] has it.
    """

    groups: tuple[PlannedGroup, ...]
    skipped: tuple[Skipped, ...]
    num_parameters: int
    waves: int
    peak: int
    budget: int
    devices: tuple[str, ...]
    backend: str
    threads: int
    to_read: int
    to_download: int
    prediction: Prediction | None
    reading: Reading | None
    floor: Floor | None
    division: Division | None
    in_memory: bool
    settings: Mapping[str, Any]
    source: Mapping[str, Any]

    @property
    def count(self) -> int:
        """How many matrices would be ranked."""
        return sum(group.count for group in self.groups)

    @property
    def numel(self) -> int:
        """How many weights would be ranked."""
        return sum(group.numel for group in self.groups)

    @property
    def operations(self) -> float:
        """Multiply-adds of all Gram matrices and Cholesky factors."""
        return sum(group.operations for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that would be ranked, in their dtype (for quantized ones: when they are dequantized)."""
        return sum(group.nbytes for group in self.groups)

    @property
    def seconds(self) -> tuple[float, float] | None:
        """From and to: computing and reading beside each other at best, one after the other at worst."""
        if self.prediction is None:
            return None
        reading = self.reading.seconds if self.reading is not None else 0.0
        return max(self.prediction.low, reading), self.prediction.high + reading

    @property
    def seconds_of_ranks(self) -> tuple[float, float] | None:
        """From and to: what the rank with the most to do would compute, if each is as fast as this process here.

        Reading is not in it: several ranks may share a disk, or each may have its own.
        """
        if self.prediction is None or self.division is None:
            return None
        opening, share = self.prediction.opening, self.division.share
        low, high = self.prediction.low - opening, self.prediction.high - opening
        return opening + share * low, opening + share * high

    def __repr__(self) -> str:
        return (
            f"Plan({self.count} matrices, {self.numel:,} weights, {self.operations:.3g} operations, {self.waves} waves)"
        )

    def _repr_html_(self) -> str:
        return consumers.html_of_plan(self)

    def __str__(self) -> str:
        return self.to_text()

    def table(self, limit: int | None = 40) -> PlanTable:
        """What ``rich`` prints: ``limit`` groups (None: all), fitted to the page."""
        return consumers.PlanTable(self, limit)

    def to_text(self, limit: int | None = 40, width: int = 100) -> str:
        """The plan as plain text.

        Raises:
            OptionError: less than 60 columns, or ``limit`` is no count.
        """
        return self.table(limit).to_text(width)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, replacing it all at once.

        Raises:
            RankingFileError: the file cannot be written.
        """
        serialize.write_document(path, self.document())

    def document(self) -> dict[str, Any]:
        """The plan as plain JSON."""
        totals = ("count", "numel", "operations", "nbytes", "seconds")
        told = [f.name for f in fields(self) if f.name not in ("groups", "skipped", "settings", "source")]
        return {
            "format": PLAN_FORMAT,
            "version": serialize.VERSION,
            "kappa_fast": __version__,
            "name": consumers.title_of({"source": self.source}),
            **{name: _as_json(getattr(self, name)) for name in (*totals, *told)},
            "settings": _as_json(dict(self.settings)),
            "source": _as_json(dict(self.source)),
            "groups": [_as_json(group) for group in self.groups],
            "skipped": [serialize.encode_skipped(skipped) for skipped in self.skipped],
        }


def plan(
    source: torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
    *,
    top: int | float | None = None,
    top_per_group: bool = False,
    rtol: float = 1e-2,
    certify: bool | Literal["selection"] = False,
    score: Score = "kappa",
    statistics: str | Sequence[str] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    embeddings: bool = False,
    routers: bool = False,
    fused: Literal["split", "stored"] = "split",
    min_dim: int = 16,
    max_dim: int | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    measure: bool = True,
    device_model: str | None = None,
    ranks: int | None = None,
) -> Plan:
    """What ``rank(source, ...)`` with the same options would do, and how long it would take.

    Args:
        source: as for rank(); modules may lie on the meta device. Of a model on the hub that is not complete in the
            local cache, only headers are downloaded, with its index and config.json.
        top, ..., memory_budget: as for rank().
        measure: resolve a few matrices of the model's shapes, made up, for one to two seconds, and read up to 256 MB of
            a checkpoint's files, to predict the time. False for what can be said at once.
        device_model: a GPU by name ("h200", "h100", "a100", "l40s", "rtx4090"), for a floor from published figures.
        ranks: also how so many ranks of a process group would divide the work.

    Returns:
        A Plan. The model is not changed, no weight is looked at, and from files only headers are interpreted.

    Raises:
        OptionError: an argument cannot work.  SourceError: the source cannot be read.  BackendError: no such backend.
        NotImplementedError: a parameter is sharded.
    """
    options = Options(
        top=top,
        top_per_group=top_per_group,
        rtol=rtol,
        certify=certify,
        score=score,
        statistics=statistics,
        include=include,
        exclude=exclude,
        embeddings=embeddings,
        routers=routers,
        fused=fused,
        min_dim=min_dim,
        max_dim=max_dim,
    )
    _check_flag(measure)
    _check_ranks(ranks)
    named = None if device_model is None else _device_model(device_model)
    with undisturbed():
        started = time.perf_counter()
        opened = _in_memory_if_meta(open_source(source, options.filters, places_of, without_values=True))
        # The network is not asked again when what is downloaded by then is ranked.
        opening = 0.0 if "to_download" in opened.metadata else time.perf_counter() - started
        matrices = opened.matrices
        executor = Executor(opened, backend, usable_device(device), parse_bytes(memory_budget), proofs=options.proofs)
        waves = list(executor.planned(matrices))
        work = Work.of(matrices, top, top_per_group, certify)
        goal, name = options.goal, executor.backend_name
        prediction = predict(name, waves, work, goal, opening) if measure and matrices else None
    files = [] if opened.in_memory else _files(opened)
    size = opened.metadata.get("size", sum(file.stat().st_size for file in files))
    # Codes of quantized weights take less than the weights that they become, never more than their files.
    to_read = min(sum(m.nbytes for m in matrices), size)
    parts = [counted(map(item_of, part)) for part in work.floor]
    return Plan(
        groups=_groups(matrices),
        skipped=opened.skipped,
        num_parameters=opened.num_parameters,
        waves=len(waves),
        peak=max((wave.nbytes for wave in waves), default=0),
        budget=max((executor.budget_on(d) for d in {wave.device for wave in waves}), default=0),
        devices=tuple(executor.devices),
        backend=executor.backend_name,
        threads=torch.get_num_threads(),
        prediction=prediction,
        to_read=to_read,
        to_download=opened.metadata.get("to_download", 0),
        reading=_reading(files, to_read) if measure and files else None,
        floor=None if named is None else floor_of(named, *parts),
        division=None if ranks is None else divide(work.possible, work.certify, ranks),
        in_memory=opened.in_memory,
        settings=options.settings(),
        source=opened.metadata,
    )


_device_model = device_model  # the option of plan() has the same name


def _check_flag(measure: object) -> None:
    if not isinstance(measure, bool):
        raise OptionError(f"measure={measure!r}: give True or False")


def _check_ranks(ranks: object) -> None:
    if ranks is not None and (not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= MOST_RANKS):
        raise OptionError(f"ranks={ranks!r}: give a number of processes, 1 to {MOST_RANKS:,}")


def _in_memory_if_meta(source: Source) -> Source:
    """What has no values yet is planned as if it lay in the memory of the host."""
    host = torch.device("cpu")
    moved = tuple(replace(m, device=host) if m.device.type == "meta" else m for m in source.matrices)
    return replace(source, matrices=moved)


def _files(source: Source) -> list[Path]:
    """The files of a checkpoint, if they are here."""
    if "to_download" in source.metadata:
        return []
    path = Path(str(source.metadata.get("path", "")))
    base = path if path.is_dir() else path.parent
    files = [base / str(name) for name in source.metadata.get("files", ())]
    return [file for file in files if file.is_file()]


def _reading(files: Sequence[Path], nbytes: int) -> Reading | None:
    try:
        return measure_reading(files, nbytes)
    except OSError as error:
        raise SourceError(f"{files[0]} cannot be read ({error.strerror}): check the file, plan again") from error


def _groups(matrices: Sequence[Matrix]) -> tuple[PlannedGroup, ...]:
    members: dict[tuple[str, tuple[int, int], torch.dtype], list[Matrix]] = {}
    for matrix in matrices:
        members.setdefault((matrix.group, matrix.shape, matrix.dtype), []).append(matrix)
    groups = [
        PlannedGroup(
            group=group,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            count=len(found),
            numel=len(found) * shape[0] * shape[1],
            operations=len(found) * operations(shape),
            nbytes=sum(matrix.nbytes for matrix in found),
        )
        for (group, shape, dtype), found in members.items()
    ]
    return tuple(sorted(groups, key=lambda g: (-g.operations, g.group, g.shape)))


def _as_json(value: Any) -> Any:
    """As JSON knows it."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _as_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (tuple, list)) else value
