"""Files with something wrong in them, from a seed; what may come of one is an error of kappa_fast or a right number."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from truths import header_of, not_of, truth_of

import kappa_fast
from kappa_fast.cache import memos
from kappa_fast.errors import KappaError

LONGEST = 10.0  # seconds of the processor that a mutant may take
SIDE = 20
NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, 1e308, -0.0, 1e-320]
TEXTS = ["", "x", "nan", "inf", "-inf", "\0", "\ud800", "../x", "/etc/passwd", "a\nb", "\x1b[2J", "re:(a+)+$"]
JUNK: list[Any] = [
    *(None, True, False, *NUMBERS, *TEXTS, "a" * 5000, "9" * 5000),
    *([], {}, [[]], [1], [0, 0], ["x"], {"a": 1}, [None], [[1, 2], [3, 4]], {"": {}}),
]


# ---- mutations


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three accidents with bytes."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(found) + 1) if rng.random() < 0.5 else rng.randrange(min(len(found), 200) + 1)
        size = rng.choice([1, 1, 2, 4, 8, 64])
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + size] = bytes([rng.choice([0, 255, 127, 128])]) * size
        elif kind == 2:
            del found[at:]
        elif kind == 3:
            found[at:at] = rng.randbytes(size)
        elif kind == 4:
            del found[at : at + size]
        else:
            found[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(data)]))
    return bytes(found)


def of_json(value: Any, rng: random.Random) -> Any:
    """One to three accidents with plain JSON: a value, a key, or what is around them."""
    for _ in range(rng.randint(1, 3)):
        value = _once(value, rng)
    return value


def _once(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.08:
        return rng.choice([rng.choice(JUNK), [value], {"a": value}, _deep(rng)])
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(sorted(copy, key=str)) if isinstance(copy, dict) else rng.randrange(len(copy))
    kind = rng.randrange(8)
    if kind == 0:
        del copy[key]
    elif kind == 1:
        copy[key] = rng.choice(JUNK)
    elif kind == 2 and isinstance(copy, dict):
        copy[str(rng.choice(JUNK))] = copy.pop(key)
    elif kind == 3 and isinstance(copy, list):
        copy.insert(key, copy[key])
    elif kind == 4 and isinstance(copy[key], (int, float)) and not isinstance(copy[key], bool):
        copy[key] = copy[key] + rng.choice([1, -1, 1000]) if rng.random() < 0.5 else -copy[key]
    else:
        copy[key] = _once(copy[key], rng)
    return copy


def _deep(rng: random.Random) -> Any:
    value: Any = 1
    for _ in range(rng.choice([5, 100, 800])):
        value = [value]
    return value


def as_text(value: Any) -> bytes:
    """JSON, also of what no strict writer would write."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


# ---- files to begin with


def normal(rng: random.Random, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))


def weights(rng: random.Random, *names: str) -> dict[str, torch.Tensor]:
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
    return {name: normal(rng, SIDE + rng.randrange(6), SIDE).to(rng.choice(dtypes)) for name in names}


def with_header(path: Path, header: Any, values: bytes) -> None:
    text = as_text(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def safetensors(folder: Path, rng: random.Random) -> Path:
    path = folder / "model.safetensors"
    save_file(weights(rng, "l.0.q.weight", "l.1.q.weight"), path)
    if rng.random() < 0.5:
        header, values = header_of(path)
        with_header(path, of_json(header, rng), values)
    else:
        path.write_bytes(of_bytes(path.read_bytes(), rng))
    return folder


def index(folder: Path, rng: random.Random) -> Path:
    tensors = weights(rng, "l.0.q.weight", "l.1.q.weight", "l.2.q.weight")
    shards = {"a.safetensors": ["l.0.q.weight", "l.1.q.weight"], "b.safetensors": ["l.2.q.weight"]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
    document = {"metadata": {"total_size": 1}, "weight_map": {n: s for s, names in shards.items() for n in names}}
    text = as_text(of_json(document, rng)) if rng.random() < 0.7 else of_bytes(as_text(document), rng)
    (folder / "model.safetensors.index.json").write_bytes(text)
    return folder


MIXTRAL = dict(
    model_type="mixtral",
    architectures=["MixtralForCausalLM"],
    hidden_size=SIDE,
    intermediate_size=SIDE,
    num_hidden_layers=1,
    num_local_experts=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=32,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    layer_types=["full_attention"],
)


def config(folder: Path, rng: random.Random) -> Path:
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    save_file({expert: normal(rng, SIDE, SIDE), **weights(rng, "l.0.q.weight")}, folder / "model.safetensors")
    text = as_text(of_json(MIXTRAL, rng)) if rng.random() < 0.8 else of_bytes(as_text(MIXTRAL), rng)
    (folder / "config.json").write_bytes(text)
    return folder


def fp8(folder: Path, rng: random.Random) -> Path:
    """Codes with scales for blocks of 16, beside a config that says so."""
    path = folder / "model.safetensors"
    codes, scales = normal(rng, 32, 48).to(torch.float8_e4m3fn), normal(rng, 2, 3).abs() + 0.5
    save_file({"l.0.q.weight": codes, "l.0.q.weight_scale_inv": scales}, path)
    document: Any = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16], "ignore": ["lm_head"]}
    }
    kind = rng.randrange(4)
    if kind == 0:
        document = of_json(document, rng)
    elif kind == 1:
        header, values = header_of(path)
        with_header(path, of_json(header, rng), values)
    else:
        path.write_bytes(of_bytes(path.read_bytes(), rng))
    (folder / "config.json").write_bytes(as_text(document))
    return folder


def companions(folder: Path, rng: random.Random) -> Path:
    """Codes of many formats with what lies beside them, some of it lost, of another dtype or shape, or misnamed."""
    from damaged_codes import DTYPES, SETS

    tensors, said = rng.choice(SETS)
    tensors, settings = dict(tensors), dict(said)
    for name in rng.sample(sorted(tensors), min(len(tensors), rng.randrange(3))):
        tensor = tensors.pop(name)
        kind = rng.randrange(5)
        if kind == 0:
            tensors[name] = tensor.float().to(rng.choice(DTYPES))
        elif kind == 1:
            tensors[name] = torch.ones([rng.choice([0, 1, 2, 16, 64]) for _ in range(rng.randrange(4))]).to(
                tensor.dtype
            )
        elif kind == 2:
            tensors[name + rng.choice(["_2", ".x", "\n"])] = tensor
        elif kind == 3:
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).clone()
            raw[: 1 + rng.randrange(8)] = rng.choice([0, 255, 127, 128])
            tensors[name] = raw.view(tensor.dtype).reshape(tensor.shape)
    tensors["l.0.q.weight"] = normal(rng, SIDE, SIDE)
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    if rng.random() < 0.3:
        header, values = header_of(path)
        with_header(path, of_json(header, rng), values)
    document: Any = {"quantization_config": settings} if settings else {}
    (folder / "config.json").write_bytes(as_text(of_json(document, rng) if rng.random() < 0.5 else document))
    return folder


def gguf(folder: Path, rng: random.Random) -> Path:
    import gguf as library
    from gguf_files import write

    kind = library.GGMLQuantizationType.Q8_0
    plain = np.random.default_rng(rng.randrange(1 << 30)).standard_normal((SIDE, 32), dtype=np.float32)
    path = write(
        folder / "m.gguf", {"blk.0.attn_q.weight": plain, "blk.1.attn_q.weight": (library.quantize(plain, kind), kind)}
    )
    path.write_bytes(of_bytes(path.read_bytes(), rng))
    return path


# ---- what may come of it


@dataclass
class Outcome:
    """What came of a mutant: ``wrong`` says what must not be."""

    kind: str
    wrong: str | None
    ranked: int
    seconds: float


def outcome(kind: str, seed: int, folder: Path) -> Outcome:
    """Make the mutant in an empty folder, rank or read it, and check what comes of it."""
    rng = random.Random(f"{kind} {seed}")
    started, wrong, ranked = time.process_time(), None, 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong, ranked = CHECKS[kind](folder, rng)
    except KappaError as error:
        if not str(error).isprintable():
            wrong = f"an error that a terminal would obey: {error!r}"
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - started
    if wrong is None and seconds > LONGEST:
        wrong = f"it took {seconds:.1f} s"
    return Outcome(kind, wrong, ranked, seconds)


def _checked(maker: Callable[[Path, random.Random], Path]) -> Callable[[Path, random.Random], tuple[str | None, int]]:
    def check(folder: Path, rng: random.Random) -> tuple[str | None, int]:
        source = maker(folder, rng)
        ranking = kappa_fast.rank(source, progress=False, min_dim=1, embeddings=True, routers=True)
        for entry in ranking:
            values = truth_of(source, entry)
            if values is not None and (wrong := not_of(entry, values)):
                return wrong, len(ranking)
        return None, len(ranking)

    return check


def ranking(folder: Path, rng: random.Random) -> tuple[str | None, int]:
    path = folder / "r.json"
    _example().to_json(path)
    _mutate_document(path, rng)
    found = kappa_fast.Ranking.from_json(path)
    text = found.to_text(width=80)
    if not all(line.isprintable() for line in text.splitlines()):
        return "a table that a terminal would obey", len(found)
    if any(e.status == "ok" and not 1 <= e.lower <= e.kappa <= e.upper for e in found):
        return "an interval that is none", len(found)
    found.to_json(path)
    if kappa_fast.Ranking.from_json(path) != found:
        return "another ranking after a round trip", len(found)
    selection = found.select(top_p=0.5)
    for kind in ("axolotl", "ms-swift", "names", "regex", "spectrum"):
        with contextlib.suppress(KappaError):
            selection.export(kind)
    return None, len(found)


def selection(folder: Path, rng: random.Random) -> tuple[str | None, int]:
    path = folder / "s.json"
    _example().select(num_tensors=2).including("norm").excluding(r"l\.9").to_json(path)
    _mutate_document(path, rng)
    found = kappa_fast.Selection.from_json(path)
    if not repr(found).isprintable():
        return "a selection that a terminal would obey", len(found)
    found.to_json(path)
    if kappa_fast.Selection.from_json(path) != found:
        return "another selection after a round trip", len(found)
    model = torch.nn.ModuleDict({"l": torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(20, 20)})])})
    with contextlib.suppress(KappaError):
        found.apply(model).restore()
    return None, len(found)


def _mutate_document(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.75:
        path.write_bytes(as_text(of_json(json.loads(path.read_text()), rng)))
    else:
        path.write_bytes(of_bytes(path.read_bytes(), rng))


def _example() -> kappa_fast.Ranking:
    generator = torch.Generator().manual_seed(0)
    source = {f"l.{i}.q.weight": torch.randn(20, 20, generator=generator) for i in range(3)}
    return kappa_fast.rank(source, progress=False)


def cache(folder: Path, rng: random.Random) -> tuple[str | None, int]:
    """A cache with one file in it changed; what comes out must be what was computed without."""
    save_file(weights(random.Random(7), "l.0.q.weight", "l.1.q.weight"), folder / "model.safetensors")
    source, store, racy = folder / "model.safetensors", folder / "cache", memos.RACY_NS
    memos.RACY_NS = -(10**12)
    try:
        expected = list(kappa_fast.rank(source, progress=False, cache=store))
        paths = sorted(path for path in store.rglob("*.json"))
        path = rng.choice(paths)
        body = json.loads(path.read_text())["body"]
        if rng.random() < 0.5:
            path.write_bytes(of_bytes(path.read_bytes(), rng))
            trusted = False
        else:
            from kappa_fast.cache import files

            path.write_bytes(files.seal(json.loads(json.dumps(of_json(body, rng)))))
            trusted = True  # a good checksum: numbers that may be right are taken for right
        found = list(kappa_fast.rank(source, progress=False, cache=store))
    finally:
        memos.RACY_NS = racy
    same = found == expected if not trusted else [e.key for e in found] == [e.key for e in expected] or len(found) == 2
    return (None if same else "other results than without the cache"), len(found)


CHECKS: Mapping[str, Callable[[Path, random.Random], tuple[str | None, int]]] = {
    "safetensors": _checked(safetensors),
    "index": _checked(index),
    "config": _checked(config),
    "fp8": _checked(fp8),
    "companions": _checked(companions),
    "gguf": _checked(gguf),
    "ranking": ranking,
    "selection": selection,
    "cache": cache,
}
