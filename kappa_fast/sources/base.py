"""What a source hands to the next stage: matrices to rank, and everything it left out with the reason."""

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

COMPUTED = "computed by"  # how evidence begins of a weight that a module computes from its parameters
Role = Literal["adapter", "embedding", "head", "router", "scales", "ingredient"]


class Take(Protocol):
    """Reads a part of a tensor, detached. See ``Stored.take``."""

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor: ...


class Load(Protocol):
    """Reads a matrix. See ``Matrix.load``."""

    def __call__(self, device: torch.device | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class FileState:
    """A file as it was when its header was read: whatever is done to the file later changes one of these."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path, found: os.stat_result | None = None) -> FileState:
        """The present state of what the path leads to, ``found`` if it is known already.

        Raises:
            OSError: there is nothing.
        """
        found = os.stat(path) if found is None else found
        return cls(
            os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        )

    def has_same_content(self, found: os.stat_result) -> bool:
        """Whether it is surely what it was: a program can set mtime back, as rsync and tar do, and not ctime.

        So other rights and new links count as changes too.
        """
        known = (self.device, self.inode, self.size, self.mtime_ns, self.ctime_ns)
        return known == (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True)
class Stamp:
    """What identifies values without reading them.

    files: all files that they come from (weights, and scales if those are elsewhere).
    what: which part of these files, and how it is read; equal for equal values.
    """

    files: tuple[FileState, ...]
    what: str

    @classmethod
    def joined(cls, parts: Sequence[Stamp | None], how: str) -> Stamp | None:
        """Of values made from several tensors, codes and their scales for instance; None if one has no stamp.

        how: what is made of them, such as the format; another format must not find what this one has left.
        """
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        files = tuple(dict.fromkeys(file for part in known for file in part.files))
        return cls(files, f"{how}({', '.join(part.what for part in known)})")


@cache
def release_of(package: str) -> str:
    """Name and version of an installed package, for stamps of what it dequantizes: a later one may correct itself."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # a copy on the path
        return package


@dataclass(frozen=True)
class Stored:
    """A tensor as a reader finds it, before anything is decided about it.

    Attributes:
        names: all names of the tensor, without the wrappers of PEFT; the first is the one it is called by.
        take: ``take(index)`` reads that part of it, detached. With ``device``, codes are moved there before they are
            dequantized; what is not quantized comes where it is.
        problem: why its values are no weights, or None.
        error: why it cannot be read though it is a weight, or None; raised unless the options leave it out.
        parent: the module that owns it, where there is one.
        model_types: ``config.model_type`` of the model around it, then that of the text model in it; () if unknown.
        roles: what it is for, as far as the model itself tells; names may tell more.
        quantization: how it was quantized, such as "mxfp4", where ``take`` dequantizes; ``shape`` and ``dtype`` are
            then those of the dequantized weight. None for values that are weights as they stand.
        overhead: bytes that ``take`` needs at its peak beside what it returns, for the whole tensor, or for one index
            of the first dimension where there are three.
        prefetch: ``prefetch(index)`` has the operating system read ahead what ``take(index)`` will want; it neither
            waits nor takes memory nor raises. None where there is nothing to read.
        location: the file and the offset in it where the values begin, for reading in the order of the disk.
        is_spread: whether ``take`` may need what other processes hold.
        stamp: what identifies the values without reading them, None if nothing does.
        out_of_sight: True for a weight of the model whose values are nowhere to be read; a warning counts these.
        unfollowed: True where nobody knows whether its layer multiplies with these values or computes others from them;
            a warning counts these.
        evidence: what makes it a weight, where that is more than ``parent`` and ``quantization`` tell: the rule of a
            format, or how a module makes it. For ``metadata["evidence"]`` and the log.
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
    """Where a tensor of a checkpoint is in the model: the parameter, what to index it with, the label of that part.

    home: what holds the parameter, for those that are stored as the model has them; None for others.
    """

    name: str
    index: Index
    label: str = ""
    home: Home | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Division:
    """A tensor of a checkpoint that becomes several parameters of the model: the rows of each, and its place."""

    parts: tuple[tuple[slice, Place], ...]


@dataclass(frozen=True)
class Home:
    """What a model tells of a parameter: the module that owns it, what that is for, the types of the model around it.

    ``Stored`` has the same under ``parent``, ``roles`` and ``model_types``. Of a buffer, which is no parameter, it says
    so with ``is_buffer``.
    """

    owner: torch.nn.Module
    roles: frozenset[Role]
    model_types: tuple[str, ...]
    is_buffer: bool = False


@dataclass(frozen=True)
class Inventory:
    """Everything that a reader found.

    Attributes:
        tensors: in the order of the model.
        num_parameters: weights of the whole model, each tensor counted once.
        metadata: what is known about the source, in plain JSON.
        in_memory: False where ``take`` brings a tensor into memory that was not there before.
        buffers: names of what lies beside the tensors and is no candidate itself.
        in_peft: whether PEFT has wrapped the model, which makes more names those of adapters.
        config: what config.json says, for checkpoints.
        shards: what of it lies on several processes; None if nothing does.
    """

    tensors: Sequence[Stored]
    num_parameters: int
    metadata: Mapping[str, Any]
    in_memory: bool = True
    buffers: Collection[str] = ()
    in_peft: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    shards: Shards | None = None


@dataclass(frozen=True)
class Matrix:
    """One matrix to rank: where it is, and how to get at its values.

    ``load()`` returns a 2-D tensor of shape ``shape`` in ``dtype``, on the device where the weight lives: a view where
    the storage allows one, detached, never to be written to. It may be called more than once. Quantized weights
    (``quantization`` says how) are dequantized by it: ``load(device)`` moves their codes there first.
    ``prefetch()`` has the operating system read ahead what ``load()`` will want, if anything has to be read;
    ``location`` is where that begins, a file and an offset. ``is_spread``: ``load()`` may need what others hold.
    ``stamp`` identifies the values of this matrix without reading them, where something does.
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
    load: Load = field(repr=False, compare=False)
    quantization: str | None = None
    overhead: int = 0  # bytes that load() needs at its peak beside the matrix
    prefetch: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    location: tuple[str, int] | None = None
    is_spread: bool = False
    stamp: Stamp | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> str:
        return self.name + self.part

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """All matrices of a model, in the order of the model, and what was left out.

    ``num_parameters`` counts every parameter of the model once (tied ones too), ranked or not: the denominator of
    ``select(max_params=<fraction>)``. ``metadata`` goes into ``Ranking.metadata["source"]`` and is plain JSON.
    ``absent``: those of ``skipped`` that are weights of the model without values to read (packed, on the meta device).
    ``unfollowed``: the names of weights that are ranked as they are held, though their layer has a forward() that
    cannot be followed and may compute others from them.
    ``shards``: what of it lies on several processes, to be connected before anything is loaded; None if nothing does.
    ``sizes``: how many entries each tensor has, by its first name, those of one dimension too.
    """

    matrices: tuple[Matrix, ...]
    skipped: tuple[Skipped, ...]
    num_parameters: int
    metadata: Mapping[str, Any]
    in_memory: bool = True  # False where load() brings a tensor into memory that was not there before
    absent: tuple[Skipped, ...] = ()
    unfollowed: tuple[str, ...] = ()
    shards: Shards | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
