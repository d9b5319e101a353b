"""What all tests share: no network, a fixed number of threads, fixed seeds, and a way to run a fresh interpreter."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

# Read when torch loads its OpenMP: threads that wait must not keep a busy machine from the ones that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read once by huggingface_hub, and handed on to child processes: no test may wait for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when Triton is imported: kernels run on the CPU. Child processes that compile for a GPU take it out again.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from hub_server import Hub

# Helpers that assert: a failure shows the values.
pytest.register_assert_rewrite("bitsandbytes_codes", "sharding", "undisturbed", "wrapping")

RunPython = Callable[..., str]

# HYPOTHESIS_PROFILE=explore looks for new counterexamples; the default tries the same examples on every machine.
settings.register_profile("repeatable", max_examples=50, derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Triton is for Linux. There it is a dependency, and an import that fails must show.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_kernels_*.py", "test_triton_backend.py"]

# The same number everywhere, because results are promised to repeat only for the same number of threads.
torch.set_num_threads(2)


# Whoever starts the tests in the background of a shell has them ignore Ctrl-C, which some of them send and wait for.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _autograd() -> Iterator[None]:
    # Whoever leaves it off makes later tests fail, in whatever file comes next.
    yield
    left = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left, "autograd was left off"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # The command line uses the user's cache: every test and its children get an empty one, made when it is written to.
    monkeypatch.setenv("KAPPA_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "caches" / uuid.uuid4().hex))


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """Run code in a fresh interpreter: ``run_python(code, cwd=..., python=..., env=...)`` returns what it printed."""

    def run(code: str, *, cwd: Path, python: Path | str = sys.executable, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            [str(python), "-c", code],
            cwd=cwd,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"exit {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; the network is off, as said above."""
    from huggingface_hub import constants

    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that can be reached."""
    from hub_server import serving
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
