"""kappa-fast rank as torchrun starts it: all ranks work, the first one prints and writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kappa_fast.cli import app
from kappa_fast.cli.launched import by_torchrun

distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


def save(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    file = folder / "model.safetensors"
    save_file({f"layers.{i}.weight": torch.randn(64 + i, 40, generator=generator) for i in range(8)}, file)
    return file


def torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    return subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=200, env=dict(os.environ)
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1", "RANK": "0"}, False),
        ({"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "head"}, False),  # a job of a cluster, one process in it
        ({}, False),
    ],
)
def test_ranks_work_together_where_torchrun_says_so(environment, expected):
    assert by_torchrun(environment) is expected


@pytest.mark.parametrize(
    ("seconds", "message"),
    [("5", "--timeout needs the ranks that torchrun starts"), ("0.1", "--timeout 0.1: give the seconds")],
)
def test_a_timeout_that_cannot_work_is_refused(tmp_path, capsys, seconds, message):
    with pytest.raises(SystemExit) as stop:
        app(["rank", str(save(tmp_path)), "--timeout", seconds], prog_name="kappa-fast")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_prints_one_ranking_which_is_that_of_one_process(tmp_path):
    file = save(tmp_path)
    done = torchrun(tmp_path, "-m", "kappa_fast", "rank", file, "--json", "together.json", "--timeout", 60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 ranked") == done.stdout.count("written to together.json") == 1
    assert re.search(r"^2 ranks, [0-9.]+ to [0-9.]+ s of work, waiting [0-9.]+ s at most$", done.stdout, re.MULTILINE)
    alone = subprocess.run(
        [sys.executable, "-m", "kappa_fast", "rank", file, "--no-cache", "--json", "alone.json"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=200,
    )  # fmt: skip
    assert alone.returncode == 0
    both = [json.loads((tmp_path / name).read_text()) for name in ("together.json", "alone.json")]
    assert both[0]["entries"] == both[1]["entries"]
    assert len(both[0]["metadata"]["ranks"]) == 2


@pytest.mark.slow
def test_torchrun_tells_an_error_once(tmp_path):
    done = torchrun(tmp_path, "-m", "kappa_fast", "rank", save(tmp_path), "--include", "nothing(", "--no-cache")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1, done.stderr
    assert not done.stdout.strip()


RESTARTED = """
import os, signal, sys
from kappa_fast.cache import memos
from kappa_fast.cli import app
from kappa_fast.distributed.exchange import Exchange

memos.RACY_NS = -(10**10)  # trust times of new files
add, done = Exchange.add, []

def dying(self, matrix, result):
    add(self, matrix, result)
    done.append(matrix)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "%d" and len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

Exchange.add = dying
app(sys.argv[1:], prog_name="kappa-fast")
"""


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("rendezvous", [(), ("--standalone",)], ids=["static", "c10d"])
def test_torchrun_starts_ranks_again_and_the_ranking_is_whole(tmp_path, dies, rendezvous):
    file, script = save(tmp_path), tmp_path / "restarted.py"
    script.write_text(RESTARTED % dies)
    options = ("--json", "together.json", "--cache-dir", tmp_path / "cache", "--timeout", 60)
    done = torchrun(tmp_path, "--max-restarts", 1, *rendezvous, script, "rank", file, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "together.json").read_text())
    cached = found["metadata"]["cache"]
    assert cached["hits"] + cached["computed"] == 8
    alone = subprocess.run(
        [sys.executable, "-m", "kappa_fast", "rank", file, "--no-cache", "--json", "alone.json"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=200,
    )  # fmt: skip
    assert alone.returncode == 0
    assert found["entries"] == json.loads((tmp_path / "alone.json").read_text())["entries"]
