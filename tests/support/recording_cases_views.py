"""Cases of a recording: rankings beside each other, in files, in tables, on pages and in pictures."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from recording_cases_results import NAN, by_hand, chosen, frame, ranked
from recording_plain import Text
from recording_sources import Cases, Stored, gaussian, model_tensors

import kappa_fast
from kappa_fast import Ranking, Selection, TensorKappa


def cases(stored: Stored) -> Cases:
    whole, hand = ranked(), by_hand()
    yield from _comparisons(whole, hand)
    yield from _files(stored, {"model": whole, "by hand": hand})
    yield from _views(stored, {"model": whole, "by hand": hand})


def moved(scale: float = 1.3, break_one: bool = False) -> Ranking:
    """Of the same model after something like training."""
    tensors = dict(model_tensors())
    for i, (name, tensor) in enumerate(tensors.items()):
        if "self_attn" in name and tensor.dim() == 2:
            tensors[name] = tensor + scale * 0.01 * gaussian(*tensor.shape, seed=60 + i)
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].half()
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    tensors["model.extra.weight"] = gaussian(30, 20)
    if break_one:
        tensors["model.layers.1.self_attn.q_proj.weight"] = NAN * tensors["model.layers.1.self_attn.q_proj.weight"]
    return kappa_fast.rank(tensors, progress=False, rtol=1e-3)


def _comparisons(whole: Ranking, hand: Ranking) -> Cases:
    after, broken = moved(), moved(2.0, True)
    named = Ranking([replace(e, name=f"module._orig_mod.{e.name}") for e in whole], (), dict(whole.metadata))
    changed = Ranking([_doubled(e) if e.status == "ok" else e for e in hand], (), dict(hand.metadata))
    pairs = {
        "itself": (whole, whole),
        "after": (whole, after),
        "broken": (whole, broken),
        "wrapped": (whole, named),
        "by hand": (hand, changed),
    }
    pairs |= {"proven": (whole, ranked(certify=True)), "stored": (whole, ranked(fused="stored"))}
    for name, (one, other) in pairs.items():
        yield f"compare with {name}", partial(one.compare, other)
        yield f"compare with {name}, parts", partial(_compared, one, other)
    yield "compare, overlap", lambda: whole.compare(after).overlap(max_params=0.2)
    grouped: dict[str, Any] = {"top_p": 0.3, "per_group": True, "unit": "parameter"}
    yield "compare, overlap per group", lambda: whole.compare(after).overlap(**grouped)
    yield "compare, document with overlap", lambda: _with_overlap(whole, after)
    yield "compare with another model", lambda: whole.compare(hand)
    yield "series", partial(whole.series, after, broken)
    yield "series with labels", partial(whole.series, after, labels=["first", "second"])
    yield "series, parts", lambda: _series(whole.series(after, broken))
    yield "series, labels that do not fit", partial(whole.series, after, labels=["one"])


def _doubled(e: TensorKappa) -> TensorKappa:
    return replace(e, kappa=e.kappa * 2, lower=e.lower * 2, upper=e.upper * 2, score=e.score * 2)


def _with_overlap(one: Ranking, other: Ranking) -> Any:
    found = one.compare(other)
    return found.document(found.overlap(num_tensors=5))


def _compared(one: Ranking, other: Ranking) -> dict[str, Any]:
    found = one.compare(other)
    changes = [[c.key, c.ratio, c.at_least, c.verdict, c.size, c.broke] for c in found]
    sides = {side: [c.key for c in found.moved(side)] for side in ("up", "down")}
    exceeding = {str(ratio): [c.key for c in found.exceeding(ratio)] for ratio in (1.0, 1.05, 1.5)}
    counts = [
        found.counts,
        [c.key for c in found.status_changes],
        found.correlation,
        found.caveats and [Text(c) for c in found.caveats],
    ]
    return {
        "changes": changes,
        "sides": sides,
        "exceeding": exceeding,
        "counts": counts,
        "words": [Text(repr(found)), Text(found.to_text(limit=5))],
        "frame": frame(found.to_dataframe()),
    }


def _series(found: Any) -> dict[str, Any]:
    tracks = [[track.first.key, track.kappas, track.ratio] for track in found]
    return {
        "tracks": tracks,
        "moved": [t.first.key for t in found.moved()],
        "words": Text(found.to_text()),
        "frame": frame(found.to_dataframe()),
    }


def _files(stored: Stored, rankings: Mapping[str, Ranking]) -> Cases:
    folder = stored.new("files")
    for name, ranking in rankings.items():
        for relative in (False, True):
            written = partial(_written, ranking, folder / "ranking.json", relative)
            yield f"{name} as a file, relative {relative}", written
        selection = ranking.select(num_tensors=4).including("norm").excluding("layers.9")
        yield f"selection of {name} as a file", partial(_written, selection, folder / "selection.json", False)
    ranking = kappa_fast.rank(stored.single(), progress=False)
    yield "a ranking of a file, relative", partial(_written, ranking, folder / "ranking.json", True)
    (folder / "condition_numbers.json").write_text('{"a.weight": 3.5, "b.weight": Infinity, "layers.3.c.weight": 2}')
    reference = folder / "condition_numbers.json"
    yield "the reference's file", partial(Ranking.from_json, reference)
    yield "the reference's file, selected", lambda: chosen(Ranking.from_json(reference), num_tensors=1)


def _written(made: Ranking | Selection, path: Path, relative: bool) -> dict[str, Any]:
    """The file as it is, but for what a clock decides, and whether it reads back."""
    made.to_json(path, relative=relative)
    text = path.read_text(encoding="utf-8")
    again = type(made).from_json(path)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(('"seconds"', '"kappa_fast"'))]
    return {
        "lines": len(lines),
        "keys": list(json.loads(text)),
        "file": json.loads(text).get("entries"),
        "same": again == made,
        "again": again,
    }


def _views(stored: Stored, rankings: Mapping[str, Ranking]) -> Cases:
    folder = stored.new("views")
    for name, ranking in rankings.items():
        steady = Ranking(ranking, ranking.skipped, {**ranking.metadata, "seconds": 1.5, "versions": {"torch": "2"}})
        selection = steady.select(max_params=0.3)
        for limit, width in ((None, 100), (3, 72), (0, 200), (40, 10_000)):
            yield f"{name}, table of {limit} rows, {width} wide", partial(_table, steady, limit, width)
        yield f"{name}, words", partial(_words, steady, selection)
        yield f"{name}, frame", partial(_frame, steady)
        yield f"{name}, page", partial(_page, steady, folder, None)
        yield f"{name}, page with a selection", partial(_page, steady, folder, selection)
        yield f"{name}, plot", partial(_picture, folder / "plot.svg", steady.plot)
        marked = partial(steady.plot, selection=selection)
        yield f"{name}, plot with a selection", partial(_picture, folder / "plot.svg", marked)
    whole, after = rankings["model"], moved()
    yield "comparison, page", lambda: _static(folder / "comparison.html", whole.compare(after).to_html)
    yield "comparison, plot", lambda: _picture(folder / "comparison.svg", whole.compare(after).plot)
    yield "series, plot", lambda: _picture(folder / "series.svg", whole.series(after).plot)


def _table(ranking: Ranking, limit: int | None, width: int) -> Text:
    return Text(ranking.to_text(limit=limit, width=width))


def _words(ranking: Ranking, selection: Selection) -> list[Text]:
    """In the interpreter and in a notebook."""
    shown = (repr(ranking), str(ranking), repr(ranking[0]), repr(selection))
    return [Text(words) for words in (*shown, ranking._repr_html_(), selection._repr_html_())]


def _frame(ranking: Ranking) -> dict[str, Any]:
    return frame(ranking.to_dataframe())


def _page(ranking: Ranking, folder: Path, selection: Selection | None) -> dict[str, Any]:
    """Data and words of the page; its hash is one of words, which change it as well."""
    ranking.to_html(folder / "page.html", selection=selection)
    text = (folder / "page.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script[^>]*application/json[^>]*>(.*?)</script>", text, re.DOTALL)
    (data,) = (_with_words(json.loads(html.unescape(script))) for script in scripts)
    return {"data": data, "hash": Text(hashlib.sha256(text.encode()).hexdigest())}


def _with_words(data: dict[str, Any]) -> dict[str, Any]:
    for group in data.get("skipped", ()):
        group["items"] = [[*item[:2], *map(Text, item[2:])] for item in group["items"]]
    return data


def _static(path: Path, write: Callable[[Path], None]) -> Text:
    write(path)
    return Text(path.read_text(encoding="utf-8"))


def _picture(path: Path, draw: Callable[[Path], Any]) -> Text:
    """The hash of a picture, in which words are drawn."""
    draw(path)
    return Text(hashlib.sha256(path.read_bytes()).hexdigest())
