"""Parts of GGUF that do not make one model: wherever headers and names disagree, an error says where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from kappa_fast import SourceError
from kappa_fast.sources import Filters, open_source

gguf = pytest.importorskip("gguf")


@dataclass(frozen=True)
class Part:
    """What a file says in its name and in its header; None for what the header lacks."""

    number: int  # from 1 on, in the name
    of: int = 3
    no: int | None = None  # from 0 on, in the header
    count: int | None = 3
    tensors: int | None = 3
    architecture: str | None = None
    holds: tuple[str, ...] = ()
    stem: str = "m"
    kind: str | None = None

    def write(self, directory: Path) -> None:
        writer = gguf.GGUFWriter(directory / f"{self.stem}-{self.number:05d}-of-{self.of:05d}.gguf", "llama")
        if self.architecture is None:
            writer.kv_data[0].clear()
        elif self.architecture != "llama":
            writer.kv_data[0]["general.architecture"].value = self.architecture
        if self.kind is not None:
            writer.add_string("general.type", self.kind)
        no = self.number - 1 if self.no is None else self.no
        for key, value in (("no", None if self.count is None else no), ("count", self.count)):
            if value is not None:
                writer.add_uint16(f"split.{key}", value)
        if self.tensors is not None and self.count is not None:
            writer.add_int32("split.tensors.count", self.tensors)
        for name in self.holds or (f"blk.{self.number - 1}.ffn_up.weight",):
            writer.add_tensor(name, torch.randn(20, 32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


SOUND = (Part(1, architecture="llama", kind="model"), Part(2), Part(3))


def changed(number: int, **changes: object) -> tuple[Part, ...]:
    return tuple(replace(part, **changes) if part.number == number else part for part in SOUND)


def every(**changes: object) -> tuple[Part, ...]:
    return tuple(replace(part, **changes) for part in SOUND)


TWO = every(of=2, count=2, tensors=2)[:2]
WRONG = {
    "the first is missing": (SOUND[1:], "part 1|00001-of-00003"),
    "one between is missing": ((SOUND[0], SOUND[2]), "00002-of-00003"),
    "the last is missing": (SOUND[:2], "00003-of-00003"),
    "only the last is there": (SOUND[2:], "00001-of-00003"),
    "the header counts more than the names": (every(count=4), "part 1 of 4, but only 3"),
    "the header counts fewer than the names": (every(count=2), "one of 3 parts, but its header says 2"),
    "one header counts more": (changed(2, count=5), "of 5, but only 3"),
    "one header counts fewer": (changed(3, count=2), "one of 3 parts, but its header says 2"),
    "one header counts one part": (changed(2, count=1), "one of 3 parts, but its header says 1"),
    "one header counts none": (changed(3, count=0), "one of 3 parts, but its header says 0"),
    "one header says nothing": (changed(2, count=None), "one of 3 parts, but its header says 0"),
    "no header says anything": (every(count=None), "one of 3 parts, but its header says 0"),
    "a number twice": (changed(3, no=1), "parts \\[1, 2, 2\\]"),
    "numbers from 1 on": (tuple(replace(p, no=p.number) for p in SOUND), "parts \\[2, 3, 4\\]"),
    "numbers in reverse": (tuple(replace(p, no=3 - p.number) for p in SOUND), "parts \\[3, 2, 1\\]"),
    "a number beyond the count": (changed(3, no=7), "parts \\[1, 2, 8\\]"),
    "all are the first": (every(no=0), "parts \\[1, 1, 1\\]"),
    "a tensor too few": (every(tensors=4), "have 3 tensors, but .* 4"),
    "a tensor too many": (every(tensors=2), "have 3 tensors, but .* 2"),
    "headers count different tensors": (changed(2, tensors=9), "number of tensors"),
    "the last counts different tensors": (changed(3, tensors=2), "number of tensors"),
    "a tensor in two parts": (changed(2, holds=("blk.0.ffn_up.weight",)), "is in both"),
    "a part of another architecture": (changed(2, architecture="qwen2"), "architecture is 'llama' in .* 'qwen2'"),
    "the last of another architecture": (changed(3, architecture="gemma"), "architecture is 'llama' in .* 'gemma'"),
    "an adapter among them": (changed(2, kind="adapter"), "kind of file is 'model' .* 'adapter'"),
    "a projector among them": (changed(3, kind="mmproj"), "kind of file is 'model' .* 'mmproj'"),
    "an importance matrix among them": (changed(2, kind="imatrix"), "importance matrix"),
    "parts of two models": ((*SOUND, *every(stem="n")), "several GGUF models"),
    "parts of two splits": ((*SOUND, *TWO), "several GGUF models .*of-00002"),
    "a whole model beside": ((*SOUND, Part(1, 1, stem="whole", count=None)), "several GGUF models"),
    "two of which each is whole": (every(of=2, count=None)[:2], "one of 2 parts, but its header says 0"),
    "one that is its own second": ((replace(SOUND[0], of=1, no=1, count=1, tensors=1),), "parts \\[2\\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_do_not_make_one_model_are_refused(case, tmp_path):
    files, message = WRONG[case]
    for part in files:
        part.write(tmp_path)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path, Filters())


RIGHT = {
    "all parts": SOUND,
    "every header has all that the first has": every(architecture="llama"),
    "no number of tensors": every(tensors=None),
    "one of one": (Part(1, 1, count=1, tensors=1, architecture="llama"),),
    "whole, with a name of one part": (Part(1, 1, count=None, architecture="llama"),),
}


@pytest.mark.parametrize("case", RIGHT)
def test_parts_that_make_one_model_are_read(case, tmp_path):
    for part in RIGHT[case]:
        part.write(tmp_path)
    found = open_source(tmp_path, Filters())
    assert len(found.matrices) == len(RIGHT[case])
    one = next(iter(sorted(tmp_path.iterdir(), reverse=True)))  # any part stands for all
    assert [m.name for m in open_source(one, Filters()).matrices] == [m.name for m in found.matrices]
