"""A model in checkpoints: one file, or two shards with an index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import weights
from safetensors.torch import save_file

from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MODEL = weights(
    model__layers__0__mlp__experts__down_proj=(3, 18, 16),
    model__layers__0__up__weight=(20, 16),
    model__layers__10__up__weight=(20, 16),
    model__layers__2__up__weight=(20, 16),
    model__embed_tokens__weight=(24, 16),
    model__norm__weight=(16,),
)


def index(folder: Path, weight_map: object, name: str = INDEX) -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_single(folder: Path) -> Path:
    save_file(MODEL, folder / "model.safetensors")
    return folder


def save_sharded(folder: Path) -> Path:
    """MODEL in two shards and an index."""
    names = sorted(MODEL)
    halves = {FIRST: names[:3], SECOND: names[3:]}
    for file, members in halves.items():
        save_file({name: MODEL[name] for name in members}, folder / file)
    return index(folder, {name: file for file, members in halves.items() for name in members})


def refused(source: object, error: type[Exception] = SourceError) -> str:
    """The message of the error that opening the source raises."""
    with pytest.raises(error) as raised:
        open_source(source, Filters())
    assert type(raised.value) is error
    return str(raised.value)


def same_as_in_memory(source: object) -> bool:
    live, stored = open_source(MODEL, Filters()), open_source(source, Filters())
    values = {m.key: m.load() for m in live.matrices}
    return (
        {(m.key, str(m.index), m.shape, m.dtype) for m in live.matrices}
        == {(m.key, str(m.index), m.shape, m.dtype) for m in stored.matrices}
        and all(torch.equal(values[m.key], m.load()) for m in stored.matrices)
        and set(live.skipped) == set(stored.skipped)
        and live.num_parameters == stored.num_parameters
    )
