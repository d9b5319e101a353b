"""What a source hands to the next stage: matrices to rank, and everything it left out with the reason."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..entries import Index, Skipped

Role = Literal["adapter", "embedding", "head", "router"]


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
    def of(cls, path: Path) -> FileState:
        """The present state of what the path leads to; OSError if there is nothing."""
        found = os.stat(path)
        return cls(
            os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        )

    def has_same_content(self, path: Path) -> bool:
        """Whether what the path leads to has not been written to; a new link to it or other rights do not count."""
        found = os.stat(path)
        return (found.st_ino, found.st_size, found.st_mtime_ns) == (self.inode, self.size, self.mtime_ns)


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


@dataclass(frozen=True)
class Stored:
    """A tensor as a reader finds it, before anything is decided about it.

    Attributes:
        names: all names of the tensor, without the wrappers of PEFT; the first is the one it is called by.
        take: ``take(index)`` reads that part of it, detached.
        problem: why its values are no weights, or None.
        parent: the module that owns it, where there is one.
        model_types: ``config.model_type`` of the model around it, then that of the text model in it; () if unknown.
        roles: what it is for, as far as the model itself tells; names may tell more.
        stamp: what identifies the values without reading them, None if nothing does.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    device: torch.device
    take: Callable[[Index], torch.Tensor] = field(repr=False, compare=False)
    problem: str | None = None
    parent: torch.nn.Module | None = field(default=None, repr=False, compare=False)
    model_types: tuple[str, ...] = ()
    roles: frozenset[Role] = frozenset()
    stamp: Stamp | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


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
    """

    tensors: Sequence[Stored]
    num_parameters: int
    metadata: Mapping[str, Any]
    in_memory: bool = True
    buffers: Collection[str] = ()
    in_peft: bool = False


@dataclass(frozen=True)
class Matrix:
    """One matrix to rank: where it is, and how to get at its values.

    ``load()`` returns a 2-D tensor of shape ``shape`` in the stored dtype, on the device where the weight lives: a
    view where the storage allows one, detached, never to be written to. It may be called more than once.
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
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
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
    """

    matrices: tuple[Matrix, ...]
    skipped: tuple[Skipped, ...]
    num_parameters: int
    metadata: Mapping[str, Any]
    in_memory: bool = True  # False where load() brings a tensor into memory that was not there before
