"""Cases of a recording: calls that cannot work, and files that are damaged. What kind of error, and its words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recording_cases_results import by_hand, entry
from recording_sources import INDEX, SHARDS, Cases, Stored, gaussian, model, model_tensors
from torch import nn

import kappa_fast
from kappa_fast import Ranking, Selection
from kappa_fast.planning import plan

SMALL = {"w.weight": gaussian(20, 18), "v.weight": gaussian(18, 20)}
WRONG: list[dict[str, Any]] = [
    *({"top": value} for value in (0, -1, 1.5, 0.0, True, "3", math.nan)),
    *({"top_per_group": value} for value in (1, "yes")),
    *({"rtol": value} for value in (0, 1, 1e-9, -0.1, True, "0.1", None, math.nan)),
    *({"certify": value} for value in (1, "all", None)),
    {"certify": "selection"},
    *({"score": value} for value in ("size", None, 3)),
    *({"include": value} for value in ("(", ["a", 3], 3, b"x")),
    *({"exclude": value} for value in ("[", [None])),
    *({"embeddings": value} for value in (1, "yes")),
    {"routers": None},
    *({"fused": value} for value in ("both", None, True)),
    *({"adapters": value} for value in ("all", True)),
    *({"min_dim": value} for value in (0, -3, 1.5, "16", True)),
    *({"max_dim": value} for value in (0, 8, "x")),
    *({"device": value} for value in ("nowhere", "cuda:99", 3.5)),
    *({"backend": value} for value in ("numpy", "cuda", None)),
    *({"memory_budget": value} for value in (0, -1, "much", 1.5, "1PB", True)),
    *({"cache": value} for value in (3, "")),
    *({"progress": value} for value in (3, "bar")),
    {"process_group": "group"},
    {"no_such_option": 1},
]
SELECT: list[dict[str, Any]] = [
    {},
    *({"num_tensors": value} for value in (0, -1, 1.5, True, "3")),
    *({"top_p": value} for value in (0, 1.1, -0.1, "x", math.nan)),
    *({"max_kappa": value} for value in (0.5, math.inf, "x")),
    *({"max_params": value} for value in (0, 1.5, -3, True, 0.0, 3, 1e-9)),
    {"num_tensors": 1, "unit": "layer"},
    {"num_tensors": 1, "fill": True},
    {"max_params": 0.5, "fill": "yes"},
    {"num_tensors": 1, "include": "("},
    {"num_tensors": 1, "include": "nowhere"},
    {"max_kappa": 1.01},
    {"num_tensors": 10},
    {"top_p": 1.0},
]


def _scored(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _failing(_: Any) -> float:
    raise ZeroDivisionError("no score")


def cases(stored: Stored) -> Cases:
    for options in WRONG:
        yield f"rank, {options}", partial(kappa_fast.rank, SMALL, **options)
        if not {"score", "adapters", "cache", "progress", "process_group"} & set(options):
            yield f"plan, {options}", partial(plan, SMALL, measure=False, **options)
    for options in ({"measure": 1}, {"ranks": 0}, {"ranks": 1.5}, {"device_model": "abacus"}):
        yield f"plan, {options}", partial(plan, SMALL, **options)
    for value in (math.nan, "x", None, 1j):
        yield f"rank, a score of {value}", partial(kappa_fast.rank, SMALL, score=_scored(value))
    yield "rank, a score that fails", partial(kappa_fast.rank, SMALL, score=_failing)
    yield from _sources(stored)
    yield from _files(stored)
    for name, ranking in {
        "by hand": by_hand(),
        "model": kappa_fast.rank(model_tensors(), top=3, progress=False),
    }.items():
        for options in SELECT:
            yield f"select {name}, {options}", partial(ranking.select, **options)
    yield from _rankings(stored)


def _sources(stored: Stored) -> Cases:
    folder = stored.new("wrong")
    torch.save({"w": gaussian(20, 20)}, folder / "pytorch_model.bin")
    sources: Mapping[str, Any] = {
        "None": None,
        "a number": 3,
        "a list": [gaussian(20, 20)],
        "a tensor": gaussian(20, 20),
        "nothing": {},
        "no text": "",
        "a missing path": str(stored.place.folder / "nowhere"),
        "a missing Path": stored.place.folder / "nowhere.safetensors",
        "a word": "model-7B",
        "an address": "https://example.org/model",
        "an id that is not there": "org/nowhere",
        "vectors only": {"a": gaussian(20)},
        "an empty module": nn.Module(),
        "only norms": nn.LayerNorm(8),
        "no tensors": {"a": 3},
        "no names": {3: gaussian(20, 20)},
        "pickled": folder / "pytorch_model.bin",
        "a folder of pickles": folder,
        "the class": nn.Linear,
        "a meta module": nn.Linear(20, 20, device="meta"),
        "meta tensors": {"a": torch.empty(20, 20, device="meta")},
        "integers": {"a": torch.ones(20, 20, dtype=torch.int32)},
        "a sparse tensor": {"a": gaussian(20, 20).to_sparse()},
        "one key twice": {"a[0]": gaussian(20, 20), "a": gaussian(2, 20, 20)},
    }
    for name, source in sources.items():
        yield f"rank {name}", partial(kappa_fast.rank, source, progress=False)
        yield f"plan {name}", partial(plan, source, measure=False, memory_budget="64MB")
    yield "rank nothing at all", lambda: kappa_fast.rank()  # type: ignore[call-arg]


def _files(stored: Stored) -> Cases:
    """Damaged checkpoints."""
    whole = stored.single().read_bytes()
    changes: Mapping[str, bytes] = {
        "empty": b"",
        "a few bytes": b"abc",
        "no header": b"\xff" * 8,
        "cut in the header": whole[:200],
        "cut in the values": whole[:-100],
        "longer": whole + b"more",
        "another kind": b"GGUF" + bytes(20),
        "json": b"{}",
    }
    for name, content in changes.items():
        path = stored.new(f"damaged {name}") / "model.safetensors"
        path.write_bytes(content)
        yield f"rank a damaged file, {name}", partial(kappa_fast.rank, path, progress=False)
        yield f"plan a damaged file, {name}", partial(plan, path, measure=False)
    indices: Mapping[str, object] = {
        "no map": {},
        "empty": {"weight_map": {}},
        "a list": [],
        "outside": {"weight_map": {"w": "../x.safetensors"}},
        "missing": {"weight_map": {"w": "nowhere.safetensors"}},
        "a pickle": {"weight_map": {"w": "model.bin"}},
        "a name that is not there": {"weight_map": {"nowhere": SHARDS[0]}},
    }
    for name, document in indices.items():
        directory = stored.sharded(f"index {name}")
        (directory / INDEX).write_text(json.dumps(document))
        yield f"rank an index, {name}", partial(kappa_fast.rank, directory, progress=False)
    incomplete = stored.sharded("incomplete")
    (incomplete / SHARDS[1]).unlink()
    yield "rank without a shard", partial(kappa_fast.rank, incomplete, progress=False)
    for name, text in {"damaged": "{", "a list": "[]", "no quantization": '{"quantization_config": 3}'}.items():
        directory = stored.sharded(f"config {name}")
        (directory / "config.json").write_text(text)
        yield f"rank with a config, {name}", partial(kappa_fast.rank, directory, progress=False)
    yield "rank an empty folder", partial(kappa_fast.rank, stored.new("empty"), progress=False)
    notes = stored.new("texts") / "notes.txt"
    notes.write_text("text")
    yield "rank a text", partial(kappa_fast.rank, notes, progress=False)
    gguf = stored.new("bad gguf") / "model.gguf"
    gguf.write_bytes(b"GGUF\x03\0\0\0" + bytes(16))
    yield "rank a damaged gguf", partial(kappa_fast.rank, gguf, progress=False)


def _rankings(stored: Stored) -> Cases:
    folder, hand = stored.new("wrong files"), by_hand()
    hand.to_json(folder / "whole.json")
    text = (folder / "whole.json").read_text()
    changes: Mapping[str, str] = {
        "cut": text[:-200],
        "no json": "{",
        "a list": "[]",
        "another format": text.replace("kappa_fast ranking", "other"),
        "newer": text.replace('"version": 1', '"version": 99'),
        "no version": text.replace('"version": 1', '"version": null'),
        "a word for kappa": text.replace('"kappa": 2.0', '"kappa": "two"'),
        "a status": text.replace('"ok"', '"fine"'),
        "below one": '{"a": 0.5}',
        "a contradiction": text.replace('"upper": 2.0', '"upper": 1.5'),
        "nothing": "{}",
    }
    for name, content in changes.items():
        (folder / f"{name}.json").write_text(content)
        yield f"read a ranking, {name}", partial(Ranking.from_json, folder / f"{name}.json")
        yield f"read a selection, {name}", partial(Selection.from_json, folder / f"{name}.json")
    yield "read a ranking that is not there", partial(Ranking.from_json, folder / "nowhere.json")
    yield "read a folder", partial(Ranking.from_json, folder)
    yield "read a ranking as a selection", partial(Selection.from_json, folder / "whole.json")
    yield "write into nowhere", partial(hand.to_json, Path(folder, "nowhere", "x.json"))
    yield "write over a folder", partial(hand.to_json, folder)
    yield "a ranking with a key twice", lambda: Ranking([entry("a", 2.0), entry("a", 3.0)])
    yield "a ranking with a score of nan", lambda: Ranking([entry("a", 2.0, score=math.nan)])
    yield "a ranking with odd metadata", lambda: Ranking([entry("a", 2.0)], (), {"x": {1: 2}})
    yield "a ranking with objects", lambda: Ranking([entry("a", 2.0)], (), {"x": object})
    yield "compare with no ranking", lambda: hand.compare(3)  # type: ignore[arg-type]
    yield "compare with nothing in common", lambda: hand.compare(Ranking([entry("other", 2.0)]))
    yield "a series of one", lambda: hand.series()
    yield "a summary by size", lambda: hand.summary("size")  # type: ignore[arg-type]
    yield "filter by a wrong pattern", lambda: hand.filter(include="(")
    yield "filter by a wrong layer", lambda: hand.filter(layers="one")  # type: ignore[arg-type]
    yield "a table of wrong length", lambda: hand.to_text(limit=-1)
    yield "a table that is too narrow", lambda: hand.to_text(width=10)
    yield "a plot of another kind", lambda: hand.plot(folder / "plot.txt")
    yield (
        "a page with a foreign selection",
        lambda: hand.to_html(folder / "x.html", selection=Selection((entry("x", 2.0),), True, {})),
    )
    yield "a page in nowhere", lambda: hand.to_html(folder / "nowhere" / "x.html")
    yield "an interrupted ranking", lambda: Ranking(hand, (), {**hand.metadata, "partial": True}).select(num_tensors=1)
    yield "a wrong pattern for including", lambda: hand.select(num_tensors=1).including("(")
    yield "a model that is none", lambda: hand.select(num_tensors=1).apply(3)  # type: ignore[arg-type]
    yield "nothing to restore", lambda: kappa_fast.restore(model())
    yield "a name that is not there", lambda: kappa_fast.nowhere
