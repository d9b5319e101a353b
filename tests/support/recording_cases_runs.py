"""Cases of a recording: runs that are cached, stopped, killed and resumed, divided among processes, or by Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recording_cases_options import spread
from recording_sources import Cases, Stored, gaussian, model, model_tensors, trained_like
from safetensors.torch import save_file

import kappa_fast
from kappa_fast import Ranking

Options = Mapping[str, Any]
LONGEST = 900  # seconds for a child
SETTLED = 2.5  # seconds after which a file counts as one that nobody writes to any more
BEGIN = "import json, os, signal, sys, torch, kappa_fast\ntorch.set_num_threads(1)\n"
KILLED = """
def stop(now):
    if now.matrices_done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

kappa_fast.rank(sys.argv[1], cache=sys.argv[2], progress=stop, memory_budget=1, **json.loads(sys.argv[4]))
"""
DIVIDED = """
import torch.distributed as distributed
file, number, source, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
distributed.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=2)
for i, options in enumerate(json.loads(sys.argv[5])):
    ranking = kappa_fast.rank(source, process_group=distributed.group.WORLD, progress=False, **options)
    ranking.to_json(f"{out}-{i}-{number}.json")
distributed.destroy_process_group()
"""
TRITON = """
from safetensors.torch import load_file
tensors = load_file(sys.argv[1])
kappa_fast.rank(tensors, backend="triton", progress=False).to_json(sys.argv[2])
kappa_fast.rank(tensors, backend="triton", progress=False, include="small", certify=True).to_json(sys.argv[3])
"""


def cases(stored: Stored) -> Cases:
    yield from _cached(stored)
    yield from _interrupted(stored)
    yield from _killed(stored)
    yield from _divided(stored)
    yield from _by_triton(stored)


def settle(path: Path) -> None:
    """Wait until the cache takes a file for one that has not just been written."""
    time.sleep(max(0.0, path.stat().st_ctime + SETTLED - time.time()))


def _cached(stored: Stored) -> Cases:
    """In this order: what one call leaves decides what the next one does."""
    tensors, file = model_tensors(), stored.single()
    for made in (file, *stored.sharded().iterdir()):
        settle(made)
    changed = {**tensors, "model.layers.0.self_attn.q_proj.weight": trained_like(48, 48, seed=77)}
    steps: dict[str, tuple[Any, dict[str, Any]]] = {
        "cold": (tensors, {}),
        "warm": (tensors, {}),
        "looser": (tensors, {"rtol": 0.3}),
        "tighter": (tensors, {"rtol": 1e-5}),
        "tighter, warm": (tensors, {"rtol": 1e-5}),
        "proven": (tensors, {"certify": True}),
        "proven, warm": (tensors, {"certify": True}),
        "estimated after that": (tensors, {}),
        "top": (tensors, {"top": 3}),
        "top, proven selection": (tensors, {"top": 3, "certify": "selection"}),
        "score": (tensors, {"score": lambda entry: -entry.kappa}),
        "stored": (tensors, {"fused": "stored"}),
        "one changed": (changed, {}),
        "renamed": ({f"other.{name}": tensor for name, tensor in tensors.items()}, {}),
        "a file": (file, {}),
        "the file again": (file, {}),
        "the file, proven": (file, {"certify": True}),
        "a directory": (stored.sharded(), {}),
        "a module": (model(), {}),
        "waves": (tensors, {"memory_budget": 1, "rtol": 1e-3}),
    }
    cache = stored.place.folder / "cache"
    for name, (source, options) in steps.items():
        yield f"cache, {name}", partial(kappa_fast.rank, source, cache=cache, progress=False, **options)
    other = stored.place.folder / "cache of top"
    first: dict[str, dict[str, Any]] = {"cold": {"top": 2}, "warm": {"top": 2}, "more": {"top": 4}, "all": {}}
    for name, options in {**first, "selection": {"top": 2, "certify": "selection"}}.items():
        yield f"cache, top first, {name}", partial(kappa_fast.rank, spread(), cache=other, progress=False, **options)
    yield "cache, the user's", partial(kappa_fast.rank, tensors, cache=True, progress=False, include="q_proj")
    yield "cache, the user's, warm", partial(kappa_fast.rank, tensors, cache=True, progress=False, include="q_proj")
    _damage(cache)
    yield "cache, damaged", partial(kappa_fast.rank, tensors, cache=cache, progress=False)


def _damage(cache: Path) -> None:
    """Cut off every second result."""
    for path in sorted(cache.rglob("*.json"))[::2]:
        path.write_bytes(path.read_bytes()[:-20])


def _interrupted(stored: Stored) -> Cases:
    """Stopped by the function for progress, and gone on with."""
    for count in (0, 1, 7):
        yield f"interrupted after {count}", partial(_stopped, count)
    for options in ({"top": 2}, {"certify": True}, {"top": 3, "certify": "selection", "memory_budget": 1}):
        yield f"interrupted, {options}", partial(_stopped, 3, **options)
    cache = stored.place.folder / "cache of stops"
    yield "interrupted with a cache", partial(_stopped, 5, cache=cache)
    yield "gone on with", partial(kappa_fast.rank, model_tensors(), cache=cache, progress=False)
    yield "a function for progress that fails", partial(kappa_fast.rank, model_tensors(), progress=_fail)


def _fail(_: object) -> None:
    raise RuntimeError("broken")


def _stopped(count: int, **options: Any) -> Ranking:
    def stop(now: Any) -> None:
        if now.matrices_done >= count:
            raise KeyboardInterrupt

    return kappa_fast.rank(model_tensors(), progress=stop, **options)


def environment() -> dict[str, str]:
    """What a child needs to use the package of this process, with one thread."""
    home = str(Path(kappa_fast.__file__).resolve().parents[1])
    return {"PYTHONPATH": home, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def child(code: str, *arguments: object, **more: str) -> subprocess.Popen[str]:
    """Another process that runs the code with the package of this one."""
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + code, *map(str, arguments)]
    known = {**os.environ, **environment(), **more}
    return subprocess.Popen(command, env=known, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(*processes: subprocess.Popen[str], code: int = 0) -> None:
    """Wait for them; where one ends in another way, or never, all are killed.

    Raises:
        RuntimeError: so it is.
    """
    try:
        for process in processes:
            _, said = process.communicate(timeout=LONGEST)
            if process.returncode != code:
                raise RuntimeError(f"a child ended with {process.returncode}: {said[-2000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _killed(stored: Stored) -> Cases:
    """By SIGKILL in the middle; the same call then goes on from there."""
    file = stored.single()
    stops: dict[int, dict[str, Any]] = {20: {}, 2: {"top": 3, "certify": "selection"}}
    for count, options in stops.items():
        cache = stored.place.folder / f"cache of killed {count}"
        yield f"killed after {count}, {options}", partial(_resumed, file, cache, count, options)
        again = partial(kappa_fast.rank, file, cache=cache, progress=False, **options)
        yield f"killed after {count}, {options}, again", again


def _resumed(file: Path, cache: Path, count: int, options: Options) -> Ranking:
    finished(child(KILLED, file, cache, count, json.dumps(dict(options))), code=-9)
    return kappa_fast.rank(file, cache=cache, progress=False, **options)


GROUPED: tuple[dict[str, Any], ...] = (
    {},
    {"certify": True},
    {"top": 3, "certify": "selection"},
    {"top": 1, "top_per_group": True},
)


def _divided(stored: Stored) -> Cases:
    """Two processes of a group, which must agree to the bit, and with the ranking of one."""
    folder = stored.new("divided")
    source = stored.sharded()
    found: list[list[Ranking]] = []

    def ranks() -> list[list[Ranking]]:
        if not found:
            given = (source, folder / "out", json.dumps(GROUPED))
            finished(*(child(DIVIDED, folder / "group", number, *given) for number in range(2)))
            for i in range(len(GROUPED)):
                found.append([Ranking.from_json(folder / f"out-{i}-{n}.json") for n in range(2)])
        return found

    def of(number: int) -> Ranking:
        return ranks()[number][0]

    for i, options in enumerate(GROUPED):
        yield f"two ranks, {options}", partial(of, i)
        yield f"two ranks, {options}, the same", partial(_agreeing, ranks, i, source, options)


def _agreeing(ranks: Callable[[], list[list[Ranking]]], number: int, source: Path, options: Options) -> list[bool]:
    rankings, alone = ranks()[number], kappa_fast.rank(source, progress=False, **options)
    return [rankings[0] == rankings[1], repr(list(rankings[0])) == repr(list(alone))]


def _by_triton(stored: Stored) -> Cases:
    """Under Triton's interpreter, on the smallest matrices that its kernels work on."""
    if sys.platform != "linux":
        return
    folder = stored.new("triton")
    file, outs = folder / "model.safetensors", [folder / f"{i}.json" for i in range(2)]
    climbing = {"climbs": gaussian(513, 32).bfloat16(), "climbs too": gaussian(514, 32)}
    save_file({**climbing, "small": gaussian(40, 24), "zero": torch.zeros(20, 20)}, file)

    def rankings() -> list[Ranking]:
        finished(child(TRITON, file, *outs, TRITON_INTERPRET="1"))
        return list(map(Ranking.from_json, outs))

    yield "triton", rankings
