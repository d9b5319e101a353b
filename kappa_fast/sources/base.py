"""The data types of sources: tensors as readers find them, matrices to rank, and skipped tensors with reasons."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ..errors import SourceError
from ..results.entries import Index, Skipped
from .spread import Shards

COMPUTED = "computed by"  # the beginning of the evidence of a weight that a module computes from its parameters
Role = Literal["adapter", "embedding", "head", "router", "scales", "ingredient"]


class Take(Protocol):
    """A function that reads a part of a tensor, detached. See ``Stored.take``."""

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor: ...


class Load(Protocol):
    """A function that reads a matrix. See ``Matrix.load``."""

    def __call__(self, device: torch.device | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class FileState:
    """The identity of a file when its header was read; every later change of the file changes one of the values."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path, found: os.stat_result | None = None) -> FileState:
        """Return the present state of the file at ``path`` (links resolved); ``found`` is its stat, if known already.

        Raises:
            OSError: there is no such file.
        """
        found = os.stat(path) if found is None else found
        return cls(
            os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        )

    def has_same_content(self, found: os.stat_result) -> bool:
        """Return whether ``found`` proves that the content is unchanged.

        Programs such as rsync and tar set mtime back, but cannot set ctime, so ctime is compared too. New permissions
        and hard links change ctime, and therefore count as changes.
        """
        known = (self.device, self.inode, self.size, self.mtime_ns, self.ctime_ns)
        return known == (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True)
class Stamp:
    """An identification of values that needs no reading of the values.

    files: all files from which the values come (of the weights, and of the scales if they are in other files).
    what: the part of these files and how it is read; equal for equal values.
    """

    files: tuple[FileState, ...]
    what: str

    @classmethod
    def joined(cls, parts: Sequence[Stamp | None], how: str) -> Stamp | None:
        """Return the stamp of values made from several tensors, such as codes and scales; None if one has no stamp.

        how: how the values are made, such as the format; other formats must not find values that this one cached.
        """
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        files = tuple(dict.fromkeys(file for part in known for file in part.files))
        return cls(files, f"{how}({', '.join(part.what for part in known)})")


@cache
def release_of(package: str) -> str:
    """Return name and version of an installed package, for the stamps of what it dequantizes: versions may differ."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # the package is on sys.path without being installed
        return package


@dataclass(frozen=True)
class Stored:
    """A tensor as a reader finds it, before it is decided whether it is ranked.

    Attributes:
        names: all names of the tensor, without the wrappers of PEFT; results show the first.
        take: ``take(index)`` reads that part of the tensor, detached. With ``device``, codes are moved there before
            they are dequantized; a tensor that is not quantized stays on its own device.
        problem: why the values are not weights, or None.
        error: why this weight cannot be read, or None; raised unless the options leave the weight out.
        parent: the module that owns the tensor, or None.
        model_types: ``config.model_type`` of the model, then that of its text model; () if unknown.
        roles: the purposes of the tensor that the model states; its names may tell more.
        quantization: the format, such as "mxfp4", if ``take`` dequantizes; ``shape`` and ``dtype`` are then those of
            the dequantized weight. None if the values are not quantized.
        overhead: bytes that ``take`` needs at its peak in addition to its result, for the whole tensor, or for one
            index of the first dimension if the tensor has three.
        prefetch: ``prefetch(index)`` asks the operating system to read ahead what ``take(index)`` will read; it does
            not wait, allocate or raise. None if nothing has to be read.
        location: the file and the offset where the values begin, for reading in the order of the disk.
        is_spread: True if ``take`` may need data that other processes hold.
        stamp: identifies the values without reading them; None if that is impossible.
        out_of_sight: True for a weight of the model whose values cannot be read; a warning counts such weights.
        unfollowed: True if it is unknown whether the layer multiplies with these values or computes others from them;
            a warning counts such weights.
        evidence: why the tensor is a weight, if ``parent`` and ``quantization`` do not say all: the rule of a format,
            or how a module computes it. For ``metadata["evidence"]`` and the log.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    device: torch.device
    take: Take = field(repr=False, compare=False)
    problem: str | None = None
    parent: torch.nn.Module | None = field(default=None, repr=False, compare=False)
    model_types: tuple[str, ...] = ()
    roles: frozenset[Role] = frozenset()
    quantization: str | None = None
    overhead: int = 0
    prefetch: Callable[[Index], None] | None = field(default=None, repr=False, compare=False)
    location: tuple[str, int] | None = None
    is_spread: bool = False
    stamp: Stamp | None = None
    evidence: str = ""
    out_of_sight: bool = False
    unfollowed: bool = False
    error: SourceError | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint ends up in the model: the parameter, an index into it, the label of that part.

    home: what the model says about the parameter, if the tensor is stored as the model has it; else None.
    """

    name: str
    index: Index
    label: str = ""
    home: Home | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Division:
    """How a tensor of a checkpoint becomes several parameters of the model: the rows and the place of each."""

    parts: tuple[tuple[slice, Place], ...]


@dataclass(frozen=True)
class Home:
    """What a model says about a parameter or buffer: the module that owns it, its roles, the types of the model.

    ``Stored`` has the same as ``parent``, ``roles`` and ``model_types``. ``is_buffer`` is True for buffers.
    """

    owner: torch.nn.Module
    roles: frozenset[Role]
    model_types: tuple[str, ...]
    is_buffer: bool = False


@dataclass(frozen=True)
class Inventory:
    """The result of a reader: all tensors of a source.

    Attributes:
        tensors: all tensors, in the order of the model.
        num_parameters: the number of weights of the whole model; each tensor is counted once.
        metadata: facts about the source, in plain JSON.
        in_memory: False if ``take`` reads tensors into memory; True if they are in memory already.
        buffers: names of tensors that are not candidates for ranking.
        in_peft: True if PEFT has wrapped the model, so that more names are those of adapters.
        config: the content of config.json, for checkpoints.
        shards: the tensors that are spread over several processes, or None.
    """

    tensors: Sequence[Stored]
    num_parameters: int
    metadata: Mapping[str, Any]
    in_memory: bool = True
    buffers: Collection[str] = ()
    in_peft: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    shards: Shards | None = None


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix to rank: its name and shape, and how to read its values. Matrices compare by identity.

    ``load()`` returns a detached 2-D tensor of shape ``shape`` in ``dtype`` on the device of the weight, as a view if
    the storage allows it; callers must not write to it. ``load()`` may be called more than once. It dequantizes
    quantized weights (``quantization`` is the format); ``load(device)`` moves their codes to ``device`` first.
    ``prefetch()`` asks the operating system to read ahead what ``load()`` will read; None if nothing has to be read.
    ``location`` is the file and the offset where these values begin.
    ``is_spread``: ``load()`` may need data that other processes hold.
    ``stamp`` identifies the values of this matrix without reading them; None if that is impossible.
    """

    name: str
    aliases: tuple[str, ...]
    part: str
    index: Index
    layer: int | None
    group: str
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    load: Load = field(repr=False)
    quantization: str | None = None
    overhead: int = 0  # bytes that load() needs at its peak in addition to the matrix
    prefetch: Callable[[], None] | None = field(default=None, repr=False)
    location: tuple[str, int] | None = None
    is_spread: bool = False  # whether load() may need what other processes hold
    stamp: Stamp | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        return self.name + self.part

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """All matrices of a model, in the order of the model, and all skipped tensors.

    ``num_parameters`` counts every parameter of the model once (tied ones too), ranked or not: the denominator of
    ``select(max_params=<fraction>)``. ``metadata`` goes into ``Ranking.metadata["source"]`` and is plain JSON.
    ``absent``: the entries of ``skipped`` that are weights whose values cannot be read (packed, on the meta device).
    ``unfollowed``: the names of weights that are ranked as stored, although it is unknown whether their layer
    computes others from them in its forward().
    ``shards``: the tensors that are spread over several processes, to be connected before anything is loaded; or None.
    ``sizes``: the number of entries of each tensor by its first name, tensors of one dimension included.
    """

    matrices: tuple[Matrix, ...]
    skipped: tuple[Skipped, ...]
    num_parameters: int
    metadata: Mapping[str, Any]
    in_memory: bool = True  # False if load() reads tensors into memory; True if they are in memory already
    absent: tuple[Skipped, ...] = ()
    unfollowed: tuple[str, ...] = ()
    shards: Shards | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
